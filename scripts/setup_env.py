"""Make or update .venv with the pinned versions of constraints.txt: `python scripts/setup_env.py`.

It needs Python 3.11 or later and nothing else. Run again, it does nothing unless pyproject.toml or constraints.txt
changed. Without an NVIDIA GPU it takes the CPU build of torch, which is 200 MB instead of 3 GB.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / ".elign-lab-setup"
INPUTS = (ROOT / "pyproject.toml", ROOT / "constraints.txt")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
EXTRAS = "lab,ani,dev"


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 (an older Python must be told)
        print(f"elign_lab needs Python 3.11 or later, this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in INPUTS)).hexdigest()
    if PYTHON.exists() and STAMP.exists() and STAMP.read_text() == wanted:
        return 0
    if not PYTHON.exists():
        if importlib.util.find_spec("ensurepip") is None:
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            print(f"this Python cannot make environments: apt-get install python{version}-venv", file=sys.stderr)
            return 2
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    constraints = ["-c", str(ROOT / "constraints.txt")]
    # torch first and alone, so that no other package draws the CUDA build in
    subprocess.run([PYTHON, "-m", "pip", "install", *constraints, *_torch()], check=True)
    subprocess.run([PYTHON, "-m", "pip", "install", *constraints, "-e", f"{ROOT}[{EXTRAS}]"], check=True)
    STAMP.write_text(wanted)
    return 0


def _torch() -> list[str]:
    """Arguments of pip that bring the right build of the pinned torch."""
    lines = (ROOT / "constraints.txt").read_text().split()
    pinned = next(line for line in lines if line.startswith("torch=="))
    # elsewhere the plain index has CPU builds only
    if not sys.platform.startswith("linux") or _has_nvidia_gpu():
        return [pinned]
    if not _reachable(CPU_INDEX):
        print(f"{CPU_INDEX} cannot be reached: taking {pinned} from the default index, perhaps the large CUDA build")
        return [pinned]
    return ["--extra-index-url", CPU_INDEX, f"{pinned}+cpu"]


def _has_nvidia_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True, check=False).returncode == 0


def _reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/torch/", timeout=5):
            return True
    except (urllib.error.URLError, TimeoutError):
        return False


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
