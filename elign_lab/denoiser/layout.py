"""How the molecules of a batch are arranged for the network, so that almost no work is spent on padding.

Molecules are sorted by size and cut into blocks of equal (or nearly equal) size. Within a block the pairs of atoms form
a dense (graphs, n, n) array; all atoms of all blocks lie one after another in packed rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elign_lab.molecules import to_device

# Pairs per block: on a CPU the activations of a block should stay in cache, on a GPU a block should fill the device.
CPU_BLOCK_PAIRS = 2048
GPU_BLOCK_PAIRS = 1 << 19
# On a GPU one padded block is faster than several launches until there is this much work; then padding costs more.
GPU_ONE_BLOCK = 1 << 16
GPU_PADDING = 0.3


@dataclass(frozen=True)
class Block:
    """`graphs` molecules of `size` rows each: packed rows start..stop, pairs pair_start..pair_stop (receiver-major)."""

    graphs: int
    size: int
    start: int
    stop: int
    pair_start: int
    pair_stop: int
    pair_weight: Tensor  # (1 or graphs, size, size): 1 for a pair of different real atoms, else 0


class Layout:
    """Packing plan of a batch, from its mask (B, N). Made once per batch.

    block_pairs bounds the pairs of a block; `padding` is the largest share of padded pairs a block may have to take in
    molecules of another size (0: equal sizes only). The plan is made on the host: for a mask on a GPU that is the only
    synchronisation, and with the mask on the host and `device` there is none.
    """

    def __init__(
        self,
        mask: Tensor,
        block_pairs: int | None = None,
        padding: float | None = None,
        device: torch.device | None = None,
    ) -> None:
        if mask.dim() != 2:
            raise ValueError(f"mask must have shape (B, N), got {tuple(mask.shape)}")
        device = mask.device if device is None else device
        host = mask.detach().cpu().numpy().astype(bool)
        sizes = host.sum(1)
        if block_pairs is None:
            block_pairs = CPU_BLOCK_PAIRS if device.type == "cpu" else GPU_BLOCK_PAIRS
        if padding is None:
            padding = 0.0 if device.type == "cpu" else 1.0 if int((sizes**2).sum()) < GPU_ONE_BLOCK else GPU_PADDING
        self.mask, self.shape = to_device(mask, device), tuple(mask.shape)
        self._shares: dict[int, list[tuple[Tensor, Layout]]] = {}
        nowhere = host.size  # index of a row of zeros appended to the flat batch
        # real atoms of a molecule first, in the order of its row
        columns = np.argsort(~host, axis=1, kind="stable")
        index, molecule, blocks, weights, row, pair = [], [], [], [], 0, 0
        for members, n in _plan(sizes, block_pairs, padding):
            chosen = np.asarray(members)
            real = np.arange(n) < sizes[chosen][:, None]
            local = np.where(real, chosen[:, None] * host.shape[1] + columns[chosen, :n], nowhere)
            if real.all():
                real = real[:1]
            weight = (real[:, :, None] & real[:, None, :] & ~np.eye(n, dtype=bool)).astype(np.float32)
            pair_weight = to_device(torch.from_numpy(weight), device)
            g = len(chosen)
            blocks.append(Block(g, n, row, row + g * n, pair, pair + g * n * n, pair_weight))
            weights.append(pair_weight.expand(g, n, n).reshape(-1))
            index.append(local.reshape(-1))
            molecule.append(np.repeat(chosen, n))
            row, pair = row + g * n, pair + g * n * n
        self.blocks, self.rows, self.pairs = blocks, row, pair
        flat = np.concatenate(index) if index else np.zeros(0, dtype=int)
        owner = np.concatenate(molecule) if molecule else np.zeros(0, dtype=int)
        self.index = to_device(torch.from_numpy(flat.astype(np.int64)), device)
        self.molecule = to_device(torch.from_numpy(owner.astype(np.int64)), device)
        self.row_mask = (self.index != nowhere).float().unsqueeze(1)
        self.counts = to_device(torch.from_numpy(sizes.clip(1).astype(np.float32)), device).unsqueeze(1)
        self.pair_weight = torch.cat(weights) if weights else torch.zeros(0, device=device)

    @classmethod
    def complete(cls, graphs: int, size: int, device: torch.device) -> Layout:
        """All pairs of all rows of a padded batch, self pairs included (the graph of EDM's gnn_dynamics)."""
        layout = cls(torch.ones(graphs, size, dtype=torch.bool, device=device))
        for block in layout.blocks:
            block.pair_weight.fill_(1.0)
        return layout

    def shares(self, threads: int) -> list[tuple[Tensor, Layout]]:
        """The molecules dealt out by size: for each thread their indices and their layout, made once."""
        if threads not in self._shares:
            order = torch.argsort(self.mask.sum(1), stable=True)
            members = [order[k::threads] for k in range(threads)]
            self._shares[threads] = [(m, Layout(self.mask[m])) for m in members]
        return self._shares[threads]

    def pack(self, dense: Tensor) -> Tensor:
        """(B, N, D) -> packed rows (rows, D); padding rows are zero."""
        flat = dense.reshape(-1, dense.shape[-1])
        return torch.nn.functional.pad(flat, (0, 0, 0, 1))[self.index]

    def unpack(self, packed: Tensor) -> Tensor:
        """Packed rows (rows, D) -> (B, N, D); padding is zero."""
        b, n = self.shape
        out = packed.new_zeros(b * n + 1, packed.shape[-1]).index_copy(0, self.index, packed)
        return out[:-1].view(b, n, -1)

    def center(self, x: Tensor) -> Tensor:
        """Subtract the mean over the real atoms of each molecule from packed rows (rows, 3); padding becomes zero."""
        x = x * self.row_mask.to(x.dtype)
        squares = [(x[b.start : b.stop].view(b.graphs, b.size, -1), b.size) for b in self.blocks]
        totals = [square.sum(1).repeat_interleave(n, 0) for square, n in squares]
        if not totals:
            return x
        return x - torch.cat(totals) / self.counts.to(x.dtype)[self.molecule] * self.row_mask.to(x.dtype)

    # Sums and differences by block and not by index: on a GPU an indexed sum has no fixed order, so no fixed rounding.
    def differences(self, x: Tensor) -> Tensor:
        """x_i - x_j of each pair, for rows x (rows, D): (pairs, D)."""
        parts = []
        for b in self.blocks:
            square = x[b.start : b.stop].view(b.graphs, b.size, -1)
            parts.append((square.unsqueeze(2) - square.unsqueeze(1)).flatten(0, 2))
        return torch.cat(parts) if parts else x.new_zeros(0, x.shape[1])

    def sum_senders(self, pairs: Tensor) -> Tensor:
        """sum_j of values (pairs, D) of the pairs i, j: (rows, D)."""
        parts = [pairs[b.pair_start : b.pair_stop].view(b.graphs * b.size, b.size, -1).sum(1) for b in self.blocks]
        return torch.cat(parts) if parts else pairs.new_zeros(0, pairs.shape[1])


def _plan(sizes: np.ndarray, block_pairs: int, padding: float) -> list[tuple[list[int], int]]:
    """Greedy blocks (members, rows per member) over the molecules sorted by size; empty molecules have no rows."""
    order = [int(m) for m in np.argsort(sizes, kind="stable") if sizes[m] > 0]
    plan: list[tuple[list[int], int]] = []
    members: list[int] = []
    real_pairs = 0
    for m in order:
        n = int(sizes[m])
        total = (len(members) + 1) * n * n
        wasted = 1 - (real_pairs + n * n) / total
        if members and (total > block_pairs or wasted > padding):
            plan.append((members, int(sizes[members[-1]])))
            members, real_pairs = [], 0
        members.append(m)
        real_pairs += n * n
    if members:
        plan.append((members, int(sizes[members[-1]])))
    return plan
