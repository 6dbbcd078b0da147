"""Pseudo-forces of perturbed equilibria: noise, and the nearest image of the reference.

The energy of a molecule does not change when it is turned, mirrored, or when identical atoms change places. So what a
noisy structure x should relax to is not the copy of the reference that it was made from but the nearest one, and

    E(x) = min over rotations Q (with reflections) and permutations P of identical atoms of |x - P x_ref Q|^2

is the invariant pseudo-potential; its force is 2 (P* x_ref Q* - x) wherever the nearest image is unique. With the copy
that the noise was added to, targets of like structures differ by a rotation and by exchanged hydrogens, and a network
under a square loss answers with their mean, which is smeared out. `nearest_image` finds the image by turns: the best
rotation for the permutation (Kabsch), then the best permutation for the rotation (linear assignment per element). No
turn makes the distance larger; the result is a local optimum, and never farther than the given copy.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from elign_lab.molecules import MoleculeBatch, zero_com, zero_com_noise

# Angstrom; identical atoms are at least 1.5 apart, and change places only when the noise is a good part of that
EXCHANGE_FROM = 0.25


def draw_sigma(n: int, sigma_min: float, sigma_max: float, generator: torch.Generator) -> Tensor:
    """Noise levels (n,) in Angstrom, log-uniform from sigma_min to sigma_max, one from each of n equal strata."""
    share = torch.rand(n, generator=generator, device=generator.device)
    # stratified: every batch has every decade, which takes that part of the variance out of the loss
    order = torch.randperm(n, generator=generator, device=generator.device)
    return sigma_min * (sigma_max / sigma_min) ** ((order + share) / n)


def perturb(
    batch: MoleculeBatch, sigma: Tensor, generator: torch.Generator | None = None, free: Tensor | None = None
) -> Tensor:
    """x = x_ref + sigma eps with eps of zero centre of mass; sigma (B,) in Angstrom -> (B, N, 3), centred.

    free (B, N) bool: the atoms that get noise (default: all). The others keep their places relative to each other.
    """
    noise = zero_com_noise(batch.mask, generator, batch.positions.dtype)
    if free is not None:
        noise = noise * free.unsqueeze(-1)
    return zero_com(batch.positions + sigma.view(-1, 1, 1) * noise, batch.mask)


def partial_noise(batch: MoleculeBatch, chosen: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Which atoms get noise when a part of a molecule is kept: (B, N) bool.

    In the molecules of `chosen` (B,) the atoms nearest to a random atom stay in place, between one atom and all but
    one; elsewhere every atom gets noise.
    """
    b, n = batch.mask.shape
    score = torch.rand(b, n, generator=generator).masked_fill(~batch.mask.cpu(), -1.0)
    centre = score.argmax(1).to(batch.mask.device)
    middle = batch.positions[torch.arange(b, device=batch.mask.device), centre].unsqueeze(1)
    distance = (batch.positions - middle).square().sum(-1).masked_fill(~batch.mask, torch.inf)
    rank = distance.argsort(1).argsort(1)
    share = torch.rand(b, generator=generator).to(batch.mask.device)
    kept = 1 + (share * (batch.sizes - 1)).long().clamp(max=batch.sizes - 2)
    kept = torch.where(chosen.to(batch.mask.device), kept, 0)
    return batch.mask & (rank >= kept.unsqueeze(1))


def rotation_onto(x: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Orthogonal Q (B, 3, 3), reflections included, that minimises |x Q - target| over the real atoms (Kabsch).

    x, target (B, N, 3), both centred.
    """
    weight = mask.unsqueeze(-1).to(x.dtype)
    u, _, vh = torch.linalg.svd((x * weight).transpose(1, 2) @ target)
    return u @ vh


def nearest_image(
    batch: MoleculeBatch, x: Tensor, *, exchange: Tensor | None = None, rotate: bool = True, turns: int = 2
) -> Tensor:
    """The image of each reference nearest to x under rotation, reflection and exchange of identical atoms.

    batch: references; x (B, N, 3) in Angstrom; exchange (B,) bool: molecules whose identical atoms may change places
    (default: all). Returns (B, N, 3), centred as x is.
    """
    mask = batch.mask
    reference = zero_com(batch.positions, mask)
    x = zero_com(x, mask)
    image = reference @ rotation_onto(reference, x, mask) if rotate else reference
    exchange = torch.ones(len(batch), dtype=torch.bool) if exchange is None else exchange.cpu()
    rows = exchange.nonzero().squeeze(1)
    if len(rows) == 0:
        return image
    numbers, goal, held = batch.numbers[rows].cpu().numpy(), x[rows], mask[rows]
    found = image[rows]
    for _ in range(turns):
        order = _assignment(numbers, goal, found).unsqueeze(-1).expand(-1, -1, 3)
        found = found.gather(1, order)
        if rotate:
            found = found @ rotation_onto(found, goal, held)
    image = image.clone()
    image[rows] = found
    return image


def _assignment(numbers: np.ndarray, x: Tensor, image: Tensor) -> Tensor:
    """Index (B, N): atom i of x takes the place of atom index[i] of the image, of the same element."""
    cost = -torch.bmm(x, image.transpose(1, 2)).cpu().numpy()  # |x_i - y_j|^2 up to terms that no permutation changes
    order = np.tile(np.arange(numbers.shape[1]), (len(numbers), 1))
    for b, kinds in enumerate(numbers):
        for z in np.unique(kinds[kinds > 0]):
            atoms = np.flatnonzero(kinds == z)
            if len(atoms) > 1:
                rows, columns = linear_sum_assignment(cost[b][np.ix_(atoms, atoms)])
                order[b, atoms[rows]] = atoms[columns]
    return torch.from_numpy(order).to(x.device)
