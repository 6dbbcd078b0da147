"""The DFT check: what density functional theory says of one molecule, next to the cheap oracles."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import ipywidgets
import torch

from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles.dft import DFTOracle
from elign_lab.oracles.protocol import Oracle, f_rms
from elign_lab.widgets.live import Live
from elign_lab.widgets.panels.base import Panel, badge, escape, headed_table, number
from elign_lab.widgets.viewer import MoleculeViewer

BASIS = "6-31g(d)"
# processor time of one core: 8, 31 and 30 s for ethanol, isobutanol and benzene (54, 90 and 96 functions)
_SECONDS, _FUNCTIONS, _POWER = 8.0, 54, 2.4


# ---------------------------------------------------------------------- pure functions
@dataclass(frozen=True)
class Verdict:
    """What one oracle says of a molecule: formation energy per atom (eV), f_RMS (eV/Angstrom), forces (N, 3)."""

    oracle: str
    energy_per_atom: float
    f_rms: float
    forces: torch.Tensor
    status: str
    seconds: float


def basis_functions(molecule: MoleculeBatch) -> int:
    """Number of 6-31G(d) functions of the first molecule: what the cost of DFT depends on."""
    from pyscf import gto

    numbers, x = molecule.arrays()[0]
    atoms = [(int(z), tuple(row)) for z, row in zip(numbers, x.tolist(), strict=True)]
    return int(gto.M(atom=atoms, basis=BASIS, spin=None, verbose=0).nao)


def expected_seconds(functions: int) -> float:
    """Processor time of energy and forces at B3LYP/6-31G(d) on one core, within a factor of two or three."""
    return _SECONDS * (functions / _FUNCTIONS) ** _POWER


def judge(molecule: MoleculeBatch, name: str, oracle: Oracle) -> Verdict:
    """Ask one oracle about the first molecule of a batch; a failure is in the status, with NaN."""
    clock = time.perf_counter()
    one = molecule[:1].to(dtype=torch.float64)
    result = oracle(one)
    energy = oracle.formation_energy_per_atom(result.energy, one.numbers, one.mask)
    force = f_rms(result.forces, one.mask)
    seconds = time.perf_counter() - clock
    return Verdict(name, float(energy[0]), float(force[0]), result.forces[0].cpu(), result.status[0], seconds)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine between two force fields (N, 3), taken as one vector: 1 when they pull the same way everywhere."""
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def verdict_html(verdicts: list[Verdict], reference: str = "dft") -> str:
    """One row an oracle; forces are compared with those of `reference` where it has answered."""
    by_name = {verdict.oracle: verdict for verdict in verdicts}
    exact = by_name.get(reference)
    rows = []
    for v in verdicts:
        same = "" if exact is None or v is exact else number(cosine(v.forces, exact.forces), 3)
        cells = (number(v.energy_per_atom), number(v.f_rms), same, f"{v.seconds:.2f}")
        status = badge(v.status, "good" if v.status == "ok" else "bad")
        rows.append(f"<tr><td>{escape(v.oracle)}</td>{''.join(f'<td>{c}</td>' for c in cells)}<td>{status}</td></tr>")
    names = ("oracle", "E_f (eV/atom)", "f_RMS (eV/Å)", "cos of forces with DFT", "seconds", "status")
    return headed_table(names, rows)


# ---------------------------------------------------------------------- the panel
class DFTCheck(Panel):
    """B3LYP/6-31G(d) energy and forces of one molecule next to other oracles, on a worker thread.

    molecule: a batch (its first molecule) or SMILES. oracles: the cheap ones to compare with. dft: default
    `DFTOracle()` with one worker process; it is asked last. The cost is shown before; Stop ends after the oracle in
    hand. `verdicts` are the answers so far. Raises ValueError for what is not a molecule.
    """

    def __init__(
        self, molecule: MoleculeBatch | str, oracles: Mapping[str, Oracle], *, dft: Oracle | None = None
    ) -> None:
        self.molecule = MoleculeBatch.from_smiles(molecule) if isinstance(molecule, str) else molecule[:1]
        if len(self.molecule) == 0:
            raise ValueError("the batch is empty: expected at least one molecule")
        self._oracles = {**oracles, "dft": dft or DFTOracle(workers=1)}
        self.verdicts: list[Verdict] = []
        self.live: Live[Verdict] = Live(self._ask, self._show, total=len(self._oracles), description="DFT check")
        functions = basis_functions(self.molecule)
        cost = (
            f"{self.molecule.formula(0)}: {int(self.molecule.sizes[0])} atoms, {functions} basis functions. "
            f"Expect about {expected_seconds(functions):.0f} s on a free core, half or three times that, and some "
            "seconds for the isolated atoms."
        )
        self._stage, self._table = ipywidgets.VBox(), ipywidgets.HTML()
        super().__init__("DFT check, B3LYP/6-31G(d)", escape(cost), [self.live, self._stage, self._table])
        self.viewer = MoleculeViewer(self.molecule, height=280)
        self._stage.children = [self.viewer]

    def start(self) -> Live[Verdict]:
        """Start, as the button does; `.wait()` on what it returns."""
        return self.live.start()

    def summary_html(self) -> str:
        """The answers so far; before them, whom Start will ask."""
        names = ", ".join(map(escape, self._oracles))
        return self._table.value or f"<span class='elp-note'>No answer yet: Start asks {names}.</span>"

    def __repr__(self) -> str:
        return f"DFTCheck({self.molecule.formula(0)}, {len(self.verdicts)} of {len(self._oracles)} oracles)"

    # ------------------------------------------------------------------ wiring
    def _ask(self) -> Iterator[Verdict]:
        self.verdicts = []
        for name, oracle in self._oracles.items():
            with oracle:  # a worker process of its own ends with its answer
                yield judge(self.molecule, name, oracle)

    def _show(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        self._table.value = verdict_html(self.verdicts)
        good = [v for v in self.verdicts if v.status == "ok"]
        if not good:
            return
        self.viewer = MoleculeViewer(
            {v.oracle: self.molecule for v in good},
            forces={v.oracle: [v.forces] for v in good},
            arrows=True,
            height=280,
        )
        self._stage.children = [self.viewer]
