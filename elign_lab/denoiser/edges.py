"""The two-layer edge network of EGNN, over all pairs of atoms: where 97 % of the time goes.

Two things make it fast. The first layer is factorised, W [h_i, h_j, e_ij] + b = (W_1 h_i + b) + W_2 h_j + W_3 e_ij, so
that its matrix products are per atom and not per pair. And training keeps nothing per pair and feature: the backward
pass recomputes each block, which costs less than memory traffic does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from elign_lab.denoiser.layout import Block, Layout


def _first_layer(receiver: Tensor, sender: Tensor, edge: Tensor, w3: Tensor, block: Block) -> Tensor:
    """Pre-activation of the factorised first layer for one block, (pairs, F)."""
    g, n, f = block.graphs, block.size, w3.shape[1]
    return (receiver.view(g, n, 1, f) + sender.view(g, 1, n, f)).view(-1, f).addmm_(edge, w3)


def _hidden(
    receiver: Tensor, sender: Tensor, edge: Tensor, w3: Tensor, w2: Tensor, b2: Tensor, block: Block
) -> tuple[Tensor, Tensor]:
    """Pre-activations of both layers for one block, each (pairs, F). The second one may be in bfloat16."""
    first = _first_layer(receiver, sender, edge, w3, block)
    return first, torch.addmm(b2, silu(first).to(w2.dtype), w2.t())


def _messages(
    receiver: Tensor, sender: Tensor, edge: Tensor, w3: Tensor, w2: Tensor, b2: Tensor, block: Block
) -> Tensor:
    """silu(W2 silu(...) + b2) for one block, (pairs, F), with as little memory as possible (no gradient)."""
    first = _first_layer(receiver, sender, edge, w3, block)
    return silu(torch.addmm(b2, silu(first, inplace=True).to(w2.dtype), w2.t()), inplace=True)


class EdgeMLP(torch.autograd.Function):
    """m_ij = silu(W2 silu(W1 [h_i, h_j, e_ij] + b1) + b2), and what EGNN does with it.

    nodes (rows, 2F): the factorised first layer, receiver part (with the bias) and sender part; edge (pairs, n_e); w3
    (n_e, F); w2 (F, F); b2 (F,); head (F,) and head_bias () or None; layout. `reduce`:
      'sum'    sum_j w_ij m_ij                          -> (rows, F)   (head unused)
      'attend' sum_j w_ij sigmoid(head.m_ij + bias) m_ij -> (rows, F)
      'score'  head.m_ij                                 -> (pairs,)
    """

    @staticmethod
    def forward(ctx, nodes, edge, w3, w2, b2, head, head_bias, layout: Layout, reduce: str, dtype: torch.dtype):
        """One pass over the blocks; the inputs are saved, the activations are not."""
        f = w2.shape[0]
        receiver, sender = nodes[:, :f].contiguous(), nodes[:, f:].contiguous()
        low_w2, low_b2, low_head = w2.to(dtype), b2.to(dtype), head.to(dtype)
        out = nodes.new_empty(layout.pairs if reduce == "score" else (layout.rows, f))
        for b in layout.blocks:
            rows, pairs = slice(b.start, b.stop), slice(b.pair_start, b.pair_stop)
            m = _messages(receiver[rows], sender[rows], edge[pairs], w3, low_w2, low_b2, b)
            if reduce == "score":
                out[pairs] = torch.mv(m, low_head)
                continue
            weight = b.pair_weight.to(nodes.dtype).expand(b.graphs, b.size, b.size)
            if reduce == "attend":
                score = torch.mv(m, low_head).to(nodes.dtype) + head_bias
                weight = torch.sigmoid(score).view(weight.shape) * weight
            total = torch.bmm(weight.reshape(-1, 1, b.size).to(dtype), m.view(-1, b.size, f))
            out[rows] = total.view(-1, f)
        ctx.save_for_backward(receiver, sender, edge, w3, w2, b2, head, head_bias)
        ctx.layout, ctx.reduce, ctx.dtype = layout, reduce, dtype
        return out

    @staticmethod
    def backward(ctx, grad):
        """Recompute the activations of each block and accumulate the gradients of all inputs."""
        receiver, sender, edge, w3, w2, b2, head, head_bias = ctx.saved_tensors
        layout, reduce, dtype = ctx.layout, ctx.reduce, ctx.dtype
        f = w2.shape[0]
        low_w2, low_b2, low_head = w2.to(dtype), b2.to(dtype), head.to(dtype)
        d_nodes = receiver.new_empty(layout.rows, 2 * f)
        d_edge = torch.empty_like(edge)
        d_w3, d_w2, d_b2 = torch.zeros_like(w3), torch.zeros_like(w2), torch.zeros_like(b2)
        d_head, d_bias = torch.zeros_like(head), torch.zeros_like(head_bias)
        silu_backward = torch.ops.aten.silu_backward
        for b in layout.blocks:
            rows, pairs = slice(b.start, b.stop), slice(b.pair_start, b.pair_stop)
            first, second = _hidden(receiver[rows], sender[rows], edge[pairs], w3, low_w2, low_b2, b)
            m = silu(second)
            if reduce == "score":
                d_score = grad[pairs]
                d_m = torch.outer(d_score, head)
            else:
                d_m, d_score = _reduce_backward(grad[rows], m, low_head, head_bias, b, reduce)
            if d_score is not None:
                d_head += torch.mv(m.t(), d_score.to(dtype))
                d_bias += d_score.sum() if reduce == "attend" else 0
            d_second = silu_backward(d_m.to(dtype), second)
            d_w2 += d_second.t() @ silu(first).to(dtype)
            d_b2 += d_second.sum(0)
            d_first = silu_backward((d_second @ low_w2).to(first.dtype), first)
            d_w3.addmm_(edge[pairs].t(), d_first)
            torch.mm(d_first, w3.t(), out=d_edge[pairs])
            square = d_first.view(b.graphs, b.size, b.size, f)
            d_nodes[rows, :f] = square.sum(2).view(-1, f)
            d_nodes[rows, f:] = square.sum(1).view(-1, f)
        return d_nodes, d_edge, d_w3, d_w2, d_b2, d_head, d_bias, None, None, None


def _reduce_backward(
    grad: Tensor, m: Tensor, head: Tensor, head_bias: Tensor, block: Block, reduce: str
) -> tuple[Tensor, Tensor | None]:
    """Gradient of sum_j a_ij m_ij with respect to m (pairs, F) and, with attention, to its score (pairs,)."""
    f, n = m.shape[1], block.size
    weight = block.pair_weight.to(grad.dtype).expand(block.graphs, n, n)
    if reduce == "sum":
        return torch.bmm(weight.reshape(-1, n, 1), grad.view(-1, 1, f)).view(-1, f), None
    gate = torch.sigmoid(torch.mv(m, head).to(grad.dtype) + head_bias)
    attention = gate.view(weight.shape) * weight
    d_attention = torch.bmm(m.view(-1, n, f), grad.to(m.dtype).view(-1, f, 1)).view(weight.shape).to(grad.dtype)
    d_score = (d_attention * weight).reshape(-1) * gate * (1 - gate)
    d_m = torch.bmm(attention.reshape(-1, n, 1), grad.view(-1, 1, f)).view(-1, f)
    return d_m.addr_(d_score, head.to(grad.dtype)), d_score
