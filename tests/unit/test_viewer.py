"""The viewer, its picture and the controls of long loops, without a browser."""

from __future__ import annotations

import base64
import functools
import gc
import http.server
import io
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import molecule
from PIL import Image
from rdkit import Chem

import elign_lab.widgets as widgets
from elign_lab.molecules import MoleculeBatch
from elign_lab.widgets import Live, MoleculeViewer, compare, show, static, viewer
from elign_lab.widgets.viewer import MAX_MESSAGES_PER_SECOND, Drag, Frame, encode

FOLDER = Path(viewer.__file__).parent


@pytest.fixture(scope="module")
def molecules() -> MoleculeBatch:
    return MoleculeBatch.from_smiles(["CCO", "c1ccccc1O", "N"])


@pytest.fixture(scope="module")
def path(molecules: MoleculeBatch) -> list[MoleculeBatch]:
    noise = torch.randn(molecules.positions.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [molecules.with_positions(molecules.positions + s * noise) for s in (1.0, 0.5, 0.1, 0.0)]


class Recorder:
    """Takes the place of `viewer.send` and keeps what it was given, with the time."""

    def __init__(self, target: MoleculeViewer) -> None:
        self.messages: list[tuple[float, dict, list[bytes]]] = []
        target.send = self

    def __call__(self, content: dict, buffers: list[bytes] | None = None) -> None:
        self.messages.append((time.monotonic(), content, list(buffers or [])))

    def frames(self) -> dict[tuple[int, int], dict[str, np.ndarray]]:
        """All frames that were sent, decoded as the layout in `encode` says; each must come once."""
        found: dict = {}
        for _, content, buffers in self.messages:
            if content["kind"] != "frames":
                continue
            values = np.frombuffer(buffers[0], dtype="<f4")
            at = 0
            for panel, index, n, forced, k, label in content["items"]:
                sizes = {"numbers": n, "positions": 3 * n, "forces": 3 * n if forced else 0, "types": k * n}
                parts = {"label": label}
                for name, size in sizes.items():
                    parts[name] = values[at : at + size]
                    at += size
                assert (panel, index) not in found
                found[panel, index] = parts
            assert at == len(values)
        return found


# ---------------------------------------------------------------------- frames
def test_frames_are_encoded_bit_exactly(molecules):
    odd = molecules.positions[0, :9].float().numpy()
    odd[0] = [np.nan, np.inf, -0.0]
    odd[1] = [np.float32(1e-45), np.float32(3.4e38), 1 / 3]
    forces = np.random.default_rng(0).normal(size=(9, 3)).astype("f4")
    weights = np.random.default_rng(1).random((9, 5)).astype("f4")
    frame = Frame(molecules.numbers[0, :9].numpy(), odd, forces, weights, "t = 3")
    headers, data = encode([(0, 4, frame), (1, 0, Frame(frame.numbers, forces))])
    assert headers == [[0, 4, 9, True, 5, "t = 3"], [1, 0, 9, False, 0, ""]]
    values = np.frombuffer(data, dtype="<f4")
    assert values[:9].tolist() == frame.numbers.tolist()
    assert values[9:36].tobytes() == odd.tobytes()
    assert values[36:63].tobytes() == forces.tobytes()
    assert values[63:108].tobytes() == weights.tobytes()
    assert values[117:].tobytes() == forces.tobytes()


def test_a_new_page_gets_everything_once(path):
    v = MoleculeViewer({"a": path, "b": path[:2]}, index=1)
    v.overlay(path[-1], index=1)
    sent = Recorder(v)
    v._handle_custom_msg({"kind": "need"}, [])
    frames = sent.frames()
    assert set(frames) == {(-1, 0), (0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)}
    for k, batch in enumerate(path):
        numbers, positions = batch.arrays()[1]
        assert frames[0, k]["numbers"].tolist() == numbers.tolist()
        assert np.array_equal(frames[0, k]["positions"].reshape(-1, 3), positions.astype("f4"))
    assert sent.messages[-1][1]["counts"] == [4, 2]


def test_a_large_back_fill_is_cut_into_messages(path, monkeypatch):
    monkeypatch.setattr(viewer, "_MESSAGE_FLOATS", 300)
    v = MoleculeViewer([path[k % 4] for k in range(50)], index=1)
    sent = Recorder(v)
    v._handle_custom_msg({"kind": "need"}, [])
    assert len(sent.messages) > 5
    assert sorted(sent.frames()) == [(0, k) for k in range(50)]


def test_the_stream_is_throttled_and_loses_nothing(path):
    v = MoleculeViewer()
    sent, states = Recorder(v), []
    v.send_state = lambda key=None: states.append(key)
    threads = [threading.Thread(target=lambda: [v.push(path[k % 4], label=str(k)) for k in range(200)]) for _ in "ab"]
    start = time.monotonic()
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    while len(sent.frames()) < 400 and time.monotonic() < start + 5:
        time.sleep(0.01)
    assert sorted(sent.frames()) == [(0, k) for k in range(400)]
    times = np.array([t for t, _, _ in sent.messages])
    assert np.diff(times).min() > 0.99 / MAX_MESSAGES_PER_SECOND
    for t in times:
        assert ((times >= t) & (times < t + 1)).sum() <= MAX_MESSAGES_PER_SECOND
    assert v.n_frames == 400
    assert v.frame == 399


def test_following_the_stream_sends_no_frame_state(path):
    v = MoleculeViewer()
    sent = []
    v._send = lambda message, buffers=None: sent.append(message)
    for batch in path:
        v.push(batch)
        v.flush()
    assert v.frame == 3
    assert not any("frame" in m.get("state", {}) for m in sent)
    v.frame = 1
    assert {"frame": 1} in [m.get("state") for m in sent]
    assert not v.follow
    v.push(path[0])
    v.flush()
    assert v.frame == 1, "a reader who went back stays there"


def test_clear_starts_anew(path):
    v = MoleculeViewer(path)
    v.frame = 3
    sent = Recorder(v)
    v.clear()
    assert (v.n_frames, v.frame, v.follow) == (0, 0, True)
    assert [m["kind"] for _, m, _ in sent.messages] == ["clear"]
    v.push(path[0])
    v.flush()
    assert list(sent.frames()) == [(0, 0)]


def test_padding_is_not_drawn_and_generated_nonsense_is(molecules):
    v = MoleculeViewer([molecules], index=2, forces=[torch.ones(3, molecules.numbers.shape[1], 3)])
    sent = Recorder(v)
    v._handle_custom_msg({"kind": "need"}, [])
    assert sent.frames()[0, 0]["numbers"].tolist() == [7, 1, 1, 1]
    assert sent.frames()[0, 0]["forces"].tolist() == [1.0] * 12
    x = torch.tensor([[[0.0, 0, 0], [torch.nan, 0, 0]]])
    broken = MoleculeBatch(torch.tensor([[6, 8]]), x, torch.ones(1, 2), check=False)
    assert len(MoleculeViewer(broken).to_png()) > 100


# ---------------------------------------------------------------------- the browser's side of traits
def test_the_browser_moves_the_frame(path):
    v = MoleculeViewer(path)
    seen = []
    v.observe(lambda change: seen.append(change["new"]), "frame")
    v.set_state({"frame": 2, "follow": False})
    v.set_state({"selected": 4})
    assert (v.frame, v.follow, v.selected, seen) == (2, False, 4, [2])
    v.set_state({"frame": 99})
    assert v.frame == 3, "a browser that does not know of a clear() is not an error"


def test_a_callback_may_move_the_frame_on_and_the_browser_hears_it(path):
    v = MoleculeViewer(path)
    sent = []
    v._send = lambda message, buffers=None: sent.append(message)
    v.observe(lambda change: v.set_trait("frame", change["new"] // 2 * 2), "frame")  # even frames only
    v.set_state({"frame": 3})
    assert v.frame == 2
    assert {"frame": 2} in [m["state"] for m in sent if m["method"] == "update"]


def test_an_error_of_a_callback_is_kept_and_raised(path):
    v = MoleculeViewer(path)

    def fail(change):
        raise RuntimeError(f"no frame {change['new']} please")

    v.observe(fail, "frame")
    with pytest.raises(RuntimeError, match="no frame 2"):
        v.set_state({"frame": 2})
    assert v.last_error == "RuntimeError: no frame 2 please"


def test_an_error_on_the_timer_is_kept(path):
    v = MoleculeViewer()
    v.push(path[0])
    v.observe(lambda change: 1 / 0, "frame")
    v.push(path[1])
    deadline = time.monotonic() + 5
    while not v.last_error and time.monotonic() < deadline:
        time.sleep(0.01)
    assert v.last_error == "ZeroDivisionError: division by zero"


def test_the_module_is_small_and_alone():
    source = (FOLDER / "viewer.js").read_text()
    assert len(source.encode()) < 30_000
    assert "import" not in source.replace("important", "")
    assert "http" not in source.replace("http://www.w3.org/2000/svg", "")
    assert f"STICK = {static.STICK_RADIUS}, BOND = {static.BOND_TOLERANCE}, OVERLAP = {static.OVERLAP};" in source
    assert str((255 * static.VIRIDIS).round().astype(int).tolist()) in source


# ---------------------------------------------------------------------- dragged atoms
def drag_message(**changes) -> dict:
    """What the view sends when atom 2 of the first panel is let go."""
    return {"kind": "drag", "panel": 0, "frame": 1, "atom": 2, "position": [0.5, -1.0, 2.25], "done": True} | changes


def test_a_dragged_atom_moves_in_its_frame_and_nothing_else_does(path):
    forces = np.ones((9, 3))
    v = MoleculeViewer({"a": path, "b": path[:1]}, forces={"a": [forces] * 4}, draggable=True)
    sent, seen = Recorder(v), []
    v.on_drag(seen.append)
    v._handle_custom_msg(drag_message(done=False), [])
    assert seen == [Drag(panel=0, frame=1, atom=2, position=(0.5, -1.0, 2.25), done=False)]
    ((_, now),) = sent.frames().items()
    moved = now["positions"].reshape(-1, 3)
    assert moved[2].tolist() == [0.5, -1.0, 2.25]
    before = path[1].arrays()[0][1].astype("f4")
    assert np.array_equal(np.delete(moved, 2, 0), np.delete(before, 2, 0))
    assert np.isnan(now["forces"]).all(), "the forces were those of another structure"
    assert [m["kind"] for _, m, _ in sent.messages] == ["frames", "dragged"]
    v.frame = 1
    assert v.molecules()[0].positions[0, 2].tolist() == [0.5, -1.0, 2.25]
    assert path[1].arrays()[0][1][2].tolist() != [0.5, -1.0, 2.25], "the molecule that was given stays"

    # the shorter trajectory is on its last frame, and that is what is dragged there
    v._handle_custom_msg(drag_message(panel=1, frame=3), [])
    assert seen[1] == Drag(panel=1, frame=0, atom=2, position=(0.5, -1.0, 2.25), done=True)


def test_a_callback_gives_the_forces_of_what_was_dragged(path):
    v = MoleculeViewer(path, forces=[np.zeros((9, 3))] * 4, draggable=True)
    sent = Recorder(v)

    def answer(drag: Drag) -> None:
        v.frame = drag.frame
        v.replace(drag.frame, v.molecules()[0], forces=np.full((9, 3), 2.0), label="moved")

    v.on_drag(answer)
    v._handle_custom_msg(drag_message(), [])
    frame = sent.frames()[0, 1]  # sent once: the view never has the new structure without its forces
    assert frame["positions"].reshape(-1, 3)[2].tolist() == [0.5, -1.0, 2.25]
    assert frame["forces"].tolist() == [2.0] * 27
    assert frame["label"] == "moved"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"atom": 9}, "a drag of atom 9: expected 0 to 8; nothing was moved"),
        ({"atom": -1}, "a drag of atom -1"),
        ({"atom": None}, "a drag of atom None"),
        ({"atom": True}, "a drag of atom True"),
        ({"frame": 4}, "a drag in panel 0, frame 4, which is not there"),
        ({"frame": "1"}, "a drag in panel 0, frame 1, which is not there"),
        ({"panel": 1}, "a drag in panel 1, frame 1, which is not there"),
        ({"position": [0.0, float("nan"), 0.0]}, "atom 2 dragged to .*nan.*: expected three finite numbers"),
        ({"position": [0.0, None, 0.0]}, "expected three finite numbers"),  # what JSON makes of not-a-number
        ({"position": [0.0, 1.0]}, "expected three finite numbers"),
        ({"position": None}, "expected three finite numbers"),
    ],
)
def test_a_drag_that_makes_no_sense_is_refused_and_seen(path, changes, message):
    v = MoleculeViewer(path, draggable=True)
    sent, seen = Recorder(v), []
    v.on_drag(seen.append)
    v._handle_custom_msg(drag_message(**changes), [])
    assert re.search(message, v.last_error)
    assert v.last_error.startswith("ValueError: ")
    assert seen == []
    assert [m["kind"] for _, m, _ in sent.messages] == ["dragged"], "the view waits for an answer"
    v._handle_custom_msg({"kind": "need"}, [])
    for k, batch in enumerate(path):
        assert np.array_equal(sent.frames()[0, k]["positions"].reshape(-1, 3), batch.arrays()[0][1].astype("f4")), (
            "the old structure is kept"
        )


