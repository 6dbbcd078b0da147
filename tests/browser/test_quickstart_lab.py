"""The quickstart notebook itself, in a real JupyterLab: what a reader sees who opens it and runs all cells."""

from __future__ import annotations

import shutil
from pathlib import Path

QUICKSTART = Path(__file__).parents[2] / "notebooks" / "00_quickstart.ipynb"
SLOW_MS = 1_200_000  # about a minute on two free cores, ten times that on busy ones

VIEWERS = 3  # a trajectory, four samples, and the pair


def test_run_all_cells_see_a_molecule_and_move_it(lab, notebook):
    shutil.copy(QUICKSTART, lab.root)
    nb = notebook()
    nb.page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    nb.url = f"{lab.address}/lab/tree/{QUICKSTART.name}?reset&token={lab.token}"
    nb.open()
    # what is stored would be taken for what is run
    nb.page.evaluate("() => jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    nb.wait_for("document.querySelectorAll('.jp-OutputArea-output').length === 0")
    nb.run_all()

    # the first molecule is there long before the last cell has run
    nb.page.wait_for_function("() => document.querySelector('.elv')?.dataset.frames > 20", timeout=SLOW_MS)
    nb.page.locator(".elv").first.scroll_into_view_if_needed()
    nb.wait_for("document.querySelector('.elv canvas').width > 300")
    nb.wait_for("!document.querySelector('.elv').dataset.error")
    assert nb.shades() > 500
    nb.picture("quickstart_trajectory")

    finished = "(k) => document.querySelectorAll('.elv').length === k"
    nb.page.wait_for_function(finished, arg=VIEWERS, timeout=SLOW_MS)
    nb.expect("print(len(history) == profile.iterations, change.low <= change.value)", "True True")
    assert nb.page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    assert [nb.data("error", k) or "" for k in range(VIEWERS)] == [""] * VIEWERS
    assert nb.page.locator(".js-plotly-plot .scatterlayer .trace").count() == 2
    nb.page.locator(".js-plotly-plot").scroll_into_view_if_needed()
    nb.picture("quickstart_distributions")

    # the slider of the trajectory: another frame is drawn
    slider = nb.page.locator(".elv-slider").first
    slider.scroll_into_view_if_needed()
    before = nb.data("frame")
    slider.focus()
    slider.press("Home")
    nb.wait_for("document.querySelector('.elv').dataset.frame === '0'")
    for _ in range(3):
        slider.press("ArrowRight")
    nb.wait_for("document.querySelector('.elv').dataset.frame === '3'")
    assert before != "3"
    assert nb.shades() > 500
    nb.picture("quickstart_slider")
