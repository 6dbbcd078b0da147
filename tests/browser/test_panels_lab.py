"""The panels in a real JupyterLab: what a user moves, clicks and reads."""

from __future__ import annotations

import time

SETUP = """
from dataclasses import replace
import torch
torch.set_num_threads(1)
from elign_lab import MoleculeBatch, load_model, load_oracle
from elign_lab.alignment import cpu_mini
from elign_lab.widgets import AlignmentDashboard, DFTCheck, OracleComparison, RewardInspector, SamplingPanel
model, oracle = load_model("edm-mini"), load_oracle("learned")
small = replace(cpu_mini(), groups=1, members=4, steps=40, skip_prefix=28, potential_stride=3)
"""
INSPECTOR = """
panel = RewardInspector(model, oracle, small, size=9)
panel
"""
SLOW_MS = 300_000  # a rollout and an update on a machine that does other things as well


def _run(nb, script: str) -> None:
    """Run all cells and wait until a JavaScript expression is true."""
    nb.run_all()
    nb.page.wait_for_function(f"() => {script}", timeout=SLOW_MS)


def _start(nb, script: str) -> None:
    """Click Start and wait until a JavaScript expression is true."""
    nb.page.locator(".elp .jupyter-button", has_text="Start").click()
    nb.page.wait_for_function(f"() => {script}", timeout=SLOW_MS)


def _both_themes(nb, name: str) -> None:
    """Screenshots of the panel by daylight and at night."""
    nb.page.set_viewport_size({"width": 1280, "height": 1500})
    nb.page.locator(".elp").scroll_into_view_if_needed()
    nb.picture(f"{name}_light")
    nb.theme(dark=True)
    nb.picture(f"{name}_dark")
    nb.theme(dark=False)


def test_reward_inspector(notebook):
    nb = notebook(SETUP, INSPECTOR)
    _run(nb, "document.querySelector('.elp .elv')?.dataset.frames === '12'")
    nb.wait_for("document.querySelectorAll('.elp .js-plotly-plot .scatterlayer .trace').length === 12")
    table = nb.page.locator(".elp-trace")
    assert "log ρ = −ξ·δ" in table.inner_text()

    # the slider of the viewer is the step: every number follows
    before = table.inner_text()
    slider = nb.page.locator(".elp .elv-slider")
    slider.focus()
    for _ in range(4):
        slider.press("ArrowRight")
    nb.expect("print(panel.step)", "4")
    nb.page.wait_for_function("(b) => document.querySelector('.elp-trace').innerText !== b", arg=before)
    held = nb.ask("print(panel.trace.judged_step(0, 4))")  # the potential is computed at every third step
    assert held != "4"
    assert f"taken from step {held}" in table.inner_text()

    # another rollout, by its button: the row of the group is marked
    nb.page.locator(".elp .widget-toggle-button", has_text="2").click()
    nb.wait_for("document.querySelector('.elp-here td')?.textContent === '2'")
    nb.expect("print(panel.member, panel.step, repr(panel.last_error))", "2 4 ''")
    nb.ask("panel.step = 11")
    nb.wait_for("document.querySelector('.elp .elv').dataset.frame === '11'")
    _both_themes(nb, "reward_inspector")

    # a size that the model cannot have: the message is seen, the group stays
    size = nb.page.locator(".elp input[type=number]").first
    size.fill("500")
    size.press("Enter")
    nb.expect("print(panel.size.value)", "500")
    _start(nb, "document.querySelector('.elp').innerText.includes('size is 500, expected 2 to')")
    nb.expect("print(panel.member, panel.step, panel.trace.members)", "2 11 4")


def test_sampling_panel(notebook):
    nb = notebook(SETUP, "panel = SamplingPanel({'edm-mini': model}, n=3, steps=25)\npanel")
    _run(nb, "document.querySelector('.elp .jupyter-button') !== null")
    _start(nb, "document.querySelectorAll('.elp-card').length === 3")
    nb.wait_for("document.querySelectorAll('.elp .elv canvas').length === 3")
    nb.expect("print(panel.live.status, len(panel.molecules))", "finished 3")
    assert "atoms stable" in nb.page.locator(".elp-figures").inner_text()
    _both_themes(nb, "sampling")

    # nonsense in the field of the sizes: a message, and the field goes back
    field = nb.page.locator(".elp input[placeholder='drawn by the model']")
    field.fill("nine")
    field.press("Enter")
    nb.page.get_by_role("alert").filter(has_text="sizes is 'nine'").wait_for()
    nb.wait_for("document.querySelector(\".elp input[placeholder='drawn by the model']\").value === ''")
    nb.expect("print(panel.settings.sizes)", "None")


