"""Constraints on generated structures: frozen atoms, kept distances, regions that no atom may enter.

They act on one molecule (all structures of a batch are copies of it) by projection: of the start, of the noise, and of
every update. Frozen atoms anchor the frame: the clean estimate of the network, which has no place of its own, is laid
over them before they are put back exactly.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ase.data import vdw_radii
from torch import Tensor

SWEEPS = 200
TOLERANCE = 1e-4  # Angstrom, of distances and of regions; frozen atoms are exact
_FREE_WEIGHT = 1e-3  # of the free atoms in laying a structure over the frozen ones: fixes what those leave open
# Angstrom; two spheres push an atom between their centres to and fro on one line: a step aside lets it out
_ASIDE = (0.04, 0.03, 0.02)
_APART = 0.1  # Angstrom, between atoms that begin at one place and must have a distance
_TRIPLE = "(i, j, length in Angstrom)"


@dataclass(frozen=True)
class Sphere:
    """A region that no free atom may enter: centre and radius in Angstrom.

    Raises ValueError for a centre that is not three finite numbers, and a radius that is not positive and finite.
    """

    centre: tuple[float, ...]
    radius: float

    def __post_init__(self) -> None:
        try:
            right = len(self.centre) == 3 and all(map(math.isfinite, self.centre))
        except TypeError:
            right = False
        if not right:
            raise ValueError(f"the centre of a forbidden sphere must be three finite numbers, got {self.centre!r}")
        try:
            right = 0 < self.radius < math.inf
        except TypeError:
            right = False
        if not right:
            raise ValueError(
                f"the radius of a forbidden sphere must be positive and finite, got {self.radius!r} Angstrom"
            )

    def __str__(self) -> str:
        place = ", ".join(f"{c:.2f}" for c in self.centre)
        return f"sphere of {self.radius:g} Angstrom at ({place})"


def pocket(numbers: Sequence[int], positions: Tensor, scale: float = 1.0) -> tuple[Sphere, ...]:
    """Forbidden spheres around fixed atoms: `scale` times the van der Waals radii (ASE's table); positions (M, 3)."""
    radii = [float(vdw_radii[int(z)]) for z in numbers]
    for z, radius in zip(numbers, radii, strict=True):
        if not radius > 0:
            raise ValueError(f"no van der Waals radius is known for atomic number {int(z)}: give Spheres instead")
    centres = torch.as_tensor(positions).tolist()
    return tuple(Sphere((c[0], c[1], c[2]), scale * r) for c, r in zip(centres, radii, strict=True))


def depth_inside(x: Tensor, forbidden: Iterable[Sphere]) -> Tensor:
    """How deep the atoms of x (..., 3) lie in a forbidden region, (...) in Angstrom; 0 outside."""
    depth = torch.zeros(x.shape[:-1], dtype=x.dtype, device=x.device)
    for sphere in forbidden:
        depth = torch.maximum(depth, sphere.radius - (x - torch.tensor(sphere.centre).to(x)).norm(dim=-1))
    return depth


def _entries(value: Iterable[Any], name: str) -> tuple[Any, ...]:
    try:
        return tuple(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}: expected a tuple, also for one entry") from None


def _parts(entry: Iterable[Any], length: int, name: str, form: str) -> tuple[Any, ...]:
    try:
        parts = tuple(entry)
    except TypeError:
        parts = ()
    if len(parts) != length:
        raise ValueError(f"{name} has the entry {entry!r}: expected {form}")
    return parts


def _index(value: Any, n: int, name: str) -> int:
    try:
        index = operator.index(value)
    except TypeError:
        raise ValueError(
            f"{name} has {value!r} for an atom: expected its index, a whole number from 0 to {n - 1}"
        ) from None
    if not 0 <= index < n:
        raise ValueError(f"atom {index} is constrained, but the molecule has atoms 0 to {n - 1}")
    return index


def _distance(entry: Iterable[Any], n: int) -> tuple[int, int, float]:
    i, j, length = _parts(entry, 3, "distances", _TRIPLE)
    try:
        length = float(length)
    except (TypeError, ValueError):
        raise ValueError(f"distances has the entry {entry!r}: expected {_TRIPLE}") from None
    return _index(i, n, "distances"), _index(j, n, "distances"), length


@dataclass(frozen=True, eq=False)
class Constraints:
    """What must hold for every structure of a batch.

    reference (N, 3) in Angstrom: where the frozen atoms are; frozen: their indices; distances: (i, j, Angstrom);
    forbidden: spheres, in the frame of the reference. Raises ValueError for entries that are not of this form, indices
    out of range, all atoms frozen, frozen atoms that break a distance or lie in a sphere, and distances that cannot
    hold together.
    """

    reference: Tensor
    frozen: tuple[int, ...] = ()
    distances: tuple[tuple[int, int, float], ...] = ()
    forbidden: tuple[Sphere, ...] = ()

    def __post_init__(self) -> None:
        reference = torch.as_tensor(self.reference)
        object.__setattr__(self, "reference", reference)
        if reference.dim() != 2 or reference.shape[1] != 3:
            raise ValueError(f"reference must be positions (N, 3) in Angstrom, got shape {tuple(reference.shape)}")
        if not bool(torch.isfinite(reference).all()):
            raise ValueError("reference has a position that is not finite: expected finite ones in Angstrom")
        n = len(reference)
        object.__setattr__(self, "frozen", tuple(_index(k, n, "frozen") for k in _entries(self.frozen, "frozen")))
        distances = tuple(_distance(entry, n) for entry in _entries(self.distances, "distances"))
        object.__setattr__(self, "distances", distances)
        object.__setattr__(self, "forbidden", _entries(self.forbidden, "forbidden"))
        for sphere in self.forbidden:
            if not isinstance(sphere, Sphere):
                raise ValueError(f"forbidden has {sphere!r}: expected Sphere((x, y, z), radius), all in Angstrom")
        if len(set(self.frozen)) == n:
            raise ValueError(f"all {n} atoms are frozen, so nothing is left to generate: leave at least one free")
        self._check_pairs()
        self._check_frozen()
        gap = self.violation(self.project(reference.double().unsqueeze(0)))
        if gap > 10 * TOLERANCE:
            raise ValueError(
                f"the constraints contradict each other: the nearest structure breaks one by {gap:.3f} Angstrom; "
                "check the distances for the triangle inequality, and those to frozen atoms and regions"
            )

    @classmethod
    def keep_distances(
        cls, reference: Tensor, pairs: Iterable[tuple[int, int]], frozen: Iterable[int] = ()
    ) -> Constraints:
        """Constraints that keep the distances of pairs of atoms as they are in the reference (N, 3)."""
        x = torch.as_tensor(reference)
        distances = []
        for pair in _entries(pairs, "pairs"):
            i, j = (_index(k, len(x), "pairs") for k in _parts(pair, 2, "pairs", "(i, j), two atoms"))
            distances.append((i, j, float((x[i] - x[j]).norm())))
        return cls(x, frozen=_entries(frozen, "frozen"), distances=tuple(distances))

    @property
    def anchored(self) -> bool:
        """Whether the constraints have a place in space, so that structures are not centred."""
        return bool(self.frozen or self.forbidden)

    @property
    def free(self) -> Tensor:
        """(N,) bool: atoms that are not frozen."""
        free = torch.ones(len(self.reference), dtype=torch.bool, device=self.reference.device)
        free[list(self.frozen)] = False
        return free

    def project(self, x: Tensor) -> Tensor:
        """The positions x (B, N, 3), changed so that all constraints hold (sweeps over the distances and regions)."""
        x = self._put_back(x)
        if not self.distances and not self.forbidden:
            return x
        mobility = self.free.to(x)
        for i, j, _ in self.distances:
            self._part(x, i, j, mobility)
        for sweep in range(SWEEPS):
            for i, j, distance in self.distances:
                self._restore(x, i, j, distance, mobility)
            for sphere in self.forbidden:
                self._push_out(x, sphere, mobility)
            if self.violation(x) < TOLERANCE:
                break
            if sweep == SWEEPS // 4:
                stuck = mobility * (depth_inside(x, self.forbidden) > TOLERANCE)
                x += stuck.unsqueeze(-1) * x.new_tensor(_ASIDE)
        return x

    def violation(self, x: Tensor) -> float:
        """Largest error of a distance, or depth of a free atom in a region, in Angstrom; x (B, N, 3)."""
        gaps = [((x[:, i] - x[:, j]).norm(dim=-1) - d).abs().max() for i, j, d in self.distances]
        if self.forbidden:
            gaps.append(depth_inside(x, self.forbidden)[:, self.free].max())
        return float(torch.stack(gaps).max()) if gaps else 0.0

    def lay_over(self, structure: Tensor, x: Tensor) -> Tensor:
        """Move and turn each structure (B, N, 3) as a whole so that its frozen atoms lie on those of x (B, N, 3)."""
        if not self.frozen:
            return structure
        weight = torch.where(self.free, _FREE_WEIGHT, 1.0).to(x).view(1, -1, 1)
        weight = weight / weight.sum()
        centre, goal = (weight * structure).sum(1, keepdim=True), (weight * x).sum(1, keepdim=True)
        covariance = ((structure - centre) * weight).transpose(1, 2) @ (x - goal)
        finite = torch.isfinite(covariance).all(-1).all(-1).view(-1, 1, 1)  # a diverged structure stays as it is
        u, _, vh = torch.linalg.svd(torch.where(finite, covariance, torch.eye(3).to(x)))
        # proper rotations only: a mirrored estimate does not fit the atoms that stay
        sign = torch.ones(len(x), 3).to(x)
        sign[:, 2] = torch.linalg.det(u @ vh).sign()
        return (structure - centre) @ (u * sign.unsqueeze(1) @ vh) + goal

    def _put_back(self, x: Tensor) -> Tensor:
        x = x.clone()
        frozen = list(self.frozen)
        x[:, frozen] = self.reference[frozen].to(x)
        return x

    def _part(self, x: Tensor, i: int, j: int, mobility: Tensor) -> None:
        """Move two atoms that are at one place a little apart: a distance of zero has no direction to grow in."""
        together = ((x[:, i] - x[:, j]).norm(dim=-1) < 1e-6).to(x).unsqueeze(-1)
        for k in (i, j):  # to places that are neither on one line nor in one plane
            aside = x.new_tensor([math.cos(k), math.sin(k), math.cos(3 * k)])
            x[:, k] += _APART * mobility[k] * together * aside

    def _restore(self, x: Tensor, i: int, j: int, distance: float, mobility: Tensor) -> None:
        total = mobility[i] + mobility[j]
        if total == 0:
            return
        difference = x[:, i] - x[:, j]
        length = difference.norm(dim=-1, keepdim=True).clamp(min=1e-8)
        correction = (distance / length - 1) * difference / total
        x[:, i] += mobility[i] * correction
        x[:, j] -= mobility[j] * correction

    def _push_out(self, x: Tensor, sphere: Sphere, mobility: Tensor) -> None:
        difference = x - torch.tensor(sphere.centre).to(x)
        length = difference.norm(dim=-1, keepdim=True)
        # an atom at the centre has no direction outward: any will do
        direction = torch.where(length > 1e-6, difference / length.clamp(min=1e-6), x.new_tensor([1.0, 0.0, 0.0]))
        x += (sphere.radius - length).clamp(min=0) * direction * mobility.view(1, -1, 1)

    def _check_pairs(self) -> None:
        seen: dict[frozenset[int], float] = {}
        for i, j, distance in self.distances:
            if i == j or not 0 < distance < math.inf:
                raise ValueError(
                    f"distance ({i}, {j}, {distance}): expected two different atoms and a positive length, finite"
                )
            pair = frozenset((i, j))
            if abs(seen.setdefault(pair, distance) - distance) > TOLERANCE:
                raise ValueError(f"atoms {i} and {j} have two distances, {seen[pair]} and {distance}: expected one")

    def _check_frozen(self) -> None:
        frozen = set(self.frozen)
        for i, j, distance in self.distances:
            actual = float((self.reference[i] - self.reference[j]).norm())
            if i in frozen and j in frozen and abs(actual - distance) > TOLERANCE:
                raise ValueError(
                    f"atoms {i} and {j} are frozen {actual:.4f} Angstrom apart, but their distance is to be "
                    f"{distance:.4f}: free one of them, or drop the distance"
                )
        for sphere in self.forbidden:
            for k in sorted(frozen):
                distance = float((self.reference[k] - torch.tensor(sphere.centre).to(self.reference)).norm())
                # a run leaves atoms on the surface, up to the tolerance inside
                if distance < sphere.radius - 10 * TOLERANCE:
                    raise ValueError(
                        f"frozen atom {k} lies in the forbidden {sphere}: free the atom, or make the sphere smaller"
                    )