def test_only_a_draggable_view_lets_its_atoms_be_moved(path):
    v = MoleculeViewer(path)
    v._handle_custom_msg(drag_message(), [])
    assert "make it with draggable=True" in v.last_error
    v.frame = 1
    assert v.molecules()[0].positions[0, 2].tolist() == pytest.approx(path[1].positions[0, 2].tolist())
    assert show(path, draggable=True).draggable


def test_an_error_of_a_drag_callback_is_seen_and_the_view_goes_on(path):
    v = MoleculeViewer(path, draggable=True)
    v.on_drag(lambda drag: 1 / 0)
    sent = Recorder(v)
    v._handle_custom_msg(drag_message(), [])
    assert v.last_error == "ZeroDivisionError: division by zero"
    assert [m["kind"] for _, m, _ in sent.messages] == ["frames", "dragged"]


def test_a_test_of_a_notebook_gets_what_callbacks_raise(path, monkeypatch):
    v = MoleculeViewer(path, draggable=True)
    v.on_drag(lambda drag: 1 / 0)
    v.on_pick(lambda atom: [][atom])
    sent = Recorder(v)
    monkeypatch.setenv("ELIGN_LAB_RAISE", "1")
    with pytest.raises(ZeroDivisionError):
        v._on_message(v, drag_message(), [])
    assert v.last_error == "ZeroDivisionError: division by zero"
    assert [m["kind"] for _, m, _ in sent.messages] == ["frames", "dragged"], "the view waits for an answer"
    with pytest.raises(IndexError):
        v._on_message(v, {"kind": "pick", "atom": 1}, [])
    assert v.last_error == "IndexError: list index out of range"


