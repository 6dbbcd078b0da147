"""A Gaussian mixture and everything that diffusion does to it, in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianMixture:
    """Isotropic Gaussians in F dimensions: weights (M,) that sum to 1, means (M, F), standard deviations (M,)."""

    weights: Tensor
    means: Tensor
    widths: Tensor

    def __post_init__(self) -> None:
        m = len(self.weights)
        if self.means.dim() != 2 or len(self.means) != m or tuple(self.widths.shape) != (m,):
            raise ValueError(
                f"expected weights (M,), means (M, F) and widths (M,), got {tuple(self.weights.shape)}, "
                f"{tuple(self.means.shape)} and {tuple(self.widths.shape)}"
            )
        if not torch.isclose(self.weights.sum(), self.weights.new_ones(())) or not bool((self.widths > 0).all()):
            raise ValueError("the weights must sum to 1 and the widths must be positive")

    @classmethod
    def of(cls, *components: tuple[float, tuple[float, ...], float]) -> GaussianMixture:
        """From (weight, mean, width) triples; float64."""
        weights, means, widths = zip(*components, strict=True)
        return cls(*(torch.tensor(v, dtype=torch.float64) for v in (weights, means, widths)))

    @property
    def dimension(self) -> int:
        """F."""
        return self.means.shape[1]

    def noised(self, alpha: Tensor | float, sigma: Tensor | float) -> GaussianMixture:
        """Law of alpha X + sigma xi: again a mixture (paper section 2, the forward marginal)."""
        return GaussianMixture(self.weights, alpha * self.means, (alpha**2 * self.widths**2 + sigma**2) ** 0.5)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n samples (n, F)."""
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.dimension, generator=generator, dtype=self.means.dtype)
        return self.means[which] + self.widths[which].unsqueeze(1) * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """log density at x (..., F) -> (...)."""
        return torch.logsumexp(self._log_parts(x), -1)

    def score(self, x: Tensor) -> Tensor:
        """Gradient of log_prob at x (..., F), the same shape."""
        share = torch.softmax(self._log_parts(x), -1)
        pull = (self.means - x.unsqueeze(-2)) / self.widths.square().unsqueeze(-1)
        return (share.unsqueeze(-1) * pull).sum(-2)

    def characteristic(self, k: float) -> float:
        """E cos(k X) in one dimension: the mean of a bounded function, so that its Monte Carlo error is sound."""
        if self.dimension != 1:
            raise ValueError(f"the characteristic function is for one dimension, this mixture has {self.dimension}")
        wave = torch.cos(k * self.means[:, 0]) * torch.exp(-0.5 * (k * self.widths) ** 2)
        return float(self.weights @ wave)

    def _log_parts(self, x: Tensor) -> Tensor:
        squared = (x.unsqueeze(-2) - self.means).square().sum(-1) / self.widths.square()
        scale = torch.log(self.weights) - self.dimension * torch.log(self.widths * (2 * torch.pi) ** 0.5)
        return scale - 0.5 * squared
