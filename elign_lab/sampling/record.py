"""What a sampler yields at each step: the one object that curves, viewer, tests and rollouts share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from elign_lab.denoiser import Denoiser
from elign_lab.molecules import MoleculeBatch
from elign_lab.shapes import Shapes


@dataclass(frozen=True, repr=False)
class StepRecord(Shapes):
    """One reverse step from t to s. All states are (B, N, 3 + F) in the scaling of the model.

    z_s = mean + sigma * noise, projected; clean is x0_hat(z_t); eps the predicted noise. The last step, the decoding,
    has t = 0 and s = -1: its mean is x0_hat(z_0), and its z_s holds the final positions. `evaluations` counts the
    network calls so far.
    """

    t: int
    s: int
    z_t: Tensor
    eps: Tensor
    clean: Tensor
    mean: Tensor
    sigma: float
    noise: Tensor
    z_s: Tensor
    mask: Tensor
    evaluations: int


class Trajectory:
    """The records of one sampling run, and the molecules in them."""

    def __init__(self, model: Denoiser, records: Iterable[StepRecord]) -> None:
        self.model = model
        self.records = list(records)
        if not self.records:
            raise ValueError("a trajectory needs at least one step record")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, step: int) -> StepRecord:
        return self.records[step]

    def frames(self, of: str = "clean") -> list[MoleculeBatch]:
        """One MoleculeBatch a step: of the clean estimates ('clean') or of the noisy states ('z')."""
        if of not in ("clean", "z"):
            raise ValueError(f"frames of {of!r}: expected 'clean' (x0_hat) or 'z' (the noisy state)")
        states = [r.clean if of == "clean" else r.z_t for r in self.records]
        return [self.model.decode(z, z[..., :3], r.mask) for z, r in zip(states, self.records, strict=True)]

    def type_weights(self, of: str = "clean") -> Tensor:
        """Soft types (steps, B, N, elements): the type channels of each state, clipped to [0, 1] and normalised.

        An atom without a positive type channel, as there are in pure noise, is all types alike.
        """
        k = len(self.model.config.elements)
        states = torch.stack([r.clean if of == "clean" else r.z_t for r in self.records])
        weights = (states[..., 3 : 3 + k] * self.model.config.scale[1]).clamp(0, 1) + 1e-6
        return weights / weights.sum(-1, keepdim=True)

    def final(self) -> MoleculeBatch:
        """The molecules at the end; needs the decoding step."""
        return decode_record(self.model, self.records[-1])


def decode_record(model: Denoiser, record: StepRecord) -> MoleculeBatch:
    """Molecules of the last record of a sampler (types from z_0, positions from the decoding step)."""
    if record.s != -1:
        raise ValueError(f"the record of step {record.t} -> {record.s} is not the decoding step (0 -> -1)")
    return model.decode(record.z_t, record.z_s, record.mask)
