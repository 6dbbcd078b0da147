"""Our denoiser against numbers computed with the public EDM code (tests/golden/README.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from elign_lab.checkpoints import from_edm_state
from elign_lab.denoiser import Denoiser, DenoiserConfig, NoiseSchedule

GOLDEN = Path(__file__).parents[1] / "golden"
VARIANTS = {
    "sin_embedding": {"sin_embedding": True},
    "inv_sublayers2": {"sublayers": 2},
    "mean_aggregation": {"aggregation": "mean"},
    "norm_factor_100": {"normalization_factor": 100.0},
    "no_attention_no_tanh": {"attention": False, "tanh": False},
    "norm_constant0": {"norm_constant": 0.0},
    "gnn_dynamics": {"network": "gnn"},
    "conditional_no_charges": {"include_charges": False, "context": 1, "scale": (1.0, 8.0, 1.0)},
}


def load(name: str, **config) -> tuple[dict[str, np.ndarray], Denoiser]:
    data = dict(np.load(GOLDEN / name))
    state = {k[3:]: torch.from_numpy(v) for k, v in data.items() if k.startswith("sd/")}
    sizes = tuple((int(n), round(float(p) * 100_000)) for n, p in zip(data["nodes/n"], data["nodes/prob"], strict=True))
    return data, from_edm_state(
        state, DenoiserConfig(features=32, layers=3, size_histogram=tuple(sorted(sizes)), **config)
    )


@pytest.fixture(scope="module")
def random_model() -> tuple[dict[str, torch.Tensor], Denoiser]:
    data, model = load("edm_small_random.npz")
    return {k: torch.from_numpy(v) for k, v in data.items() if v.dtype.kind in "fiub"}, model


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Largest deviation relative to the largest entry of the golden array; NaN in the golden array is skipped."""
    want = torch.as_tensor(want).double()
    keep = torch.isfinite(want)
    assert keep.any()
    got = got.double().broadcast_to(want.shape)
    assert float((got - want)[keep].abs().max()) <= tolerance * float(want[keep].abs().max())


def test_schedule(random_model):
    data, model = random_model
    computed = NoiseSchedule("polynomial_2", 1000, 1e-5)
    assert_close(computed.gamma, data["sched/gamma_table"], 1e-6)
    t = torch.arange(1001)
    for schedule in (computed, model.schedule):
        alpha, sigma = schedule.alpha_sigma(t)
        assert_close(alpha, data["sched/alpha"], 1e-6)
        assert_close(sigma, data["sched/sigma"], 1e-6)
        assert_close(alpha.square(), data["sched/alphas2_f64"], 1e-6)
        step = schedule.transition(t[1:], t[:-1])
        assert_close(step.sigma2_ts, data["sched/sigma2_t_given_s"])
        assert_close(step.sigma2_ts.sqrt(), data["sched/sigma_t_given_s"])
        assert_close(step.alpha_ts, data["sched/alpha_t_given_s"])
        assert_close(step.sigma, data["sched/post_sigma"])
        assert_close(step.eps_coefficient, data["sched/post_eps_coef"])
        assert_close(step.ratio_scale.square(), data["sched/vlb_weight"])


def all_eps(data, model, key="net/z_t", dtype=torch.float32):
    mask = data["in/node_mask"][..., 0] > 0
    model = model.to(dtype)
    with torch.no_grad():
        out = [model.eps(z.to(dtype), t.long(), mask) for z, t in zip(data[key], data["in/t_int"], strict=True)]
    model.float()
    return torch.stack(out)


def test_noise_prediction(random_model):
    data, model = random_model
    assert_close(all_eps(data, model), data["net/eps_hat"])
    # the golden float64 output stores more digits than float32 noise leaves
    assert_close(all_eps(data, model, dtype=torch.float64), data["net/eps_hat_f64"], 1e-7)


def test_encoding_forward_clean_and_posterior(random_model):
    data, model = random_model
    mask = data["in/node_mask"][..., 0] > 0
    z = data["in/xh_normalized"]
    for k, t in enumerate(data["in/t_int"].long()):
        z_t, eps = data["net/z_t"][k], data["net/eps_hat"][k]
        assert_close(model.diffuse(z, t, data["in/eps"]), z_t)
        assert_close(model.clean(z_t, t, eps), data["net/xh_pred"][k])
        if (t == 0).any():
            assert torch.isnan(data["post/mu"][k]).all()
            continue
        step = model.schedule.transition(t.view(-1, 1, 1), t.view(-1, 1, 1) - 1)
        mean = model.posterior_mean(z_t.double(), eps.double(), step)
        assert_close(mean, data["post/mu"][k])
        assert_close(step.sigma, data["post/sigma"][k])
        z_s = mean + step.sigma * data["in/eps_s"]
        assert_close(z_s * mask.unsqueeze(-1), data["post/z_s"][k])


