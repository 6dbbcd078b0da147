"""The live molecule viewer: trajectories, streaming from a running loop, colours by force or by soft type.

The Python side keeps all frames and sends each one once, as float32. The browser side is viewer.js.
"""

from __future__ import annotations

import base64
import html
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import anywidget
import numpy as np
import traitlets
from numpy.typing import ArrayLike, NDArray
from PIL import ImageColor
from torch import Tensor

from elign_lab.molecules import MAX_ATOMIC_NUMBER, MoleculeBatch, atomic_number
from elign_lab.widgets.errors import raise_in_tests
from elign_lab.widgets.static import (
    ELEMENT_COLORS,
    Drawing,
    FloatArray,
    force_scale,
    orientation,
    palette,
    render_png,
)

if TYPE_CHECKING:
    from ase import Atoms
    from rdkit.Chem import Mol

MAX_MESSAGES_PER_SECOND = 30
_MESSAGE_FLOATS = 1_000_000  # a back-fill is cut into messages of about 4 MB
_PICTURE_WIDTH = 640  # CSS pixels
_REFERENCE = -1  # the panel number under which an overlaid reference is sent
_COLORED = {
    "element": "",
    "force": ", coloured by the size of the forces",
    "type": ", coloured by the weights of the elements",
}


@runtime_checkable
class HasFrames(Protocol):
    """What `show` and the viewer accept as a trajectory besides a list: anything with `frames()`."""

    def frames(self) -> list[MoleculeBatch]:
        """The molecules, one batch for each step."""
        ...


MoleculeLike: TypeAlias = "MoleculeBatch | str | Mol | Atoms"
"""A batch, a SMILES string, an RDKit molecule with a conformer, or ASE's Atoms."""
TrajectoryLike: TypeAlias = "MoleculeLike | Sequence[MoleculeLike] | HasFrames"


@dataclass(frozen=True, eq=False)
class Frame:
    """One molecule as it is drawn: numbers (n,), positions (n, 3) Angstrom, forces (n, 3) eV/Angstrom, types (n, K)."""

    numbers: NDArray[np.int64]
    positions: NDArray[np.float32]
    forces: NDArray[np.float32] | None = None
    type_weights: NDArray[np.float32] | None = None
    label: str = ""


@dataclass(frozen=True)
class Drag:
    """An atom that was moved by hand: in which panel and frame, to which position (x, y, z) in Angstrom.

    done is False while the mouse button or the finger is down, and True for the last message of a drag.
    """

    panel: int
    frame: int
    atom: int
    position: tuple[float, float, float]
    done: bool


def encode(frames: Iterable[tuple[int, int, Frame]]) -> tuple[list[list[Any]], bytes]:
    """Headers and one little-endian float32 buffer of (panel, index, frame) triples.

    A header is [panel, index, n, has forces, K, label]. The buffer holds, frame after frame, n atomic numbers,
    3 n coordinates, 3 n force components if there are any, and n K type weights.
    """
    headers, parts = [], []
    for panel, index, frame in frames:
        k = 0 if frame.type_weights is None else frame.type_weights.shape[1]
        headers.append([panel, index, len(frame.numbers), frame.forces is not None, k, frame.label])
        arrays = (frame.numbers, frame.positions, frame.forces, frame.type_weights)
        parts += [np.asarray(a, dtype="<f4").tobytes() for a in arrays if a is not None]
    return headers, b"".join(parts)


def read_molecules(x: Any) -> Any:
    """What the viewer accepts as molecules, as a batch (molecules) or a list of batches (the frames of a trajectory).

    SMILES, RDKit molecules and ASE Atoms are converted. A list of Mol or Atoms is a trajectory where all have the same
    atoms, otherwise, and for a list of SMILES, molecules. Anything else is returned as it is. Raises ValueError for
    what cannot be converted, by its number in the list.
    """
    if _is_molecule(x):
        return _batch(x)
    if not isinstance(x, list | tuple) or not any(map(_is_molecule, x)):
        return x
    batches = [_batch(item, f"number {k} of the list: ") if _is_molecule(item) else item for k, item in enumerate(x)]
    if all(map(_is_molecule, x)) and not any(isinstance(item, MoleculeBatch) for item in x):
        atoms = {tuple(batch.numbers[0].tolist()) for batch in batches}
        if len(atoms) > 1 or any(isinstance(item, str) for item in x):
            return MoleculeBatch.cat(batches)
    return batches