# ---------------------------------------------------------------------- picture and representation
def test_the_text_is_the_same_every_time(path):
    assert repr(MoleculeViewer(path, title="run")) == "MoleculeViewer('run', C2H6O, 4 frames)"
    assert repr(MoleculeViewer()) == "MoleculeViewer(empty, 0 frames)"
    assert repr(compare(path, path, index=1)) == "MoleculeViewer(C6H6O, 4 frames, 2 panels)"
    assert repr(Live(range(3))) == "Live(ready, 0 of 3 items)"


def test_the_output_has_widget_picture_and_text(path):
    data, metadata = MoleculeViewer(path)._repr_mimebundle_()
    assert data["text/plain"] == "MoleculeViewer(C2H6O, 4 frames)"
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"]
    image = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    size = metadata["image/png"]
    assert image.size == (2 * size["width"], 2 * size["height"])
    assert size["alt"] == "C2H6O, 9 atoms, ball and stick; frame 1 of 4"


def test_the_picture_has_words_for_readers_who_do_not_see_it(molecules, path):
    v = MoleculeViewer(path, title="run", labels=[f"t = {40 * k}" for k in range(4)])
    v.frame, v.color_by = 2, "force"
    expected = "run: C2H6O, 9 atoms, ball and stick, coloured by the size of the forces; frame 3 of 4: t = 80"
    assert v._repr_mimebundle_()[1]["image/png"]["alt"] == v.words() == expected
    v.overlay(molecules[1])
    assert "laid over" in v.words()
    assert show(molecules[:2]).words() == (
        "2 views side by side, ball and stick: 0: C2H6O: 9 atoms; 1: C6H6O: 13 atoms"
    )
    both = compare(path, path[:2], titles=("base", "aligned"))
    both.frame = 3  # the shorter one stays on its last frame
    assert both.words().endswith("base: C2H6O, 9 atoms, frame 4 of 4; aligned: C2H6O, 9 atoms, frame 2 of 2")
    assert MoleculeViewer().words() == "no molecule, ball and stick"
    v = MoleculeViewer(path, title="<'run'>")
    page = v.picture_html()
    assert "alt='&lt;&#x27;run&#x27;&gt;: C2H6O" in page
    assert base64.b64decode(page.split("base64,")[1].split("'")[0]) == v.to_png()