def test_alignment_dashboard_stops_and_resumes(notebook):
    settings = "settings = replace(small, iterations=40, evaluate_every=3, evaluate_n=4)"
    nb = notebook(SETUP, f"{settings}\npanel = AlignmentDashboard(model, oracle, settings, gallery=2)\npanel")
    _run(nb, "document.querySelector('.elp .js-plotly-plot') !== null")
    _start(nb, "Number(document.querySelector('.elp .elv')?.dataset.frames) > 3")
    nb.page.locator(".elp .jupyter-button", has_text="Stop").click()
    nb.expect("panel.live.wait(30); print(panel.live.status)", "stopped")
    done = int(nb.ask("print(len(panel.rows))"))
    assert 3 <= done < 40
    nb.expect("print(len(panel.chart.figure.data[0].x) == len(panel.rows) == panel.trainer.iteration)", "True")
    nb.wait_for(f"document.querySelectorAll('.elp .scatterlayer .trace .point').length >= {4 * done}")
    _both_themes(nb, "alignment_dashboard")

    # on again from there: no iteration is done twice
    _start(nb, f"Number(document.querySelector('.elp .elv')?.dataset.frames) > {done + 1}")
    nb.ask("panel.live.stop(); panel.live.wait(30)")
    nb.expect("print([r['iteration'] for r in panel.rows] == list(range(panel.trainer.iteration)))", "True")


def test_oracle_comparison(notebook):
    nb = notebook(
        SETUP, "panel = OracleComparison('CC=O', {'learned': oracle, 'xtb': load_oracle('xtb', workers=0)})\npanel"
    )
    _run(nb, "document.querySelectorAll('.elp .elv canvas').length === 2")
    nb.wait_for("document.querySelectorAll('.elp .js-plotly-plot .scatterlayer .trace').length === 4")
    table = nb.page.locator(".elp table")
    before = table.inner_text()
    slider = nb.page.locator(".elp .elv-slider")
    slider.focus()
    for _ in range(5):
        slider.press("ArrowRight")
    nb.page.wait_for_function("(b) => document.querySelector('.elp table').innerText !== b", arg=before)
    _both_themes(nb, "oracle_comparison")

    field = nb.page.locator(".elp input[placeholder='CCO']")
    field.fill("C((")
    field.press("Enter")
    nb.page.get_by_role("alert").filter(has_text="not a valid SMILES").wait_for()
    nb.expect("print(panel.molecule.formula(0), panel.smiles.value)", "C2H4O CC=O")


MOVED = "(panel.dragged.molecule.positions - panel.dragged.start.positions)[0]"


def _pull(nb, x: float, y: float, right: float, down: float) -> None:
    """Press the mouse button at a point and move; the button stays down."""
    nb.page.mouse.move(x, y)
    nb.page.mouse.down()
    nb.page.mouse.move(x + right, y + down, steps=40)


