"""The molecular editor: pick atoms, change them, and watch the pseudo-force field make the new structure."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
from rdkit.Chem import Mol, RemoveHs, RemoveHsParameters
from rdkit.Chem.Draw.rdMolDraw2D import MolDraw2DSVG
from rdkit.Chem.rdDepictor import Compute2DCoords

from elign_lab.gpff import editing_state as editing
from elign_lab.gpff.constraints import TOLERANCE, Sphere, depth_inside
from elign_lab.gpff.editing_bonds import GROUPS
from elign_lab.gpff.editing_run import Measures, RunSettings, accept, measure, regenerate
from elign_lab.gpff.editing_state import EditorState, Structure
from elign_lab.gpff.generate import SAMPLERS
from elign_lab.gpff.model import PseudoForceField
from elign_lab.gpff.record import ForceRecord
from elign_lab.molecules import MoleculeBatch, symbol
from elign_lab.oracles import Oracle
from elign_lab.widgets.live import Live
from elign_lab.widgets.panels.base import Panel, badge, escape, figures_row, number
from elign_lab.widgets.viewer import MoleculeViewer

EVALUATIONS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
SIGMAS = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)  # Angstrom
PICKED, FROZEN = "#ff9d2e", "#4c8dff"
FORBIDDEN = "#2f9e8f"  # what the viewer lays over a molecule has this colour

# legible on white and on black; carbon and bonds are black in RDKit's drawing and become the colour of the text
_ATOM_COLORS = {6: (0, 0, 0), 1: (0, 0, 0), 7: (0.25, 0.47, 0.95), 8: (0.88, 0.27, 0.25), 9: (0.2, 0.63, 0.35)}
_NOTE_COLOR = (0.54, 0.58, 0.64)
# a region is shown as dots on its surface: the smallest atom of the viewer, too far apart for it to draw bonds
_DOT, _DOT_AREA, _MOST_DOTS = 2, 0.8, 400  # helium, square Angstrom, per region


# ---------------------------------------------------------------------- pure functions
def read_atoms(text: str) -> frozenset[int]:
    """Atom indices from a text such as "0, 3 7"; "" picks none. Raises ValueError for anything else."""
    words = text.replace(",", " ").split()
    if not all(word.isdigit() for word in words):
        raise ValueError(f"picked atoms are {text!r}: expected indices such as '0, 3, 7', or nothing")
    return frozenset(map(int, words))


def read_place(text: str) -> tuple[float, ...] | None:
    """A place from a text such as "1.5, 0, -2" (x, y, z in Angstrom), None from "". Raises ValueError for others."""
    words = text.replace(",", " ").split()
    try:
        place = tuple(map(float, words))
    except ValueError:
        place = ()
    if words and len(place) != 3:
        raise ValueError(f"the centre is {text!r}: expected x, y, z in Angstrom, or nothing for the picked atoms")
    return place or None


def region_dots(regions: Sequence[Sphere]) -> MoleculeBatch | None:
    """Dots all over the surface of forbidden regions, as a molecule for the viewer to lay over; None without any."""
    parts = []
    for sphere in regions:
        n = min(_MOST_DOTS, max(12, round(4 * np.pi * sphere.radius**2 / _DOT_AREA)))
        height = 1 - (2 * np.arange(n) + 1) / n
        turn = np.pi * (1 + 5**0.5) * np.arange(n)  # a Fibonacci lattice: even, for any number
        across = np.sqrt(1 - height**2)
        shell = np.stack([across * np.cos(turn), across * np.sin(turn), height], axis=1)
        dots = np.asarray(sphere.centre) + sphere.radius * shell
        others = [other for other in regions if other is not sphere]
        buried = [np.linalg.norm(dots - np.asarray(other.centre), axis=1) < other.radius for other in others]
        parts.append(dots[~np.any(buried, axis=0)] if buried else dots)
    dots = np.concatenate(parts) if parts else np.zeros((0, 3))
    return MoleculeBatch.from_arrays([(np.full(len(dots), _DOT), dots)], check=False) if len(dots) else None


def region_options(regions: Sequence[Sphere]) -> list[tuple[str, int | None]]:
    """Entries of the list of forbidden regions, each with its index; the first one stands for all."""
    each: list[tuple[str, int | None]] = [(f"{i}: {sphere}", i) for i, sphere in enumerate(regions)]
    return [(f"all, {_regions(len(each))}" if each else "no forbidden region", None), *each]


def inside_regions(structure: Structure) -> list[int]:
    """Atoms that lie in a forbidden region, which a run will move out of it."""
    deep = depth_inside(structure.molecule.positions[0], structure.forbidden) > 10 * TOLERANCE
    return [int(i) for i in deep.nonzero()]


def depiction(structure: Structure, width: int = 340, height: int = 230) -> str:
    """An SVG of the bonds with atom indices, marked atoms in colour; of hydrogens only the picked ones."""
    mol = Mol(structure.mol)
    for atom in mol.GetAtoms():
        atom.SetProp("atomNote", str(atom.GetIdx()))
        if atom.GetIdx() in structure.picked:
            atom.SetAtomMapNum(1)  # RemoveHs keeps mapped hydrogens
    keep_mapped = RemoveHsParameters()
    keep_mapped.removeMapped = False  # type: ignore[assignment]  # RDKit's stubs have no setters
    mol = RemoveHs(mol, keep_mapped)
    marks = _marks(structure)
    colors = {}
    for atom in mol.GetAtoms():
        atom.SetAtomMapNum(0)
        for color, atoms in marks.items():  # the last one counts, as in the viewer
            if int(atom.GetProp("atomNote")) in atoms:
                colors[atom.GetIdx()] = _rgba(color)
    Compute2DCoords(mol)
    drawer = MolDraw2DSVG(width, height)
    options = drawer.drawOptions()
    options.clearBackground = False  # type: ignore[assignment]
    options.maxFontSize = 17  # type: ignore[assignment]
    options.fixedBondLength = 34  # type: ignore[assignment]
    options.updateAtomPalette(_ATOM_COLORS)
    options.setAnnotationColour(_NOTE_COLOR)
    drawer.DrawMolecule(
        mol, highlightAtoms=list(colors), highlightAtomColors=colors, highlightBonds=[], highlightBondColors={}
    )
    drawer.FinishDrawing()
    drawing = drawer.GetDrawingText().split("?>", 1)[-1].replace("#000000", "currentColor")
    title = escape(f"{structure.smiles}: {len(structure.picked)} atoms picked, {len(structure.frozen)} frozen")
    return f"<div role='img' aria-label='{title}'>{drawing}</div>"


def measures_html(measures: Measures, asked: str) -> str:
    """Energy, f_RMS, sigma_hat and validity; `asked` is the SMILES of the bonds that were asked for."""
    if measures.smiles is None:
        verdict = badge("not valid", "bad", strong=True)
    elif measures.smiles == asked:
        verdict = badge("valid", "good", strong=True)
    else:
        verdict = badge("valid", "good", strong=True) + badge(f"another molecule than {asked}", "warn")
    if measures.status != "ok":
        verdict += badge(f"oracle: {measures.status}", "warn")
    figures = {
        "E_f (eV/atom)": number(measures.energy),
        "f_RMS (eV/Å)": number(measures.f_rms, 3),
        "σ̂ (Å)": number(measures.sigma_hat, 2),
    }
    name = escape(measures.smiles or "no bonds without charges or radicals, in one piece")
    return f"{figures_row(figures)}<div style='margin-top:6px'>{verdict}<span class='elp-note'>{name}</span></div>"


def sdf_link(state: EditorState) -> str:
    """A link that saves the present structure as an SDF file."""
    data = base64.b64encode(editing.to_sdf(state).encode()).decode()
    name = f"{state.structure.molecule.formula(0)}.sdf"
    return f"<a download='{name}' href='data:chemical/x-mdl-sdfile;base64,{data}'>save {name}</a>"


def change_text(before: EditorState, after: EditorState) -> str:
    """One line on what an edit did."""
    old, new = before.structure, after.structure
    what = f"{old.smiles} → {new.smiles}" if old.smiles != new.smiles else new.smiles
    counts = f"{new.n_atoms} atoms, {len(new.frozen)} frozen, {len(new.picked)} picked"
    if new.forbidden:
        inside = inside_regions(new)
        leave = f", with atoms {', '.join(map(str, inside))} inside until Start" if inside else ""
        counts += f", {_regions(len(new.forbidden))}{leave}"
    return f"{new.label}: {what}; {counts}"


def _regions(count: int) -> str:
    return f"{count} forbidden region{'s' if count > 1 else ''}"


def _marks(structure: Structure) -> dict[str, list[int]]:
    """Atoms by the colour that shows what they are."""
    return {
        FORBIDDEN: inside_regions(structure),
        FROZEN: sorted(structure.frozen),
        PICKED: sorted(structure.picked),
    }


def _rgba(color: str) -> tuple[float, ...]:
    return (*(int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)), 0.55)


# ---------------------------------------------------------------------- the panel
class MoleculeEditor(Panel):
    """Edit a molecule and let a pseudo-force field make what is free anew.

    model: the pseudo-force field; oracle: gives energy and f_RMS; molecule: SMILES or a batch (its first molecule).
    `state` is what is edited (see `gpff.editing_state`), `settings` how structures are made. What the buttons do, the
    methods do; an edit that cannot be raises ValueError with the reason and changes nothing (a button shows it
    instead). `start()` regenerates on a worker thread, as the Start button does; meanwhile nothing can be edited.
    """

    def __init__(
        self,
        model: PseudoForceField,
        oracle: Oracle,
        molecule: MoleculeBatch | str = "CCO",
        *,
        settings: RunSettings | None = None,
    ) -> None:
        self._model, self._oracle = model, oracle
        self.state = editing.open_molecule(molecule, model.config)
        self.settings = settings or RunSettings()
        self.viewer = MoleculeViewer(height=340)
        self.viewer.on_pick(self._clicked)
        self.live: Live[ForceRecord] = Live(self._run, self._show, description="new structure")
        self.live.observe(self._status_changed, "status")
        self._drawing, self._measures, self._link = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self._message = ipywidgets.HTML()
        self._shown_regions: tuple[Sphere, ...] = ()
        self._make_controls()
        super().__init__(
            "Molecular editor",
            "Click atoms to pick them; drag to rotate. "
            + badge("picked", "warn")
            + f"<span class='elp-badge' style='--elp-tone:{FROZEN}'>frozen</span>"
            + f"<span class='elp-badge' style='--elp-tone:{FORBIDDEN}'>forbidden</span>"
            + " Start makes everything that is not frozen anew, from where it is plus noise, out of forbidden regions.",
            self._layout(),
        )
        self._changed_structure()

    # ------------------------------------------------------------------ what a user does
    def open_molecule(self, molecule: MoleculeBatch | str) -> None:
        """Open another molecule; undo brings the present one back."""
        opened = editing.open_molecule(molecule, self._model.config)
        self._edit(lambda state: editing.commit(state, opened.structure))

    def pick(self, atom: int | None) -> None:
        """Pick an atom, or put it back; None puts all back."""
        self._check_idle()
        self.state = editing.pick(self.state, atom)
        self._changed_picks()

    def pick_only(self, atoms: Iterable[int]) -> None:
        """Pick exactly these atoms."""
        self._check_idle()
        self.state = editing.pick_only(self.state, atoms)
        self._changed_picks()

    def delete(self) -> None:
        """Delete the picked atoms and their hydrogens."""
        self._edit(editing.delete)

    def replace(self, element: str) -> None:
        """Put another element in the place of the picked atom."""
        self._edit(partial(editing.replace_element, element=element))

    def add(self, group: str) -> None:
        """Grow a group (a name of `gpff.editing_bonds.GROUPS`, or SMILES with one `*`) on the picked atom."""
        self._edit(partial(editing.add_group, group=group))

    def swap(self, group: str) -> None:
        """Put a group in the place of the picked atoms."""
        self._edit(partial(editing.swap_group, group=group))

    def freeze(self) -> None:
        """Freeze the picked atoms."""
        self._edit(editing.freeze)

    def free(self) -> None:
        """Free the picked atoms, or all where none is picked."""
        self._edit(editing.free)

    def freeze_rest(self) -> None:
        """Freeze all but the picked atoms."""
        self._edit(editing.freeze_rest)

    def forbid(self, radius: float, centre: Sequence[float] | None = None) -> None:
        """Forbid a sphere (Angstrom) at `centre`, or around the place of each picked atom, to what is made anew."""
        self._edit(partial(editing.forbid, radius=radius, centre=centre))

    def allow(self, region: int | None = None) -> None:
        """Allow a forbidden region again, by its index in `state.structure.forbidden`; None: all."""
        self._edit(partial(editing.allow, region=region))

    def undo(self) -> None:
        """One step back."""
        self._edit(editing.undo)

    def redo(self) -> None:
        """One step forward again."""
        self._edit(editing.redo)

    def set(self, **values: Any) -> None:
        """Change settings: sampler, evaluations (one of EVALUATIONS), sigma (one of SIGMAS), seed; see RunSettings."""
        self._check_idle()
        unknown = set(values) - set(self.controls)
        if unknown:
            raise ValueError(f"unknown setting {', '.join(sorted(unknown))}: expected {', '.join(self.controls)}")
        for name, known in (("evaluations", EVALUATIONS), ("sigma", SIGMAS)):
            if name in values and values[name] not in known:
                raise ValueError(f"{name} is {values[name]}, expected one of {', '.join(map(str, known))}")
        self.settings = RunSettings(**(asdict(self.settings) | values))
        self._write_settings()

    def start(self) -> Live[ForceRecord]:
        """Make a new structure with the present settings; `.wait()` on what it returns."""
        return self.live.start()

    def to_sdf(self, path: str | Path | None = None) -> str:
        """SDF text of the present structure; written to `path` when given."""
        text = editing.to_sdf(self.state)
        if path is not None:
            Path(path).write_text(text)
        return text

    def summary_html(self) -> str:
        """The drawing and the measures."""
        return f"{self._drawing.value}{self._measures.value}{self._message.value}"

    def __repr__(self) -> str:
        s = self.state.structure
        return f"MoleculeEditor({s.smiles!r}, {s.n_atoms} atoms, {len(s.frozen)} frozen, {len(s.picked)} picked)"

    # ------------------------------------------------------------------ building
    def _make_controls(self) -> None:
        narrow = {"layout": {"width": "130px"}}
        wide = {"layout": {"width": "250px"}, "style": {"description_width": "58px"}}
        self.smiles = ipywidgets.Text(placeholder="SMILES to open", continuous_update=False, layout={"width": "150px"})
        self.atoms = ipywidgets.Text(
            placeholder="picked, e.g. 0, 3", continuous_update=False, tooltip="indices of the picked atoms", **narrow
        )
        self.group = ipywidgets.Dropdown(options=list(GROUPS), tooltip="group", **narrow)
        names = [symbol(z) for z in self._model.config.elements]
        self.element = ipywidgets.Dropdown(options=names, value="N", tooltip="element", layout={"width": "60px"})
        self.radius = ipywidgets.FloatText(
            1.5, step=0.1, description="radius (Å)", layout={"width": "150px"}, style={"description_width": "70px"}
        )
        self.centre = ipywidgets.Text(
            placeholder="x, y, z, or picked atoms",
            tooltip="centre of the region in Å; empty: one around each picked atom",
            layout={"width": "190px"},
        )
        self.regions = ipywidgets.Dropdown(
            options=region_options(()), tooltip="forbidden regions", layout={"width": "300px"}
        )
        self.at_once = ipywidgets.Checkbox(
            description="regenerate after every change", indent=False, layout={"width": "240px"}
        )
        self.buttons: dict[str, ipywidgets.Button] = {}
        for name, icon, tip, action in (
            ("Add", "plus", "grow the group on the picked atom", lambda: self.add(self.group.value)),
            ("Swap", "exchange", "put the group in the place of the picked atoms", lambda: self.swap(self.group.value)),
            ("Replace", "refresh", "change the element of the picked atom", lambda: self.replace(self.element.value)),
            ("Delete", "trash", "delete the picked atoms and their hydrogens", self.delete),
            ("Freeze", "lock", "freeze the picked atoms", self.freeze),
            ("Freeze rest", "lock", "freeze all but the picked atoms", self.freeze_rest),
            ("Free", "unlock", "free the picked atoms, or all", self.free),
            ("Forbid", "ban", "forbid a sphere at the centre, or around each picked atom", self._forbid_clicked),
            ("Allow", "check", "allow the chosen region again", lambda: self.allow(self.regions.value)),
            ("Undo", "undo", "one step back", self.undo),
            ("Redo", "repeat", "one step forward", self.redo),
        ):
            self._add_button(name, icon, tip, action)
        self.controls: dict[str, ipywidgets.Widget] = {
            "sampler": ipywidgets.Dropdown(options=list(SAMPLERS), description="sampler", **wide),
            "evaluations": ipywidgets.SelectionSlider(
                options=EVALUATIONS, description="NFE", continuous_update=False, **wide
            ),
            "sigma": ipywidgets.SelectionSlider(
                options=SIGMAS, description="noise (Å)", continuous_update=False, **wide
            ),
            "seed": ipywidgets.BoundedIntText(min=0, max=2**31 - 1, description="seed", **wide),
        }
        for control in self.controls.values():
            control.observe(self._settings_changed, "value")
        self._write_settings()
        self.smiles.observe(self._smiles_given, "value")
        self.atoms.observe(self._atoms_given, "value")

    def _add_button(self, name: str, icon: str, tip: str, action: Callable[[], None]) -> None:
        button = ipywidgets.Button(description=name, icon=icon, tooltip=tip, layout={"width": "auto"})

        def clicked(_: object) -> None:
            with self._shown():
                action()

        button.on_click(clicked)
        self.buttons[name] = button

    def _layout(self) -> list[ipywidgets.Widget]:
        def row(*children: ipywidgets.Widget) -> ipywidgets.HBox:
            return ipywidgets.HBox(children, layout={"flex_flow": "row wrap", "align_items": "center"})

        def buttons(*names: str) -> list[ipywidgets.Button]:
            return [self.buttons[name] for name in names]

        self.viewer.layout.flex = "3 1 420px"
        side = ipywidgets.VBox([self._drawing, self._measures, self._link], layout={"flex": "2 1 300px"})
        return [
            row(self.smiles, *buttons("Undo", "Redo"), self.atoms, *buttons("Freeze", "Freeze rest", "Free")),
            row(self.group, *buttons("Add", "Swap"), self.element, *buttons("Replace", "Delete")),
            row(self.radius, self.centre, *buttons("Forbid"), self.regions, *buttons("Allow")),
            ipywidgets.HBox([self.viewer, side], layout={"flex_flow": "row wrap", "grid_gap": "14px"}),
            row(*self.controls.values(), self.at_once),
            self.live,
            self._message,
        ]

    # ------------------------------------------------------------------ wiring
    def _check_idle(self) -> None:
        if self.live.running:
            raise ValueError("a new structure is being made: stop it before you edit")

    def _edit(self, change: Callable[[EditorState], EditorState]) -> None:
        self._check_idle()
        before, self.state = self.state, change(self.state)
        self._changed_structure()
        self._message.value = escape(change_text(before, self.state))
        if self.at_once.value:
            self.start()

    def _clicked(self, atom: int | None) -> None:
        with self._shown():
            self.pick(atom)
            if atom not in self.state.structure.picked:
                self.viewer.selected = None

    def _forbid_clicked(self) -> None:
        self.forbid(self.radius.value, read_place(self.centre.value))
        self.centre.value = ""  # the next one is around the picked atoms again

    def _smiles_given(self, change: dict[str, Any]) -> None:
        if change["new"].strip():
            with self._shown():
                self.open_molecule(change["new"].strip())

    def _atoms_given(self, change: dict[str, Any]) -> None:
        with self._shown():
            try:
                self.pick_only(read_atoms(change["new"]))
            finally:
                self._write_picks()

    def _settings_changed(self, change: dict[str, Any]) -> None:
        with self._shown():
            try:
                self.set(**{name: control.value for name, control in self.controls.items()})
            finally:
                self._write_settings()  # a setting that cannot be goes back
            if self.at_once.value:
                self.start()

    def _write_settings(self) -> None:
        for name, control in self.controls.items():
            control.unobserve(self._settings_changed, "value")
            control.value = getattr(self.settings, name)
            control.observe(self._settings_changed, "value")

    def _write_picks(self) -> None:
        self.atoms.unobserve(self._atoms_given, "value")
        self.atoms.value = ", ".join(map(str, sorted(self.state.structure.picked)))
        self.atoms.observe(self._atoms_given, "value")

    def _changed_structure(self) -> None:
        molecule = self.state.structure.molecule
        self.viewer.clear()
        self.viewer.push(molecule, label=self.state.structure.label)
        self._judge(molecule)
        self._changed_state()

    def _changed_state(self) -> None:
        self._link.value = sdf_link(self.state)
        self.buttons["Undo"].disabled = not self.state.past
        self.buttons["Redo"].disabled = not self.state.future
        self._write_regions()
        self._changed_picks()

    def _write_regions(self) -> None:
        regions = self.state.structure.forbidden
        if regions != self._shown_regions:
            self._shown_regions = regions
            self.regions.options = region_options(regions)
            self.viewer.overlay(region_dots(regions))

    def _changed_picks(self) -> None:
        structure = self.state.structure
        self.viewer.marks = _marks(structure)
        self._drawing.value = depiction(structure)
        self._write_picks()

    def _judge(self, molecule: MoleculeBatch) -> None:
        measures = measure(self._model, self._oracle, molecule)
        self._measures.value = measures_html(measures, self.state.structure.smiles)

    # ------------------------------------------------------------------ the run, on the worker thread
    def _run(self) -> Iterator[ForceRecord]:
        before, seconds = self.state, 0.0
        self.viewer.clear()
        self._message.value = ""
        result, evaluations = before.structure.molecule, 0
        clock = time.perf_counter()
        try:
            for record in regenerate(self._model, before.structure, self.settings):
                seconds += time.perf_counter() - clock
                result, evaluations = record.molecules(), record.evaluations
                yield record
                clock = time.perf_counter()  # what is shown and judged in between is not computing
            self.viewer.flush()
            self.state = accept(before, result)
        except BaseException:  # stopped, or failed: the structure is the one of before, and that is shown last
            kept = before.structure.molecule
            self.viewer.push(kept, label="kept")
            self.viewer.flush()
            self._judge(kept)
            raise
        self._changed_state()
        self._message.value = escape(
            f"{change_text(before, self.state)}; NFE {evaluations}, {1000 * seconds:.0f} ms of computing"
        )

    def _show(self, record: ForceRecord) -> None:
        if self.viewer.n_frames == 0:
            self.viewer.push(record.molecules("noisy"), label="start, with noise")
        self.viewer.push(record.molecules(), label=f"NFE {record.evaluations}")
        self._judge(record.molecules())

    def _status_changed(self, change: dict[str, Any]) -> None:
        active = change["new"] in ("running", "paused")
        fields = (self.smiles, self.atoms, self.radius, self.centre, self.regions)
        for widget in (*self.buttons.values(), *self.controls.values(), *fields):
            widget.disabled = active
        if not active:
            self.buttons["Undo"].disabled = not self.state.past
            self.buttons["Redo"].disabled = not self.state.future