def test_the_picture_shows_the_atoms_in_their_colours(molecules):
    image = np.asarray(Image.open(io.BytesIO(MoleculeViewer(molecules[0]).to_png())).convert("RGBA")).astype(int)
    drawn = image[..., 3] > 0
    assert 0.03 < drawn.mean() < 0.7
    red = drawn & (image[..., 0] - image[..., 1:3].max(-1) > 60)
    white = drawn & (image[..., :3].min(-1) > 190)
    assert red.sum() > 500, "the oxygen"
    assert white.sum() > 2000, "the hydrogens"
    assert len(np.unique(image[drawn], axis=0)) > 30, "shaded, not flat"


def test_the_picture_follows_frame_colour_and_reference(path):
    forces = [np.linspace(0, 4, 27).reshape(9, 3)] * 4
    v = MoleculeViewer(path, forces=forces)
    first = v.to_png()
    v.frame = 3
    last = v.to_png()
    v.color_by = "force"
    by_force = v.to_png()
    v.overlay(path[2])
    assert len({first, last, by_force, v.to_png()}) == 4


def test_the_picture_has_the_rings_of_the_view(molecules):
    v = MoleculeViewer(molecules[0])

    def blue() -> np.ndarray:
        image = np.asarray(Image.open(io.BytesIO(v.to_png())).convert("RGBA")).astype(int)
        return np.argwhere((image[..., 2] - image[..., 0] > 120) & (image[..., 3] > 200))

    assert len(blue()) == 0
    v.marks = {"#2060ff": [0, 99]}  # a frame may have fewer atoms
    one = blue()
    v.marks = {"#2060ff": [0, 1]}
    assert len(blue()) > 1.7 * len(one) > 0
    middle = (one.min(0) + one.max(0)) / 2
    radii = np.linalg.norm(one - middle, axis=1)
    assert radii.max() - radii.min() < 8, "a ring, and round"
    with pytest.raises(ValueError, match="marks: 'no colour' is no colour, expected one such as"):
        v.marks = {"no colour": [0]}


