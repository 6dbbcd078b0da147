"""The network and its layout: symmetries, independence of the batch, gradients, bad input."""

import itertools
import math

import pytest
import torch

from elign_lab.denoiser import Denoiser, DenoiserConfig, Layout, NoiseSchedule, edges
from elign_lab.denoiser.edges import EdgeMLP, EdgeOptions
from elign_lab.denoiser.schedule import FIRST_STEP
from elign_lab.molecules import MoleculeBatch
from elign_lab.testing import Tolerance, assert_equivariant, equivariance_errors

SMILES = ["O", "CCO", "c1ccccc1", "CC(=O)N", "FC(F)F"]


@pytest.fixture(scope="module")
def batch() -> MoleculeBatch:
    return MoleculeBatch.from_smiles(SMILES).to(dtype=torch.float32)


def make(dtype: torch.dtype = torch.float32, **config) -> Denoiser:
    torch.manual_seed(0)
    model = Denoiser(DenoiserConfig(features=24, layers=3, **config)).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("coordinates.out.weight"):
                p.mul_(300)  # the initial gain of 0.001 would hide errors of the coordinate update
    return model


def state(model: Denoiser, batch: MoleculeBatch, t: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    z = model.encode(batch)
    steps = torch.full((len(batch),), t)
    return model.diffuse(z, steps, model.noise(batch.mask, torch.Generator().manual_seed(1))), steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t", [1, 500, 1000])
def test_equivariance(batch, dtype, t):
    model = make(dtype)
    z, steps = state(model, batch.to(dtype=dtype), t)
    assert_equivariant(model, z, steps, batch.mask)


def test_equivariance_check_finds_a_broken_network(batch):
    model = make(torch.float64)
    z, steps = state(model, batch.to(dtype=torch.float64))

    def broken(state, mask):
        return model.eps(state, steps, mask) + 1e-3 * state[..., :1].abs()

    errors = equivariance_errors(broken, z, batch.mask, torch.Generator().manual_seed(0))
    assert errors["rotation"] > 100 * Tolerance.FLOAT64
    assert errors["translation"] > 100 * Tolerance.FLOAT64
    assert errors["permutation"] < Tolerance.FLOAT64


def test_gnn_baseline_is_not_equivariant(batch):
    model = make(torch.float64, network="gnn")
    z, steps = state(model, batch.to(dtype=torch.float64))
    with pytest.raises(AssertionError, match="rotation"):
        assert_equivariant(model, z, steps, batch.mask)


def test_noise_has_zero_centre_of_mass_and_unit_variance(batch):
    model = make()
    big = batch[[0] * 4000]
    noise = model.noise(big.mask, torch.Generator().manual_seed(0))
    assert float(noise[..., :3].sum(1).abs().max()) < 1e-5
    # 3 (N - 1) dimensions with unit variance: E |x|^2 = 6 for water
    squared = noise[..., :3].square().sum((1, 2))
    assert abs(float(squared.mean()) - 6) < 4 * (12 / 4000) ** 0.5


def test_output_does_not_depend_on_the_batch_or_its_layout(batch):
    model = make(torch.float64)
    z, t = state(model, batch.to(dtype=torch.float64))
    together = model.eps(z, t, batch.mask)
    for block_pairs, padding in ((1, 0.0), (100_000, 1.0), (500, 0.5)):
        other = model.eps(z, t, batch.mask, layout=Layout(batch.mask, block_pairs, padding))
        torch.testing.assert_close(other, together)
    for i, n in enumerate(batch.sizes.tolist()):
        alone = model.eps(z[i : i + 1, :n], t[i : i + 1], batch.mask[i : i + 1, :n])
        torch.testing.assert_close(alone[0], together[i, :n])
    assert float(together[~batch.mask].abs().max()) == 0


def test_layout_takes_a_mask_with_holes(batch):
    model = make(torch.float64)
    z, t = state(model, batch.to(dtype=torch.float64))
    dense = model.eps(z, t, batch.mask)
    order = torch.arange(z.shape[1]).flip(0)
    holes = model.eps(z[:, order], t, batch.mask[:, order])
    torch.testing.assert_close(holes, dense[:, order])


def test_single_atom_and_empty_rows():
    model = make()
    mask = torch.tensor([[True, False], [True, True], [False, False]])
    z = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(0)) * mask.unsqueeze(-1)
    out = model.eps(z, torch.tensor([5, 5, 5]), mask)
    assert torch.isfinite(out).all()
    assert float(out[0, 0, :3].abs().max()) == 0  # one atom: no degree of freedom in space
    assert float(out[2].abs().max()) == 0


