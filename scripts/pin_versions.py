"""Write constraints.txt, environment.yml and binder/environment.yml from what is installed in .venv.

Run it with the environment's own Python after a dependency changed: `.venv/bin/python scripts/pin_versions.py`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAIRCHEM = "fairchem-core==2.24.0"  # the paper's oracle; not installed where the tests run
HEAD = """name: elign-lab
channels: [conda-forge, nodefaults]
dependencies:
  - python=3.11
  - pip
  - pip:
"""


def main() -> None:
    freeze = [sys.executable, "-m", "pip", "freeze", "--exclude-editable"]
    lines = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout.split()
    # the local part (+cpu) is the build, and the CUDA libraries come with the CUDA build only
    pins = [line.split("+")[0] for line in lines if not line.lower().startswith(("nvidia", "triton"))]
    title = (
        "# Exact versions that the tests run with; pyproject.toml has the ranges. Written by scripts/pin_versions.py.\n"
    )
    (ROOT / "constraints.txt").write_text(title + "\n".join(pins) + "\n")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    version = {_canonical(pin): pin for pin in pins}
    lab = [version[_canonical(r)] for r in project["dependencies"] + extras["lab"]]
    more = [version[_canonical(r)] for r in extras["ani"] + extras["dev"]]
    full = (
        "# The environment for research, with UMA (the paper's preference model; needs access on Hugging Face):\n"
        "#   conda env create -f environment.yml && conda activate elign-lab && pip install --no-deps -e .\n"
    )
    (ROOT / "environment.yml").write_text(full + HEAD + _items([*lab, *more, FAIRCHEM]))
    small = (
        "# Binder: what the notebooks need, in the same versions, with the CPU build of torch. No UMA and no ANI-2x\n"
        "# (their weights are downloads), no test tools: 1.9 GB instead of 2.5. postBuild installs the package.\n"
    )
    index = "--extra-index-url https://download.pytorch.org/whl/cpu"
    cpu = [f"{pin}+cpu" if pin.startswith("torch==") else pin for pin in lab]
    (ROOT / "binder" / "environment.yml").write_text(small + HEAD + _items([index, *cpu]))


def _canonical(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def _items(lines: list[str]) -> str:
    return "".join(f"      - {line}\n" for line in lines)


if __name__ == "__main__":
    main()