def test_the_picture_fits_what_is_laid_over(molecules):
    far = molecules[0].with_positions(molecules[0].positions + torch.tensor([14.0, 9.0, 3.0]))
    v = MoleculeViewer(molecules[0])
    v.overlay(far)
    image = np.asarray(Image.open(io.BytesIO(v.to_png())).convert("RGBA")).astype(int)
    green = (image[..., 3] > 60) & (image[..., 1] - image[..., 0] > 40)
    assert green.sum() > 300, "the reference is in the picture"
    edge = np.concatenate([image[0, :, 3], image[-1, :, 3], image[:, 0, 3], image[:, -1, 3]])
    assert edge.max() == 0, "and nothing of it is cut off"


def test_a_picture_seen_along_a_bond_is_finite():
    carbon = static.Drawing(np.array([6, 6]), np.array([[0, 0, 0.7], [0, 0, -0.7]]), np.full((2, 3), 0.5), np.eye(3))
    image = Image.open(io.BytesIO(static.render_png([carbon], width=100, height=80, columns=1)))
    assert image.size == (200, 160)


def test_bonds_of_phenol(molecules):
    numbers, positions = molecules.arrays()[1]
    pairs = static.bonds(numbers, positions)
    assert len(pairs) == 13
    degree = np.bincount(pairs.ravel())
    assert sorted(degree[numbers == 6].tolist()) == [3] * 6
    assert sorted(degree[numbers == 1].tolist()) == [1] * 6