def test_a_non_finite_molecule_does_not_touch_the_others(batch):
    model = make()
    z, t = state(model, batch)
    clean = model.eps(z, t, batch.mask)
    z = z.clone()
    z[2, 0, 0] = float("nan")
    out = model.eps(z, t, batch.mask)
    others = [0, 1, 3, 4]
    torch.testing.assert_close(out[others], clean[others])
    assert torch.isnan(out[2]).any()


@pytest.mark.parametrize("config", [{}, {"attention": False}, {"sublayers": 2}])
def test_hand_written_gradient(batch, config):
    """EdgeMLP's backward against finite differences, through the whole network and its loss."""
    model = make(torch.float64, **config)
    small = batch[[0, 1]].to(dtype=torch.float64)
    z, t = model.encode(small), torch.tensor([200, 600])
    noise = model.noise(small.mask, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)

    def loss() -> torch.Tensor:
        return model.training_loss(z, small.mask, t, noise).loss.sum()

    loss().backward()
    for name, p in model.named_parameters():
        direction = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        slope = float((p.grad * direction).sum())
        with torch.no_grad():
            p.add_(1e-6 * direction)
            up = float(loss())
            p.sub_(2e-6 * direction)
            down = float(loss())
            p.add_(1e-6 * direction)
        assert abs((up - down) / 2e-6 - slope) <= 1e-5 * max(1.0, abs(slope)), name


def test_edge_mlp_gradcheck():
    mask = torch.tensor([[True, True, True], [True, True, False]])
    layout = Layout(mask)
    f, g = 3, torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()

    inputs = (tensor(layout.rows, 2 * f), tensor(layout.pairs, 2), tensor(2, f), tensor(f, f), tensor(f))
    for reduce in ("sum", "attend", "score"):
        head, bias = tensor(f), tensor()
        assert torch.autograd.gradcheck(
            lambda *a, r=reduce: EdgeMLP.apply(*a, layout, r, EdgeOptions()), (*inputs, head, bias)
        )


def test_sums_over_pairs_equal_those_by_index():
    """Blocks of equal and of unequal sizes, atoms in between missing, a molecule without atoms."""
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0]]).bool()
    for padding in (0.0, 1.0):
        layout = Layout(mask, padding=padding)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(layout.rows, 3, generator=generator, dtype=torch.float64)
        receiver, sender = [], []
        for b in layout.blocks:
            for i in range(b.start, b.stop):
                first = b.start + (i - b.start) // b.size * b.size
                receiver += [i] * b.size
                sender += range(first, first + b.size)
        receiver, sender = torch.tensor(receiver), torch.tensor(sender)
        torch.testing.assert_close(layout.differences(x), x[receiver] - x[sender])
        values = torch.randn(layout.pairs, 2, generator=generator, dtype=torch.float64)
        expected = torch.zeros(layout.rows, 2, dtype=torch.float64).index_add(0, receiver, values)
        torch.testing.assert_close(layout.sum_senders(values), expected)
        centred = layout.unpack(layout.center(x))
        torch.testing.assert_close(centred.sum(1), torch.zeros(5, 3, dtype=torch.float64))
        assert not centred[~mask].any()
        moved = layout.unpack(x * layout.row_mask) - centred
        assert all((moved[m][mask[m]].std(0, correction=0) < 1e-12).all() for m in (0, 1, 3, 4))  # one shift each


def test_bfloat16_products_stay_close(batch):
    model = make()
    z, t = state(model, batch)
    exact = model.eps(z, t, batch.mask)
    model.network.dtype = torch.bfloat16
    low = model.eps(z, t, batch.mask)
    error = float((low - exact).norm() / exact.norm())
    assert 1e-5 < error < 0.1  # bfloat16 has 3 digits, and these weights blow the coordinate update up


def test_compiled_blocks_give_the_same_numbers(monkeypatch):
    compile_ = torch.compile
    # the graphs of torch.compile without the code that it would generate for them, which takes longer
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="aot_eager", **options))
    edges._compile.cache_clear()
    layout, f = Layout(torch.ones(3, 7, dtype=torch.bool)), 16
    g = torch.Generator().manual_seed(0)
    shapes = ((layout.rows, 2 * f), (layout.pairs, 2), (2, f), (f, f), (f,), (f,), ())
    values = [torch.randn(shape, generator=g) for shape in shapes]
    results = []
    for compiled in (False, True):
        inputs = [v.clone().requires_grad_() for v in values]
        out = EdgeMLP.apply(*inputs, layout, "attend", EdgeOptions(compiled=compiled))
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    assert edges._compile.cache_info().currsize == 2
    edges._compile.cache_clear()
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5 * float(eager.abs().max()))