def test_dragging_an_atom(notebook):
    nb = notebook(
        SETUP, "panel = OracleComparison('CC=O', {'learned': oracle, 'xtb': load_oracle('xtb', workers=0)})\npanel"
    )
    _run(nb, "document.querySelectorAll('.elp .elv canvas').length === 2")
    nb.page.set_viewport_size({"width": 1280, "height": 1100})
    nb.page.locator(".elp select:has(option:text-is('drag an atom'))").select_option(label="drag an atom")
    nb.wait_for("document.querySelector('.elp .elv')?.dataset.frames === '1'")
    nb.page.locator(".elp .elv").scroll_into_view_if_needed()
    nb.wait_for("document.querySelector('.elp .elv canvas').width > 300")
    nb.ask("drags = []; panel.viewer.on_drag(drags.append)")
    table = nb.page.locator(".elp table")
    assert table.locator("tbody td:nth-child(2)").all_inner_texts() == ["0", "0"]

    # the oxygen, 60 pixels to the right and 30 down: the learned oracle answers while the button is down
    start = time.monotonic()
    _pull(nb, *nb.oxygen(), 60, 30)
    nb.wait_for("document.querySelector('.elp table').innerText.includes('asked when you let go')")
    nb.wait_for("/[1-9]/.test(document.querySelector('.elp tbody td:nth-child(2)').innerText)")
    nb.expect("print(len(drags) > 0 and not any(drag.done for drag in drags))", "True")
    nb.picture("dragging")
    nb.page.mouse.up()
    nb.wait_for("!/asked|yet/.test(document.querySelector('.elp table').innerText)")
    elapsed = time.monotonic() - start
    energies = table.locator("tbody td:nth-child(2)").all_inner_texts()
    assert all(float(energy) > 0.1 for energy in energies), energies
    assert table.locator("tbody td:nth-child(5)").all_inner_texts() == ["ok", "ok"]

    # it moved parallel to the screen, and alone; the view was modest with its messages
    nb.expect(
        "print([drag.done for drag in drags].index(True) == len(drags) - 1, {drag.atom for drag in drags})", "True {2}"
    )
    assert int(nb.ask("print(len(drags))")) <= 15 * elapsed + 2
    nb.expect(f"print(({MOVED}.norm(dim=1) > 1e-6).nonzero().flatten().tolist())", "[2]")
    turn = "torch.tensor(panel.viewer._orientations[0]).view(3, 3).double()"
    right, up, near = map(float, nb.ask(f"print(*({turn} @ {MOVED}[2]).tolist())").split())
    assert right > 0.1
    assert abs(up / right + 0.5) < 0.05
    assert abs(near) < 1e-4
    shown = nb.page.locator(".elp .elv-label").first.inner_text()
    assert shown.startswith("O 2\n")
    assert nb.ask("print(', '.join(f'{c:.3f}' for c in panel.dragged.molecule.positions[0, 2].tolist()))") in shown
    _both_themes(nb, "oracle_drag")

    # beside the atoms the mouse rotates
    canvas = nb.page.locator(".elp .elv canvas").first
    corner = {"x": 8, "y": canvas.bounding_box()["height"] - 70}
    canvas.hover(position=corner)  # waits until the themes have settled and the canvas takes the pointer
    box = canvas.bounding_box()
    before = nb.page.evaluate("() => document.querySelector('.elp .elv canvas').toDataURL()")
    count = nb.ask("print(len(drags))")
    _pull(nb, box["x"] + corner["x"], box["y"] + corner["y"], 70, 20)
    nb.page.mouse.up()
    nb.page.wait_for_function("(b) => document.querySelector('.elp .elv canvas').toDataURL() !== b", arg=before)
    nb.expect("print(len(drags))", count)

    # on the carbon: the oracles say why they do not answer, and the reset brings the start back
    nb.ask("panel.dragged.move(2, panel.dragged.start.positions[0, 1].tolist())")
    nb.wait_for("document.querySelector('.elp table').innerText.includes('atoms 1 and 2 are 0.000 Angstrom apart')")
    nb.wait_for("!document.querySelector('.elp .elv-label').innerText.includes('|F|')")  # there is none
    nb.picture("oracle_drag_refused")
    nb.page.locator(".elp .jupyter-button", has_text="Reset").click()
    nb.expect(f"print({MOVED}.abs().max().item())", "0.0")
    nb.wait_for("document.querySelector('.elp tbody td:nth-child(2)').innerText === '0'")
    assert nb.data("error") == ""


def test_dft_check(notebook):
    nb = notebook(SETUP, "panel = DFTCheck('O', {'learned': oracle, 'xtb': load_oracle('xtb', workers=0)})\npanel")
    _run(nb, "document.querySelector('.elp')?.innerText.includes('18 basis functions')")
    _start(nb, "document.querySelectorAll('.elp tbody tr').length === 3")
    nb.wait_for("document.querySelectorAll('.elp .elv canvas').length === 3")
    nb.expect("print([v.status for v in panel.verdicts])", "['ok', 'ok', 'ok']")
    _both_themes(nb, "dft_check")


def test_sliders_show_their_figure_once(notebook):
    nb = notebook(
        "from elign_lab.teaching import Figure\nfrom elign_lab.teaching.explore import explore",
        "draw = lambda power: Figure(x='x', y='y', alt=f'x to the {power}').add_scatter(x=[1, 2], y=[1, 2**power])\n"
        "sliders = explore(draw, power=(2, 1, 4, 1))\nsliders",
    )
    _run(nb, "document.querySelectorAll('.js-plotly-plot').length > 0")
    slider = nb.page.locator(".widget-slider .noUi-handle")
    slider.focus()
    slider.press("ArrowRight")
    nb.expect("print(sliders.chart.figure.data[0].y[1])", "8")
    nb.wait_for("document.body.innerText.includes('in words')")
    assert nb.page.locator(".jp-OutputArea-output:has(.widget-slider)").count() == 1
    assert nb.page.locator(".js-plotly-plot").count() == 1, "the output holds the figure too, for pages without widgets"
    nb.picture("sliders")