def test_the_first_view_is_a_rotation_that_shows_the_flat_side(molecules):
    _, positions = molecules.arrays()[1]
    turn = static.orientation(positions)
    assert np.allclose(turn @ turn.T, np.eye(3))
    assert np.linalg.det(turn) == pytest.approx(1)
    spread = ((positions - positions.mean(0)) @ turn.T).std(0)
    assert spread[0] > spread[1] > spread[2]


def test_a_page_without_widgets_shows_the_picture(path):
    nbconvert = pytest.importorskip("nbconvert", reason="nbconvert comes with JupyterLab")
    import nbformat

    data, metadata = MoleculeViewer(path)._repr_mimebundle_()
    output = nbformat.v4.new_output("display_data", data=data, metadata=metadata)
    cell = nbformat.v4.new_code_cell("viewer", outputs=[output])
    body, _ = nbconvert.HTMLExporter(template_name="basic").from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    assert f"data:image/png;base64,{data['image/png'][:60]}" in body
    assert "widget-view" not in body


def test_a_saved_page_has_one_frame_in_the_state(path):
    v = MoleculeViewer(path)
    v.frame = 2
    v._repr_mimebundle_()
    assert v._still["counts"] == [1]
    values = np.frombuffer(v._still["data"], dtype="<f4")
    assert np.array_equal(values[9:].reshape(-1, 3), path[2].arrays()[0][1].astype("f4"))


# ---------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, p: MoleculeViewer(p, index=3), "molecule 3 of a batch of 3"),
        (lambda m, p: MoleculeViewer([3]), "frame 0 is a int, expected a MoleculeBatch, a SMILES string"),
        (lambda m, p: MoleculeViewer([m[0], None]), "frame 1 is a NoneType"),
        (lambda m, p: show("water"), "'water' is not a valid SMILES string"),
        (lambda m, p: show(["CCO", "C1C"]), "number 1 of the list: 'C1C' is not a valid SMILES"),
        (lambda m, p: show([m[0], Chem.MolFromSmiles("CCO")]), "number 1 of the list: the molecule has no conformer"),
        (lambda m, p: show({"a": Chem.MolFromSmiles("CCO")}), "the molecule has no conformer: embed it first"),
        (lambda m, p: MoleculeViewer().push(Chem.MolFromSmiles("CCO")), "the pushed molecule: the molecule has no"),
        (lambda m, p: MoleculeViewer({}), "empty mapping"),
        (lambda m, p: MoleculeViewer(p, labels=["a"]), "1 labels for 4 frames"),
        (lambda m, p: MoleculeViewer(m[0], forces=[np.zeros((4, 3))]), r"forces has shape \(4, 3\), expected \(9, 3\)"),
        (lambda m, p: MoleculeViewer(m[0], type_weights=[-np.ones((9, 5))]), "softmax"),
        (lambda m, p: MoleculeViewer(m[0], type_weights=[np.ones((9, 3))]), r"expected \(9, 5\)"),
        (lambda m, p: MoleculeViewer(m[0], type_elements=("H", "Xx")), "unknown element 'Xx'"),
        (lambda m, p: MoleculeViewer(m[0], bonds=[(0, 9)]), r"bond \(0, 9\): expected two different atoms, 0 to 8"),
        (lambda m, p: MoleculeViewer(m[0], color_by="charge"), "color_by is 'charge'"),
        (lambda m, p: MoleculeViewer(m[0], force_max=0), "force_max is 0"),
        (lambda m, p: MoleculeViewer({"a": p}, labels=["t"] * 4), "must be mappings"),
        (lambda m, p: MoleculeViewer().push(p[0], panel=1), "panel 1 of a viewer with 1"),
        (lambda m, p: MoleculeViewer(p).replace(4, p[0]), "frame 4 of a panel with 4 frames"),
        (lambda m, p: MoleculeViewer(p).replace(0, p[0], panel=1), "panel 1 of a viewer with 1"),
        (lambda m, p: setattr(MoleculeViewer(p), "frame", 4), "frame 4 of a viewer with 4 frames"),
        (lambda m, p: compare(p, p, titles=("a", "a")), "two different texts"),
        (lambda m, p: show(3), "cannot show a int"),
        (lambda m, p: show(m, style="cartoon"), "style is 'cartoon'"),
        (lambda m, p: Live(3), "expected an iterable"),
        (lambda m, p: Live(range(3)).wait(), "call start"),
    ],
)
def test_bad_input_is_refused_with_a_reason(molecules, path, make, message):
    with pytest.raises(ValueError, match=message):
        make(molecules, path)


