"""scripts/add_pictures.py: what it does to the outputs of a notebook."""

from __future__ import annotations

import base64
import importlib.util
import io
import re
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from elign_lab.teaching import Figure
from elign_lab.widgets.panels.base import PLOTLY, plotly_json

pytest.importorskip("kaleido")
SCRIPT = Path(__file__).parents[2] / "scripts" / "add_pictures.py"
WIDGET = {"application/vnd.jupyter.widget-view+json": {"model_id": "1", "version_major": 2, "version_minor": 0}}
ALT = 'A line; it is "straight" & < 2.'


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("add_pictures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # an image in the place of Chromium's
    monkeypatch.setattr(module.kaleido, "calc_fig_sync", lambda chart, opts: image(int(opts["width"] * opts["scale"])))
    return module


def image(width: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (width, 10)).save(file, "PNG")
    return file.getvalue()


def stored(script, tmp_path: Path, **more: object) -> nbformat.NotebookNode:
    """The output that the script makes of a figure and what stands beside it."""
    figure = plotly_json(Figure(x="x", y="y", alt=ALT).add_scatter(x=[0, 1], y=[0, 1]))
    output = nbformat.v4.new_output("display_data", data={PLOTLY: figure, "text/plain": "figure", **more})
    cell = nbformat.v4.new_code_cell("figure", outputs=[output])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "n.ipynb")
    for _ in range(2):  # a second time changes nothing
        script.add_pictures(tmp_path / "n.ipynb")
    notebook = nbformat.read(tmp_path / "n.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook.cells[0].outputs[0]


def width(picture: str) -> int:
    return Image.open(io.BytesIO(base64.b64decode(picture))).width


def test_a_figure_gets_a_picture_beside_it(script, tmp_path):
    output = stored(script, tmp_path)
    assert set(output.data) == {PLOTLY, "image/png", "text/plain"}
    assert output.metadata["image/png"] == {"alt": ALT}
    assert width(output.data["image/png"]) == 1080


def test_the_figure_of_sliders_becomes_a_smaller_picture(script, tmp_path):
    output = stored(script, tmp_path, **WIDGET)
    assert set(output.data) == {*WIDGET, "image/png", "text/plain"}
    assert output.metadata["image/png"] == {"alt": ALT}
    assert width(output.data["image/png"]) == 720


def test_the_figure_of_a_panel_goes_into_its_html(script, tmp_path):
    output = stored(script, tmp_path, **WIDGET, **{"text/html": "<b>done</b>\n<i>all</i>"})
    assert set(output.data) == {*WIDGET, "text/html", "text/plain"}
    page = output.data["text/html"]
    assert page.endswith("<br><b>done</b>\n<i>all</i>")
    assert page.count("<img") == 1
    assert "alt='A line; it is &quot;straight&quot; &amp; &lt; 2.'" in page
    assert width(re.search(r"base64,([^']*)", page)[1]) == 720
