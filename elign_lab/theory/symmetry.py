"""The zero-centre-of-mass subspace: its dimension, its density, and what a rotation does to a generated molecule."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from scipy.linalg import null_space
from scipy.stats import special_ortho_group
from torch import Tensor

from elign_lab.alignment import degrees_of_freedom, log_density, log_ratio
from elign_lab.denoiser import Denoiser, DenoiserConfig
from elign_lab.molecules import zero_com_noise
from elign_lab.sampling import ancestral, mask_of_sizes
from elign_lab.theory.check import Check, mean_check


def subspace_basis(atoms: int) -> Tensor:
    """Orthonormal basis of {x : sum_i x_i = 0}, (3 N, 3 (N - 1)) float64."""
    if atoms < 2:
        raise ValueError(f"the subspace of {atoms} atom(s) is a point: give at least 2 atoms")
    return torch.from_numpy(np.kron(null_space(np.ones((1, atoms))), np.eye(3)))


def small_denoiser(seed: int = 0, network: str = "egnn") -> Denoiser:
    """An untrained float64 denoiser of 10 steps, for properties that hold whatever the weights are.

    alpha_T is 0.1: with EDM's 0.003 an untrained model's first clean estimates are hundreds of Angstrom wide.
    """
    config = DenoiserConfig(
        features=16,
        layers=2,
        timesteps=10,
        network=network,
        include_charges=False,
        precision=0.01,
        scale=(1.0, 1.0, 1.0),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # PyTorch's initialisers take no generator
        model = Denoiser(config)
    return model.double().eval()


def perturbed(model: Denoiser, scale: float = 0.1, seed: int = 0) -> Denoiser:
    """A copy with other weights: what any update, an alignment step included, makes of a model."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return other


def random_rotation(seed: int = 0) -> Tensor:
    """A uniformly random rotation matrix (3, 3), float64."""
    return torch.from_numpy(special_ortho_group.rvs(3, random_state=seed))


