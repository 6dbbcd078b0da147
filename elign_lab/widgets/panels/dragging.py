"""Atoms that are moved by hand, and what each oracle says of the structure that comes out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import ipywidgets
import numpy as np
import torch

from elign_lab.molecules import MoleculeBatch, symbol
from elign_lab.oracles.learned import LearnedOracle
from elign_lab.oracles.protocol import Oracle, f_rms
from elign_lab.widgets.panels.base import badge, escape, headed_table, number
from elign_lab.widgets.viewer import Drag, MoleculeViewer

FORCE_MAX = 10.0  # eV/Angstrom; fixed, so that an arrow grows with its force
WHILE_DRAGGING, NO_ANSWER = "asked when you let go", "no answer yet"


# ---------------------------------------------------------------------- pure functions
def place_atom(molecule: MoleculeBatch, i: int, position: Sequence[float]) -> MoleculeBatch:
    """The first molecule of a batch with atom i at (x, y, z) Angstrom.

    Raises ValueError for an atom that is not there and for a position that is not three finite numbers.
    """
    numbers, x = molecule.arrays()[0]
    if not 0 <= i < len(x):
        raise ValueError(f"atom {i}: expected 0 to {len(x) - 1}")
    if len(position) != 3 or not np.isfinite(position).all():
        raise ValueError(f"position of atom {i} is {tuple(position)}: expected three finite numbers in Angstrom")
    placed = x.copy()
    placed[i] = position
    return MoleculeBatch.from_arrays([(numbers, placed)])


@dataclass(frozen=True)
class Answer:
    """What an oracle says of one structure: energy in eV, forces (N, 3) and their RMS and largest norm in eV/Angstrom.

    Where the status is not "ok", all numbers are NaN.
    """

    energy: float
    forces: torch.Tensor
    f_rms: float
    f_max: float
    status: str


def ask(molecule: MoleculeBatch, oracle: Oracle) -> Answer:
    """Evaluate the first molecule of a batch; a failure is in the status."""
    one = molecule[:1].to(dtype=torch.float64)
    result = oracle(one)
    forces = result.forces[0].cpu()
    rms, largest = float(f_rms(result.forces, one.mask)[0]), float(forces.norm(dim=-1).max())
    return Answer(float(result.energy[0]), forces, rms, largest, result.status[0])


def no_answer(molecule: MoleculeBatch, why: str) -> Answer:
    """In the place of the answer of an oracle that was not asked."""
    nan = float("nan")
    return Answer(nan, torch.full_like(molecule.positions[0], nan), nan, nan, why)


def displacement(start: MoleculeBatch, molecule: MoleculeBatch) -> str:
    """How far which atoms are from the start, in words."""
    (numbers, before), (_, after) = start.arrays()[0], molecule.arrays()[0]
    distance = np.linalg.norm(after - before, axis=1)
    moved = np.flatnonzero(distance > 1e-6)
    if len(moved) == 0:
        return "start"
    what = (
        f"{symbol(int(numbers[moved[0]]))}{moved[0]} moved" if len(moved) == 1 else f"{len(moved)} atoms moved, up to"
    )
    return f"{what} {distance.max():.2f} Å"


def answers_html(answers: Mapping[str, Answer], start: Mapping[str, Answer]) -> str:
    """One row an oracle: energy above that of the start, forces, status."""
    rows = []
    for name, answer in answers.items():
        values = (number(answer.energy - start[name].energy), number(answer.f_rms), number(answer.f_max))
        tone = {"ok": "good", WHILE_DRAGGING: "", NO_ANSWER: "warn"}.get(answer.status, "bad")
        cells = "".join(f"<td>{value}</td>" for value in values)
        rows.append(f"<tr><td>{escape(name)}</td>{cells}<td>{badge(answer.status, tone)}</td></tr>")
    names = ("oracle", "E above the start (eV)", "f_RMS (eV/Å)", "largest force (eV/Å)", "status")
    return headed_table(names, rows)


# ---------------------------------------------------------------------- the view
class DraggedMolecule(ipywidgets.VBox):
    """A molecule whose atoms are dragged with the mouse, once for each oracle with its forces.

    molecule: a batch (its first molecule). oracles: by name. Learned oracles are asked while an atom moves, the others
    when it is let go. `molecule` is the present structure and `answers` what is said of it, by oracle. Raises
    ValueError when an oracle cannot evaluate the molecule.
    """

    def __init__(self, molecule: MoleculeBatch, oracles: Mapping[str, Oracle]) -> None:
        self.start = self.molecule = molecule[:1]
        self._oracles = dict(oracles)
        self.answers = {name: ask(self.start, oracle) for name, oracle in self._oracles.items()}
        for name, answer in self.answers.items():
            if answer.status != "ok":
                raise ValueError(f"the {name} oracle cannot evaluate {molecule.formula(0)}: {answer.status}")
        self._start_answers = dict(self.answers)
        self.viewer = MoleculeViewer(
            dict.fromkeys(self._oracles, self.start),
            labels={name: ["start"] for name in self._oracles},
            forces={name: [answer.forces] for name, answer in self.answers.items()},
            arrows=True,
            force_max=FORCE_MAX,
            draggable=True,
            height=280,
        )
        self.viewer.on_drag(self._dragged)
        self.reset_button = ipywidgets.Button(
            description="Reset", icon="undo", tooltip="back to the start", layout={"width": "auto"}
        )
        self.reset_button.on_click(lambda _: self.reset())
        note = ipywidgets.HTML(
            "<span class='elp-note'>Press on an atom and move it; beside the atoms, the mouse rotates.</span>"
        )
        self._table = ipywidgets.HTML()
        row = ipywidgets.HBox([self.reset_button, note], layout={"align_items": "center", "grid_gap": "8px"})
        super().__init__([row, self.viewer, self._table])
        self._draw()

    def move(self, atom: int, position: Sequence[float], *, done: bool = True) -> None:
        """Put an atom at (x, y, z) Angstrom, as the mouse does; done=False: as long as the mouse button is down.

        Raises ValueError for an atom that is not there and a position that is not finite, and then changes nothing.
        """
        self.molecule = place_atom(self.molecule, atom, position)
        # no number of the old structure is shown for the new one
        self.answers = dict.fromkeys(self._oracles, no_answer(self.molecule, NO_ANSWER if done else WHILE_DRAGGING))
        quick = [name for name, oracle in self._oracles.items() if isinstance(oracle, LearnedOracle)]
        self._ask(quick)
        if done:
            for name in self._oracles:
                if name not in quick:
                    self._ask([name])

    def reset(self) -> None:
        """Back to the start."""
        self.molecule, self.answers = self.start, dict(self._start_answers)
        self._draw()

    def summary_html(self) -> str:
        """What each oracle says of the present structure."""
        return self._table.value

    # ------------------------------------------------------------------ wiring
    def _dragged(self, drag: Drag) -> None:
        self.move(drag.atom, drag.position, done=drag.done)

    def _ask(self, names: Iterable[str]) -> None:
        try:
            for name in names:
                self.answers[name] = ask(self.molecule, self._oracles[name])
        finally:
            self._draw()

    def _draw(self) -> None:
        label = displacement(self.start, self.molecule)
        for panel, answer in enumerate(self.answers.values()):
            self.viewer.replace(0, self.molecule, forces=answer.forces, label=label, panel=panel)
        self._table.value = answers_html(self.answers, self._start_answers)
        self.reset_button.disabled = label == "start"
