"""The equivariant diffusion model EDM: encoding, forward process, noise prediction, losses, posterior, decoding.

State z = [x / s_x | one-hot(type) / s_h | charge / s_c], shape (B, N, 3 + F); EDM's scales are 1, 4 and 10. Notation as
in SPEC section 1; Hoogeboom et al. 2022 for the losses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from elign_lab.denoiser.egnn import EGNN, GNN
from elign_lab.denoiser.layout import Layout
from elign_lab.denoiser.schedule import NoiseSchedule, Transition
from elign_lab.denoiser.threads import thread_map
from elign_lab.molecules import MoleculeBatch, symbol, to_device, zero_com, zero_com_noise

# pairs of atoms times features squared, for each thread: below, the interpreter's lock costs more than it saves
MIN_WORK = 3e8
LOG_2PI = 1.8378770664093453


@dataclass(frozen=True)
class DenoiserConfig:
    """What defines a denoiser. The defaults are EDM's for QM9 (5.3 million parameters)."""

    elements: tuple[int, ...] = (1, 6, 7, 8, 9)  # order of the one-hot types
    include_charges: bool = True  # one more channel: the atomic number
    features: int = 256
    layers: int = 9
    sublayers: int = 1
    attention: bool = True
    tanh: bool = True
    norm_constant: float = 1.0
    sin_embedding: bool = False
    normalization_factor: float = 1.0
    aggregation: str = "sum"
    network: str = "egnn"  # or 'gnn', EDM's baseline that is not equivariant
    condition_time: bool = True
    context: int = 0  # properties per atom that condition the model
    timesteps: int = 1000
    schedule: str = "polynomial_2"
    precision: float = 1e-5
    scale: tuple[float, float, float] = (1.0, 4.0, 10.0)  # of positions, types, charge
    size_histogram: tuple[tuple[int, int], ...] = ()  # (number of atoms, count) in the training data

    def __post_init__(self) -> None:
        positive = all(isinstance(s, int | float) and s > 0 for s in self.scale)
        checks = {
            "elements": (0 < len(set(self.elements)) == len(self.elements), "atomic numbers, each once"),
            "features": (self.features >= 1, "1 or more"),
            "layers": (self.layers >= 1, "1 or more"),
            "sublayers": (self.sublayers >= 1, "1 or more"),
            "normalization_factor": (self.normalization_factor > 0, "a positive number"),
            "context": (self.context >= 0, "0 or more"),
            "scale": (len(self.scale) == 3 and positive, "three positive numbers"),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise ValueError(f"DenoiserConfig.{name} is {getattr(self, name)!r}, expected {expected}")

    @property
    def channels(self) -> int:
        """F: number of invariant channels in z."""
        return len(self.elements) + int(self.include_charges)

    @property
    def max_atoms(self) -> int | None:
        """Largest molecule of the training data, None when it is not known."""
        return max((n for n, count in self.size_histogram if count > 0), default=None)


class LossTerms(NamedTuple):
    """Per-molecule terms (B,) of a loss, and their sum `loss`."""

    loss: Tensor
    error: Tensor
    term_0: Tensor
    kl_prior: Tensor
    neg_log_constants: Tensor


class Denoiser(nn.Module):
    """EDM. `eps(z, t, mask)` predicts the noise; all the rest follows from it and the schedule."""

    def __init__(self, config: DenoiserConfig, gamma: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.schedule = NoiseSchedule(config.schedule, config.timesteps, config.precision, gamma)
        sigma_0 = self.schedule.alpha_sigma(0)[1]
        if 8 * sigma_0 > 1 / max(config.scale[1:]):
            # the rounding of types and charges in the likelihood needs this (EDM's check)
            raise ValueError(f"scale {config.scale} is too large for sigma_0 = {sigma_0:.4f}: 8 sigma_0 max(scale) > 1")
        inputs = config.channels + int(config.condition_time) + config.context
        if config.network == "egnn":
            self.network: nn.Module = EGNN(
                inputs,
                config.features,
                config.layers,
                config.sublayers,
                config.attention,
                config.tanh,
                config.norm_constant,
                config.sin_embedding,
                config.normalization_factor,
                config.aggregation,
            )
        elif config.network == "gnn":
            self.network = GNN(
                inputs,
                config.features,
                config.layers,
                config.attention,
                config.normalization_factor,
                config.aggregation,
            )
        else:
            raise ValueError(f"unknown network {config.network!r}: expected 'egnn' or 'gnn'")

    # ------------------------------------------------------------------ representation
    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights."""
        return next(self.parameters()).dtype

    def encode(self, batch: MoleculeBatch) -> Tensor:
        """Molecules -> clean latent z = [x | one-hot | charge] in EDM's scaling, centred, (B, N, 3 + F)."""
        batch.validate(max_atoms=self.config.max_atoms, elements=self.config.elements)
        batch = batch.to(self.device, self.dtype)
        s_x, s_h, s_c = self.config.scale
        elements = to_device(torch.tensor(self.config.elements), self.device)
        one_hot = (batch.numbers.unsqueeze(-1) == elements).to(self.dtype)
        parts = [zero_com(batch.positions, batch.mask) / s_x, one_hot / s_h]
        if self.config.include_charges:
            parts.append(batch.numbers.unsqueeze(-1).to(self.dtype) / s_c)
        return torch.cat(parts, -1)

    def decode(self, z_0: Tensor, positions: Tensor, mask: Tensor) -> MoleculeBatch:
        """Final decoding: types are the largest type channel of z_0 (B, N, 3 + F); positions in units of z."""
        k = len(self.config.elements)
        elements = torch.tensor(self.config.elements, device=z_0.device)
        numbers = elements[z_0[..., 3 : 3 + k].argmax(-1)]
        return MoleculeBatch(numbers, positions[..., :3] * self.config.scale[0], mask, check=False)

    def noise(self, mask: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Standard Gaussian noise of the state space: zero centre of mass on x, zero on padding, (B, N, 3 + F)."""
        x = zero_com_noise(mask, generator, self.dtype)
        h = torch.randn(*mask.shape, self.config.channels, generator=generator, device=mask.device, dtype=self.dtype)
        return torch.cat([x, h * mask.unsqueeze(-1)], -1)

    # ------------------------------------------------------------------ the model
    def eps(
        self, z: Tensor, t: Tensor, mask: Tensor, *, context: Tensor | None = None, layout: Layout | None = None
    ) -> Tensor:
        """Predicted noise eps_theta(z_t, t).

        z (B, N, 3 + F) in EDM's scaling, t (B,) integer steps 0..T, mask (B, N) -> (B, N, 3 + F), zero on padding, zero
        mean on x. context (B, N, C) for conditional models. `layout` (made from the same mask) saves its construction.
        """
        self._check_inputs(z, t, mask, context)
        if isinstance(self.network, GNN):
            return self._eps_gnn(z, t, mask, context)
        layout = layout or Layout(mask)
        if self._worth_threads(layout):
            return self._eps_threads(z, t, layout, context)
        rows = layout.pack(z)
        x, h = rows[:, :3], [rows[:, 3:]]
        if self.config.condition_time:
            h.append((t.to(z.dtype) / self.config.timesteps)[layout.molecule].unsqueeze(1))
        if context is not None:
            h.append(layout.pack(context))
        x_out, h_out = self.network(x, torch.cat(h, 1), layout)
        out = torch.cat([layout.center(x_out - x), h_out[:, : self.config.channels] * layout.row_mask.to(z.dtype)], 1)
        return layout.unpack(out)

    def _worth_threads(self, layout: Layout) -> bool:
        """Whether shares of the molecules in one thread each are faster than threads that share every operation."""
        threads = torch.get_num_threads()
        if layout.mask.device.type != "cpu" or torch.is_grad_enabled() or not 1 < threads <= layout.shape[0]:
            return False
        return layout.pairs * self.config.features**2 > threads * MIN_WORK

    def _eps_threads(self, z: Tensor, t: Tensor, layout: Layout, context: Tensor | None) -> Tensor:
        def eps(share: tuple[Tensor, Layout]) -> Tensor:
            members, part = share
            given = None if context is None else context[members]
            return self.eps(z[members], t[members], part.mask, context=given, layout=part)

        shares = layout.shares(torch.get_num_threads())
        return torch.cat(thread_map(eps, shares))[torch.argsort(torch.cat([members for members, _ in shares]))]

    def _eps_gnn(self, z: Tensor, t: Tensor, mask: Tensor, context: Tensor | None) -> Tensor:
        b, n = mask.shape
        weight = mask.unsqueeze(-1).to(z.dtype)
        z = z * weight
        h = [z[..., 3:]]
        if self.config.condition_time:
            h.append((t.to(z.dtype) / self.config.timesteps).view(b, 1, 1).expand(b, n, 1))
        if context is not None:
            h.append(context)
        x_out, h_out = self.network(z[..., :3], torch.cat(h, -1), weight)
        return torch.cat([zero_com(x_out, mask), h_out[..., : self.config.channels] * weight], -1)

    def _check_inputs(self, z: Tensor, t: Tensor, mask: Tensor, context: Tensor | None) -> None:
        want = (*mask.shape, 3 + self.config.channels)
        if tuple(z.shape) != want:
            raise ValueError(f"z has shape {tuple(z.shape)}, expected {want} for a mask of shape {tuple(mask.shape)}")
        if tuple(t.shape) != (mask.shape[0],) or t.is_floating_point():
            raise ValueError(f"t must be integer steps of shape ({mask.shape[0]},), got {t.dtype} {tuple(t.shape)}")
        if (context is not None) != (self.config.context > 0):
            raise ValueError(f"this model takes {self.config.context} context features; context={context is not None}")
        if context is not None and tuple(context.shape) != (*mask.shape, self.config.context):
            want = (*mask.shape, self.config.context)
            raise ValueError(f"context has shape {tuple(context.shape)}, expected {want}: one row per atom")

    def diffuse(self, z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Forward process z_t = alpha_t z + sigma_t eps."""
        alpha, sigma = self._alpha_sigma(t, z)
        return alpha * z + sigma * noise

    def clean(self, z_t: Tensor, t: int | Tensor, eps: Tensor) -> Tensor:
        """Clean estimate x0_hat = (z_t - sigma_t eps) / alpha_t (Tweedie; SPEC section 1)."""
        alpha, sigma = self._alpha_sigma(t, z_t)
        return (z_t - sigma * eps) / alpha

    def posterior_mean(self, z_t: Tensor, eps: Tensor, step: Transition) -> Tensor:
        """Mean of the reverse kernel, z_t / alpha_ts - (sigma_ts^2 / (alpha_ts sigma_t)) eps."""
        return z_t / step.alpha_ts - step.eps_coefficient * eps

    def _alpha_sigma(self, t: int | Tensor, like: Tensor) -> tuple[float, float] | tuple[Tensor, Tensor]:
        if isinstance(t, int):
            return self.schedule.alpha_sigma(t)
        alpha, sigma = self.schedule.alpha_sigma(t)
        shape = (*t.shape, *([1] * (like.dim() - t.dim())))
        return alpha.to(like.dtype).view(shape), sigma.to(like.dtype).view(shape)

    # ------------------------------------------------------------------ losses
    def training_loss(
        self,
        z: Tensor,
        mask: Tensor,
        t: Tensor,
        noise: Tensor,
        *,
        normalize: str = "padded",
        context: Tensor | None = None,
        layout: Layout | None = None,
    ) -> LossTerms:
        """EDM's l2 training loss per molecule (without -log p(N)), for clean z and given t (B,) and noise.

        normalize 'padded' divides the squared error by (3 + F) N of the padded batch, as EDM does; 'molecule' by the
        molecule's own number of atoms, so that its weight does not depend on its neighbours in the batch.
        """
        z_t = self.diffuse(z, t, noise)
        eps = self.eps(z_t, t, mask, context=context, layout=layout)
        squared = (noise - eps).square()
        if normalize not in ("padded", "molecule"):
            raise ValueError(f"normalize must be 'padded' or 'molecule', got {normalize!r}")
        atoms = mask.sum(1) if normalize == "molecule" else torch.full_like(t, mask.shape[1])
        entries = z.shape[-1] * atoms.to(z.dtype)
        error = squared.sum((1, 2)) / entries
        term_0 = 0.5 * squared[..., :3].sum((1, 2)) / entries - self.log_likelihood_types(z, z_t, t, mask)
        kl = self.kl_prior(z, mask)
        loss = kl + torch.where(t == 0, term_0, 0.5 * error)
        return LossTerms(loss, error, term_0, kl, torch.zeros_like(loss))

    def nll(
        self,
        z: Tensor,
        mask: Tensor,
        t: Tensor,
        noise: Tensor,
        noise_0: Tensor,
        *,
        context: Tensor | None = None,
        layout: Layout | None = None,
    ) -> LossTerms:
        """One-sample estimate of the variational bound on -log p(x, h | N), in nats per molecule; t in 1..T."""
        layout = layout or (Layout(mask) if isinstance(self.network, EGNN) else None)
        eps = self.eps(self.diffuse(z, t, noise), t, mask, context=context, layout=layout)
        error = (noise - eps).square().sum((1, 2))
        weight = torch.expm1(self.schedule.lookup(t) - self.schedule.lookup((t - 1).clamp(min=0))).to(z.dtype)
        zero = torch.zeros_like(t)
        z_0 = self.diffuse(z, zero, noise_0)
        eps_0 = self.eps(z_0, zero, mask, context=context, layout=layout)
        term_0 = 0.5 * (noise_0 - eps_0)[..., :3].square().sum((1, 2))
        term_0 = term_0 - self.log_likelihood_types(z, z_0, zero, mask)
        dof = 3 * (mask.sum(1) - 1).to(z.dtype)
        # the last term makes it a density in Angstrom (EDM's delta_log_px)
        constants = dof * (0.5 * float(self.schedule.gamma[0]) + 0.5 * LOG_2PI + math.log(self.config.scale[0]))
        kl = self.kl_prior(z, mask)
        loss = kl + self.config.timesteps * 0.5 * weight * error + constants + term_0
        return LossTerms(loss, error, term_0, kl, constants)

    def kl_prior(self, z: Tensor, mask: Tensor) -> Tensor:
        """KL(q(z_T | z) || N(0, I)) per molecule, with 3 (N - 1) dimensions for the positions, (B,)."""
        alpha, sigma = self.schedule.alpha_sigma(self.config.timesteps)
        atoms = mask.sum(1).to(z.dtype)
        dims = 3 * (atoms - 1) + atoms * self.config.channels
        mean = (alpha * z).square().sum((1, 2))
        log_sigma = torch.log(torch.tensor(sigma, dtype=torch.float64)).item()
        return dims * (-log_sigma + 0.5 * sigma**2 - 0.5) + 0.5 * mean

    def log_likelihood_types(self, z: Tensor, z_t: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        """log p(types, charge | z_t): each integer owns the unit interval around it, seen through noise sigma_t."""
        k = len(self.config.elements)
        _, s_h, s_c = self.config.scale
        sigma = self.schedule.alpha_sigma(t)[1].view(-1, 1, 1)
        weight = mask.unsqueeze(-1)
        one_hot = z[..., 3 : 3 + k].double() * s_h
        types = _log_interval(z_t[..., 3 : 3 + k].double() * s_h - 1, sigma * s_h)
        total = (torch.log_softmax(types, -1) * one_hot * weight).sum((1, 2))
        if self.config.include_charges:
            charge = torch.round(z[..., 3 + k :].double() * s_c)
            total = total + (_log_interval(charge - z_t[..., 3 + k :].double() * s_c, sigma * s_c) * weight).sum((1, 2))
        return total.to(z.dtype)

    def log_prob_size(self, sizes: Tensor) -> Tensor:
        """log p(N) under the training histogram, (B,); -69 (EDM's floor) for a size that never occurred."""
        counts = torch.zeros(int(sizes.max()) + 1, dtype=torch.float64)
        total = sum(c for _, c in self.config.size_histogram)
        if total == 0:
            raise ValueError("this model has no size histogram")
        for n, count in self.config.size_histogram:
            if n < len(counts):
                counts[n] = count / total
        return torch.log(counts + 1e-30).to(sizes.device)[sizes]

    def sample_sizes(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n molecule sizes from the training histogram, (n,) int64 on the CPU."""
        if not self.config.size_histogram:
            raise ValueError(
                "this model has no size histogram: pass sizes= to sample(), or give the model one with "
                "with_size_histogram({atoms: count, ...})"
            )
        sizes, counts = zip(*self.config.size_histogram, strict=True)
        drawn = torch.multinomial(torch.tensor(counts, dtype=torch.float64), n, replacement=True, generator=generator)
        return torch.tensor(sizes)[drawn]

    def with_size_histogram(self, histogram: dict[int, int]) -> Denoiser:
        """Set the size histogram (number of atoms -> count); returns self."""
        self.config = replace(self.config, size_histogram=tuple(sorted(histogram.items())))
        return self

    def extra_repr(self) -> str:
        """Elements and schedule for repr()."""
        names = " ".join(symbol(z) for z in self.config.elements)
        return f"elements={names}, timesteps={self.config.timesteps}, schedule={self.config.schedule}"


def _log_interval(centered: Tensor, sigma: Tensor) -> Tensor:
    """log of the mass that N(centered, sigma) puts on [-1/2, 1/2], floored at 1e-10 as in EDM; float64."""
    cdf = torch.special.ndtr
    return torch.log(cdf((centered + 0.5) / sigma) - cdf((centered - 0.5) / sigma) + 1e-10)
