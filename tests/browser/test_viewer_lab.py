"""The viewer and the controls of long loops in a real JupyterLab: what a user sees, clicks and hears back."""

from __future__ import annotations

import numpy as np
import pytest

SETUP = """
import time, torch
from elign_lab.molecules import MoleculeBatch
from elign_lab.widgets import Live, MoleculeViewer, show
torch.set_num_threads(1)
molecule = MoleculeBatch.from_smiles("OCC(=O)N")
generator = torch.Generator().manual_seed(1)

def noisy(scale):
    noise = torch.randn(molecule.positions.shape, generator=generator)
    return molecule.with_positions(molecule.positions + scale * noise)
"""
TRAJECTORY = """
viewer = MoleculeViewer([noisy(1 - k / 20) for k in range(21)], labels=[f"t = {20 - k}" for k in range(21)])
viewer
"""
STREAM = """
stream = MoleculeViewer(title="streaming")

def steps():
    for k in range(4000):
        time.sleep(0.005)
        yield k

live = Live(steps, lambda k: stream.push(noisy(0.3), label=f"step {k}"), total=4000)
display(stream, live)
live.start();
"""


def _frames_seen(nb) -> int:
    return int(nb.data("frames") or 0)


def test_a_trajectory_is_drawn_moved_played_and_picked(notebook):
    nb = notebook(SETUP, TRAJECTORY)
    nb.run_all()
    nb.wait_for("document.querySelector('.elv')?.dataset.frames === '21'")
    nb.wait_for("document.querySelector('.elv canvas').width > 300")
    assert nb.page.locator(".jp-OutputArea-output img").count() == 0, "the widget is preferred over the picture"
    assert nb.shades() > 500
    nb.picture("trajectory_light")

    # the slider, by keyboard: the kernel's frame follows
    slider = nb.page.locator(".elv-slider")
    slider.focus()
    for _ in range(3):
        slider.press("ArrowRight")
    nb.wait_for("document.querySelector('.elv').dataset.frame === '3'")
    nb.expect("print(viewer.frame)", "3")
    assert slider.get_attribute("aria-valuetext") == "4 of 21, t = 17"
    assert "t = 17" in nb.page.locator(".elv-caption").inner_text()

    # and the other way: Python moves the slider
    nb.ask("viewer.frame = 20")
    nb.wait_for("document.querySelector('.elv-slider').value === '20'")

    # a click on an atom selects it in Python; Python's choice is labelled in the view
    box = nb.page.locator(".elv canvas").bounding_box()
    spot = nb.page.evaluate(
        """() => {
            const canvas = document.querySelector(".elv canvas"), ratio = canvas.width / canvas.clientWidth;
            const { data, width, height } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            let best = null;
            for (let y = 0; y < height; y += 2) for (let x = 0; x < width; x += 2) {
                const at = 4 * (y * width + x), red = data[at] - Math.max(data[at + 1], data[at + 2]);
                if (data[at + 3] === 255 && (!best || red > best[2])) best = [x / ratio, y / ratio, red];
            }
            return best;
        }"""
    )
    nb.page.mouse.click(box["x"] + spot[0], box["y"] + spot[1])
    nb.wait_for("!document.querySelector('.elv-label').hidden")
    assert nb.page.locator(".elv-label").inner_text().startswith("O ")
    nb.expect("print(molecule.numbers[0, viewer.selected].item())", "8")
    nb.ask("viewer.selected = 1")
    nb.wait_for("document.querySelector('.elv-label').textContent.startsWith('C 1')")

    # a drag rotates: other pixels, same frame; the reset brings the first view back
    before = nb.page.evaluate("() => document.querySelector('.elv canvas').toDataURL()")
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    nb.page.mouse.move(x, y)
    nb.page.mouse.down()
    nb.page.mouse.move(x + 90, y + 40, steps=4)
    nb.page.mouse.up()
    nb.page.wait_for_function("(b) => document.querySelector('.elv canvas').toDataURL() !== b", arg=before)
    nb.page.locator(".elv canvas").press("0")
    nb.ask("viewer.selected = 1")
    nb.page.wait_for_function("(b) => document.querySelector('.elv canvas').toDataURL() === b", arg=before)

    # space plays from the start and stops at the end
    nb.page.locator(".elv canvas").press(" ")
    nb.wait_for("document.querySelector('.elv-play').getAttribute('aria-label') === 'pause'")
    nb.wait_for("document.querySelector('.elv-play').getAttribute('aria-label') === 'play'")
    assert nb.data("frame") == "20"

    # the dark theme draws on a dark ground
    nb.theme(dark=True)
    nb.page.wait_for_function("(b) => document.querySelector('.elv canvas').toDataURL() !== b", arg=before)
    assert nb.shades() > 500
    nb.picture("trajectory_dark")
    nb.theme(dark=False)
    assert nb.data("error") == ""