# ---------------------------------------------------------------------- show
def test_show_picks_the_view(molecules, path):
    class Run:
        def frames(self) -> list[MoleculeBatch]:
            return path

    assert repr(show(molecules[1])) == "MoleculeViewer(C6H6O, 1 frame)"
    assert repr(show(molecules)) == "MoleculeViewer(C2H6O, 1 frame, 3 panels)"
    assert repr(show(MoleculeBatch.cat([molecules] * 5))) == "MoleculeViewer(C2H6O, 15 frames)"
    assert repr(show(path, index=2)) == "MoleculeViewer(H3N, 4 frames)"
    assert repr(show(Run())) == "MoleculeViewer(C2H6O, 4 frames)"
    assert repr(show((path, Run()))) == "MoleculeViewer(C2H6O, 4 frames, 2 panels)"
    assert show({"EDM": path, "Elign": path})._titles == ["EDM", "Elign"]


def test_show_reads_smiles_rdkit_and_ase(molecules):
    water, ammonia = molecule("H2O"), molecule("NH3")
    mols = molecules.to_rdkit()
    assert repr(show("CCO")) == repr(show(mols[0])) == "MoleculeViewer(C2H6O, 1 frame)"
    for form, batch in (("CCO", MoleculeBatch.from_smiles("CCO")), (mols[0], molecules[0])):
        shown = show(form).molecules()[0]
        np.testing.assert_allclose(shown.positions[0], batch.positions[0][batch.mask[0]], atol=1e-4)
    assert repr(show([water])) == repr(show(water)) == "MoleculeViewer(H2O, 1 frame)"
    moved = water.copy()
    moved.positions += [0.0, 0.0, 1.0]
    path = show([water, moved])
    assert repr(path) == "MoleculeViewer(H2O, 2 frames)", "the same atoms: a trajectory"
    path.frame = 1
    np.testing.assert_allclose(path.molecules()[0].positions[0], moved.positions, atol=1e-6)
    assert repr(show([water, ammonia])) == "MoleculeViewer(H2O, 1 frame, 2 panels)", "other atoms: molecules"
    assert repr(show(mols)) == "MoleculeViewer(C2H6O, 1 frame, 3 panels)"
    assert repr(show(["CO", "CO"])) == "MoleculeViewer(CH4O, 1 frame, 2 panels)", "SMILES are molecules"
    assert repr(show(["CO"] * 13)) == "MoleculeViewer(CH4O, 13 frames)", "as a large batch"
    assert repr(show(("CO", [water, water]))) == "MoleculeViewer(CH4O, 2 frames, 2 panels)"
    assert repr(show({"a": mols[0], "b": "CO"})) == "MoleculeViewer(C2H6O, 1 frame, 2 panels)"
    assert repr(compare([molecules[0], water], mols[0])) == "MoleculeViewer(C2H6O, 2 frames, 2 panels)"
    live = MoleculeViewer()
    live.push(water)
    live.replace(0, "CO")
    live.overlay(ammonia)
    live.flush()
    assert repr(live) == "MoleculeViewer(CH4O, 1 frame)"


def test_a_viewer_that_was_refused_is_forgotten_without_a_word(molecules, monkeypatch):
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: ignored.append(raised.exc_value))
    with pytest.raises(TypeError, match="foo"):
        show(molecules[0], foo=3)
    with pytest.raises(ValueError, match="color_by is"):
        show(molecules[0], color_by="charge")
    gc.collect()
    assert ignored == []


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "3Dmol-min.js").write_text("// stands for the script")
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_py3dmol_is_used_when_its_script_is_there(molecules, path, server):
    page = show(path, style="py3dmol", js=f"{server}/3Dmol-min.js", index=1).data
    assert f"{server}/3Dmol-min.js" in page
    assert "data:image/png;base64," in page, "what a browser shows that cannot load it"
    assert page.count('addModel("13\\nC6H6O') == 1
    assert show(molecules, style="py3dmol", js=f"{server}/3Dmol-min.js").data.count("addModel(") == 3


