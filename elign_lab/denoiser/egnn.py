"""EDM's E(3)-equivariant graph network: the noise prediction eps_theta(z_t, t), on packed rows.

Per molecule, over all ordered pairs of different atoms (Hoogeboom et al. 2022; facts checked against the public code):
    h = W [z_h, t/T, context] + b,   d0_ij = |x_i - x_j|^2 of the input
    each block:  d_ij = |x_i - x_j|^2,  u_ij = (x_i - x_j) / (|x_i - x_j| + norm_constant)
        m_ij = edge_mlp(h_i, h_j, d_ij, d0_ij),  h_i += node_mlp(h_i, sum_j attention(m_ij) m_ij / normalization)
        x_i += sum_j u_ij * 15 tanh(coord_mlp(h_i, h_j, d_ij, d0_ij)) / normalization        (with the updated h)
    eps_x = x_out - x_in without its mean,   eps_h = W_out h + b_out
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from elign_lab.denoiser.edges import EdgeMLP, EdgeOptions
from elign_lab.denoiser.layout import Layout

COORDINATE_RANGE = 15.0  # Angstrom a block, the value that EDM uses (it is not divided by the number of blocks)


class EdgeNetwork(nn.Module):
    """Two linear layers over pairs, stored unfactorised: `first` acts on [h_receiver, h_sender, edge features]."""

    def __init__(self, features: int, edge_features: int) -> None:
        super().__init__()
        self.first = nn.Linear(2 * features + edge_features, features)
        self.second = nn.Linear(features, features)

    def forward(
        self,
        h: Tensor,
        edge: Tensor,
        layout: Layout,
        head: Tensor,
        head_bias: Tensor,
        reduce: str,
        options: EdgeOptions,
    ) -> Tensor:
        """h (rows, F), edge (pairs, n_e) -> see EdgeMLP."""
        f = h.shape[1]
        w = self.first.weight
        # one matrix product for both parts; the bias goes with the receiver
        nodes = torch.cat([torch.addmm(self.first.bias, h, w[:, :f].t()), h @ w[:, f : 2 * f].t()], 1)
        w3 = w[:, 2 * f :].t().contiguous()
        return EdgeMLP.apply(
            nodes, edge, w3, self.second.weight, self.second.bias, head, head_bias, layout, reduce, options
        )


class MessageLayer(nn.Module):
    """Invariant message passing: h_i += node_mlp(h_i, sum_j e_ij m_ij / normalization)."""

    def __init__(self, features: int, edge_features: int, attention: bool) -> None:
        super().__init__()
        self.edge = EdgeNetwork(features, edge_features)
        self.node = nn.Sequential(nn.Linear(2 * features, features), nn.SiLU(), nn.Linear(features, features))
        self.attention = nn.Linear(features, 1) if attention else None

    def forward(self, h: Tensor, edge: Tensor, layout: Layout, normalization: float, options: EdgeOptions) -> Tensor:
        """h (rows, F), edge (pairs, n_e) -> updated h."""
        if self.attention is None:
            zero = h.new_zeros(())
            total = self.edge(h, edge, layout, h.new_zeros(h.shape[1]), zero, "sum", options)
        else:
            head, bias = self.attention.weight.view(-1), self.attention.bias.view(())
            total = self.edge(h, edge, layout, head, bias, "attend", options)
        return h + self.node(torch.cat([h, total / normalization], 1))


class CoordinateLayer(nn.Module):
    """Equivariant update: x_i += sum_j u_ij p_ij / normalization."""

    def __init__(self, features: int, edge_features: int, tanh: bool) -> None:
        super().__init__()
        self.edge = EdgeNetwork(features, edge_features)
        self.out = nn.Linear(features, 1, bias=False)
        nn.init.xavier_uniform_(self.out.weight, gain=0.001)
        self.tanh = tanh

    def forward(
        self,
        h: Tensor,
        x: Tensor,
        direction: Tensor,
        edge: Tensor,
        layout: Layout,
        normalization: float,
        options: EdgeOptions,
    ) -> Tensor:
        """h (rows, F), x (rows, 3), direction u (pairs, 3), edge (pairs, n_e) -> updated x."""
        p = self.edge(h, edge, layout, self.out.weight.view(-1), h.new_zeros(()), "score", options)
        if self.tanh:
            p = torch.tanh(p) * COORDINATE_RANGE
        p = p * layout.pair_weight.to(p.dtype)
        return x + layout.sum_senders(direction * p.unsqueeze(1)) / normalization


class EquivariantBlock(nn.Module):
    """`sublayers` message layers, then one coordinate update, all on the same distances."""

    def __init__(self, features: int, edge_features: int, sublayers: int, attention: bool, tanh: bool) -> None:
        super().__init__()
        self.messages = nn.ModuleList(MessageLayer(features, edge_features, attention) for _ in range(sublayers))
        self.coordinates = CoordinateLayer(features, edge_features, tanh)


class EGNN(nn.Module):
    """Noise prediction on packed rows.

    inputs: size of [z_h, t/T, context]; outputs: its columns come back through embedding_out. `dtype` (for example
    torch.bfloat16) is the precision of the large matrix products; None keeps that of the weights. With `compiled` the
    functions of the pairs go through torch.compile, which is meant for CUDA: on a CPU it did not pay.
    """

    def __init__(
        self,
        inputs: int,
        features: int,
        layers: int,
        sublayers: int = 1,
        attention: bool = True,
        tanh: bool = True,
        norm_constant: float = 1.0,
        sin_embedding: bool = False,
        normalization_factor: float = 1.0,
        aggregation: str = "sum",
    ) -> None:
        super().__init__()
        if aggregation not in ("sum", "mean"):
            raise ValueError(f"unknown aggregation {aggregation!r}: expected 'sum' or 'mean'")
        self.norm_constant, self.normalization_factor, self.aggregation = (
            norm_constant,
            normalization_factor,
            aggregation,
        )
        self.distance_embedding = SinusoidalDistance() if sin_embedding else None
        edge_features = 2 * (self.distance_embedding.size if self.distance_embedding else 1)
        self.embedding = nn.Linear(inputs, features)
        self.embedding_out = nn.Linear(features, inputs)
        self.blocks = nn.ModuleList(
            EquivariantBlock(features, edge_features, sublayers, attention, tanh) for _ in range(layers)
        )
        self.dtype: torch.dtype | None = None
        self.compiled = False

    def forward(self, x: Tensor, h: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """x (rows, 3), h (rows, inputs) -> coordinates after all blocks (rows, 3), features (rows, inputs)."""
        # EDM's mean divides by the padded number of atoms, so that its result depends on the padding
        normalization = self.normalization_factor if self.aggregation == "sum" else float(layout.shape[1])
        h = self.embedding(h)
        d0, options = None, EdgeOptions(self.dtype, self.compiled)
        for block in self.blocks:
            assert isinstance(block, EquivariantBlock)
            difference = layout.differences(x)
            squared = difference.square().sum(1, keepdim=True)
            direction = difference / (torch.sqrt(squared + 1e-8) + self.norm_constant)
            distance = self.distance_embedding(squared) if self.distance_embedding else squared
            d0 = distance if d0 is None else d0
            edge = torch.cat([distance, d0], 1)
            for layer in block.messages:
                h = layer(h, edge, layout, normalization, options)
            x = block.coordinates(h, x, direction, edge, layout, normalization, options)
        return x, self.embedding_out(h)


class SinusoidalDistance(nn.Module):
    """sin and cos of the distance at six frequencies 2 pi 4^k / 15 (EDM's sin_embedding); no gradient passes."""

    size = 12

    def forward(self, squared: Tensor) -> Tensor:
        """Squared distances (pairs, 1) -> (pairs, 12)."""
        frequency = 2 * math.pi * 4.0 ** torch.arange(6, device=squared.device, dtype=squared.dtype) / 15
        phase = torch.sqrt(squared + 1e-8) * frequency
        return torch.cat([phase.sin(), phase.cos()], 1).detach()


class GNN(nn.Module):
    """EDM's non-equivariant baseline (gnn_dynamics): messages between all rows of the padded batch, self included.

    It has no pair mask in the public code, so its output depends on the padding; kept for its checkpoints only.
    """

    def __init__(
        self,
        inputs: int,
        features: int,
        layers: int,
        attention: bool = True,
        normalization_factor: float = 1.0,
        aggregation: str = "sum",
    ) -> None:
        super().__init__()
        self.normalization_factor, self.aggregation = normalization_factor, aggregation
        self.embedding = nn.Linear(3 + inputs, features)
        self.embedding_out = nn.Linear(features, 3 + inputs)
        self.messages = nn.ModuleList(MessageLayer(features, 0, attention) for _ in range(layers))

    def forward(self, x: Tensor, h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, N, 3), h (B, N, inputs), weight (B, N, 1) the mask as numbers -> new x and h of the same shapes."""
        b, n = x.shape[:2]
        layout = Layout.complete(b, n, x.device)
        normalization = self.normalization_factor if self.aggregation == "sum" else float(n)
        rows = self.embedding(layout.pack(torch.cat([x, h], -1)))
        row_weight = layout.pack(weight)
        edge = rows.new_zeros(layout.pairs, 0)
        for layer in self.messages:
            rows = layer(rows, edge, layout, normalization, EdgeOptions()) * row_weight
        out = layout.unpack(self.embedding_out(rows))
        return out[..., :3], out[..., 3:]
