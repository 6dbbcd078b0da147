"""What every passport that a script writes says of its making."""

import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = ("elign_lab", "scripts")  # whose changes change what a script makes


def provenance(packages: Iterable[str]) -> dict[str, object]:
    """Date, commit of the checkout, versions of the packages, licence."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "versions": {name: metadata.version(name) for name in packages},
        "licence": "MIT",
    }


def commit(root: Path = ROOT) -> str:
    """Commit of the checkout, with '-dirty' when tracked code differs from it: assets and documents do not count."""
    head = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", *CODE, ":!elign_lab/assets")
    return f"{head}-dirty" if changed else head


def machine(threads: int) -> str:
    """This machine, and the threads that were used."""
    return f"{platform.machine()}, {platform.processor() or 'CPU'}, {threads} threads"


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()
