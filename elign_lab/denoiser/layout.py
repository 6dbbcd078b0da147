"""How the molecules of a batch are arranged for the network, so that almost no work is spent on padding.

Molecules are sorted by size and cut into blocks of equal (or nearly equal) size. Within a block the pairs of atoms form
a dense (graphs, n, n) array; all atoms of all blocks lie one after another in packed rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Pairs per block: on a CPU the activations of a block should stay in cache, on a GPU a block should fill the device.
CPU_BLOCK_PAIRS = 2048
GPU_BLOCK_PAIRS = 1 << 19


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
    """Packing plan of a batch, from its mask (B, N). Made once per batch; making it is the only host synchronisation.

    block_pairs bounds the pairs of a block; `padding` is the largest share of padded pairs a block may have to take in
    molecules of another size (0: equal sizes only).
    """

    def __init__(self, mask: Tensor, block_pairs: int | None = None, padding: float | None = None) -> None:
        if mask.dim() != 2:
            raise ValueError(f"mask must have shape (B, N), got {tuple(mask.shape)}")
        on_gpu = mask.device.type != "cpu"
        self.mask, self.shape = mask, tuple(mask.shape)
        self._shares: dict[int, list[tuple[Tensor, Layout]]] = {}
        host = mask.detach().cpu().numpy().astype(bool)
        sizes = host.sum(1)
        plan = _plan(
            sizes,
            block_pairs or (GPU_BLOCK_PAIRS if on_gpu else CPU_BLOCK_PAIRS),
            (1.0 if on_gpu else 0.0) if padding is None else padding,
        )
        nowhere = host.size  # index of a row of zeros appended to the flat batch
        index, molecule, blocks, row, pair = [], [], [], 0, 0
        for members, n in plan:
            local = np.full((len(members), n), nowhere)
            for k, m in enumerate(members):
                local[k, : sizes[m]] = m * host.shape[1] + np.flatnonzero(host[m])
            real = torch.from_numpy(local != nowhere)
            if bool(real.all()):
                real = real[:1]
            weight = (real[:, :, None] & real[:, None, :]) & ~torch.eye(n, dtype=torch.bool)
            g = len(members)
            blocks.append(Block(g, n, row, row + g * n, pair, pair + g * n * n, weight.float().to(mask.device)))
            index.append(local.reshape(-1))
            molecule.append(np.repeat(members, n))
            row, pair = row + g * n, pair + g * n * n
        self.blocks, self.rows, self.pairs = blocks, row, pair
        flat = np.concatenate(index) if index else np.zeros(0, dtype=int)
        owner = np.concatenate(molecule) if molecule else np.zeros(0, dtype=int)
        self.index = torch.from_numpy(flat.astype(np.int64)).to(mask.device)
        self.molecule = torch.from_numpy(owner.astype(np.int64)).to(mask.device)
        self.row_mask = (self.index != nowhere).float().unsqueeze(1)
        self.counts = torch.from_numpy(sizes.clip(1).astype(np.float32)).to(mask.device).unsqueeze(1)
        self.receiver, self.sender = self._pair_rows(mask.device)
        weights = [b.pair_weight.expand(b.graphs, b.size, b.size).reshape(-1) for b in blocks]
        self.pair_weight = torch.cat(weights) if weights else mask.new_zeros(0, dtype=torch.float32)

    @classmethod
    def complete(cls, graphs: int, size: int, device: torch.device) -> Layout:
        """All pairs of all rows of a padded batch, self pairs included (the graph of EDM's gnn_dynamics)."""
        layout = cls(torch.ones(graphs, size, dtype=torch.bool, device=device))
        for block in layout.blocks:
            block.pair_weight.fill_(1.0)
        return layout

    def _pair_rows(self, device: torch.device) -> tuple[Tensor, Tensor]:
        receiver, sender = [], []
        for b in self.blocks:
            rows = torch.arange(b.start, b.stop, device=device).view(b.graphs, b.size)
            square = (b.graphs, b.size, b.size)
            receiver.append(rows[:, :, None].expand(square).reshape(-1))
            sender.append(rows[:, None, :].expand(square).reshape(-1))
        if not receiver:
            empty = torch.zeros(0, dtype=torch.long, device=device)
            return empty, empty
        return torch.cat(receiver), torch.cat(sender)

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
        mask = self.row_mask.to(x.dtype)
        total = x.new_zeros(self.shape[0], x.shape[1]).index_add(0, self.molecule, x * mask)
        return (x - (total / self.counts.to(x.dtype))[self.molecule]) * mask


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
