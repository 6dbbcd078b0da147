"""Relaxation of distorted molecules: pseudo-forces against an optimiser with the energies and forces of a calculator.

A pseudo-force says where the minimum is, in one call and without an energy; a force says only which way is down. So the
one needs few calls and is as accurate as the network, the other needs many and is as accurate as one likes. The same
comparison is made for a diffusion model in MoreRed (Kahouli et al., arXiv:2404.10935). Counted are calls:
of the network, or of the calculator (an energy with its forces).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.optimize import BFGS
from plotly.colors import qualitative
from torch import Tensor

from elign_lab.gpff.direct import direct
from elign_lab.gpff.generate import SIGMA_MIN
from elign_lab.gpff.model import PseudoForceField
from elign_lab.gpff.pseudo_forces import nearest_image
from elign_lab.gpff.task import SamplingTask
from elign_lab.molecules import MoleculeBatch
from elign_lab.teaching import Figure


@dataclass(frozen=True)
class Relaxation:
    """The way of B distorted molecules to their minima, call by call.

    rmsd (K + 1, B): distance from the minimum in Angstrom (see `rmsd`) after 0, 1, ... K calls; a molecule that has
    stopped keeps its last one. calls (B,): calls that each molecule took. converged (B,) bool. molecules: where they
    ended.
    """

    rmsd: Tensor
    calls: Tensor
    converged: Tensor
    molecules: MoleculeBatch


def rmsd(batch: MoleculeBatch, minima: MoleculeBatch) -> Tensor:
    """Root mean square displacement (B,) in Angstrom per atom from the nearest image of each minimum.

    Images: rotated, mirrored, and with identical atoms exchanged; see `nearest_image`. Raises ValueError when the atoms
    of the two batches are not the same.
    """
    _check_same_atoms(batch, minima)
    minima, centred = minima[:], batch[:].centered()  # both padded to the largest molecule
    image = nearest_image(minima.to(dtype=centred.positions.dtype), centred.positions)
    return ((image - centred.positions).square().sum((1, 2)) / batch.sizes).sqrt()


def relax_by_denoising(
    model: PseudoForceField, distorted: MoleculeBatch, minima: MoleculeBatch, calls: int = 32
) -> Relaxation:
    """Direct denoising without noise, x <- x + F(x) / 2, and how near each network call brings it to the minima.

    Converged: the last force showed a noise level under the smallest that samplers use, 0.02 Angstrom. It ends when all
    are, or after `calls`. Raises ValueError for calls < 1, for molecules that the model cannot evaluate, and when the
    atoms of the two batches are not the same.
    """
    _check_calls(calls)
    model.check(distorted)
    task = SamplingTask(model, distorted.numbers, distorted.mask)
    found = [rmsd(distorted, minima)]
    start = task.project(distorted.positions.to(model.device, model.dtype))
    for last in direct(task, start, evaluations=calls, sigma_min=SIGMA_MIN, strength=0.0):
        found.append(rmsd(last.molecules().to("cpu"), minima))
    found += [found[-1]] * (calls + 1 - len(found))
    return Relaxation(
        torch.stack([values.double() for values in found]),
        last.spent.cpu(),
        (last.sigma_hat < SIGMA_MIN).cpu(),
        last.molecules().to("cpu"),
    )


def relax_by_optimiser(
    calculator: BaseCalculator,
    distorted: MoleculeBatch,
    minima: MoleculeBatch,
    calls: int = 32,
    *,
    fmax: float = 0.01,
) -> Relaxation:
    """ASE's BFGS with a calculator, and how near each call of the calculator brings the molecules to the minima.

    Converged: the largest force on an atom is under fmax (eV/Angstrom). A molecule that the calculator cannot evaluate
    stays where it was, with a warning that names it. Raises ValueError for calls < 1 or fmax <= 0, and when the atoms
    of the two batches are not the same.
    """
    _check_calls(calls)
    _check_same_atoms(distorted, minima)
    if not fmax > 0:
        raise ValueError(f"fmax must be over 0 eV/Angstrom, got {fmax}")
    ways, converged = [], []
    for i, atoms in enumerate(distorted.to_ase()):
        atoms.calc = calculator
        way, arrived, error = _optimise(atoms, calls, fmax)
        if error is not None:
            warnings.warn(
                f"molecule {i} ({distorted.formula(i)}) stopped after {len(way) - 1} of {calls} calls: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
        ways.append(MoleculeBatch.from_ase(way))
        converged.append(arrived)
    columns = [rmsd(way, minima[[i] * len(way)]).double() for i, way in enumerate(ways)]
    columns = [torch.cat([column, column[-1:].expand(calls + 1 - len(column))]) for column in columns]
    return Relaxation(
        torch.stack(columns, 1),
        torch.tensor([len(way) - 1 for way in ways]),
        torch.tensor(converged),
        MoleculeBatch.cat([way[-1] for way in ways]),
    )


def relaxation_figure(curves: Mapping[str, Relaxation], spent: Mapping[str, int] | None = None) -> Figure:
    """Median distance from the minima against calls, one line for each relaxation, with the quartiles as bars.

    spent: calls that were made before a relaxation began, by its name; its line starts there, the others at 0. Raises
    ValueError for a name that no relaxation has.
    """
    spent = spent or {}
    if unknown := spent.keys() - curves.keys():
        raise ValueError(f"spent names {sorted(unknown)}, which are none of the relaxations {list(curves)}")
    alt = "Median distance from the minimum against calls of the network or of the calculator, on logarithmic axes."
    figure = Figure(x="calls (network, or calculator)", y="RMSD to the minimum (Å)", alt=alt)
    for k, (name, curve) in enumerate(curves.items()):
        low, middle, high = torch.quantile(curve.rmsd, torch.tensor([0.25, 0.5, 0.75]).double(), dim=1)
        figure.add_estimates(
            [spent.get(name, 0) + calls for calls in range(len(middle))],
            middle.tolist(),
            low.tolist(),
            high.tolist(),
            name=name,
            mode="lines+markers",
            marker={"size": 5},
            line={"color": qualitative.Dark24[k]},
        )
    figure.update_yaxes(type="log")
    return figure


def _optimise(atoms: Atoms, calls: int, fmax: float) -> tuple[list[Atoms], bool, Exception | None]:
    """The structures after 0, 1, ... calls, whether the last has converged, and why it ended early, if it did."""
    start, way, converged = atoms.copy(), [], False
    try:
        for arrived in BFGS(atoms, logfile=None).irun(fmax=fmax, steps=calls):
            way.append(Atoms(atoms.numbers, atoms.positions))
            converged = bool(arrived)
    except Exception as error:  # calculators raise what they like; it goes into the warning
        return way or [start], False, error
    return way, converged, None


def _check_calls(calls: int) -> None:
    if calls < 1:
        raise ValueError(f"calls must be at least 1, got {calls}")


def _check_same_atoms(batch: MoleculeBatch, minima: MoleculeBatch) -> None:
    if len(batch) != len(minima):
        raise ValueError(f"{len(batch)} molecules for {len(minima)} minima: expected as many of both")
    pairs = zip(batch.arrays(), minima.arrays(), strict=True)
    for i, ((numbers, _), (expected, _)) in enumerate(pairs):
        if list(numbers) != list(expected):
            raise ValueError(
                f"molecule {i} is {batch.formula(i)}, its minimum {minima.formula(i)}: expected the same atoms in the "
                "same order"
            )
