"""Assignments in nbgrader's notebook format (metadata schema 3), turned into what students get, without nbgrader.

The source notebooks hold solutions and hidden tests between marks. `student_version` takes them out as
`nbgrader generate_assignment` does, so that `elign-lab start --assignments` needs no nbgrader. Grading does: nbgrader
locks cells, restores edited tests and keeps the marks.
"""

from __future__ import annotations

import copy
import re
from typing import Any

CODE_STUB = "# YOUR CODE HERE\nraise NotImplementedError()"
TEXT_STUB = "YOUR ANSWER HERE"

_SOLUTION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n.*?^[ \t]*### END SOLUTION$", re.DOTALL | re.MULTILINE)
_HIDDEN = re.compile(r"^[ \t]*### BEGIN HIDDEN TESTS\n.*?^[ \t]*### END HIDDEN TESTS(\n|\Z)", re.DOTALL | re.MULTILINE)
_MARK = re.compile(r"### (?:BEGIN|END) (?:SOLUTION|HIDDEN TESTS)")


def student_version(notebook: dict[str, Any]) -> dict[str, Any]:
    """A copy of a source notebook (format 4, as JSON) without solutions, hidden tests and outputs.

    Raises ValueError for a mark without its partner, and for a cell that is to be solved and has no solution marked.
    """
    result = copy.deepcopy(notebook)
    for cell in result["cells"]:
        name = cell["metadata"].get("nbgrader", {}).get("grade_id", cell.get("id", "?"))
        source = "".join(cell["source"])
        if cell["metadata"].get("nbgrader", {}).get("solution"):
            source = _without_solution(source, cell["cell_type"], name)
        source = _HIDDEN.sub("", source).rstrip("\n")
        if _MARK.search(source):
            raise ValueError(f"cell {name!r}: a mark has no partner, or is in a cell of the wrong kind")
        cell["source"] = source
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    return result


def _without_solution(source: str, kind: str, name: str) -> str:
    if kind != "code":
        return TEXT_STUB
    stubbed, found = _SOLUTION.subn(lambda mark: "\n".join(mark[1] + line for line in CODE_STUB.splitlines()), source)
    if found == 0:
        raise ValueError(f"cell {name!r} is to be solved: put its solution between ### BEGIN SOLUTION and END SOLUTION")
    return stubbed