def test_encode_and_decode(random_model):
    from elign_lab.molecules import MoleculeBatch

    data, model = random_model
    mask = data["in/node_mask"][..., 0] > 0
    batch = MoleculeBatch(data["in/h_integer"][..., 0].long(), data["in/x"], mask)
    z = model.encode(batch)
    assert_close(z, data["in/xh_normalized"])
    z_0, eps = data["net/z_t"][0], data["net/eps_hat"][0]
    mean = model.clean(z_0, 0, eps)
    assert_close(mean, data["final/mu_xh"])
    sigma = float(torch.exp(0.5 * model.schedule.gamma[0]))
    assert_close(torch.tensor(sigma), data["final/sigma_x"])
    out = model.decode(z_0, mean + sigma * data["in/eps_final"], mask)
    assert_close(out.positions, data["final/x"])
    one_hot = out.numbers.unsqueeze(-1) == torch.tensor([1, 6, 7, 8, 9])
    assert torch.equal(one_hot, data["final/h_categorical"] > 0)


def test_training_loss(random_model):
    data, model = random_model
    mask = data["in/node_mask"][..., 0] > 0
    for k, t in enumerate(data["in/t_int"].long()):
        with torch.no_grad():
            terms = model.training_loss(data["in/xh_normalized"], mask, t, data["in/eps"])
        assert_close(terms.loss, data["train_l2/loss"][k])
        assert_close(terms.error, data["train_l2/error"][k])
        assert_close(terms.term_0, data["train_l2/loss_term_0"][k])
        # a difference of terms as large as 3 (N - 1) / 2 = 42: the golden float32 value holds 2e-6 of rounding
        torch.testing.assert_close(terms.kl_prior, data["train_l2/kl_prior"][k], atol=4e-6, rtol=0)


def test_nll(random_model):
    data, model = random_model
    mask = data["in/node_mask"][..., 0] > 0
    for k, t in enumerate(data["in/t_int"].long()):
        if (t == 0).any():
            continue
        with torch.no_grad():
            terms = model.nll(data["in/xh_normalized"], mask, t, data["in/eps"], data["in/eps_0"])
        for name in ("loss", "error", "neg_log_constants"):
            assert_close(getattr(terms, name), data[f"test_nll/{name}"][k])
        assert_close(terms.term_0, data["test_nll/loss_term_0"][k])
    assert_close(model.log_prob_size(mask.sum(1)), data["test_nll/log_pN"], 1e-6)
    log_p = [
        model.log_likelihood_types(data["in/xh_normalized"], z_t, t, mask)
        for z_t, t in zip(data["net/z_t"], data["in/t_int"].long(), strict=True)
    ]
    assert_close(torch.stack(log_p), data["l0/log_p_h_given_z"])


def test_gradients(random_model):
    data, model = random_model
    mask = data["in/node_mask"][..., 0] > 0
    model.zero_grad()
    terms = model.training_loss(data["in/xh_normalized"], mask, data["in/t_int"][-1].long(), data["in/eps"])
    loss = (terms.loss - model.log_prob_size(mask.sum(1)).float()).mean()
    loss.backward()
    assert_close(loss.detach(), data["grad/loss"])
    total = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
    assert_close(total, data["grad/total_norm"])
    want = {k[5:]: v for k, v in data.items() if k.startswith("grad/dynamics")}
    reference = from_edm_state(want, model.config)
    names = 0
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert p.grad is not None, name
        assert_close(p.grad, q.detach(), 2e-5)
        names += 1
    assert names == len(want)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name):
    data = dict(np.load(GOLDEN / "edm_variants_random.npz"))
    prefix = f"{name}/sd/"
    state = {k[len(prefix) :]: torch.from_numpy(v) for k, v in data.items() if k.startswith(prefix)}
    model = from_edm_state(state, DenoiserConfig(features=16, layers=2, **VARIANTS[name]))
    mask = torch.from_numpy(data["in/node_mask"][..., 0] > 0)
    z = torch.from_numpy(data["in/z9"])[..., : 3 + model.config.channels]
    t = torch.from_numpy(data["in/t"][:, 0] * 1000).round().long()
    context = torch.from_numpy(data["in/context"]) if model.config.context else None
    with torch.no_grad():
        assert_close(model.eps(z, t, mask, context=context), torch.from_numpy(data[f"{name}/eps_hat"]))
