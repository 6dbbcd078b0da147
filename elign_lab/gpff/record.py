"""The step record of pseudo-force samplers: StepRecord without type channels, and what a noise-free network adds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from elign_lab.molecules import MoleculeBatch
from elign_lab.sampling.record import StepRecord


@dataclass(frozen=True, repr=False)
class ForceRecord(StepRecord):
    """One update. The states are positions (B, N, 3) in Angstrom; t counts the updates that are left after this one.

    As in StepRecord z_s = mean + sigma * noise, projected; the last update has t = 0, s = -1, and z_s is the result.
    eps is (z_t - x0_hat) / sigma_t with the level sigma_t that the sampler used. As every molecule may have
    its own level, sigma is 1, and noise is in Angstrom, of standard deviation amplitude (B,)
    (0 for a deterministic update).

    numbers (B, N); sigma_hat (B,): level read off the force at z_t, in Angstrom; active (B,): molecules that this
    update moved (the others had stopped); spent (B,): network evaluations of each molecule so far.
    """

    numbers: Tensor
    amplitude: Tensor
    sigma_hat: Tensor
    active: Tensor
    spent: Tensor

    def molecules(self, of: str = "result") -> MoleculeBatch:
        """The structures after the update ('result'), before it ('noisy'), or the clean estimate ('clean')."""
        states = {"result": self.z_s, "noisy": self.z_t, "clean": self.clean}
        if of not in states:
            raise ValueError(f"molecules of {of!r}: expected one of {', '.join(states)}")
        return MoleculeBatch(self.numbers, states[of], self.mask, check=False)