def test_streaming_scrubbing_stopping_and_reloading(notebook):
    nb = notebook(SETUP, STREAM)
    nb.run_all()
    nb.wait_for("Number(document.querySelector('.elv')?.dataset.frames) > 60")
    nb.picture("streaming")
    assert abs(int(nb.data("frame")) - _frames_seen(nb)) < 60, "the view follows the newest frame"

    # scrub back while the run goes on: the view stays where it was put, the frames still arrive
    slider = nb.page.locator(".elv-slider")
    slider.focus()
    slider.press("Home")
    nb.wait_for("document.querySelector('.elv').dataset.frame === '0'")
    arrived = _frames_seen(nb)
    nb.page.wait_for_function("(n) => Number(document.querySelector('.elv').dataset.frames) > n + 40", arg=arrived)
    assert nb.data("frame") == "0"
    nb.expect("print(stream.frame, stream.follow, live.status)", "0 False running")

    # pause and stop by their buttons
    nb.page.locator(".jupyter-button", has_text="Pause").click()
    nb.wait_for("[...document.querySelectorAll('.jupyter-button')].some((b) => b.textContent.includes('Resume'))")
    nb.expect("print(live.status)", "paused")
    nb.page.locator(".jupyter-button", has_text="Stop").click()
    nb.expect("live.wait(10); print(live.status, stream.n_frames == live.n_done)", "stopped True")
    count = int(nb.ask("print(stream.n_frames)"))
    assert 100 < count < 4000
    nb.wait_for(f"document.querySelector('.elv').dataset.frames === '{count}'")

    # a reload of the page brings all frames back, in the frame where it was
    nb.ask("stream.frame = 7")
    nb.page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
    nb.open()
    nb.wait_for(f"document.querySelector('.elv')?.dataset.frames === '{count}'")
    nb.wait_for("document.querySelector('.elv').dataset.frame === '7'")
    assert "step 7" in nb.page.locator(".elv-caption").inner_text()
    nb.wait_for("document.querySelector('.elv canvas').width > 300")
    assert nb.shades() > 300
    assert nb.data("error") == ""


PAIR = """
start = [noisy(0.4), noisy(0.2), molecule]
n = molecule.numbers.shape[1]
forces = [torch.full((n, 3), 1.0 - k / 2) for k in range(3)]
pair = MoleculeViewer(
    {"EDM": start, "Elign": start[1:]}, forces={"EDM": forces, "Elign": forces[1:]}, height=260, title="two runs"
)
pair
"""


def test_two_panels_share_one_camera_and_colour_by_force(notebook):
    nb = notebook(SETUP, PAIR)
    nb.run_all()
    nb.wait_for("document.querySelectorAll('.elv canvas').length === 2")
    nb.wait_for("document.querySelector('.elv')?.dataset.frames === '3'")
    nb.wait_for("document.querySelectorAll('.elv canvas')[1].width > 300")
    assert nb.page.locator(".elv-caption").all_inner_texts() == ["EDM", "Elign"]
    nb.ask("pair.frame = 2")
    nb.wait_for("document.querySelector('.elv').dataset.frame === '2'")
    nb.wait_for(SAME_PIXELS)  # both end at the same molecule

    # a drag in one panel turns both
    before = nb.page.evaluate("() => document.querySelector('.elv canvas').toDataURL()")
    _drag(nb, -80, 30)
    nb.page.wait_for_function("(b) => document.querySelector('.elv canvas').toDataURL() !== b", arg=before)
    nb.wait_for(SAME_PIXELS)

    nb.page.locator(".elv canvas").nth(1).press("ArrowLeft")
    nb.wait_for(SAME_PIXELS)
    before = nb.page.evaluate("() => document.querySelector('.elv canvas').toDataURL()")
    nb.page.locator(".elv canvas").nth(1).press("ArrowLeft")
    nb.page.wait_for_function("(b) => document.querySelector('.elv canvas').toDataURL() !== b", arg=before)
    nb.wait_for(SAME_PIXELS)

    assert nb.page.locator(".elv-legend").is_hidden()
    nb.page.locator(".elv-mode").select_option("force")
    nb.expect("print(pair.color_by)", "force")
    assert "eV/Å" in nb.page.locator(".elv-legend").inner_text()
    nb.page.locator(".elv-arrows input").check()
    nb.expect("print(pair.arrows)", "True")
    nb.picture("two_panels")
    assert nb.data("error") == ""


