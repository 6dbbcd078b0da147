"""What `elign-lab start` copies, and files of the repository that notebooks read, wherever the notebooks lie."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PACKAGE = Path(__file__).parents[1]
_DOCS = ("metrics.md", "runs.md")  # notebooks name them
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def shipped(path: str) -> Path:
    """A file or folder of the repository, such as "gpu/results", in a checkout or in the installed package.

    The package has what pyproject.toml lists under `force-include`. Raises FileNotFoundError for anything else.
    """
    for root in (PACKAGE / f"_{path}", PACKAGE.parent / path):
        if root.exists():
            return root
    raise FileNotFoundError(f"{path} is not installed: reinstall elign-lab, or work in a checkout")


def own_files(*, assignments: bool = False) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Name and content of each file of a student's folder: notebooks, docs, and, if asked for, assignments."""
    source = shipped("notebooks")
    given: dict[PurePosixPath, bytes] = {}
    if assignments:
        from elign_lab.teaching.assignments import student_version

        for path in sorted(shipped("assignments/source").glob("*/*.ipynb")):
            release = student_version(json.loads(path.read_bytes()))
            text = json.dumps(release, indent=1, ensure_ascii=False) + "\n"
            given[PurePosixPath("assignments", path.name)] = text.encode()
    for path in sorted(source.rglob("*")):
        name = PurePosixPath(path.relative_to(source))
        if path.is_file() and not any(part.startswith((".", "__")) for part in name.parts):
            content = path.read_bytes()
            yield name, _relinked(content.decode(), given).encode() if name.suffix == ".md" else content
    yield from given.items()
    for document in _DOCS:
        text = shipped(f"docs/{document}").read_text(encoding="utf-8")
        yield PurePosixPath("docs", document), _relinked(text, {}).encode()


def _relinked(text: str, given: dict[PurePosixPath, bytes]) -> str:
    """Markdown for a student's folder: links out of the notebooks lead to what is given, or are text."""

    def link(found: re.Match[str]) -> str:
        title, target = found.groups()
        own = PurePosixPath("assignments", PurePosixPath(target).name)
        if not target.startswith("../"):
            return found[0]
        return f"[{title}]({own})" if own in given else title

    return _LINK.sub(link, text)
