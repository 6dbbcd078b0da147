"""The two-layer edge network of EGNN, over all pairs of atoms: where 97 % of the time goes.

Two things make it fast. The first layer is factorised, W [h_i, h_j, e_ij] + b = (W_1 h_i + b) + W_2 h_j + W_3 e_ij, so
that its matrix products are per atom and not per pair. And training keeps nothing per pair and feature: the backward
pass recomputes each block, which costs less than memory traffic does. torch.compile may fuse the functions of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from elign_lab.denoiser.layout import Block, Layout

# Graphs that torch.compile may keep: three reductions, each for one and for several molecules in a block, for small and
# large blocks and for two precisions, with room for those of other models in the process.
_COMPILED_GRAPHS = 64


class EdgeOptions(NamedTuple):
    """How the pairs are computed: dtype of the large matrix products (None: that of the weights), torch.compile."""

    dtype: torch.dtype | None = None
    compiled: bool = False


class EdgeWeights(NamedTuple):
    """w3 (n_e, F) of the edge features; second layer w2 (F, F), b2 (F,); head (F,) and its bias ()."""

    w3: Tensor
    w2: Tensor
    b2: Tensor
    head: Tensor
    head_bias: Tensor


class EdgeMLP(torch.autograd.Function):
    """m_ij = silu(W2 silu(W1 [h_i, h_j, e_ij] + b1) + b2), and what EGNN does with it.

    nodes (rows, 2F): the factorised first layer, receiver part (with the bias) and sender part; edge (pairs, n_e); the
    five EdgeWeights; layout; options. `reduce`:
      'sum'    sum_j w_ij m_ij                          -> (rows, F)   (head unused)
      'attend' sum_j w_ij sigmoid(head.m_ij + bias) m_ij -> (rows, F)
      'score'  head.m_ij                                 -> (pairs,)
    """

    @staticmethod
    def forward(ctx, nodes, edge, w3, w2, b2, head, head_bias, layout: Layout, reduce: str, options: EdgeOptions):
        """One pass over the blocks; the inputs are saved, the activations are not."""
        f, dtype = w2.shape[0], options.dtype or w2.dtype
        # detached: torch.compile makes one graph for inputs that want a gradient and one for those that do not
        edge, w3, head, head_bias = edge.detach(), w3.detach(), head.detach(), head_bias.detach()
        receiver, sender = nodes[:, :f].contiguous(), nodes[:, f:].contiguous()
        weights = EdgeWeights(w3, w2.detach().to(dtype), b2.detach().to(dtype), head.to(dtype), head_bias)
        forward_block = _compile(_forward_block) if options.compiled else _forward_block
        out = nodes.new_empty(layout.pairs if reduce == "score" else (layout.rows, f))
        for b in layout.blocks:
            rows, pairs = slice(b.start, b.stop), slice(b.pair_start, b.pair_stop)
            pair_weight = _pair_weight(b, nodes.dtype, options.compiled)
            part = pairs if reduce == "score" else rows
            square = (b.graphs, b.size, f)
            out[part] = forward_block(
                receiver[rows].view(square), sender[rows].view(square), edge[pairs], pair_weight, weights, reduce
            )
        ctx.save_for_backward(receiver, sender, edge, w3, w2, b2, head, head_bias)
        ctx.layout, ctx.reduce, ctx.options = layout, reduce, options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Recompute the activations of each block and accumulate the gradients of all inputs."""
        receiver, sender, edge, w3, w2, b2, head, head_bias = (saved.detach() for saved in ctx.saved_tensors)
        f, dtype = w2.shape[0], ctx.options.dtype or w2.dtype
        weights = EdgeWeights(w3, w2.to(dtype), b2.to(dtype), head.to(dtype), head_bias)
        backward_block = _compile(_backward_block) if ctx.options.compiled else _backward_block
        d_nodes = receiver.new_empty(ctx.layout.rows, 2 * f)
        d_edge = torch.empty_like(edge)
        totals = EdgeWeights(*(torch.zeros_like(w) for w in (w3, w2, b2, head, head_bias)))
        for b in ctx.layout.blocks:
            rows, pairs = slice(b.start, b.stop), slice(b.pair_start, b.pair_stop)
            pair_weight = _pair_weight(b, grad.dtype, ctx.options.compiled)
            square = (b.graphs, b.size, f)
            part = grad[pairs] if ctx.reduce == "score" else grad[rows]
            d_nodes[rows, :f], d_nodes[rows, f:], d_edge[pairs], d_weights = backward_block(
                part,
                receiver[rows].view(square),
                sender[rows].view(square),
                edge[pairs],
                pair_weight,
                weights,
                ctx.reduce,
            )
            for total, d_weight in zip(totals, d_weights, strict=True):
                total += d_weight
        return d_nodes, d_edge, *totals, None, None, None


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _COMPILED_GRAPHS)
    return torch.compile(function, dynamic=True)


