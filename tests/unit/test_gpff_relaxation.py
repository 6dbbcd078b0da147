"""Relaxation of distorted molecules by pseudo-forces and by an optimiser, on exact fields."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase.calculators.calculator import Calculator, all_changes
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from elign_lab.gpff import (
    GPFFConfig,
    PseudoForceField,
    bundled_quality,
    nearest_image,
    perturb,
    relax_by_denoising,
    relax_by_optimiser,
    relaxation_figure,
    rmsd,
)
from elign_lab.gpff.quality import BUDGETS, EDM
from elign_lab.molecules import MoleculeBatch, zero_com

SHARE = 0.75  # of the way to the minimum that one call of PartialField goes


class PartialField(nn.Module):
    """A pseudo-force field that goes a known share of the way to the nearest image of each minimum."""

    def __init__(self, minima: MoleculeBatch) -> None:
        super().__init__()
        self.minima, self.config = minima, GPFFConfig()
        self.device, self.dtype = torch.device("cpu"), torch.float64
        self.check = PseudoForceField.check.__get__(self)

    def forward(self, numbers: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        x = zero_com(positions.double(), mask)
        return 2 * SHARE * (nearest_image(self.minima, x, exchange=torch.zeros(len(x), dtype=torch.bool)) - x)


class Springs(Calculator):
    """A spring for every pair of atoms, at rest in the minimum: harmonic, of the minimum's shape at any place."""

    implemented_properties = ("energy", "forces")

    def __init__(self, minima: MoleculeBatch, *, fails_after: int | None = None) -> None:
        super().__init__()
        self.rest = {len(z): np.linalg.norm(x[:, None] - x[None], axis=-1) for z, x in minima.arrays()}
        self.fails_after, self.count = fails_after, 0

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        if self.count == self.fails_after:
            raise RuntimeError("no self-consistent field")
        self.count += 1
        arrows = atoms.positions[:, None] - atoms.positions[None]
        lengths = np.linalg.norm(arrows, axis=-1) + np.eye(len(atoms))
        stretch = lengths - np.eye(len(atoms)) - self.rest[len(atoms)]
        self.results = {
            "energy": 0.25 * (stretch**2).sum(),
            "forces": -((stretch / lengths)[..., None] * arrows).sum(1),
        }


@pytest.fixture(scope="module")
def minima() -> MoleculeBatch:
    return MoleculeBatch.from_smiles(["CCO", "CC=O"]).to(dtype=torch.float64).centered()


@pytest.fixture(scope="module")
def distorted(minima) -> MoleculeBatch:
    return minima.with_positions(perturb(minima, torch.tensor([0.1, 0.2]), torch.Generator().manual_seed(0)))


def test_rmsd_is_that_of_the_displacement_and_knows_images(minima):
    turn = torch.tensor(Rotation.random(random_state=1).as_matrix())
    # one per cent larger: no rotation takes anything of that displacement
    larger = minima.with_positions((1.01 * minima.positions) @ turn + 3.0 * minima.mask.unsqueeze(-1))
    expected = 0.01 * (minima.positions.square().sum((1, 2)) / minima.sizes).sqrt()
    assert torch.allclose(rmsd(larger, minima), expected)
    swapped = minima.positions.clone()
    swapped[0, [3, 4]] = minima.positions[0, [4, 3]]  # two hydrogens of the methyl group
    assert torch.allclose(rmsd(minima.with_positions(swapped), minima), torch.zeros(2).double(), atol=1e-9)


def test_denoising_takes_the_share_that_the_field_gives(minima, distorted):
    found = relax_by_denoising(PartialField(minima), distorted, minima, calls=3)
    start = rmsd(distorted, minima)
    assert found.rmsd.shape == (4, 2)
    for k in range(4):
        assert torch.allclose(found.rmsd[k], start * (1 - SHARE) ** k, rtol=1e-6)
    assert found.calls.tolist() == [3, 3]
    assert torch.allclose(rmsd(found.molecules, minima), found.rmsd[-1])


