"""EDM's network in plain tensor algebra: every pair of every padded row, nothing factorised. To read, and to compare.

It computes what Denoiser.eps computes, with the weights of the same model, from the formulas in denoiser/egnn.py. That
it is about ten times slower is what the packed layout and the factorised first layer are for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from elign_lab.denoiser import Denoiser
from elign_lab.denoiser.egnn import COORDINATE_RANGE, EGNN, EdgeNetwork, EquivariantBlock, MessageLayer
from elign_lab.molecules import zero_com


def padded_eps(model: Denoiser, z: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    """Predicted noise, z (B, N, 3 + F), t (B,) integer steps, mask (B, N) -> (B, N, 3 + F).

    Raises ValueError for a variant of EDM that the released models do not use.
    """
    config, net = model.config, model.network
    if not isinstance(net, EGNN) or config.sin_embedding or config.aggregation != "sum" or config.context:
        raise ValueError("padded_eps covers the EGNN of the released QM9 model: no sin_embedding, mean or context")
    n = mask.shape[1]
    real = mask.unsqueeze(-1).to(z.dtype)
    different = ~torch.eye(n, dtype=torch.bool, device=mask.device)
    pair = (mask[:, :, None] & mask[:, None, :] & different).unsqueeze(-1).to(z.dtype)

    start = x = z[..., :3] * real
    columns = [z[..., 3:]]
    if config.condition_time:
        columns.append((t.to(z.dtype) / config.timesteps).view(-1, 1, 1).expand(-1, n, 1))
    h = net.embedding(torch.cat(columns, -1)) * real
    d0 = None
    for block in net.blocks:
        assert isinstance(block, EquivariantBlock)
        difference = x[:, :, None] - x[:, None, :]
        d = difference.square().sum(-1, keepdim=True)
        d0 = d if d0 is None else d0
        u = difference / (torch.sqrt(d + 1e-8) + config.norm_constant)
        for layer in block.messages:
            assert isinstance(layer, MessageLayer)
            m = _edge_mlp(layer.edge, h, d, d0)
            if layer.attention is not None:
                m = torch.sigmoid(layer.attention(m)) * m
            total = (m * pair).sum(2) / config.normalization_factor
            h = (h + layer.node(torch.cat([h, total], -1))) * real
        p = block.coordinates.out(_edge_mlp(block.coordinates.edge, h, d, d0))
        if config.tanh:
            p = torch.tanh(p) * COORDINATE_RANGE
        x = (x + (u * p * pair).sum(2) / config.normalization_factor) * real
    h = net.embedding_out(h)[..., : config.channels] * real
    return torch.cat([zero_com(x - start, mask), h], -1)


def _edge_mlp(edge: EdgeNetwork, h: Tensor, d: Tensor, d0: Tensor) -> Tensor:
    """silu(W2 silu(W1 [h_i, h_j, d_ij, d0_ij] + b1) + b2) for all pairs: (B, N, F) -> (B, N, N, F)."""
    b, n, f = h.shape
    receiver = h[:, :, None, :].expand(b, n, n, f)
    sender = h[:, None, :, :].expand(b, n, n, f)
    return silu(edge.second(silu(edge.first(torch.cat([receiver, sender, d, d0], -1)))))