def _pair_weight(block: Block, dtype: torch.dtype, whole: bool) -> Tensor:
    """(graphs, n, n); `whole`: also in memory, so that torch.compile meets one kind of tensor and not two."""
    weight = block.pair_weight.to(dtype).expand(block.graphs, block.size, block.size)
    return weight.contiguous() if whole else weight


# In the functions of a block all shapes are products of g, n and F, without -1 and without division: torch.compile
# takes minutes to prove what a division gives.


def _first_layer(receiver: Tensor, sender: Tensor, edge: Tensor, w3: Tensor) -> Tensor:
    """Pre-activation of the factorised first layer for one block, (pairs, F)."""
    g, n, f = receiver.shape
    return (receiver.view(g, n, 1, f) + sender.view(g, 1, n, f)).view(g * n * n, f).addmm_(edge, w3)


def _forward_block(
    receiver: Tensor, sender: Tensor, edge: Tensor, pair_weight: Tensor, weights: EdgeWeights, reduce: str
) -> Tensor:
    """One block of g molecules: receiver, sender (g, n, F), edge (g n n, n_e), pair_weight (g, n, n)."""
    w3, w2, b2, head, head_bias = weights
    g, n, f = receiver.shape
    # in place, because that is as little memory as possible and no gradient passes here
    first = silu(_first_layer(receiver, sender, edge, w3), inplace=True).to(w2.dtype)
    m = silu(torch.addmm(b2, first, w2.t()), inplace=True)
    if reduce == "score":
        return torch.mv(m, head).to(receiver.dtype)
    if reduce == "attend":
        pair_weight = torch.sigmoid(torch.mv(m, head).to(pair_weight.dtype) + head_bias).view(g, n, n) * pair_weight
    total = torch.bmm(pair_weight.to(m.dtype).reshape(g * n, 1, n), m.view(g * n, n, f))
    return total.view(g * n, f).to(receiver.dtype)


def _backward_block(
    grad: Tensor,
    receiver: Tensor,
    sender: Tensor,
    edge: Tensor,
    pair_weight: Tensor,
    weights: EdgeWeights,
    reduce: str,
) -> tuple[Tensor, Tensor, Tensor, EdgeWeights]:
    """Gradients of receiver and sender (g n, F), of edge (pairs, n_e) and of the weights, for grad of the result."""
    w3, w2, b2, head, head_bias = weights
    g, n, f = receiver.shape
    silu_backward = torch.ops.aten.silu_backward
    first = _first_layer(receiver, sender, edge, w3)
    activation = silu(first).to(w2.dtype)
    second = torch.addmm(b2, activation, w2.t())
    m = silu(second)
    if reduce == "sum":
        d_m, d_score = _outer(pair_weight, grad), None
    elif reduce == "score":
        d_m, d_score = torch.outer(grad, head.to(grad.dtype)), grad
    else:
        d_m, d_score = _attend_backward(grad, m, pair_weight, head, head_bias)
    d_head = torch.zeros_like(head) if d_score is None else torch.mv(m.t(), d_score.to(m.dtype))
    d_bias = d_score.sum() if d_score is not None and reduce == "attend" else torch.zeros_like(head_bias)
    d_second = silu_backward(d_m.to(w2.dtype), second)
    d_w2 = d_second.t() @ activation
    d_first = silu_backward((d_second @ w2).to(first.dtype), first)
    square = d_first.view(g, n, n, f)
    d_weights = EdgeWeights(edge.t() @ d_first, d_w2, d_second.sum(0), d_head, d_bias)
    return square.sum(2).view(g * n, f), square.sum(1).view(g * n, f), d_first @ w3.t(), d_weights


def _outer(pair_weight: Tensor, grad: Tensor) -> Tensor:
    """Gradient of sum_j a_ij m_ij with respect to m: a (g, n, n), grad (g n, F) -> (g n n, F)."""
    g, n, _ = pair_weight.shape
    f = grad.shape[1]
    return torch.bmm(pair_weight.reshape(g * n, n, 1), grad.reshape(g * n, 1, f)).view(g * n * n, f)


def _attend_backward(
    grad: Tensor, m: Tensor, pair_weight: Tensor, head: Tensor, head_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of the attended sum with respect to m (pairs, F) and to the score (pairs,)."""
    g, n, _ = pair_weight.shape
    f = m.shape[1]
    gate = torch.sigmoid(torch.mv(m, head).to(grad.dtype) + head_bias)
    d_attention = torch.bmm(m.view(g * n, n, f), grad.to(m.dtype).reshape(g * n, f, 1)).view(g * n * n).to(grad.dtype)
    d_score = d_attention * pair_weight.reshape(g * n * n) * gate * (1 - gate)
    d_m = _outer(gate.view(g, n, n) * pair_weight, grad)
    return torch.addr(d_m, d_score, head.to(grad.dtype)), d_score
