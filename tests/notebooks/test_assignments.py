"""The assignments: solutions pass, the student version does not, and neither do the usual mistakes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import nbformat
import pytest

from elign_lab.cli import main
from elign_lab.teaching.assignments import CODE_STUB, student_version

FOLDER = Path(__file__).parents[2] / "assignments" / "source"
NAMES = ("zero_com_gaussian", "fed_grpo_by_hand", "shaping_by_hand")
# wrong answer -> (solution cell, what is replaced, by what, graded cells that must notice)
MISTAKES = {
    "zero_com_gaussian": {
        "mean over the padding": ("sample", "atoms.sum(1, keepdim=True)", "x.shape[1]", {"sample_support"}),
        "no projection": (
            "sample",
            "(x - x.sum(1, keepdim=True) / atoms.sum(1, keepdim=True)) * atoms",
            "x",
            {"sample_support"},
        ),
        "rescaled to unit variance": (
            "sample",
            "return (x - x.sum(1, keepdim=True) / atoms.sum(1, keepdim=True)) * atoms",
            "y = (x - x.sum(1, keepdim=True) / atoms.sum(1, keepdim=True)) * atoms\n    return y / y[mask].std()",
            {"sample_spread"},
        ),
        "3N dimensions": ("density", "(mask.sum(1) - 1)", "mask.sum(1)", {"density_pair", "density_padded"}),
        "dimensions of the padding": ("density", "mask.sum(1) - 1", "mask.shape[1] - 1", {"density_padded"}),
        "sigma to the first power": (
            "density",
            "dims * (math.log(sigma) + 0.5 * math.log(2 * math.pi))",
            "dims * 0.5 * math.log(2 * math.pi) - math.log(sigma)",
            {"density_pair"},
        ),
        "entropy in 3N dimensions": ("entropy", "(mask.sum(1) - 1)", "mask.sum(1)", {"entropy_test"}),
    },
    "fed_grpo_by_hand": {
        "sample standard deviation": ("normalise", "correction=0", "correction=1", {"normalise_hand"}),
        "no floor": ("normalise", ".clamp(min=floor)", "", {"normalise_group"}),
        "over all steps at once": ("normalise", "values.std(0, ", "values.std(", {"normalise_group"}),
        "sum first, then normalise": (
            "advantage",
            "return (energy_part + force_part.unsqueeze(1))",
            "raw = config.energy_weight * to_go + config.force_weight * force.unsqueeze(1)\n"
            "    return normalise(raw, config.force_floor)",
            {"advantage_test"},
        ),
        "clip of each channel": (
            "advantage",
            "(energy_part + force_part.unsqueeze(1)).clamp(-config.adv_clip, config.adv_clip)",
            "energy_part.clamp(-config.adv_clip, config.adv_clip) + force_part.unsqueeze(1)",
            {"advantage_test"},
        ),
        "clip without the minimum": (
            "surrogate",
            "torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)",
            "ratio.clamp(1 - clip_range, 1 + clip_range) * advantage",
            {"surrogate_test"},
        ),
        "sign of the log-ratio": ("surrogate", "-noise_delta", "noise_delta", {"surrogate_test"}),
        "the square forgotten": ("surrogate", " - 0.5 * delta_squared", "", {"surrogate_test"}),
    },
    "shaping_by_hand": {
        "no discount in the shaping": ("shaping", "gamma * following", "following", {"shaping_test"}),
        "sign": ("shaping", "gamma * following - potential", "potential - gamma * following", {"shaping_test"}),
        "one transition too few": ("return_to_go", "arange(steps, 0, -1", "arange(steps - 1, -1, -1", {"return_end"}),
        "no discount in the return": ("return_to_go", "gamma**left * ", "", {"return_end", "return_sum"}),
        "normalised at each step": (
            "return_to_go",
            "return gamma",
            "potential = (potential - potential.mean(0)) / potential.std(0)\n    return gamma",
            {"return_end", "return_sum"},
        ),
        "the last step not computed": ("held", "    source[-1] = len(steps) - 1\n", "", {"held_test"}),
    },
}


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name / f"{name}.ipynb").read_text())


def about(cell: dict[str, Any]) -> dict[str, Any]:
    return cell["metadata"]["nbgrader"]


def graded(notebook: dict[str, Any]) -> set[str]:
    """The cells that a machine marks."""
    return {about(c)["grade_id"] for c in notebook["cells"] if c["cell_type"] == "code" and about(c)["grade"]}


@pytest.fixture(scope="module")
def setups() -> dict[str, dict[str, Any]]:
    """The names that the setup cell of each assignment defines: the rollouts are made once."""
    made = {}
    for name in NAMES:
        cell = next(c for c in read(name)["cells"] if about(c)["grade_id"] == "setup")
        made[name] = {}
        exec("".join(cell["source"]), made[name])
    return made


def marks(notebook: dict[str, Any], setup: dict[str, Any]) -> dict[str, Exception | None]:
    """Run all cells, as an autograder does, and return what each graded cell raised."""
    scope, found = dict(setup), {}
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code" or about(cell)["grade_id"] == "setup":
            continue
        error = None
        try:
            exec("".join(cell["source"]), scope)
        except Exception as raised:
            error = raised
        if about(cell)["grade"]:
            found[about(cell)["grade_id"]] = error
        else:
            assert error is None, error
    return found


def test_all_assignments_are_tested():
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(NAMES) == sorted(MISTAKES)


@pytest.mark.parametrize("name", NAMES)
def test_the_metadata_is_nbgraders(name):
    notebook = read(name)
    nbformat.validate(nbformat.from_dict(notebook))
    cells = notebook["cells"]
    keys = {"schema_version", "grade_id", "grade", "solution", "locked", "task"}
    ids = [about(cell)["grade_id"] for cell in cells]
    assert len(ids) == len(set(ids))
    for cell in cells:
        meta, source = about(cell), "".join(cell["source"])
        assert set(meta) == keys | ({"points"} if meta["grade"] else set())
        assert meta["schema_version"] == 3
        assert meta["task"] is False
        assert meta["locked"] is not meta["solution"]
        assert ("### BEGIN SOLUTION" in source) == (meta["solution"] and cell["cell_type"] == "code")
        assert "### BEGIN HIDDEN TESTS" not in source or meta["grade"]
        assert not cell.get("outputs"), "a source notebook has no outputs"
    points = sum(about(cell).get("points", 0) for cell in cells)
    assert f"{points} points" in "".join(cells[0]["source"])


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_gets_full_marks(name, setups):
    found = marks(read(name), setups[name])
    assert found == dict.fromkeys(graded(read(name)))
    assert len(found) >= 4


@pytest.mark.parametrize("name", NAMES)
def test_the_student_version_holds_no_answer_and_gets_no_marks(name, setups):
    stripped = student_version(read(name))
    text = json.dumps(stripped)
    assert "SOLUTION" not in text
    assert "HIDDEN" not in text
    for full, cell in zip(read(name)["cells"], stripped["cells"], strict=True):
        if about(cell)["solution"]:
            assert "raise NotImplementedError()" in cell["source"] or cell["source"] == "YOUR ANSWER HERE"
            assert cell["source"] != "".join(full["source"])
    found = marks(stripped, setups[name])
    assert all(isinstance(error, NotImplementedError) for error in found.values()), found
    assert set(found) == graded(stripped)


@pytest.mark.parametrize(
    ("name", "mistake"), [(name, mistake) for name, mistakes in MISTAKES.items() for mistake in mistakes]
)
def test_a_usual_mistake_is_noticed(name, mistake, setups):
    where, right, wrong, noticed = MISTAKES[name][mistake]
    notebook = read(name)
    cell = next(c for c in notebook["cells"] if about(c)["grade_id"] == where)
    source = "".join(cell["source"])
    assert right in source
    cell["source"] = source.replace(right, wrong)
    failed = {grade_id for grade_id, error in marks(notebook, setups[name]).items() if error is not None}
    assert noticed <= failed, f"noticed by {failed or 'no cell'}"


# ---------------------------------------------------------------------- the student version
def test_marks_without_a_partner_are_refused():
    notebook = read("shaping_by_hand")
    solution = next(k for k, cell in enumerate(notebook["cells"]) if about(cell)["grade_id"] == "shaping")
    broken = copy.deepcopy(notebook)
    source = "".join(broken["cells"][solution]["source"])
    broken["cells"][solution]["source"] = source.replace("### END SOLUTION", "")
    with pytest.raises(ValueError, match=r"cell 'shaping' is to be solved"):
        student_version(broken)
    test = next(k for k, cell in enumerate(notebook["cells"]) if about(cell)["grade_id"] == "shaping_test")
    notebook["cells"][test]["source"] = "### BEGIN HIDDEN TESTS\nassert True"
    with pytest.raises(ValueError, match=r"cell 'shaping_test': a mark has no partner"):
        student_version(notebook)


def test_start_gives_students_the_assignments_without_the_answers(tmp_path, capsys):
    assert main(["start", str(tmp_path), "--assignments"]) == 0
    paths = sorted((tmp_path / "assignments").rglob("*.ipynb"))
    assert [path.stem for path in paths] == sorted(NAMES)
    for path in paths:
        nbformat.validate(nbformat.read(path, as_version=4))
        assert CODE_STUB.splitlines()[0] in path.read_text()
        assert "SOLUTION" not in path.read_text()
    paths[0].write_text("my work")
    capsys.readouterr()
    assert main(["start", str(tmp_path), "--assignments"]) == 0
    assert paths[0].read_text() == "my work"
    assert f"kept      {paths[0]}" in capsys.readouterr().out


def test_start_without_the_option_gives_none(tmp_path):
    assert main(["start", str(tmp_path)]) == 0
    assert not (tmp_path / "assignments").exists()
