"""The oracle comparison: stretch a bond or drag an atom, and see what each oracle says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets
import numpy as np
import plotly.graph_objects as go
import torch
from ase.data import chemical_symbols
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles import load_oracle
from elign_lab.oracles.protocol import Oracle, f_rms
from elign_lab.teaching.figure import COLORS, PANEL, Figure
from elign_lab.widgets.panels.base import (
    Chart,
    Panel,
    add_mark,
    badge,
    escape,
    headed_table,
    move_marks,
    number,
)
from elign_lab.widgets.panels.dragging import DraggedMolecule
from elign_lab.widgets.static import bonds
from elign_lab.widgets.viewer import MoleculeViewer

FloatArray = NDArray[np.floating]
REACH = (0.65, 2.0)  # of a bond length
SHIFT = 0.8  # Angstrom, of an atom to each side
DEFAULT_ORACLES = ("learned", "xtb", "ani", "uma")  # of these, what is installed
DRAG = "drag"  # in the menu of coordinates: none of them, but the mouse
_POINTS = 41
_LINES = (COLORS["tilt"], COLORS["aligned"], COLORS["other"], COLORS["base"])


# ---------------------------------------------------------------------- pure functions
@dataclass(frozen=True)
class Coordinate:
    """A way to distort a molecule: a bond (i, j) that is stretched, or an atom i that moves along an axis 0, 1, 2."""

    i: int
    j: int | None = None
    axis: int | None = None

    def name(self, molecule: MoleculeBatch) -> str:
        """For a menu: "bond C0-O2", "atom C0 along x"."""
        names = [f"{chemical_symbols[int(z)]}{k}" for k, z in enumerate(molecule.numbers[0])]
        if self.j is not None:
            return f"bond {names[self.i]}–{names[self.j]}"
        return f"atom {names[self.i]} along {'xyz'[self.axis or 0]}"


def coordinates(molecule: MoleculeBatch) -> list[Coordinate]:
    """All bonds of the molecule, heavy atoms first, and then every atom along x, y and z."""
    numbers, x = molecule.arrays()[0]
    pairs = sorted(bonds(numbers, x).tolist(), key=lambda pair: -min(numbers[pair]))
    moves = [Coordinate(i, axis=axis) for i in range(len(numbers)) for axis in range(3)]
    return [Coordinate(i, j) for i, j in pairs] + moves


def stretch_bond(molecule: MoleculeBatch, i: int, j: int, length: float) -> MoleculeBatch:
    """The molecule with atoms i and j `length` Angstrom apart; the side of j moves as a whole, in a ring j alone.

    Raises ValueError for atoms that are not there or are the same, and for a length that is not positive.
    """
    numbers, x = molecule.arrays()[0]
    if not (0 <= i < len(x) and 0 <= j < len(x)) or i == j:
        raise ValueError(f"bond ({i}, {j}): expected two different atoms, 0 to {len(x) - 1}")
    if not length > 0:
        raise ValueError(f"length is {length}, expected a positive number of Angstrom")
    kept = np.array([pair for pair in bonds(numbers, x).tolist() if set(pair) != {i, j}]).reshape(-1, 2)
    graph = coo_matrix((np.ones(len(kept)), (kept[:, 0], kept[:, 1])), shape=(len(x), len(x)))
    side = connected_components(graph, directed=False)[1]
    moves = side == side[j] if side[i] != side[j] else np.arange(len(x)) == j
    along = (x[j] - x[i]) / np.linalg.norm(x[j] - x[i])
    moved = x + np.outer(moves, (length - np.linalg.norm(x[j] - x[i])) * along)
    return MoleculeBatch.from_arrays([(numbers, moved)])


def move_atom(molecule: MoleculeBatch, i: int, shift: Sequence[float]) -> MoleculeBatch:
    """The molecule with atom i moved by (x, y, z) Angstrom. Raises ValueError for an atom that is not there."""
    numbers, x = molecule.arrays()[0]
    if not 0 <= i < len(x) or len(shift) != 3:
        raise ValueError(f"atom {i} moved by {tuple(shift)}: expected an atom 0 to {len(x) - 1} and three numbers")
    moved = x.copy()
    moved[i] += shift
    return MoleculeBatch.from_arrays([(numbers, moved)])


def distort(molecule: MoleculeBatch, coordinate: Coordinate, points: int = _POINTS) -> tuple[FloatArray, MoleculeBatch]:
    """Values of a coordinate (Angstrom) and the molecules there: bond lengths from 0.65 to 2 times, or shifts +-0.8."""
    _, x = molecule.arrays()[0]
    if coordinate.j is not None:
        length = float(np.linalg.norm(x[coordinate.j] - x[coordinate.i]))
        values = np.linspace(REACH[0] * length, REACH[1] * length, points)
        made = [stretch_bond(molecule, coordinate.i, coordinate.j, v) for v in values]
    else:
        values = np.linspace(-SHIFT, SHIFT, points)
        made = [move_atom(molecule, coordinate.i, v * np.eye(3)[coordinate.axis or 0]) for v in values]
    return values, MoleculeBatch.cat(made)


@dataclass(frozen=True)
class Scan:
    """Oracles along a coordinate: values (P,) in Angstrom, molecules (P), and for each oracle energy (P,) in eV above
    its lowest, forces (P, N, 3) and f_rms (P,) in eV/Angstrom, and the status of each point. NaN where it failed.
    """

    label: str
    values: FloatArray
    molecules: MoleculeBatch
    energy: dict[str, FloatArray]
    forces: dict[str, torch.Tensor]
    f_rms: dict[str, FloatArray]
    status: dict[str, tuple[str, ...]]


def scan(molecule: MoleculeBatch, coordinate: Coordinate, oracles: Mapping[str, Oracle], points: int = _POINTS) -> Scan:
    """Ask every oracle along a coordinate of the first molecule of a batch.

    Raises ValueError when an oracle could not evaluate any of the points: the message has its reason.
    """
    values, molecules = distort(molecule, coordinate, points)
    molecules = molecules.to(dtype=torch.float64)
    energy, forces, rms, status = {}, {}, {}, {}
    for name, oracle in oracles.items():
        result = oracle(molecules)
        if not bool(result.ok.any()):
            raise ValueError(f"the {name} oracle cannot evaluate {molecule.formula(0)}: {result.status[0]}")
        absolute = result.energy.double().cpu().numpy()
        energy[name] = absolute - np.nanmin(absolute)
        forces[name], status[name] = result.forces.cpu(), result.status
        rms[name] = f_rms(result.forces, molecules.mask).double().cpu().numpy()
    unit = "bond length" if coordinate.j is not None else "shift"
    return Scan(f"{coordinate.name(molecule)}: {unit} (Å)", values, molecules, energy, forces, rms, status)


def scan_figure(found: Scan, point: int) -> Figure:
    """Energy and force RMS of each oracle along the coordinate, the chosen point marked."""
    titles = ("energy above the lowest (eV)", "force RMS (eV/Å)")
    words = f"Energy above the lowest (eV) and force RMS (eV/Å) by {', '.join(found.energy)} against {found.label}."
    figure = Figure(x=found.label, y=titles[0], alt=words, height=300, template=PANEL)
    figure.set_subplots(cols=2, horizontal_spacing=0.11)
    x = found.values.round(4).tolist()
    for k, name in enumerate(found.energy):
        line = {"color": _LINES[k % len(_LINES)], "width": 2.5}
        for column, y in enumerate((found.energy[name], found.f_rms[name]), start=1):
            shown = [None if np.isnan(v) else float(f"{v:.5g}") for v in y]
            figure.add_scatter(
                x=x, y=shown, name=name, line=line, legendgroup=name, showlegend=column == 1, row=1, col=column
            )
    figure.update_xaxes(title_text=found.label)
    add_mark(figure, float(found.values[point]))
    for column, values in enumerate((found.energy, found.f_rms), start=1):
        figure.update_yaxes(title_text=titles[column - 1], range=[0, _top(values.values())], row=1, col=column)
    return figure


def _top(curves: Any) -> float:
    """An axis that shows the well: the repulsive wall may leave at the top."""
    return 1.15 * max(float(np.nanquantile(y, 0.85)) for y in curves)


def scan_html(found: Scan, point: int) -> str:
    """What each oracle says at one point."""
    rows = []
    for name in found.energy:
        status = found.status[name][point]
        values = (
            found.energy[name][point],
            found.f_rms[name][point],
            found.values[int(np.nanargmin(found.energy[name]))],
        )
        cells = "".join(f"<td>{number(float(v))}</td>" for v in values)
        rows.append(f"<tr><td>{name}</td>{cells}<td>{badge(status, 'good' if status == 'ok' else 'bad')}</td></tr>")
    names = ("oracle", "E above its lowest (eV)", "f_RMS (eV/Å)", "lowest at (Å)", "status")
    return headed_table(names, rows)


def missing_html(notes: Mapping[str, str]) -> str:
    """Which oracles are not here, and why (notes: name -> reason)."""
    return "".join(
        f"<details class='elp-note'><summary>{escape(name)} cannot be used here</summary>{escape(why)}</details>"
        for name, why in notes.items()
    )


def usable_oracles(
    names: Sequence[str], options: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[dict[str, Oracle], dict[str, str]]:
    """The oracles of these names that can be made here, and for the others the reason and the remedy."""
    made, reasons = {}, {}
    for name in names:
        try:
            made[name] = load_oracle(name, **(options or {}).get(name, {}))
        except ValueError as error:
            reasons[name] = str(error)
    return made, reasons


# ---------------------------------------------------------------------- the panel
class OracleComparison(Panel):
    """Distort a molecule and compare oracles: curves of energy and force, and the forces as arrows.

    molecule: a batch (its first molecule) or a SMILES string. oracles: a mapping from name to oracle; default:
    DEFAULT_ORACLES, as far as they can be made here (the panel says why not). `coordinate` chooses a bond to stretch or
    an atom to move along an axis, by the frame slider of the viewer, or "drag an atom": then the mouse moves atoms, and
    `dragged` holds the structure and the answers. A SMILES that cannot be read gives a message, and the old molecule
    stays.
    """

    def __init__(self, molecule: MoleculeBatch | str = "CCO", oracles: Mapping[str, Oracle] | None = None) -> None:
        notes: dict[str, str] = {}
        if oracles is None:
            oracles, notes = usable_oracles(DEFAULT_ORACLES, {"xtb": {"workers": 0}})
        if not oracles:
            raise ValueError("oracles is empty: expected a mapping from a name to an oracle")
        self._oracles = dict(oracles)
        self.dragged: DraggedMolecule | None = None
        text = molecule if isinstance(molecule, str) else ""
        self.smiles = ipywidgets.Text(
            value=text, description="SMILES", placeholder="CCO", continuous_update=False, layout={"width": "260px"}
        )
        self.coordinate = ipywidgets.Dropdown(description="distort", layout={"width": "260px"})
        self._table = ipywidgets.HTML()
        self._missing = ipywidgets.HTML(missing_html(notes), layout={"display": "" if notes else "none"})
        self._stage, self.chart = ipywidgets.VBox(), Chart(go.Figure(layout={"height": 300}))
        self._scan_view = ipywidgets.VBox([self._stage, self.chart, self._table])
        self._body = ipywidgets.VBox()
        super().__init__(
            "Oracles compared",
            "One geometry, several oracles. Arrows are forces. Each oracle has its own zero of energy, so energies "
            "count from its own lowest point of the curve, or from the start of a drag.",
            [
                ipywidgets.HBox([self.smiles, self.coordinate], layout={"flex_flow": "row wrap"}),
                self._body,
                self._missing,
            ],
        )
        self.coordinate.observe(self._coordinate_changed, "value")
        self.set_molecule(molecule)
        self.smiles.observe(self._smiles_changed, "value")

    # ------------------------------------------------------------------ what a user does
    def set_molecule(self, molecule: MoleculeBatch | str) -> None:
        """Take another molecule. Raises ValueError for what cannot be read or evaluated, and then changes nothing."""
        batch = MoleculeBatch.from_smiles(molecule) if isinstance(molecule, str) else molecule[:1]
        options = coordinates(batch)
        chosen: Coordinate | str = DRAG if self.dragged else options[0]
        made = self._make(batch, chosen)
        self.molecule = batch
        self.coordinate.unobserve(self._coordinate_changed, "value")
        self.coordinate.options = [("drag an atom", DRAG), *((c.name(batch), c) for c in options)]
        self.coordinate.value = chosen
        self.coordinate.observe(self._coordinate_changed, "value")
        self._show(made)

    @property
    def point(self) -> int:
        """The point of the scan that is shown."""
        return self.viewer.frame

    @point.setter
    def point(self, point: int) -> None:
        self.viewer.frame = point

    def summary_html(self) -> str:
        """What each oracle says of the structure that is shown."""
        table = self.dragged.summary_html() if self.dragged else self._table.value
        return table + self._missing.value

    def __repr__(self) -> str:
        return f"OracleComparison({self.molecule.formula(0)}, {', '.join(self._oracles)})"

    # ------------------------------------------------------------------ wiring
    def _smiles_changed(self, change: dict[str, Any]) -> None:
        with self._shown():
            try:
                self.set_molecule(change["new"])
            except ValueError:
                self.smiles.unobserve(self._smiles_changed, "value")
                self.smiles.value = change["old"]
                self.smiles.observe(self._smiles_changed, "value")
                raise

    def _coordinate_changed(self, change: dict[str, Any]) -> None:
        with self._shown():
            self._show(self._make(self.molecule, change["new"]))

    def _make(self, molecule: MoleculeBatch, chosen: Coordinate | str) -> Scan | DraggedMolecule:
        if isinstance(chosen, Coordinate):
            return scan(molecule, chosen, self._oracles)
        return DraggedMolecule(molecule.to(dtype=torch.float64), self._oracles)

    def _show(self, made: Scan | DraggedMolecule) -> None:
        if isinstance(made, Scan):
            self.dragged = None
            self._body.children = [self._scan_view]
            self._show_scan(made)
        else:
            self.dragged, self.viewer = made, made.viewer
            self._body.children = [made]

    def _show_scan(self, found: Scan) -> None:
        self.scan = found
        start = int(np.abs(found.values - self._rest()).argmin())
        labels = [f"{value:.2f} Å" for value in found.values]
        names = list(self._oracles)
        self.viewer = MoleculeViewer(
            dict.fromkeys(names, found.molecules),
            labels=dict.fromkeys(names, labels),
            forces={name: list(found.forces[name]) for name in names},
            arrows=True,
            height=280,
        )
        self.viewer.frame = start
        self.viewer.observe(self._point_changed, "frame")
        self._stage.children = [self.viewer]
        self.chart.draw(scan_figure(found, start))
        self._table.value = scan_html(found, start)

    def _rest(self) -> float:
        """Value of the coordinate in the undistorted molecule."""
        c = self.coordinate.value
        _, x = self.molecule.arrays()[0]
        return 0.0 if c.j is None else float(np.linalg.norm(x[c.j] - x[c.i]))

    def _point_changed(self, change: dict[str, Any]) -> None:
        with self._shown():
            self.chart.draw(move_marks(self.chart.figure, float(self.scan.values[change["new"]])))
            self._table.value = scan_html(self.scan, change["new"])