def test_nll_is_of_positions_in_angstrom(batch):
    """p(x) = p(x / s) s^-3(N - 1): the same state is that much less likely a density for a model with scale s."""
    plain, scaled = make(), make(scale=(2.0, 4.0, 10.0))
    z, t = state(plain, batch)
    noise, noise_0 = (plain.noise(batch.mask, torch.Generator().manual_seed(k)) for k in (2, 3))
    with torch.no_grad():
        one, two = (m.nll(z, batch.mask, t, noise, noise_0) for m in (plain, scaled))
    volume = 3 * (batch.sizes - 1) * math.log(2)
    torch.testing.assert_close(two.neg_log_constants - one.neg_log_constants, volume)
    torch.testing.assert_close(two.loss - one.loss, volume, atol=0.02, rtol=0)


def test_bad_input_is_named(batch):
    model = make()
    z, t = state(model, batch)
    with pytest.raises(ValueError, match="z has shape"):
        model.eps(z[..., :5], t, batch.mask)
    with pytest.raises(ValueError, match="integer steps"):
        model.eps(z, t.float(), batch.mask)
    with pytest.raises(ValueError, match="context"):
        model.eps(z, t, batch.mask, context=z)
    wide = torch.zeros(len(z), z.shape[1] + 1, 1)  # its rows would be taken for those of other atoms
    with pytest.raises(ValueError, match="context has shape"):
        make(context=1).eps(z, t, batch.mask, context=wide)
    with pytest.raises(ValueError, match=r"molecule 0, atom 0 is Cl"):
        model.encode(MoleculeBatch.from_smiles("ClCCl"))
    limited = make().with_size_histogram({5: 1})
    with pytest.raises(ValueError, match="over the limit of 5"):
        limited.encode(batch)
    with pytest.raises(ValueError, match="unknown noise schedule"):
        NoiseSchedule("linear", 10)
    with pytest.raises(ValueError, match="0 <= s < t"):
        model.schedule.transition(3, 3)
    with pytest.raises(ValueError, match="too large for sigma_0"):
        Denoiser(DenoiserConfig(scale=(1.0, 4.0, 100.0)))
    # each of these made a model without a word: one that predicts nothing, or NaN, or has a channel too few
    for name, value in (("layers", 0), ("normalization_factor", 0.0), ("context", -1), ("elements", (1, 1, 6))):
        with pytest.raises(ValueError, match=f"DenoiserConfig.{name}"):
            DenoiserConfig(**{name: value})
    for scale in ((0.0, 4.0, 10.0), (1.0, 4.0), "[1,4,10]"):
        with pytest.raises(ValueError, match=r"DenoiserConfig\.scale"):
            DenoiserConfig(scale=scale)


def test_grid_is_a_subset_of_the_full_one():
    schedule = NoiseSchedule("polynomial_2", 1000)
    assert schedule.grid() == list(range(1000, -1, -1))
    for steps in (1, 7, 20, 100, 500, 999):
        times = schedule.grid(steps)
        assert times[-1] == 0
        assert len(times) == steps + 1
        assert all(a > b for a, b in itertools.pairwise(times))
    assert schedule.grid(500)[0] == 1000
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="steps must be"):
            schedule.grid(steps)


def test_spacing_moves_steps_to_small_times():
    schedule = NoiseSchedule("polynomial_2", 1000)
    for spacing, steps in itertools.product((1.0, 1.5, 2.0, 6.0), (1, 7, 100, 600, 1000)):
        times = schedule.grid(steps, spacing)
        assert len(times) == steps + 1
        assert times[-1] == 0
        assert all(a > b for a, b in itertools.pairwise(times))
    assert [sum(t < 100 for t in schedule.grid(100, spacing)) for spacing in (1.0, 2.0)] == [10, 32]
    assert schedule.grid(1000, 2.0) == schedule.grid()
    times = schedule.grid(40, 2.0)
    assert times[20] == round(times[0] / 4)
    for spacing in (0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"spacing is .*expected 1"):
            schedule.grid(40, spacing)


@pytest.mark.parametrize("name", ["polynomial_2", "cosine"])
@pytest.mark.parametrize("spacing", [1.0, 2.0])
def test_first_step_of_a_coarse_grid_does_not_blow_up_errors(name, spacing):
    schedule = NoiseSchedule(name, 1000)
    for steps in (4, 12, 20, 50, 100):
        first, second = schedule.grid(steps, spacing)[:2]
        later = round((first + 1) * ((steps - 1) / steps) ** spacing)
        assert 1 / schedule.transition(first, second).alpha_ts <= FIRST_STEP
        assert 1 / schedule.transition(first + 1, later).alpha_ts > FIRST_STEP