SAME_PIXELS = """(() => {
    const [a, b] = [...document.querySelectorAll(".elv canvas")].map((c) => c.toDataURL());
    return a === b;
})()"""


# the colour of what is laid over a molecule is there, and nothing is cut off at the edge
LAID_OVER = """(() => {
    const canvas = document.querySelector(".elv canvas"), { width, height } = canvas;
    const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
    let ghosts = 0, cut = 0;
    for (let y = 0, at = 0; y < height; y++) for (let x = 0; x < width; x++, at += 4) {
        if (!data[at + 3]) continue;
        ghosts += data[at + 1] - data[at] > 40;
        cut += x === 0 || y === 0 || x === width - 1 || y === height - 1;
    }
    return ghosts > 300 && cut === 0;
})()"""


def test_a_far_reference_is_in_view_and_a_new_stream_is_followed(notebook):
    nb = notebook(SETUP, "view = MoleculeViewer([noisy(0.1) for _ in range(30)], height=300)\nview")
    nb.run_all()
    nb.wait_for("document.querySelector('.elv')?.dataset.frames === '30'")
    nb.wait_for("document.querySelector('.elv canvas').width > 300")
    far = "molecule.with_positions(molecule.positions + torch.tensor([14.0, 9.0, 3.0]))"
    nb.ask(f"view.overlay({far})")
    nb.wait_for(LAID_OVER)
    nb.picture("far_reference")
    nb.ask("view.overlay(None)")
    nb.page.wait_for_function(f"() => !({LAID_OVER})")

    # cleared while it plays: the newest frame is followed again
    nb.ask("view.frame = 0; view.playing = True")
    nb.wait_for("Number(document.querySelector('.elv').dataset.frame) > 2")
    nb.ask("view.clear()")
    nb.expect("print(view.playing)", "False")
    nb.ask("for k in range(3): view.push(molecule); view.flush()")
    nb.wait_for("document.querySelector('.elv').dataset.frame === '2'")
    nb.expect("print(view.frame, view.follow, repr(view.last_error))", "2 True ''")


DRAWN = """
bent = MoleculeBatch.from_arrays([([9, 6, 7], [[-1.2, -0.2, 0.0], [0.0, 0.4, 0.0], [1.1, -0.2, 0.0]])])
push = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.2, 1.6, 0.0]])  # the nitrogen, 2 eV/Angstrom
types = torch.eye(5)[[3, 1, 2]].repeat(3, 1, 1)  # H, C, N, O, F; the first atom is O, then N, then half of each
types[1, 0] = torch.eye(5)[2]
types[2, 0] = types[:2, 0].mean(0)
drawn = MoleculeViewer([bent] * 3, forces=[push, -push, push], type_weights=list(types), height=300)
picks = []
drawn.on_pick(picks.append)
drawn
"""


def _middle(found: np.ndarray) -> np.ndarray:
    """Where the true pixels of (height, width) are: x to the right, y up, in pixels of the canvas."""
    assert found.sum() > 40
    y, x = np.nonzero(found)
    return np.array([x.mean(), -y.mean()])


