"""What `elign-lab start` gives a student: complete, also from an installed package, and nothing leads out of it."""

from __future__ import annotations

import ast
import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from elign_lab.cli import main
from elign_lab.teaching import shipped, start

ROOT = Path(__file__).parents[2]
READERS = {"Path", "open", "read_csv", "read_json", "read_json_lines"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's folder as pyproject.toml fills it in a wheel, without its modules."""
    package = tmp_path_factory.mktemp("site-packages") / "elign_lab"
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for source, target in wheel["force-include"].items():
        place = package.parent / target
        place.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, place)
        else:
            shutil.copy(ROOT / source, place)
    return package


@pytest.fixture(params=["checkout", "wheel"])
def place(request, installed, monkeypatch) -> str:
    if request.param == "wheel":
        monkeypatch.setattr(start, "PACKAGE", installed)
    return request.param


def code_of(notebook: Path) -> Iterator[ast.Call]:
    """The calls in its cells."""
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            lines = "\n".join(line for line in source.splitlines() if not line.startswith(("%", "!")))
            yield from (node for node in ast.walk(ast.parse(lines)) if isinstance(node, ast.Call))


def texts(folder: Path) -> Iterator[tuple[Path, str]]:
    """File and Markdown of everything in a folder that has some."""
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".md":
            yield path, path.read_text()
        if path.suffix == ".ipynb":
            cells = json.loads(path.read_text())["cells"]
            yield from ((path, "".join(c["source"])) for c in cells if c["cell_type"] == "markdown")


@pytest.mark.parametrize("options", [[], ["--assignments"]], ids=["plain", "assignments"])
def test_every_link_of_a_started_folder_resolves(place, options, tmp_path):
    assert main(["start", str(tmp_path), *options]) == 0
    links = 0
    for path, text in texts(tmp_path):
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not target.startswith(("http", "#", "attachment:")):
                links += 1
                found = (path.parent / target.split("#")[0]).resolve()
                assert found.exists(), f"{path.name} links to {target}"
                assert tmp_path.resolve() in found.parents, f"{path.name} links to {target}, outside the folder"
    assert links >= len(list((ROOT / "notebooks").glob("*.ipynb")))
    readme = (tmp_path / "README.md").read_text()
    assert ("(assignments/fed_grpo_by_hand.ipynb)" in readme) == bool(options)
    assert "| fed_grpo_by_hand |" in readme or options


def test_what_a_notebook_reads_is_there(place, tmp_path):
    assert main(["start", str(tmp_path)]) == 0
    for notebook in sorted(tmp_path.glob("*.ipynb")):
        for call in code_of(notebook):
            name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
            first = call.args[0] if call.args else None
            if not (isinstance(first, ast.Constant) and isinstance(first.value, str)):
                continue
            if name == "shipped":
                assert shipped(first.value).exists()
            elif name in READERS and not Path(first.value).is_absolute():
                assert (tmp_path / first.value).exists(), f"{notebook.name} reads {first.value}"


def test_recorded_runs_are_in_the_package(place):
    assert (shipped("gpu") / "RESULTS.md").is_file()
    assert any(shipped("gpu/results").glob("*/edm-mini.jsonl"))
    assert json.loads(shipped("benchmarks/results/oracles.json").read_text())["rows"]
    with pytest.raises(FileNotFoundError, match="gpu/nothing is not installed: reinstall"):
        shipped("gpu/nothing")


def test_what_a_student_has_is_never_overwritten(tmp_path, capsys):
    own = [tmp_path / name for name in ("README.md", "docs/metrics.md", "07_training_runs.ipynb")]
    for path in own:
        path.parent.mkdir(exist_ok=True)
        path.write_text("my work")
    assert main(["start", str(tmp_path)]) == 0
    assert [path.read_text() for path in own] == ["my work"] * 3
    assert capsys.readouterr().out.count("kept ") == 3