def _is_molecule(x: object) -> bool:
    if isinstance(x, MoleculeBatch | str):  # a pushed frame waits for no import
        return True
    from ase import Atoms
    from rdkit.Chem import Mol

    return isinstance(x, Mol | Atoms)


def _batch(x: MoleculeLike, where: str = "") -> MoleculeBatch:
    """One molecule of any form as a batch; `where` begins the message of what it raises."""
    if isinstance(x, MoleculeBatch):
        return x
    from rdkit.Chem import Mol

    try:
        if isinstance(x, str):
            return MoleculeBatch.from_smiles(x)
        return MoleculeBatch.from_rdkit(x) if isinstance(x, Mol) else MoleculeBatch.from_ase(x)
    except ValueError as error:
        reason = str(error).removeprefix("molecule 0: ").replace("molecule 0 ", "the molecule ", 1)
        raise ValueError(f"{where}{reason}") from None


class MoleculeViewer(anywidget.AnyWidget):
    """A molecule, a trajectory, or several side by side under one camera; frames may be pushed while a loop runs.

    frames: a batch (each molecule is a frame), a list of batches (molecule `index` of each is a frame), an object with
        `frames()`, or a mapping from title to any of these (one panel each, all with the same camera). A SMILES
        string, an RDKit molecule with a conformer or ASE's Atoms may stand in the place of a batch.
    labels: one text a frame, for example "t = 412". forces: one (n, 3) array a frame, eV/Angstrom.
    type_weights: one (n, K) array a frame, the weights of the elements `type_elements` (default H, C, N, O, F).
        With several panels, these three are mappings with the same titles.
    color_by: "element", "force" or "type". arrows: draw the forces. force_max: the top of the colour scale,
        eV/Angstrom (default: the median over the frames of the largest force). bonds: pairs of atoms (default: pairs
        nearer than 1.3 times the sum of the covalent radii). shared_orientation: turn all panels as the first one.
    draggable: an atom that is pressed and moved goes along, parallel to the screen (see `on_drag`); beside the atoms
        the same movement still rotates.

    Two-way traits, which can be observed and set: `frame`, `selected` (an atom or None), `playing`, `follow` (stay on
    the newest frame), `color_by`, `arrows`, `last_error`. `marks` draws rings: lists of atoms by colour, such as
    {"#4c8dff": [0, 3]}. Raises ValueError for input that cannot be drawn; positions that are not finite are counted in
    the view, because a diverging sampler is something to look at.
    """

    _esm = Path(__file__).with_name("viewer.js")
    _css = Path(__file__).with_name("viewer.css")

    frame = traitlets.Int(0).tag(sync=True)
    follow = traitlets.Bool(True).tag(sync=True)
    playing = traitlets.Bool(False).tag(sync=True)
    fps = traitlets.Int(15, min=1, max=60).tag(sync=True)
    selected = traitlets.Int(None, allow_none=True, min=0).tag(sync=True)
    marks = traitlets.Dict(traitlets.List(traitlets.Int(min=0)), key_trait=traitlets.Unicode()).tag(sync=True)
    color_by = traitlets.Enum(("element", "force", "type"), "element").tag(sync=True)
    arrows = traitlets.Bool(False).tag(sync=True)
    force_max = traitlets.Float(None, allow_none=True).tag(sync=True)
    draggable = traitlets.Bool(False).tag(sync=True)
    title = traitlets.Unicode("").tag(sync=True)
    height = traitlets.Int(380, min=80).tag(sync=True)
    last_error = traitlets.Unicode("").tag(sync=True)
    _titles = traitlets.List(traitlets.Unicode()).tag(sync=True)
    _columns = traitlets.Int(1).tag(sync=True)
    _orientations: traitlets.List[Any] = traitlets.List().tag(sync=True)
    _types = traitlets.List(traitlets.Int()).tag(sync=True)
    _bonds: Any = traitlets.List(None, allow_none=True).tag(sync=True)
    _palette = traitlets.Dict().tag(sync=True)
    _still = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        frames: TrajectoryLike | Mapping[str, TrajectoryLike] = (),
        *,
        index: int = 0,
        title: str = "",
        labels: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        forces: Sequence[ArrayLike] | Mapping[str, Sequence[ArrayLike]] | None = None,
        type_weights: Sequence[ArrayLike] | Mapping[str, Sequence[ArrayLike]] | None = None,
        type_elements: Sequence[int | str] = (1, 6, 7, 8, 9),
        color_by: str = "element",
        arrows: bool = False,
        force_max: float | None = None,
        bonds: Sequence[tuple[int, int]] | None = None,
        shared_orientation: bool = True,
        draggable: bool = False,
        fps: int = 15,
        height: int = 380,
    ) -> None:
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None
        if color_by not in ("element", "force", "type"):
            raise ValueError(f"color_by is {color_by!r}, expected 'element', 'force' or 'type'")
        if force_max is not None and not force_max > 0:
            raise ValueError(f"force_max is {force_max}, expected a positive number in eV/Angstrom, or None")
        self._pending: list[tuple[int, int]] = []
        self._next_send = 0.0
        self._internal = threading.local()  # .who: for whom this thread moves `frame`, "stream" or "browser"
        self._index = index
        self._elements = [atomic_number(e) for e in type_elements]
        self._reference: Frame | None = None
        self._trajectories: list[list[Frame]] = []
        panels = frames if isinstance(frames, Mapping) else {"": frames}
        if not panels:
            raise ValueError("frames is an empty mapping: expected at least one title with its trajectory")
        for name, trajectory in panels.items():
            extras = [_of_panel(v, name, frames) for v in (labels, forces, type_weights)]
            self._trajectories.append(self._read(trajectory, *extras))
        columns = min(len(panels), 4 if len(panels) > 6 else 3 if len(panels) > 4 else 2)
        super().__init__(
            title=title,
            color_by=color_by,
            arrows=arrows,
            force_max=force_max,
            draggable=draggable,
            fps=fps,
            height=height,
            _titles=list(panels),
            _columns=columns,
            _types=self._elements,
            _bonds=self._check_bonds(bonds),
            _orientations=self._turn(shared_orientation),
            _palette=palette(),
            _still=self._encode_still(0),
            follow=self.n_frames < 2,
        )
        self._pick_callbacks: list[Callable[[int | None], object]] = []
        self._drag_callbacks: list[Callable[[Drag], object]] = []
        self.on_msg(self._on_message)

    # ------------------------------------------------------------------ frames
    @property
    def n_frames(self) -> int:
        """Number of frames (of the longest trajectory)."""
        return max(len(t) for t in self._trajectories)

    def push(
        self,
        molecule: MoleculeLike,
        *,
        forces: ArrayLike | None = None,
        type_weights: ArrayLike | None = None,
        label: str | None = None,
        panel: int = 0,
    ) -> None:
        """Append a frame, from any thread; at most 30 messages a second are sent, and no frame is lost.

        molecule: its molecule `index` is drawn. forces (n, 3), type_weights (n, K) as in the constructor.
        """
        self._check_panel(panel)
        frame = self._frame(molecule, self._index, label or "", forces, type_weights, "the pushed molecule")
        with self._lock:
            trajectory = self._trajectories[panel]
            trajectory.append(frame)
            self._pending.append((panel, len(trajectory) - 1))
            wait = self._next_send - time.monotonic()
            if wait > 0:
                if self._timer is None:
                    self._timer = threading.Timer(wait, self._flush_later)
                    self._timer.daemon = True
                    self._timer.start()
                return
            self._send_pending()
        self._follow_newest()

    def replace(
        self,
        frame: int,
        molecule: MoleculeLike,
        *,
        forces: ArrayLike | None = None,
        type_weights: ArrayLike | None = None,
        label: str | None = None,
        panel: int = 0,
    ) -> None:
        """Put another molecule in the place of a frame, from any thread; molecule, forces, ... as in `push`.

        Raises ValueError for a panel or a frame that is not there.
        """
        self._check_panel(panel)
        made = self._frame(molecule, self._index, label or "", forces, type_weights, "the new molecule")
        with self._lock:
            trajectory = self._trajectories[panel]
            if not 0 <= frame < len(trajectory):
                raise ValueError(f"frame {frame} of a panel with {len(trajectory)} frames, counted from 0")
            trajectory[frame] = made
            self._send_frames([(panel, frame)])

    def flush(self) -> None:
        """Send the frames that wait for their turn (a timer does it by itself)."""
        with self._lock:
            self._send_pending()
        self._follow_newest()

    def clear(self) -> None:
        """Remove all frames, to start anew in the same view; an overlaid reference stays."""
        with self._lock:
            self._pending.clear()
            for trajectory in self._trajectories:
                trajectory.clear()
            self.send({"kind": "clear"})
            self._still = {}
        self.frame, self.selected = 0, None
        self.follow = True

    def overlay(self, reference: MoleculeLike | None, index: int = 0) -> None:
        """Lay a translucent second molecule over every panel, in the same coordinates (None removes it)."""
        if reference is None:
            self._reference = None
            self.send({"kind": "frames", "counts": self._counts(), "items": [[_REFERENCE, 0, 0, False, 0, ""]]}, [b""])
            return
        self._reference = self._frame(reference, index, "", None, None, "the reference")
        self._send_frames([(_REFERENCE, 0)])

    # ------------------------------------------------------------------ what is shown
    @property
    def n_columns(self) -> int:
        """Number of panels in a row."""
        return self._columns

    def molecules(self) -> list[MoleculeBatch]:
        """The molecules that are shown now: one batch of one for each panel that has a frame."""
        frames = [self._trajectories[p][i] for p, i in self._shown(self.frame)]
        return [MoleculeBatch.from_arrays([(f.numbers, f.positions)], check=False) for f in frames]

    def to_png(self, path: str | Path | None = None) -> bytes:
        """The current frame as a PNG with a transparent background (force arrows are not drawn); written to `path`."""
        data = render_png(self._drawings(), width=_PICTURE_WIDTH, height=self._picture_height(), columns=self._columns)
        if path is not None:
            Path(path).write_bytes(data)
        return data

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The widget, and a picture for pages that run no widgets (GitHub, nbviewer)."""
        data, metadata = super()._repr_mimebundle_(**kwargs) or ({}, {})
        self._still = self._encode_still(self.frame)
        data["image/png"] = base64.b64encode(self.to_png()).decode()
        about = {"width": _PICTURE_WIDTH, "height": self._picture_height(), "alt": self.words()}
        return data, {**metadata, "image/png": about}

    def words(self) -> str:
        """What the picture shows, for readers who do not see it: molecules, style, frames and their labels."""
        laid = "" if self._reference is None else ", a translucent reference laid over"
        style = f"ball and stick{_COLORED[self.color_by]}{laid}"
        if len(self._titles) == 1:
            what, where = self._words_of(0)
            head = [text for text in (self.title, self._titles[0]) if text]
            return ": ".join([*head, f"{what}, {style}"]) + (f"; {where}" if where else "")
        panels = [", ".join(text for text in self._words_of(p) if text) for p in range(len(self._titles))]
        named = [f"{title}: {text}" for title, text in zip(self._titles, panels, strict=True)]
        head = [self.title] if self.title else []
        return ": ".join([*head, f"{len(named)} views side by side, {style}", "; ".join(named)])

    def _words_of(self, panel: int) -> tuple[str, str]:
        """What a panel shows: formula and number of atoms; frame and label."""
        frames = self._trajectories[panel]
        if not frames:
            return "no molecule", ""
        i = min(self.frame, len(frames) - 1)
        frame = frames[i]
        formula = MoleculeBatch.from_arrays([(frame.numbers, frame.positions)], check=False).formula(0)
        known = formula in self._titles[panel]  # as in the grid of a batch
        what = f"{len(frame.numbers)} atoms" if known else f"{formula}, {len(frame.numbers)} atoms"
        place = [f"frame {i + 1} of {len(frames)}"] if len(frames) > 1 else []
        return what, ": ".join([*place, *([frame.label] if frame.label not in ("", formula) else [])])

    def picture_html(self) -> str:
        """The picture as HTML, for the static output of a panel."""
        data = base64.b64encode(self.to_png()).decode()
        return f"<img src='data:image/png;base64,{data}' alt='{html.escape(self.words())}' width='{_PICTURE_WIDTH}'>"

    def __repr__(self) -> str:
        shown = self.molecules()
        what = shown[0].formula(0) if shown else "empty"
        name = f"{self.title!r}, " if self.title else ""
        side = f", {len(self._trajectories)} panels" if len(self._trajectories) > 1 else ""
        return f"MoleculeViewer({name}{what}, {self.n_frames} frame{'s' if self.n_frames != 1 else ''}{side})"

    # ------------------------------------------------------------------ messages
    def set_state(self, sync_data: dict[str, Any]) -> None:
        """What the browser changed; an exception of an observer is shown in the view and kept in `last_error`."""
        if "frame" in sync_data:  # a browser may not know yet that frames were cleared
            sync_data = {**sync_data, "frame": max(0, min(sync_data["frame"], self.n_frames - 1))}
        try:
            with self._internally("browser"):
                super().set_state(sync_data)
        except Exception as error:
            self._report(error)
            raise

    def send_state(self, key: str | Iterable[str] | None = None) -> None:
        """Send traits to the browser, except a `frame` that follows the stream: the frames themselves say it."""
        if key == "frame" and getattr(self._internal, "who", None) == "stream":
            return
        super().send_state(key)

    def close(self) -> None:
        """Close the view; frames that wait are dropped."""
        if hasattr(self, "_lock"):  # Python also closes what was never made: arguments with a wrong name
            with self._lock:
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None
        super().close()

    def on_pick(self, callback: Callable[[int | None], object]) -> None:
        """Call this with the atom at each click in the view, also at a second one on the same atom; None: beside it."""
        self._pick_callbacks.append(callback)

    def on_drag(self, callback: Callable[[Drag], object]) -> None:
        """Call this with a `Drag` when an atom is dragged (draggable=True): while it moves, and once when it is let go.

        The atom has moved in its frame already; forces of that frame are unknown (NaN) unless the callback gives new
        ones by `replace`. The view sends at most 15 drags a second and waits for the callbacks in between.
        """
        self._drag_callbacks.append(callback)

    def _on_message(self, _: object, content: dict[str, Any], __: object) -> None:
        if content.get("kind") == "pick":
            self._click(content["atom"])
        if content.get("kind") == "drag":
            self._dragged(content)
        if content.get("kind") != "need":
            return
        with self._lock:  # a new page: everything, also what still waits for its turn
            panels = enumerate(self._trajectories)
            everything = [(p, i) for p, trajectory in panels for i in range(len(trajectory))]
            if self._reference is not None:
                everything.insert(0, (_REFERENCE, 0))
            self._pending.clear()
            self._send_frames(everything)
        self._follow_newest()

    def _click(self, atom: int | None) -> None:
        try:
            for callback in self._pick_callbacks:
                callback(atom)
        except Exception as error:  # a click has no caller that could catch it
            self._report(error)
            raise_in_tests(error)

    def _dragged(self, content: dict[str, Any]) -> None:
        """Move the atom and tell the callbacks; a bad message moves nothing and is shown as an error."""
        try:
            drag = self._read_drag(content)
            with self._lock:
                moved = self._move(drag)
            try:
                for callback in self._drag_callbacks:
                    callback(drag)
            finally:
                with self._lock:
                    if moved in self._trajectories[drag.panel]:  # otherwise a callback has put something else there
                        self._send_frames([(drag.panel, drag.frame)])
        except Exception as error:  # as in _click
            self._report(error)
            raise_in_tests(error)
        finally:
            self.send({"kind": "dragged"})  # the view may send the next one

    def _read_drag(self, content: dict[str, Any]) -> Drag:
        if not self.draggable:
            raise ValueError("a drag in a view that is not draggable: make it with draggable=True")
        given: dict[str, Any] = {"panel": None, "frame": None, "atom": None, **content}
        panel, frame, atom = given["panel"], given["frame"], given["atom"]
        trajectory = self._trajectories[panel] if _is_index(panel, len(self._trajectories)) else []
        if not trajectory or not _is_index(frame, self.n_frames):
            raise ValueError(f"a drag in panel {panel}, frame {frame}, which is not there: nothing was moved")
        frame = min(frame, len(trajectory) - 1)  # a shorter trajectory stays on its last frame
        n = len(trajectory[frame].numbers)
        if not _is_index(atom, n):
            raise ValueError(f"a drag of atom {atom}: expected 0 to {n - 1}; nothing was moved")
        position = content.get("position")
        if not isinstance(position, list | tuple) or len(position) != 3 or not all(map(_is_finite, position)):
            raise ValueError(f"atom {atom} dragged to {position}: expected three finite numbers; nothing was moved")
        x, y, z = map(float, position)
        return Drag(panel, frame, atom, (x, y, z), bool(content.get("done")))

    def _move(self, drag: Drag) -> Frame:
        """Move an atom; the caller holds the lock. The forces belong to the old structure."""
        old = self._trajectories[drag.panel][drag.frame]
        positions = old.positions.copy()
        positions[drag.atom] = drag.position
        forces = None if old.forces is None else np.full_like(old.forces, np.nan)
        moved = replace(old, positions=positions, forces=forces)
        self._trajectories[drag.panel][drag.frame] = moved
        return moved

    def _send_pending(self) -> None:
        """Send what waits; the caller holds the lock."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        self._send_frames(pending)
        self._next_send = time.monotonic() + 1 / MAX_MESSAGES_PER_SECOND
        if not self._still:
            self._still = self._encode_still(0)

    def _send_frames(self, keys: list[tuple[int, int]]) -> None:
        chunk: list[tuple[int, int, Frame]] = []
        room = _MESSAGE_FLOATS
        for panel, i in keys:
            frame = self._reference if panel == _REFERENCE else self._trajectories[panel][i]
            assert frame is not None  # a pending reference is there
            chunk.append((panel, i, frame))
            room -= 7 * len(frame.numbers)
            if room < 0:
                self._send_chunk(chunk)
                chunk, room = [], _MESSAGE_FLOATS
        if chunk:
            self._send_chunk(chunk)

    def _send_chunk(self, chunk: list[tuple[int, int, Frame]]) -> None:
        headers, data = encode(chunk)
        self.send({"kind": "frames", "counts": self._counts(), "items": headers}, [data])

    @contextmanager
    def _internally(self, who: str) -> Iterator[None]:
        before = getattr(self._internal, "who", None)
        self._internal.who = who
        try:
            yield
        finally:
            self._internal.who = before

    def _follow_newest(self) -> None:
        if self.follow and self.n_frames:
            with self._internally("stream"):
                self.set_trait("frame", self.n_frames - 1)

    def _flush_later(self) -> None:
        try:
            self.flush()
        except Exception as error:  # on a timer's thread no caller could catch it
            self._report(error)

    def _check_panel(self, panel: int) -> None:
        if not 0 <= panel < len(self._trajectories):
            raise ValueError(f"panel {panel} of a viewer with {len(self._trajectories)}")

    def _report(self, error: Exception) -> None:
        self.last_error = f"{type(error).__name__}: {error}"

    @traitlets.validate("frame")
    def _check_frame(self, proposal: dict[str, Any]) -> int:
        if not 0 <= proposal["value"] < max(1, self.n_frames):
            raise ValueError(f"frame {proposal['value']} of a viewer with {self.n_frames} frames, counted from 0")
        return proposal["value"]

    @traitlets.validate("marks")
    def _check_marks(self, proposal: dict[str, Any]) -> dict[str, list[int]]:
        for color in proposal["value"]:
            try:
                ImageColor.getrgb(color)
            except ValueError:
                raise ValueError(f"marks: {color!r} is no colour, expected one such as '#ff9d2e' or 'red'") from None
        return proposal["value"]

    @traitlets.observe("frame")
    def _frame_set(self, change: dict[str, Any]) -> None:
        if getattr(self._internal, "who", None) is None:
            self.follow = change["new"] == self.n_frames - 1

    # ------------------------------------------------------------------ reading the input
    def _read(
        self,
        trajectory: TrajectoryLike,
        labels: Sequence[str] | None,
        forces: Sequence[ArrayLike] | None,
        type_weights: Sequence[ArrayLike] | None,
    ) -> list[Frame]:
        given = read_molecules(trajectory)
        sources: list[tuple[MoleculeLike, int]]
        if isinstance(given, MoleculeBatch):
            sources = [(given, i) for i in range(len(given))]
        else:
            batches = given.frames() if isinstance(given, HasFrames) else list(given)
            sources = [(batch, self._index) for batch in batches]
        for name, values in (("labels", labels), ("forces", forces), ("type_weights", type_weights)):
            if values is not None and len(values) != len(sources):
                raise ValueError(f"{len(values)} {name} for {len(sources)} frames: expected one for each frame")
        return [
            self._frame(
                batch,
                i,
                "" if labels is None else str(labels[k]),
                None if forces is None else forces[k],
                None if type_weights is None else type_weights[k],
                f"frame {k}",
            )
            for k, (batch, i) in enumerate(sources)
        ]

    def _frame(
        self,
        given: MoleculeLike,
        index: int,
        label: str,
        forces: ArrayLike | None,
        type_weights: ArrayLike | None,
        where: str,
    ) -> Frame:
        if not _is_molecule(given):
            expected = "a MoleculeBatch, a SMILES string, an RDKit molecule or ASE's Atoms"
            raise ValueError(f"{where} is a {type(given).__name__}, expected {expected}")
        batch = _batch(given, f"{where}: ")
        if not 0 <= index < len(batch):
            raise ValueError(f"{where}: molecule {index} of a batch of {len(batch)}")
        mask = batch.mask[index].cpu()
        numbers = batch.numbers[index].cpu()[mask].numpy()
        if len(numbers) == 0:
            raise ValueError(f"{where}: molecule {index} is empty")
        if numbers.min() < 1 or numbers.max() > MAX_ATOMIC_NUMBER:
            raise ValueError(f"{where}: atomic numbers must be 1 to {MAX_ATOMIC_NUMBER}, got {numbers.tolist()}")
        positions = batch.positions[index].detach().cpu()[mask].numpy().astype(np.float32)
        f = _per_atom(forces, "forces", 3, index, mask, where)
        w = _per_atom(type_weights, "type_weights", len(self._elements), index, mask, where)
        if w is not None:
            total = w.sum(1, keepdims=True)
            if not (np.isfinite(w).all() and (w >= 0).all() and (total > 0).all()):
                raise ValueError(
                    f"{where}: type_weights must be finite, not negative and not all zero for an atom; "
                    "turn relaxed one-hot types into weights first, for example by clamp(min=0) or softmax(-1)"
                )
            w = w / total
        return Frame(numbers, positions, f, w, label)

    def _check_bonds(self, bonds: Sequence[tuple[int, int]] | None) -> list[list[int]] | None:
        if bonds is None:
            return None
        pairs = [[int(i) for i in pair] for pair in bonds]
        atoms = max((len(f.numbers) for t in self._trajectories for f in t), default=None)
        for pair in pairs:
            if len(pair) != 2 or pair[0] == pair[1] or min(pair) < 0 or (atoms is not None and max(pair) >= atoms):
                raise ValueError(f"bond {tuple(pair)}: expected two different atoms, 0 to {(atoms or 0) - 1}")
        return pairs

    # ------------------------------------------------------------------ what is drawn
    def _counts(self) -> list[int]:
        return [len(t) for t in self._trajectories]

    def _turn(self, shared: bool) -> list[list[float] | None]:
        """Rows of the first view's rotation for each panel, from the last frame: what a trajectory arrives at."""
        turns = [orientation(t[-1].positions).ravel().tolist() if t else None for t in self._trajectories]
        return turns[:1] * len(turns) if shared else turns

    def _shown(self, frame: int) -> list[tuple[int, int]]:
        return [(p, min(frame, len(t) - 1)) for p, t in enumerate(self._trajectories) if t]

    def _encode_still(self, frame: int) -> dict[str, Any]:
        """One frame a panel inside the widget's state: a saved page that has no kernel can draw it."""
        shown = self._shown(frame)
        if not shown:
            return {}
        headers, data = encode((p, 0, self._trajectories[p][i]) for p, i in shown)
        return {"items": headers, "data": data, "counts": [min(1, n) for n in self._counts()]}

    def _picture_height(self) -> int:
        rows = -(-len(self._trajectories) // self._columns)
        return rows * min(self.height, round(0.62 * _PICTURE_WIDTH / min(self._columns, 2)))

    def _drawings(self) -> list[Drawing]:
        drawings = []
        shown = dict(self._shown(self.frame))
        overlay = self._reference
        reference = None if overlay is None else (overlay.numbers, overlay.positions)
        for p, name in enumerate(self._titles):
            frame = self._trajectories[p][shown[p]] if p in shown else _NOTHING
            turn = self._orientations[p]
            rotation = orientation(frame.positions) if turn is None else np.reshape(turn, (3, 3))
            caption = " · ".join(text for text in (name or self.title, frame.label) if text)
            colors = self._colors(frame)
            sticks = None if self._bonds is None else np.array(self._bonds, dtype=int).reshape(-1, 2)
            given = (frame.numbers, frame.positions, colors, rotation, caption, sticks, reference, self.marks)
            drawings.append(Drawing(*given))
        return drawings

    def _colors(self, frame: Frame) -> FloatArray:
        if self.color_by == "force" and frame.forces is not None:
            return force_scale(np.linalg.norm(frame.forces, axis=1) / self._force_top())
        if self.color_by == "type" and frame.type_weights is not None:
            return frame.type_weights @ ELEMENT_COLORS[self._types]
        return ELEMENT_COLORS[frame.numbers]

    def _force_top(self) -> float:
        if self.force_max is not None:
            return self.force_max
        forces = (f.forces for t in self._trajectories for f in t if f.forces is not None)
        peaks = sorted(float(np.nan_to_num(np.linalg.norm(f, axis=1), nan=0, posinf=0).max()) for f in forces)
        return (peaks[len(peaks) // 2] if peaks else 0) or 1.0


_NOTHING = Frame(np.zeros(0, dtype=np.int64), np.zeros((0, 3), dtype=np.float32))


def compare(
    a: TrajectoryLike, b: TrajectoryLike, *, titles: tuple[str, str] = ("first", "second"), **options: Any
) -> MoleculeViewer:
    """Two trajectories side by side, locked to one camera and one frame slider; options as for MoleculeViewer."""
    if len(titles) != 2 or titles[0] == titles[1]:
        raise ValueError(f"titles is {titles!r}, expected two different texts")
    return MoleculeViewer({titles[0]: a, titles[1]: b}, **options)


def _of_panel(value: Any, name: str, frames: object) -> Any:
    """The labels (or forces, ...) of one panel."""
    if value is None or not isinstance(frames, Mapping):
        return value
    if not isinstance(value, Mapping) or not set(value) <= set(frames):
        raise ValueError(
            f"frames has the titles {list(frames)}: labels, forces and type_weights must be mappings of them"
        )
    return value.get(name)


def _is_index(value: Any, n: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < n


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _per_atom(
    values: ArrayLike | None, name: str, columns: int, index: int, mask: Tensor, where: str
) -> NDArray[np.float32] | None:
    """(n, columns) of one molecule from (n, columns), (N, columns) or (B, N, columns) with padding."""
    if values is None:
        return None
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float32)
    if array.ndim == 3:
        if index >= len(array):
            raise ValueError(f"{where}: {name} of a batch of {len(array)}, molecule {index} is asked for")
        array = array[index]
    n = int(mask.sum())
    if array.ndim != 2 or array.shape[1] != columns or array.shape[0] not in (n, len(mask)):
        raise ValueError(f"{where}: {name} has shape {tuple(array.shape)}, expected ({n}, {columns})")
    return array if len(array) == n else array[mask.numpy()]