def test_py3dmol_falls_back_to_the_viewer(molecules, server):
    with pytest.warns(UserWarning, match=r"cannot be loaded .*missing.js.*404.*the live viewer is shown"):
        shown = show(molecules[0], style="py3dmol", js=f"{server}/missing.js")
    assert isinstance(shown, MoleculeViewer)
    assert {"Live", "MoleculeViewer", "compare", "show"} <= set(widgets.__all__)


# ---------------------------------------------------------------------- live
def test_live_runs_to_the_end_and_again():
    seen = []
    live = Live(lambda: (k * k for k in range(50)), seen.append, total=50)
    assert live.start().wait(10) is live
    assert (live.status, live.n_done, seen) == ("finished", 50, [k * k for k in range(50)])
    live.start().wait(10)
    assert seen == [k * k for k in range(50)] * 2
    once = Live(iter([1, 2]))
    once.start().wait(10)
    with pytest.raises(ValueError, match="an iterator can be run once"):
        once.start()


def test_live_pauses_resumes_and_stops():
    closed = threading.Event()

    def forever():
        try:
            while True:
                time.sleep(0.002)
                yield None
        finally:
            closed.set()

    live = Live(forever).start()
    _until(lambda: live.n_done > 5)
    live.pause()
    _until(lambda: live.status == "paused")
    done = live.n_done
    time.sleep(0.05)
    assert live.n_done == done
    assert live.running
    live.start()
    _until(lambda: live.n_done > done + 5)
    with pytest.raises(TimeoutError, match=r"still running after 0.01 s"):
        live.wait(0.01)
    live.pause()
    live.stop()
    assert live.wait(10).status == "stopped"
    assert closed.is_set(), "the generator was closed on its own thread"
    assert not live.running


def test_a_start_right_after_a_stop_is_not_lost():
    live = Live(lambda: (time.sleep(0.01) for _ in range(5000))).start()
    _until(lambda: live.n_done > 3)
    live.stop()
    live.start()  # the first run has not ended yet
    _until(lambda: live.n_done > 6)
    assert live.status == "running"
    live.stop()
    assert live.wait(10).status == "stopped"


@pytest.mark.parametrize("where", ["iterable", "on_item", "start"])
def test_live_raises_what_the_thread_raised(where):
    def steps():
        yield 1
        raise ArithmeticError("it diverged")

    def fail(_: object) -> None:
        raise ArithmeticError("it diverged")

    live = {"iterable": Live(steps), "on_item": Live([1, 2], fail), "start": Live(lambda: fail(0))}[where]
    live.start()
    with pytest.raises(ArithmeticError, match="it diverged"):
        live.wait(10)
    assert live.status == "failed"
    assert live.last_error == "ArithmeticError: it diverged"
    assert "it diverged" in live.children[1].value


def test_the_buttons_do_what_they_say():
    live = Live(lambda: (time.sleep(0.002) for _ in range(5000)), total=5000, description="sampling")
    start, pause, stop = live.children[0].children[1:4]
    assert (start.disabled, pause.disabled, stop.disabled) == (False, True, True)
    start.click()
    _until(lambda: live.n_done > 3)
    pause.click()
    _until(lambda: live.status == "paused")
    _until(lambda: start.description == "Resume")
    stop.click()
    assert live.wait(10).status == "stopped"
    assert (start.disabled, pause.disabled, stop.disabled) == (False, True, True)


def test_a_button_that_cannot_start_says_why():
    live = Live(iter([1]))
    live.start().wait(10)
    live.children[0].children[0].click()
    assert "an iterator can be run once" in live.last_error


def test_a_test_of_a_notebook_gets_what_a_button_raises(monkeypatch):
    live = Live(iter([1]))
    live.start().wait(10)
    monkeypatch.setenv("ELIGN_LAB_RAISE", "1")
    with pytest.raises(ValueError, match="an iterator can be run once"):
        live._clicked("Start")  # ipywidgets catches what a click raises, and shows it where IPython runs
    assert "an iterator can be run once" in live.children[1].value


def _until(true, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)
