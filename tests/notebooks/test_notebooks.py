"""Rules that every notebook keeps; nbval runs their cells (`make test`)."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest

from tests.notebooks.sources import NOTED, digest

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.rglob("*.ipynb"))
PLOTLY, WIDGET = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture
def cells(path) -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook.cells


def code(cells: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    return [cell for cell in cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert FOLDER / "00_quickstart.ipynb" in NOTEBOOKS


def test_a_notebook_asks_checks_and_breaks_what_it_teaches(cells):
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for part in ("**Question.**", "redict", "hat would break it"):
        assert part in text
    assert any("NBVAL_CHECK_OUTPUT" in cell.source or "assert " in cell.source for cell in code(cells))
    assert cells[-1].cell_type == "markdown"
    assert re.findall(r"^(\d)\. ", cells[-1].source, re.MULTILINE) == ["1", "2", "3"], "three questions at the end"


def test_cells_are_short_and_install_nothing(cells):
    for cell in code(cells):
        lines = cell.source.splitlines()
        assert len(lines) <= 15, f"{len(lines)} lines: {lines[0]}"
        assert "pip install" not in cell.source


def test_no_cell_branches_on_the_profile(cells):
    for cell in code(cells):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.If | ast.IfExp):
                assert "profile" not in ast.unparse(node.test)


def test_outputs_are_stored_without_widget_state(path, cells):
    assert path.stat().st_size < 400_000
    assert "widgets" not in json.loads(path.read_text())["metadata"]
    counts = [cell.execution_count for cell in code(cells)]
    assert counts == list(range(1, len(counts) + 1)), "not executed in order: run `make notebooks`"
    for cell in code(cells):
        assert not [out for out in cell.outputs if out.output_type == "error"]


def test_stored_outputs_belong_to_the_code(path):
    notebook = nbformat.read(path, as_version=4)
    remedy = f"execute and store it (`make notebooks`), then `python -m tests.notebooks.sources notebooks/{path.name}`"
    assert json.loads(NOTED.read_text()).get(path.stem) == digest(notebook), f"code was changed since: {remedy}"


def test_only_code_counts_for_the_outputs():
    notebook = nbformat.read(FOLDER / "00_quickstart.ipynb", as_version=4)
    before, first = digest(notebook), code(notebook.cells)[0]
    notebook.cells[0].source += " More words."
    first.outputs = []
    assert digest(notebook) == before
    first.source += "\n"
    assert digest(notebook) != before


def test_figures_have_axis_titles_and_words(cells):
    for cell in code(cells):
        for output in cell.outputs:
            figure = output.get("data", {}).get("application/vnd.plotly.v1+json")
            if figure:
                assert figure["layout"]["meta"]["alt"].strip(), "no alternative text"
            if figure and any(trace["type"].startswith("scatter") for trace in figure["data"]):
                axes = {name: axis for name, axis in figure["layout"].items() if re.match("[xy]axis", name)}
                for name, axis in axes.items():  # one that shares its numbers with a neighbour shows none
                    if axis.get("showticklabels", True):
                        assert axis.get("title", {}).get("text"), f"no title on the {name}"


def outputs(cells: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    return [output for cell in code(cells) for output in cell.outputs if "data" in output]


def test_figures_have_a_picture_for_readers_without_a_kernel(cells):
    for output in outputs(cells):
        if PLOTLY in output.data:
            assert output.data.get("image/png", "").startswith("iVBORw0KGgo"), "no PNG: run `make notebooks`"
            alt = output.data[PLOTLY]["layout"]["meta"]["alt"]
            assert output.metadata.get("image/png", {}).get("alt") == alt, "no text: run scripts/add_pictures.py"


def test_every_picture_has_words(cells):
    for output in outputs(cells):
        if "image/png" in output.data:
            name = output.data.get("text/plain", "an output")
            assert output.metadata.get("image/png", {}).get("alt", "").strip(), f"no alternative text: {name}"
        for image in re.findall(r"<img\b[^>]*>", output.data.get("text/html", "")):
            assert re.search(r"""\balt=(['"])\s*[^\s'"]""", image), f"no alternative text: {image[:60]}"


def test_a_widget_leaves_something_to_readers_without_a_kernel(cells):
    for output in outputs(cells):
        if WIDGET in output.data:
            name = output.data.get("text/plain", "a widget")
            assert output.data.get("text/html", "").strip() or "image/png" in output.data, f"only text: {name}"
            assert PLOTLY not in output.data, f"a figure that only a kernel draws: run scripts/add_pictures.py ({name})"


def test_the_quickstart_ends_with_a_check():
    cells = code(nbformat.read(FOLDER / "00_quickstart.ipynb", as_version=4).cells)
    tree = ast.parse(cells[-1].source)
    assert sum(isinstance(node, ast.Assert) for node in ast.walk(tree)) >= 3
