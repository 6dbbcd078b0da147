"""Generate structures with a pseudo-force field: the one call that a user needs, and what it starts from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from elign_lab.gpff.adaptive_ancestral import adaptive_ancestral
from elign_lab.gpff.adaptive_heun import adaptive_heun
from elign_lab.gpff.ancestral import ancestral
from elign_lab.gpff.compositions import (
    check_closed_shell,
    check_elements,
    draw_compositions,
    formula_of,
    pad_compositions,
    read_composition,
)
from elign_lab.gpff.constraints import TOLERANCE, Constraints
from elign_lab.gpff.direct import direct
from elign_lab.gpff.heun import heun
from elign_lab.gpff.model import PseudoForceField
from elign_lab.gpff.record import ForceRecord
from elign_lab.gpff.task import SamplingTask
from elign_lab.molecules import MoleculeBatch

Sampler = Callable[..., Iterator[ForceRecord]]

SAMPLERS: dict[str, Sampler] = {
    "ancestral": ancestral,
    "heun": heun,
    "adaptive_ancestral": adaptive_ancestral,
    "adaptive_heun": adaptive_heun,
    "direct": direct,
}
ON_A_GRID = ("ancestral", "heun")
SIGMA_MIN = 0.02  # Angstrom, where the grids end and the adaptive samplers stop


def generate(
    model: PseudoForceField,
    n: int | None = None,
    *,
    compositions: str | Sequence[str | Sequence[int]] | None = None,
    start: MoleculeBatch | None = None,
    sigma: float | None = None,
    constraints: Constraints | None = None,
    sampler: str = "ancestral",
    evaluations: int = 64,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
    **options: object,
) -> MoleculeBatch:
    """Generate n structures; `evaluations` is the number of network calls (NFE) for each.

    compositions: formulas ('C2H6O') or lists of atomic numbers, one for all or one each (default: drawn from the
    model's training set). start: structures to start from instead of a Gaussian cloud, one for all or one each, of
    atoms that a closed-shell molecule can have, as for compositions. sigma: noise added to them in Angstrom (default 0;
    a sampler on a grid needs some), or the width of the cloud (default: the model's sigma_max). constraints: see
    Constraints; all structures are then copies of one molecule, and a start is needed. Other options go to the sampler.
    The same arguments give the same structures on the same machine. Molecules of near-equal size go together. When
    interrupted (Ctrl-C) it returns the structures of the finished batches with a warning, and it warns of structures in
    which a distance or a region could not be kept. Raises ValueError for what cannot be.
    """
    run = get_sampler(sampler)
    if evaluations < 1:
        raise ValueError(f"evaluations must be at least 1, got {evaluations}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    atoms = _atoms(model, n, compositions, start, generator)
    level = _start_level(model, start, sigma, sampler)
    if constraints is not None and start is None:
        raise ValueError("constraints need a start: the structure that holds the frozen atoms and the distances")
    order = torch.argsort(atoms.sizes, stable=True)
    done: list[MoleculeBatch] = []
    with tqdm(total=len(atoms), desc="generating", unit="molecule", disable=not progress) as bar:
        try:
            for k, chunk in enumerate(order.split(batch_size)):
                part = atoms[chunk]
                noise = torch.Generator(model.device).manual_seed(seed * 1_000_003 + k)
                task = SamplingTask(model, part.numbers, part.mask, constraints=constraints, generator=noise)
                x = start_positions(task, level, None if start is None else part.positions)
                for last in run(task, x, evaluations=evaluations, sigma=level, sigma_min=SIGMA_MIN, **options):  # noqa: B007
                    pass
                done.append(last.molecules().to("cpu"))
                if constraints is not None:
                    _warn_of_violations(constraints, done[-1].positions)
                bar.update(len(part))
        except KeyboardInterrupt:
            if not done:
                raise
            warnings.warn(f"interrupted: returning {sum(map(len, done))} of {len(atoms)} molecules", stacklevel=2)
            return MoleculeBatch.cat(done)
    return MoleculeBatch.cat(done)[torch.argsort(order)]


def get_sampler(name: str) -> Sampler:
    """A sampler by name; ValueError lists the names."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: expected one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def start_positions(task: SamplingTask, sigma: float, structure: Tensor | None = None) -> Tensor:
    """Where sampling starts: a structure (B, N, 3), or the origin, plus noise of level sigma (Angstrom), projected."""
    noise = sigma * task.noise()
    if structure is None:
        return task.project(noise)
    return task.project(structure.to(noise) + noise)


def _atoms(
    model: PseudoForceField,
    n: int | None,
    compositions: str | Sequence[str | Sequence[int]] | None,
    start: MoleculeBatch | None,
    generator: torch.Generator,
) -> MoleculeBatch:
    """What is generated, as a batch with the start's positions, or zeros."""
    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if start is not None:
        if compositions is not None:
            raise ValueError("both a start and compositions were given: the start says what the atoms are")
        model.check(start)
        for i, (kinds, _) in enumerate(start.arrays()):
            check_closed_shell(kinds.tolist(), f"molecule {i} of the start, {start.formula(i)},")
        return start[_repeats(len(start), n, "start")]
    if compositions is None:
        drawn: list[tuple[int, ...]] = draw_compositions(model.config.compositions, n or 1, generator)
    else:
        if not isinstance(compositions, Iterable) or not all(isinstance(c, Iterable) for c in compositions):
            raise ValueError(
                f"compositions are {compositions}: expected formulas, or a list of atomic numbers for each molecule"
            )
        given = [compositions] if isinstance(compositions, str) else list(compositions)
        drawn = [read_composition(c) for c in given]
        drawn = [drawn[i] for i in _repeats(len(drawn), n, "compositions")]
    for atoms in drawn:
        check_elements(atoms, model.config.elements, model.config.max_atoms)
        check_closed_shell(atoms, f"the composition {formula_of(atoms)}")
    numbers, mask = pad_compositions(drawn)
    return model.check(MoleculeBatch(numbers, torch.zeros(*mask.shape, 3), mask))


def _warn_of_violations(constraints: Constraints, x: Tensor) -> None:
    """Distances that all hold at one place need not be reached from another: then the structure is a wrong one."""
    gaps = [constraints.violation(structure.unsqueeze(0)) for structure in x]
    broken = [gap for gap in gaps if gap > 10 * TOLERANCE]
    if broken:
        warnings.warn(
            f"{len(broken)} of {len(x)} structures break a constraint, by up to {max(broken):.3f} Angstrom: the "
            "projection found no way out; start nearer (less sigma), or with fewer distances",
            stacklevel=3,
        )


def _repeats(given: int, n: int | None, what: str) -> list[int]:
    if given == 0:
        raise ValueError(f"{what} is empty: expected at least one")
    if n is None or given == n:
        return list(range(given))
    if given != 1:
        raise ValueError(f"{what} has {given} entries for n = {n} structures: give one for all, or one for each")
    return [0] * n


def _start_level(model: PseudoForceField, start: MoleculeBatch | None, sigma: float | None, sampler: str) -> float:
    if sigma is not None and not 0 <= sigma <= model.config.sigma_max:
        raise ValueError(f"sigma = {sigma} Angstrom is outside the model's range, 0 to {model.config.sigma_max}")
    if start is None:
        if sigma is not None and sigma <= SIGMA_MIN:
            raise ValueError(
                f"sigma = {sigma} Angstrom without a start puts all atoms at one place: give a sigma over {SIGMA_MIN} "
                f"(default: {model.config.sigma_max}, the model's widest cloud), or a start"
            )
        return model.config.sigma_max if sigma is None else sigma
    if sampler in ON_A_GRID and (sigma is None or sigma <= SIGMA_MIN):
        raise ValueError(
            f"sampler {sampler!r} runs on a grid that begins at sigma, which must be over {SIGMA_MIN} Angstrom with a "
            f"start, got {sigma}; or use an adaptive sampler, which reads the level off the force"
        )
    if not sigma:
        _check_apart(start)
    return 0.0 if sigma is None else sigma


def _check_apart(start: MoleculeBatch) -> None:
    """Refuse atoms at one place, such as the new ones of `replace_group`: their forces are the same, for ever."""
    for i, (_, x) in enumerate(start.arrays()):
        if torch.pdist(torch.as_tensor(x)).min() < TOLERANCE:
            raise ValueError(f"molecule {i} of the start has two atoms at one place: give sigma > 0, to part them")
