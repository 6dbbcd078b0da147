"""Samplers: the golden 1000-step chain, seeds, network calls, interruption."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

import elign_lab.sampling as sampling
from elign_lab.checkpoints import from_edm_state, load_model
from elign_lab.denoiser import Denoiser, DenoiserConfig
from elign_lab.sampling import (
    StepRecord,
    Trajectory,
    ancestral,
    decode_record,
    draw_sizes,
    get_sampler,
    mask_of_sizes,
    noise_stream,
    sample,
)

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def trained() -> tuple[dict[str, np.ndarray], Denoiser]:
    data = dict(np.load(GOLDEN / "edm_small_trained.npz"))
    state = {k[3:]: torch.from_numpy(v) for k, v in data.items() if k.startswith("sd/")}
    config = DenoiserConfig(features=32, layers=3, size_histogram=((5, 2), (9, 1)))
    return data, from_edm_state(state, config)


def test_golden_chain_of_1000_steps(trained):
    """Same network, same noise: the states of the public code after each recorded step, and its molecules."""
    data, model = trained
    mask = torch.from_numpy(data["chain/node_mask"][..., 0] > 0)
    noise = iter(torch.from_numpy(data["chain/noise"]))
    wanted = {int(s): z for s, z in zip(data["chain/s_int"], torch.from_numpy(data["chain/z_s"]), strict=True)}
    seen = 0
    for record in ancestral(model, mask, noise=noise):
        if record.s in wanted:
            z = wanted[record.s]
            # float32 against float32 of the public code, which is itself 4e-5 from its float64 run over the chain
            assert float((record.z_s - z).abs().max()) < 1e-4 * max(1.0, float(z.abs().max()))
            seen += 1
    assert seen == len(wanted)
    assert record.evaluations == 1001
    molecules = decode_record(model, record)
    assert float((molecules.positions - torch.from_numpy(data["chain/x"])).abs().max()) < 1e-4
    one_hot = molecules.numbers.unsqueeze(-1) == torch.tensor(model.config.elements)
    assert torch.equal(one_hot, torch.from_numpy(data["chain/h_categorical"] > 0))


def test_records_obey_the_kernel(trained):
    _, model = trained
    _, trained = trained
    mask = mask_of_sizes([5, 9])
    records = list(ancestral(model, mask, steps=10, generator=torch.Generator().manual_seed(0)))
    assert [r.t for r in records] == [*model.schedule.grid(10)[:-1], 0]
    assert [r.evaluations for r in records] == list(range(1, 12))
    for r in records:
        torch.testing.assert_close(r.z_s, r.mean + r.sigma * r.noise, atol=2e-6, rtol=1e-5)
        assert float((r.z_s[..., :3].sum(1)).abs().max()) < 1e-3
        assert float(r.z_s[~mask].abs().max()) == 0
    trajectory = Trajectory(model, records)
    assert len(trajectory.frames()) == len(trajectory.frames("z")) == 11
    weights = trajectory.type_weights()
    assert weights.shape == (11, 2, 9, 5)
    assert torch.equal(trajectory.final().numbers, decode_record(model, records[-1]).numbers)
    with pytest.raises(ValueError, match="decoding step"):
        decode_record(model, records[0])


def test_seeds(trained):
    _, model = trained
    a, b, c = (sample(model, 6, steps=5, seed=seed, batch_size=4) for seed in (1, 1, 2))
    assert torch.equal(a.positions, b.positions)
    assert torch.equal(a.numbers, b.numbers)
    assert not torch.equal(a.sizes, c.sizes) or not torch.equal(a.positions, c.positions)


def test_temperature_scales_the_noise_of_the_steps_and_not_the_start(trained):
    _, trained = trained
    mask = mask_of_sizes([5, 9])
    one, half = (noise_stream(trained, mask, torch.Generator().manual_seed(3), t) for t in (1.0, 0.5))
    torch.testing.assert_close(next(one), next(half), rtol=0, atol=0)
    for _ in range(3):
        torch.testing.assert_close(0.5 * next(one), next(half), rtol=0, atol=0)
    cold, usual = (sample(trained, 2, sizes=[5, 9], steps=5, temperature=t) for t in (0.0, 1.0))
    assert not torch.equal(cold.positions, usual.positions)
    assert torch.equal(usual.positions, sample(trained, 2, sizes=[5, 9], steps=5).positions)
    with pytest.raises(ValueError, match="temperature is -1"):
        sample(trained, 1, steps=2, temperature=-1)
    with pytest.raises(ValueError, match="dpm_solver has no noise"):
        sample(trained, 1, steps=2, temperature=0.5, sampler="dpm_solver")


def test_results_come_in_the_order_of_the_sizes(trained):
    _, model = trained
    sizes = [9, 5, 7, 3, 9, 5]
    out = sample(model, 6, sizes=sizes, steps=3, batch_size=2)
    assert out.sizes.tolist() == sizes


def test_interruption_keeps_what_is_finished(trained, monkeypatch):
    _, model = trained
    calls = 0

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        yield from ancestral(*args, **kwargs)

    monkeypatch.setitem(sampling.SAMPLERS, "ancestral", interrupted)
    with pytest.warns(UserWarning, match="returning 4 of 6"):
        out = sample(model, 6, sizes=[5] * 6, steps=3, batch_size=2)
    assert len(out) == 4
    calls = 2
    with pytest.raises(KeyboardInterrupt):
        sample(model, 6, sizes=[5] * 6, steps=3, batch_size=2)


def test_bad_requests(trained):
    _, model = trained
    for options, message in (
        ({"n": 0}, "at least 1"),
        ({"n": 2, "batch_size": 0}, "at least 1"),
        ({"n": 2, "sizes": [5]}, r"expected \(2,\)"),
        ({"n": 2, "sizes": [5, 0]}, r"sizes\[1\] = 0"),
        ({"n": 2, "sizes": [5, 30]}, "over the model's limit of 9"),
        ({"n": 2, "steps": 0}, "steps must be"),
        ({"n": 2, "sampler": "euler"}, "expected one of ancestral, dpm_solver"),
    ):
        n = options.pop("n")
        with pytest.raises(ValueError, match=message):
            sample(model, n, **options)
    plain = Denoiser(DenoiserConfig(features=8, layers=1))
    with pytest.raises(ValueError, match="no size histogram"):
        sample(plain, 2)
    with pytest.raises(ValueError, match="ends at t = 0"):
        list(ancestral(plain, mask_of_sizes([3]), grid=[10, 5]))
    for sampler in ("ancestral", "dpm_solver"):
        with pytest.raises(ValueError, match="0 <= s < t"):
            list(get_sampler(sampler)(plain, mask_of_sizes([3]), grid=[5, 10, 0]))


def test_spacing_reaches_every_sampler(trained):
    _, model = trained
    sizes = [5, 5, 5]
    for sampler in ("ancestral", "dpm_solver"):
        found = sample(model, 3, sizes=sizes, steps=12, spacing=2.0, seed=4, sampler=sampler)
        mask, generator = mask_of_sizes(sizes), torch.Generator().manual_seed(4)
        grid = model.schedule.grid(12, 2.0)
        *_, last = get_sampler(sampler)(model, mask, grid=grid, noise=noise_stream(model, mask, generator))
        torch.testing.assert_close(found.positions, decode_record(model, last).positions)


def test_record_type(trained):
    _, model = trained
    record = next(ancestral(model, mask_of_sizes([3]), steps=2))
    assert isinstance(record, StepRecord)
    assert (record.t, record.s) == tuple(model.schedule.grid(2)[:2])


class GaussianModel(Denoiser):
    """Denoiser whose data are Gaussian with variance `v` in every direction: its eps is known exactly."""

    v = 0.3

    def eps(self, z, t, mask, *, context=None, layout=None):
        alpha, sigma = (x.view(-1, 1, 1).to(z.dtype) for x in self.schedule.alpha_sigma(t))
        return sigma / (alpha**2 * self.v + sigma**2) * z


@pytest.mark.parametrize("first", [True, False])
def test_dpm_solver_order(first, monkeypatch):
    """On Gaussian data the ODE has the solution z_s = z_t sqrt(var_s / var_t); the error falls with the second power.

    Without the multistep term (first) it falls with the first power, so that the test can tell.
    """
    module = importlib.import_module("elign_lab.sampling.dpm_solver")  # the package attribute is the function
    if first:
        monkeypatch.setattr(module, "_extrapolate", lambda clean, *_: clean)
    model = GaussianModel(DenoiserConfig(features=4, layers=1)).double()
    mask = mask_of_sizes([4])
    z = model.noise(mask, torch.Generator().manual_seed(0))
    top, bottom = 900, 300

    def variance(t):
        alpha, sigma = model.schedule.alpha_sigma(t)
        return alpha**2 * model.v + sigma**2

    exact = z * (variance(bottom) / variance(top)) ** 0.5
    errors = []
    for step in (50, 25):
        grid = list(range(top, bottom - 1, -step))
        last = list(module.dpm_solver(model, mask, grid=grid, z=z, decode=False))[-1]
        errors.append(float((last.z_s - exact).norm()))
    order = np.log2(errors[0] / errors[1])
    assert abs(order - (1 if first else 2)) < 0.3, order


def test_dpm_solver_samples(trained):
    _, model = trained
    one, two = (sample(model, 2, sizes=[5, 9], steps=20, seed=s, sampler="dpm_solver") for s in (0, 0))
    assert torch.equal(one.positions, two.positions)
    assert torch.isfinite(one.positions).all()


def test_small_molecules_stay_together_on_coarse_grids():
    """From T itself the first of 20 steps multiplies errors by 30: nearly all molecules of 5 atoms flew apart."""
    molecules = sample(load_model("edm-mini"), 32, sizes=[5] * 32, steps=20, seed=0)
    radius = molecules.positions.norm(dim=-1).amax(1)
    assert (radius < 4.0).float().mean() > 0.9  # Angstrom; nan is not


def test_sizes_do_not_depend_on_the_noise_of_the_same_seed():
    """Correlation over seeds of the size with the first noise numbers; 0.16 when both come from one stream."""
    model = load_model("edm-mini")
    sizes = torch.tensor([int(draw_sizes(model, 1, seed)) for seed in range(2000)])
    noise = torch.stack([torch.randn(8, generator=torch.Generator().manual_seed(seed)) for seed in range(2000)])
    table = torch.cat([sizes.unsqueeze(1), noise, noise.abs()], 1).T
    assert float(table.corrcoef()[0, 1:].abs().max()) < 4 / 2000**0.5
