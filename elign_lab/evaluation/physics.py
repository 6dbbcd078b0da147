"""What an oracle says of generated molecules: formation energy per atom and force RMS (paper section 4).

The oracle that judges should not be the one that the model was aligned to: train with a force field, judge with DFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elign_lab.molecules import MoleculeBatch
from elign_lab.shapes import Shapes

if TYPE_CHECKING:
    from elign_lab.oracles import Oracle


@dataclass(frozen=True, repr=False)
class Physics(Shapes):
    """Formation energy per atom (B,) in eV and force RMS (B,) in eV/Angstrom; NaN where `ok` (B,) is False.

    status: "ok", or the oracle's reason, per molecule.
    """

    energy_per_atom: Tensor
    f_rms: Tensor
    ok: Tensor
    status: tuple[str, ...]

    @property
    def energy_per_atom_median(self) -> float:
        """Median over the molecules that the oracle could evaluate, in eV; NaN when there is none."""
        return float(self.energy_per_atom[self.ok].quantile(0.5)) if self.ok.any() else float("nan")

    @property
    def f_rms_median(self) -> float:
        """Median over the molecules that the oracle could evaluate, in eV/Angstrom; NaN when there is none."""
        return float(self.f_rms[self.ok].quantile(0.5)) if self.ok.any() else float("nan")

    @property
    def failures(self) -> int:
        """Number of molecules that the oracle could not evaluate."""
        return int((~self.ok).sum())


def physics(batch: MoleculeBatch, oracle: Oracle) -> Physics:
    """Formation energy per atom and force RMS of each molecule by an oracle.

    Molecules that the oracle cannot evaluate are marked, never dropped. Raises ValueError when the oracle has no
    isolated-atom energy for an element of an evaluated molecule.
    """
    # loaded here, because the widgets and the bare metrics need no oracle
    from elign_lab.oracles import f_rms

    result = oracle(batch)
    ok = result.ok.bool().cpu()
    energy = oracle.formation_energy_per_atom(result.energy, batch.numbers, batch.mask).detach().cpu().double()
    force = f_rms(result.forces, batch.mask).detach().cpu().double()
    nan = torch.tensor(torch.nan, dtype=torch.float64)
    return Physics(torch.where(ok, energy, nan), torch.where(ok, force, nan), ok, tuple(result.status))
