"""The viewer and the controls of long loops in a real JupyterLab: what a user sees, clicks and hears back."""

from __future__ import annotations

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

    # cleared while it plays: the newest frame is followed again
    nb.ask("view.frame = 0; view.playing = True")
    nb.wait_for("Number(document.querySelector('.elv').dataset.frame) > 2")
    nb.ask("view.clear()")
    nb.expect("print(view.playing)", "False")
    nb.ask("for k in range(3): view.push(molecule); view.flush()")
    nb.wait_for("document.querySelector('.elv').dataset.frame === '2'")
    nb.expect("print(view.frame, view.follow, repr(view.last_error))", "2 True ''")


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
