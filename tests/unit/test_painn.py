"""The network: symmetries, independence of padding, smoothness, and the factorised sums against explicit ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from elign_lab.molecules import MoleculeBatch
from elign_lab.painn import PaiNN, PaiNNConfig, RadialBasis, smooth_step

SMALL = PaiNNConfig(features=16, vectors=8, channels=8, layers=3, basis=6)


def make_network(config: PaiNNConfig = SMALL) -> PaiNN:
    torch.manual_seed(0)
    return PaiNN(config).double().requires_grad_(False)


@pytest.fixture(scope="module")
def batch() -> MoleculeBatch:
    return MoleculeBatch.from_smiles(["CCO", "NC=O", "c1ccccc1F", "O"]).to(dtype=torch.float64)


def features(batch: MoleculeBatch, size: int = SMALL.features) -> torch.Tensor:
    table = torch.randn(10, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return table[batch.numbers]


@pytest.mark.parametrize("inversion", [1.0, -1.0])
@pytest.mark.parametrize(("cutoff", "normalise"), [(True, False), (False, False), (False, True)])
def test_scalars_are_invariant_and_vectors_turn_with_the_molecule(batch, inversion, cutoff, normalise):
    network = make_network(PaiNNConfig(features=16, vectors=8, channels=8, basis=6, cutoff=cutoff, normalise=normalise))
    turn = torch.from_numpy(inversion * Rotation.random(rng=3).as_matrix())
    s, v = network(features(batch), batch.positions, batch.mask)
    s_turned, v_turned = network(features(batch), batch.positions @ turn.T + 5.0, batch.mask)
    real = batch.mask
    assert v[real].abs().max() > 1e-3  # not the trivial way of being equivariant
    torch.testing.assert_close(s_turned[real], s[real], rtol=0, atol=1e-10)
    torch.testing.assert_close(v_turned[real], torch.einsum("cd,adf->acf", turn, v[real]), rtol=0, atol=1e-10)


def test_padding_and_other_molecules_do_not_matter(batch):
    network = make_network()
    s, v = network(features(batch), batch.positions, batch.mask)
    for i in range(len(batch)):
        alone = batch[i]
        n = int(alone.sizes)
        s_alone, v_alone = network(features(alone), alone.positions, alone.mask)
        torch.testing.assert_close(s_alone[0, :n], s[i, :n], rtol=0, atol=1e-10)
        torch.testing.assert_close(v_alone[0, :n], v[i, :n], rtol=0, atol=1e-10)


def test_order_of_atoms_does_not_matter(batch):
    network = make_network()
    one = batch[2]
    order = torch.from_numpy(np.random.default_rng(0).permutation(int(one.sizes)))
    s, v = network(features(one), one.positions, one.mask)
    s_p, v_p = network(features(one)[:, order], one.positions[:, order], one.mask)
    torch.testing.assert_close(s_p, s[:, order], rtol=0, atol=1e-10)
    torch.testing.assert_close(v_p, v[:, order], rtol=0, atol=1e-10)


def test_basis_is_the_explicit_sum_over_pairs(batch):
    basis = RadialBasis(SMALL).double()
    near = basis(batch.positions, batch.mask)
    b, n = batch.mask.shape
    x = torch.randn(b, n, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    total = torch.bmm(near.directed, x).view(b, n, 3, SMALL.basis, 3)
    i, positions = 1, batch.positions
    for molecule in range(b):
        expected = torch.zeros(3, SMALL.basis, 3, dtype=torch.float64)
        for j in range(int(batch.sizes[molecule])):
            if j == i:
                continue
            r = positions[molecule, i] - positions[molecule, j]
            d = r.norm()
            width = (np.log(1 + SMALL.reach) - np.log(1 + SMALL.shortest)) / (SMALL.basis - 1)
            phi = torch.exp(-0.5 * ((torch.log(1 + d) - basis.centres) / width) ** 2) * smooth_step(d / SMALL.reach)
            expected += (r / (1 + d)).view(3, 1, 1) * phi.view(-1, 1) * x[molecule, j]
        torch.testing.assert_close(total[molecule, i], expected, rtol=1e-6, atol=1e-8)


def test_cutoff_is_local_and_smooth():
    network = make_network()

    def change(distance: float) -> torch.Tensor:
        positions = torch.tensor([[[0.0, 0, 0], [1.1, 0, 0], [1.1 + distance, 0, 0]]], dtype=torch.float64)
        mask = torch.ones(1, 3, dtype=torch.bool)
        s = torch.ones(1, 3, SMALL.features, dtype=torch.float64)
        return network(s, positions, mask)[0][0, 2]

    outside = change(SMALL.reach + 0.1)
    torch.testing.assert_close(change(50.0), outside, rtol=0, atol=1e-12)
    assert (change(SMALL.reach - 1.5) - outside).abs().max() > 1e-4
    assert (change(SMALL.reach - 0.01) - outside).abs().max() < 1e-4


def test_without_cutoff_distant_atoms_interact():
    network = make_network(PaiNNConfig(features=16, vectors=8, channels=8, basis=8, reach=60.0, cutoff=False))
    mask = torch.ones(1, 2, dtype=torch.bool)
    s = torch.ones(1, 2, 16, dtype=torch.float64)
    near, far = (torch.tensor([[[0.0, 0, 0], [d, 0, 0]]], dtype=torch.float64) for d in (30.0, 40.0))
    assert (network(s, near, mask)[0] - network(s, far, mask)[0]).abs().max() > 1e-3


def test_coincident_atoms_are_finite_with_their_gradients():
    network = make_network()
    positions = torch.zeros(1, 3, 3, dtype=torch.float64).requires_grad_(True)
    s, v = network(torch.ones(1, 3, 16, dtype=torch.float64), positions, torch.ones(1, 3, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(s.sum() + v.sum(), positions)
    assert torch.isfinite(s).all()
    assert torch.isfinite(v).all()
    assert torch.isfinite(gradient).all()


def test_layers_that_normalise_do_not_multiply_a_large_input_up(batch):
    def growth(normalise: bool) -> float:
        config = PaiNNConfig(features=16, vectors=8, channels=8, layers=4, basis=6, normalise=normalise)
        _, v = make_network(config)(1e3 * features(batch), batch.positions, batch.mask)
        return float(v[batch.mask].abs().max())

    assert growth(True) < 1e2
    assert not growth(False) < 1e6  # infinite or undefined


def test_smooth_step_has_two_continuous_derivatives():
    x = torch.tensor([1e-4, 1 - 1e-4], dtype=torch.float64, requires_grad=True)
    y = smooth_step(x)
    torch.testing.assert_close(y, torch.tensor([1.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-10)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert first.abs().max() < 1e-6
    assert second.abs().max() < 1e-2
    assert smooth_step(torch.tensor([-1.0, 2.0])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "wrong", [{"features": 0}, {"layers": 0}, {"basis": 1}, {"shortest": 6.0}, {"shortest": 0.0}, {"channels": 0}]
)
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PaiNNConfig(**wrong)
