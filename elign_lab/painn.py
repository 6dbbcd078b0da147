"""A small O(3)-equivariant message-passing network with scalar and vector features (after PaiNN, arXiv:2102.03150).

PaiNN weighs every message with a filter W(r_ij) per pair and feature, and that is where its time goes. Here the filter
is a sum over K radial functions phi_k, and the sum over neighbours is taken first, as one batched matrix product:

    scalars:  A_i^k = sum_j phi_k(r_ij) x_j          then  ds_i = sum_k W_k A_i^k
    vectors:  V_i^k = sum_j phi_k(r_ij) u_ij y_j,
              T_i^k = sum_j phi_k(r_ij) v_j          then  dv_i = sum_k W'_k V_i^k + W''_k T_i^k

Nothing is stored per pair and feature, and the W mix channels, which PaiNN's filter does not. The update of an atom is
PaiNN's (its equations 9 and 10).

PaiNN multiplies features with each other in every layer, so that one structure unlike the rest can make them overflow.
With `normalise`, every layer reads its input at unit size (the sums that it adds to keep theirs).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

_SMALLEST = 1e-2  # mean square below which features are not enlarged: a vector that symmetry makes zero stays zero
_EPSILON = 1e-8  # Angstrom^2 and squared features: keeps norms differentiable at zero


@dataclass(frozen=True)
class PaiNNConfig:
    """Sizes of the network. Lengths are in Angstrom.

    features of an atom: scalars and vectors; channels: how many of each an atom sends to its neighbours (scalars, and
    half as many vectors); basis: radial functions K, Gaussians in log(1 + r), from `shortest` to `reach`; cutoff:
    whether interactions go smoothly to zero at `reach` (else every pair interacts). Below `shortest` they fade out.
    normalise: whether layers read features divided by their root mean square, for inputs of widely different sizes.
    """

    features: int = 64
    vectors: int = 32
    channels: int = 24
    layers: int = 3
    basis: int = 12
    shortest: float = 0.65
    reach: float = 5.0
    cutoff: bool = True
    normalise: bool = False

    def __post_init__(self) -> None:
        for name in ("features", "vectors", "channels", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.basis < 2 or not 0 < self.shortest < self.reach:
            raise ValueError(
                "expected basis >= 2 and 0 < shortest < reach (Angstrom), got "
                f"basis={self.basis}, shortest={self.shortest}, reach={self.reach}"
            )


class Neighbours(NamedTuple):
    """Geometry of a batch, the same for all layers: radial (B, N K, N) and directed (B, N 3 K, N)."""

    radial: Tensor
    directed: Tensor


class RadialBasis(nn.Module):
    """Gaussians in log(1 + r), times a smooth cutoff: short distances, where bonds are, get the finest resolution."""

    centres: Tensor

    def __init__(self, config: PaiNNConfig) -> None:
        super().__init__()
        first, last = math.log1p(config.shortest), math.log1p(config.reach)
        self.register_buffer("centres", torch.linspace(first, last, config.basis), persistent=False)
        self.inverse_width = (config.basis - 1) / (last - first)
        self.reach = config.reach if config.cutoff else None

    def forward(self, positions: Tensor, mask: Tensor) -> Neighbours:
        """positions (B, N, 3) in Angstrom, mask (B, N); pairs with padding and self pairs are zero."""
        b, n = mask.shape
        # [b, i, c, j]: from atom j to atom i
        difference = positions.unsqueeze(3) - positions.transpose(1, 2).unsqueeze(1)
        distance = (difference.square().sum(2) + _EPSILON).sqrt()
        pair = mask.unsqueeze(2) & mask.unsqueeze(1) & ~torch.eye(n, dtype=torch.bool, device=mask.device)
        weight = pair.to(positions.dtype) if self.reach is None else pair * smooth_step(distance / self.reach)
        scaled = (torch.log1p(distance).unsqueeze(2) - self.centres.view(-1, 1)) * self.inverse_width
        radial = torch.exp(-0.5 * scaled.square()) * weight.unsqueeze(2)
        # u = r / (1 + |r|) is smooth where two atoms coincide, and the radial functions take up the rest
        unit = difference / (1 + distance.unsqueeze(2))
        directed = unit.unsqueeze(3) * radial.unsqueeze(2)
        k = len(self.centres)
        return Neighbours(radial.reshape(b, n * k, n), directed.reshape(b, n * 3 * k, n))


def smooth_step(x: Tensor) -> Tensor:
    """1 at x = 0, 0 from x = 1 on, with two continuous derivatives: 1 - 10 x^3 + 15 x^4 - 6 x^5."""
    x = x.clamp(0, 1)
    return 1 - x.pow(3) * (10 - 15 * x + 6 * x.square())


class Interaction(nn.Module):
    """One layer: messages from the neighbours, then PaiNN's update of each atom.

    The first layer has no vectors to send.
    """

    def __init__(self, config: PaiNNConfig, first: bool) -> None:
        super().__init__()
        f, v, c, k = config.features, config.vectors, config.channels, config.basis
        self.normalise = config.normalise
        self.hidden = nn.Linear(f, f)
        self.send = nn.Linear(f, 2 * c)
        self.receive_scalars = nn.Linear(k * c, f)
        self.receive_directions = nn.Linear(k * c, v, bias=False)
        self.vector_channels = 0 if first else max(c // 2, 1)
        if not first:
            self.send_vectors = nn.Linear(v, self.vector_channels, bias=False)
            self.gate_vectors = nn.Linear(f, self.vector_channels)
            self.receive_vectors = nn.Linear(k * self.vector_channels, v, bias=False)
        self.mix = nn.Linear(v, 2 * v, bias=False)
        self.update_hidden = nn.Linear(f + v, f)
        self.update = nn.Linear(f, f + 2 * v)
        self.product = nn.Linear(v, f, bias=False)

    def forward(self, s: Tensor, v: Tensor | None, near: Neighbours) -> tuple[Tensor, Tensor]:
        """s (B, N, F) and v (B, N, 3, V), None in the first layer -> the same, updated."""
        b, n, f = s.shape
        hidden = silu(self.hidden(self._read(s)))
        x, y = self.send(hidden).chunk(2, -1)
        ds = self.receive_scalars(torch.bmm(near.radial, x).view(b, n, -1))
        dv = self.receive_directions(torch.bmm(near.directed, y).view(b, n, 3, -1))
        s = s + ds
        v = dv if v is None else v + dv + self._vector_messages(hidden, self._read(v), near)
        left, right = self.mix(self._read(v)).chunk(2, -1)
        norm = (right.square().sum(2) + _EPSILON).sqrt()
        change = self.update(silu(self.update_hidden(torch.cat([self._read(s), norm], -1))))
        ds, gate_product, gate_vectors = change.split([f, v.shape[-1], v.shape[-1]], -1)
        s = s + ds + self.product(gate_product * (left * right).sum(2))
        return s, v + gate_vectors.unsqueeze(2) * left

    def _read(self, features: Tensor) -> Tensor:
        """Features as the layer reads them: s (B, N, F), or v (B, N, 3, V) by the norm over all three components."""
        if not self.normalise:
            return features
        square = features.square().mean(-1, keepdim=True)
        if features.dim() == 4:
            square = square.sum(2, keepdim=True)
        return features * (square + _SMALLEST).rsqrt()

    def _vector_messages(self, hidden: Tensor, v: Tensor, near: Neighbours) -> Tensor:
        b, n, _, _ = v.shape
        sent = self.send_vectors(v) * self.gate_vectors(hidden).unsqueeze(2)
        total = torch.bmm(near.radial, sent.view(b, n, -1)).view(b, n, -1, 3, self.vector_channels)
        return self.receive_vectors(total.transpose(2, 3).reshape(b, n, 3, -1))


class PaiNN(nn.Module):
    """Scalar and vector features of atoms, invariant and equivariant under rotation and inversion.

    Energies, or noise, or pseudo-forces are read off by a head of the user's own.
    """

    def __init__(self, config: PaiNNConfig) -> None:
        super().__init__()
        self.config = config
        self.basis = RadialBasis(config)
        self.layers = nn.ModuleList(Interaction(config, first=i == 0) for i in range(config.layers))

    def forward(self, s: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """s (B, N, F) input features, positions (B, N, 3) in Angstrom, mask (B, N) -> s (B, N, F), v (B, N, 3, V).

        Features of padding are not defined; they do not reach real atoms.
        """
        near = self.basis(positions, mask)
        first, *others = self.layers
        s, v = first(s, None, near)
        for layer in others:
            s, v = layer(s, v, near)
        return s, v