def rotated(z: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the positions of states z (..., 3 + F); the invariant channels stay."""
    return torch.cat([z[..., :3] @ rotation.to(z).t(), z[..., 3:]], -1)


def generate(model: Denoiser, noise: Sequence[Tensor]) -> Tensor:
    """The states z_0 (B, N, 3 + F) that a model makes of given noise, T + 1 states or more, for full molecules."""
    mask = torch.ones(noise[0].shape[:2], dtype=torch.bool)
    *_, last = ancestral(model, mask, noise=iter(noise), decode=False)
    return last.z_s


# ---------------------------------------------------------------------- statements
def check_noise_dimension(atoms: int = 5, n: int = 20_000, seed: int = 0, project: bool = True) -> Check:
    """E |xi|^2 of the position noise is 3 (N - 1), the dimension of the subspace."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(n, atoms, dtype=torch.bool)
    noise = zero_com_noise(mask, generator) if project else torch.randn(n, atoms, 3, generator=generator)
    return mean_check(noise.square().sum((1, 2)).numpy(), 3.0 * (atoms - 1))


def broken_noise_dimension() -> Check:
    """Noise that is not projected."""
    return check_noise_dimension(project=False)


def check_density(
    atoms: int = 4, sigma: float = 0.7, n: int = 20_000, seed: int = 0, full_dimension: bool = False
) -> Check:
    """The kernel's density integrates to 1 over the subspace, by importance sampling from a wider Gaussian.

    Left: mean of exp(log_density) / proposal in orthonormal coordinates of the subspace. full_dimension counts 3 N
    dimensions in the normalisation.
    """
    rng = np.random.default_rng(seed)
    width = 1.2 * sigma
    y = rng.normal(scale=width, size=(n, 3 * (atoms - 1)))
    x = (torch.from_numpy(y) @ subspace_basis(atoms).t()).view(n, atoms, 3)
    mask = torch.ones(n, atoms, dtype=torch.bool)
    log_p = log_density(x, torch.zeros_like(x), sigma, mask).numpy()
    if full_dimension:
        log_p = log_p - 3 * (np.log(sigma) + 0.5 * np.log(2 * np.pi))
    log_proposal = -0.5 * (y**2).sum(1) / width**2 - y.shape[1] * (np.log(width) + 0.5 * np.log(2 * np.pi))
    return mean_check(np.exp(log_p - log_proposal), 1.0)


def broken_density() -> Check:
    """3 N dimensions in the normalisation instead of 3 (N - 1)."""
    return check_density(full_dimension=True)


def check_determinant(
    atoms: int = 4, sigma: float = 0.7, n: int = 20_000, seed: int = 0, with_determinant: bool = True
) -> Check:
    """The same integral in the positions of the first N - 1 atoms, which needs the volume factor N^{3/2}.

    The last atom is minus the sum of the others: these coordinates are not orthonormal, and the determinant of their
    Gram matrix is N^3.
    """
    rng = np.random.default_rng(seed)
    width = 1.2 * sigma
    free = rng.normal(scale=width, size=(n, atoms - 1, 3))
    x = torch.from_numpy(np.concatenate([free, -free.sum(1, keepdims=True)], 1))
    mask = torch.ones(n, atoms, dtype=torch.bool)
    log_p = log_density(x, torch.zeros_like(x), sigma, mask).numpy()
    dims = 3 * (atoms - 1)
    log_proposal = -0.5 * (free**2).sum((1, 2)) / width**2 - dims * (np.log(width) + 0.5 * np.log(2 * np.pi))
    volume = atoms**1.5 if with_determinant else 1.0
    return mean_check(volume * np.exp(log_p - log_proposal), 1.0)


def broken_determinant() -> Check:
    """The determinant left out."""
    return check_determinant(with_determinant=False)


def check_ratio(n: int = 20_000, seed: int = 0, per_dimension: bool = False, shift: float = 1.0) -> Check:
    """Importance weights average to 1: E_old[pi_new / pi_old] over molecules of 3 and 9 atoms.

    The log ratio of a molecule is the sum over its degrees of freedom. per_dimension takes the mean over them.
    """
    generator = torch.Generator().manual_seed(seed)
    mask = mask_of_sizes([3, 9] * (n // 2))
    model = small_denoiser()
    noise = model.noise(mask, generator)
    change = model.noise(mask[:2], generator)  # one fixed change of eps for each size
    change = change / change.square().sum((1, 2), keepdim=True).sqrt()
    delta = change.repeat(n // 2, 1, 1)
    scale = torch.full((n,), shift, dtype=noise.dtype)
    logs = log_ratio(noise, delta, torch.zeros_like(delta), scale)
    if per_dimension:
        logs = logs / degrees_of_freedom(mask, model.config.channels)
    return mean_check(torch.exp(logs).numpy(), 1.0)


def broken_ratio() -> Check:
    """Mean instead of sum over the degrees of freedom, so that the size of a molecule changes the weight."""
    return check_ratio(per_dimension=True)


def check_invariance(atoms: int = 6, seed: int = 0, network: str = "egnn") -> Check:
    """A rotated noise gives the rotated molecule, for a model whose weights were changed by training.

    The noise is rotation invariant in law, so the terminal law is invariant too. Left: largest deviation (Angstrom)
    between 'rotate, then generate' and 'generate, then rotate' relative to the size of the state.
    """
    model = perturbed(small_denoiser(seed, network), seed=seed)
    mask = torch.ones(4, atoms, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    noise = [model.noise(mask, generator) for _ in range(model.config.timesteps + 2)]
    rotation = random_rotation(seed)
    plain = generate(model, noise)
    turned = generate(model, [rotated(xi, rotation) for xi in noise])
    deviation = (turned - rotated(plain, rotation)).abs().max() / plain.abs().max()
    return Check(float(deviation), 0.0, 1e-8)


def broken_invariance() -> Check:
    """EDM's baseline network that is not equivariant."""
    return check_invariance(network="gnn")
