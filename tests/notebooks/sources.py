"""Which code the stored outputs of the notebooks belong to, noted in executed.json.

After notebooks were executed and stored: `python -m tests.notebooks.sources notebooks/*.ipynb`. A test compares:
whoever changes a code cell executes the notebook again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import nbformat

NOTED = Path(__file__).with_name("executed.json")


def digest(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of the code cells in their order; text and outputs do not count."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def main() -> None:
    """Note the code of the notebooks that are named on the command line."""
    noted = json.loads(NOTED.read_text()) if NOTED.is_file() else {}
    noted |= {Path(name).stem: digest(nbformat.read(name, as_version=4)) for name in sys.argv[1:]}
    NOTED.write_text(json.dumps(noted, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