def _atoms(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The middles of the green fluorine and of the blue nitrogen."""
    red, green, blue, _ = np.moveaxis(image, -1, 0)
    return _middle((green - red > 25) & (green - blue > 40)), _middle(blue - np.maximum(red, green) > 60)


def _at(image: np.ndarray, spot: np.ndarray) -> np.ndarray:
    x, y = spot.round().astype(int)
    return image[-y - 5 : -y + 6, x - 5 : x + 6, :3].mean((0, 1))


def _arrows(image: np.ndarray) -> np.ndarray:
    red, green, blue, _ = np.moveaxis(image, -1, 0)
    return (red - blue > 190) & (green - blue > 110) & (red - green > 50)


def _width(image: np.ndarray) -> int:
    return int(np.ptp(np.nonzero(image[..., 3])[1]))


def _drag(nb, right: float, down: float) -> None:
    """Press beside the molecule of the first view, and move."""
    box = nb.page.locator(".elv canvas").first.bounding_box()
    x, y = box["x"] + 0.5 * box["width"] - right / 2, box["y"] + 0.9 * box["height"]
    nb.page.mouse.move(x, y - down)
    nb.page.mouse.down()
    nb.page.mouse.move(x + right, y, steps=4)
    nb.page.mouse.up()


def test_what_is_drawn_is_what_python_gave(notebook):
    nb = notebook(SETUP, DRAWN)
    nb.run_all()
    nb.wait_for("document.querySelector('.elv')?.dataset.frames === '3'")
    nb.wait_for("document.querySelector('.elv canvas').width > 300")
    canvas, mode = nb.page.locator(".elv canvas"), nb.page.locator(".elv-mode")
    canvas.scroll_into_view_if_needed()

    def image_of(frame: int) -> np.ndarray:
        nb.ask(f"drawn.frame = {frame}")
        nb.wait_for(f"document.querySelector('.elv').dataset.frame === '{frame}'")
        return nb.image()

    # a click on an atom: Python is told which; a click beside it: None
    plain = image_of(0)
    fluorine, nitrogen = _atoms(plain)
    ratio = plain.shape[1] / canvas.bounding_box()["width"]
    canvas.click(position={"x": nitrogen[0] / ratio, "y": -nitrogen[1] / ratio})
    nb.expect("print(drawn.selected, picks)", "2 [2]")
    canvas.click(position={"x": 8, "y": 120})
    nb.expect("print(drawn.selected, picks)", "None [2, None]")

    # by type: a soft type has the colour between those of its elements
    mode.select_option("type")
    oxygen_like, nitrogen_like, half = (image_of(k) for k in range(3))
    differ = np.abs(oxygen_like - nitrogen_like).max(-1) > 60
    assert differ.sum() > 1000
    assert np.linalg.norm(_middle(differ) - fluorine) < 20, "the first atom, and only that"
    away = np.abs(half - (oxygen_like + nitrogen_like) / 2)[differ]
    assert np.quantile(away, 0.95) < 8  # where it glitters, colours are cut off
    nb.picture("by_type")

    # by force: no force is dark violet, the largest one yellow
    mode.select_option("force")
    image = image_of(0)
    red, green, blue = _at(image, fluorine)
    assert min(red, blue) > green + 20
    red, green, blue = _at(image, nitrogen)
    assert min(red, green) > blue + 60
    assert not _arrows(image).any()

    # arrows point where the force does
    mode.select_option("element")
    nb.page.locator(".elv-arrows input").check()
    way_of_push = "print(*(torch.tensor(drawn._orientations[0]).view(3, 3) @ push[2]).tolist())"
    right, up, _ = map(float, nb.ask(way_of_push).split())
    for frame, sign in ((0, 1), (1, -1)):
        image = image_of(frame)
        way = _middle(_arrows(image)) - _atoms(image)[1]
        assert sign * (way @ (right, up)) > 0.9 * np.hypot(*way) * np.hypot(right, up), f"frame {frame}"
    nb.picture("arrows")
    nb.page.locator(".elv-arrows input").uncheck()

    # wheel and keys: larger, smaller, and back; whoever only scrolls past leaves it as it is
    image = image_of(0)
    assert np.array_equal(image, plain)
    width = _width(image)
    canvas.blur()
    canvas.hover(position={"x": 60, "y": 150})
    nb.page.mouse.wheel(0, -300)
    assert np.array_equal(nb.image(), plain)
    canvas.hover(position={"x": 60, "y": 150})
    canvas.focus()
    nb.page.mouse.wheel(0, -300)
    larger = _width(nb.image())
    assert larger > 1.15 * width
    canvas.press("-")
    assert larger / _width(nb.image()) == pytest.approx(1.15, rel=0.03)
    nb.page.mouse.wheel(0, 600)
    assert _width(nb.image()) < 0.87 * width
    canvas.press("0")
    assert np.array_equal(nb.image(), plain)

    # half a turn by the mouse: left and right change places
    _drag(nb, np.pi / 0.009, 0)
    turned = _atoms(nb.image())
    assert np.sign(turned[0][0] - turned[1][0]) == -np.sign(fluorine[0] - nitrogen[0])
    assert [spot[1] for spot in turned] == pytest.approx([fluorine[1], nitrogen[1]], abs=25)
    canvas.press("ArrowUp")
    assert _atoms(nb.image())[0] != pytest.approx(turned[0], abs=3)

    # without eyes and without a mouse; keys of the browser stay the browser's
    assert "CFN, 3 atoms" in canvas.get_attribute("aria-label")
    assert nb.page.evaluate("() => document.activeElement === document.querySelector('.elv canvas')")
    pressed = """(options) => document.querySelector('.elv canvas').dispatchEvent(
        new KeyboardEvent("keydown", { key: "+", bubbles: true, cancelable: true, ...options }))"""
    assert nb.page.evaluate(pressed, {}) is False, "taken"
    assert nb.page.evaluate(pressed, {"ctrlKey": True}) is True

    # at night nothing sinks into the ground, not even the dark end of the colour scale
    mode.select_option("force")
    nb.ask("drawn.force_max = 1e6")
    nb.theme(dark=True)
    ground = "getComputedStyle(document.querySelector('.elv')).backgroundColor"
    nb.wait_for(f"{ground}.match(/\\d+/g).slice(0, 3).every((c) => c < 50)")
    dark = [int(c) for c in nb.page.evaluate(f"() => {ground}.match(/\\d+/g)")[:3]]
    image = nb.image()
    lost = np.abs(image[image[..., 3] == 255][:, :3] - dark).max(-1) < 25
    assert lost.mean() < 0.02
    nb.picture("by_force_dark")
    nb.theme(dark=False)
    assert nb.data("error") == ""


FAILURES = """
shy = MoleculeViewer([molecule, noisy(0.1), noisy(0.2)], height=200)

def fail(change):
    raise RuntimeError(f"cannot handle frame {change['new']}")

shy.observe(fail, "frame")

def broken():
    yield 1
    raise ArithmeticError("the <sampler> diverged")

lost = Live(broken)
display(shy, lost)
"""


def test_errors_are_seen(notebook):
    nb = notebook(SETUP, FAILURES)
    nb.run_all()
    nb.wait_for("document.querySelector('.elv')?.dataset.frames === '3'")
    assert nb.page.locator(".elv-error").is_hidden()

    # a callback of the browser's change
    slider = nb.page.locator(".elv-slider")
    slider.focus()
    slider.press("ArrowRight")
    nb.wait_for("document.querySelector('.elv').dataset.error !== ''")
    assert nb.page.get_by_role("alert").first.inner_text().startswith("RuntimeError: cannot handle frame 1")
    nb.expect("print(shy.last_error)", "RuntimeError: cannot handle frame 1")
    nb.page.get_by_role("alert").first.scroll_into_view_if_needed()
    nb.picture("error")
    nb.page.get_by_label("dismiss the error").click()
    nb.wait_for("document.querySelector('.elv').dataset.error === ''")
    nb.expect("print(repr(shy.last_error))", "''")

    # a loop on its thread
    nb.page.locator(".jupyter-button", has_text="Start").click()
    nb.wait_for("document.body.innerText.includes('ArithmeticError: the <sampler> diverged')")
    nb.expect("lost.wait(5)", "ArithmeticError: the <sampler> diverged")

    # the browser's own drawing
    nb.ask("shy.send({'kind': 'frames', 'counts': [3], 'items': [[0, 0, 5, False, 0, '']]}, [b'123'])")
    nb.wait_for("document.querySelector('.elv').dataset.error.includes('RangeError')")
    nb.expect("print('RangeError' in shy.last_error)", "True")