def test_denoising_stops_when_no_force_shows_noise(minima, distorted):
    found = relax_by_denoising(PartialField(minima), distorted, minima, calls=20)
    assert found.converged.all()
    assert 1 < int(found.calls[0]) < 20
    assert torch.equal(found.rmsd[-1], found.rmsd[int(found.calls[0])])
    assert not relax_by_denoising(PartialField(minima), distorted, minima, calls=1).converged.any()


def test_optimiser_reaches_the_minimum_and_counts_its_calls(minima, distorted):
    calculator = Springs(minima)
    found = relax_by_optimiser(calculator, distorted, minima, calls=60, fmax=1e-4)
    assert torch.allclose(found.rmsd[0], rmsd(distorted, minima))
    assert found.converged.all()
    assert (found.rmsd[-1] < 1e-3).all()
    assert (found.calls < 60).all()
    # the last structure of each molecule is evaluated too, to see that it has converged
    assert calculator.count == int(found.calls.sum()) + 2
    assert torch.allclose(rmsd(found.molecules, minima), found.rmsd[-1])


def test_optimiser_has_moved_after_one_call(minima, distorted):
    found = relax_by_optimiser(Springs(minima), distorted, minima, calls=1)
    assert found.calls.tolist() == [1, 1]
    assert not found.converged.any()
    assert (found.rmsd[1] < found.rmsd[0]).all()


def test_a_molecule_that_cannot_be_evaluated_is_named_and_stays(minima, distorted):
    with pytest.warns(UserWarning, match=r"molecule 0 \(C2H6O\) stopped after 2 of 5 calls: RuntimeError: no self"):
        found = relax_by_optimiser(Springs(minima, fails_after=3), distorted[[0]], minima[[0]], calls=5)
    assert found.calls.tolist() == [2]
    assert not found.converged.any()
    assert torch.equal(found.rmsd[2:], found.rmsd[2].expand(4, 1))
    with pytest.warns(UserWarning, match="after 0 of 5 calls"):
        found = relax_by_optimiser(Springs(minima, fails_after=0), distorted[[0]], minima[[0]], calls=5)
    assert torch.allclose(found.rmsd, rmsd(distorted[[0]], minima[[0]]).expand(6, 1))


def test_figure_shows_the_medians(minima, distorted):
    curve = relax_by_denoising(PartialField(minima), distorted, minima, calls=3)
    figure = relaxation_figure({"pseudo-forces": curve})
    (trace,) = figure.data
    assert np.allclose(trace.y, curve.rmsd.mean(1))  # the median of two is their mean
    assert list(trace.x) == [0, 1, 2, 3]
    assert "Å" in figure.layout.yaxis.title.text


def test_figure_begins_after_the_calls_that_were_made_before(minima, distorted):
    curve = relax_by_denoising(PartialField(minima), distorted, minima, calls=2)
    figure = relaxation_figure({"field": curve, "after field": curve}, spent={"after field": 4})
    assert [list(trace.x) for trace in figure.data] == [[0, 1, 2], [4, 5, 6]]
    assert list(figure.data[0].y) == list(figure.data[1].y)
    with pytest.raises(ValueError, match="spent names"):
        relaxation_figure({"field": curve}, spent={"fields": 4})


def test_bad_input_is_refused(minima, distorted):
    field = PartialField(minima)
    with pytest.raises(ValueError, match="calls must be at least 1"):
        relax_by_denoising(field, distorted, minima, calls=0)
    with pytest.raises(ValueError, match="calls must be at least 1"):
        relax_by_optimiser(Springs(minima), distorted, minima, calls=0)
    with pytest.raises(ValueError, match="fmax must be over 0"):
        relax_by_optimiser(Springs(minima), distorted, minima, fmax=0.0)
    with pytest.raises(ValueError, match="2 molecules for 1 minima"):
        rmsd(distorted, minima[[0]])
    with pytest.raises(ValueError, match="molecule 0 is C2H6O, its minimum C2H4O"):
        relax_by_optimiser(Springs(minima), distorted, minima[[1, 0]])


def test_bundled_quality_is_in_the_passport():
    rows = bundled_quality()
    assert {row.evaluations for row in rows if row.sampler == "direct"} == set(BUDGETS)
    assert any(row.sampler.startswith(EDM) for row in rows)
    assert all(0 <= row.validity <= 1 and row.n >= 100 for row in rows)
