"""Download of one public file: resumed after a break, checked against its size and MD5, put in place in one step."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

_BLOCK = 1 << 18
_ATTEMPTS = 5
_TIMEOUT = 60.0  # seconds without a byte


@dataclass(frozen=True)
class RemoteFile:
    """A file on the web with the size in bytes and the MD5 that its publisher states."""

    name: str
    url: str
    size: int
    md5: str


def fetch(remote: RemoteFile, folder: str | Path) -> Path:
    """Download a file to `folder` unless it is there; returns its path.

    What has arrived is kept as NAME.part: a broken connection is resumed (HTTP Range), by this call or by the next one.
    Raises ConnectionError when the server does not give the file, ValueError when the file is not the expected one.
    """
    path = Path(folder) / remote.name
    if path.is_file():
        _check(path, remote, f"delete {path} and download it again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    _receive_all(remote, part)
    try:
        _check(part, remote, f"the broken download is deleted; try again, or get {remote.url} with a browser")
    except ValueError:
        part.unlink()
        raise
    part.replace(path)
    return path


def _receive_all(remote: RemoteFile, part: Path) -> None:
    problem: Exception | None = None
    with tqdm(total=remote.size, desc=remote.name, unit="B", unit_scale=True) as bar:
        for _ in range(_ATTEMPTS):
            try:
                _receive(remote, part, bar)
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                    problem = error
                    break  # asking again will not help
                problem = error
            if part.is_file() and part.stat().st_size >= remote.size:
                return
    held = part.stat().st_size if part.is_file() else 0
    raise ConnectionError(
        f"{remote.url} gave {held} of the {remote.size} bytes of {remote.name} "
        f"({problem or 'the connection was closed'}); call again to resume, "
        f"or download it with a browser to {part.with_suffix('')}"
    )


def _receive(remote: RemoteFile, part: Path, bar: tqdm) -> None:
    """One request, from the end of the part file on."""
    held = part.stat().st_size if part.is_file() else 0
    if held >= remote.size:
        return
    request = urllib.request.Request(remote.url, headers={"Range": f"bytes={held}-"} if held else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        if response.status not in (200, 206):
            raise ConnectionError(f"HTTP status {response.status} {response.reason}")  # figshare's 202: a browser check
        resumed = response.status == 206
        bar.n = held if resumed else 0
        with part.open("ab" if resumed else "wb") as file:
            while block := response.read(_BLOCK):
                file.write(block)
                bar.update(len(block))


def _check(path: Path, remote: RemoteFile, advice: str) -> None:
    size = path.stat().st_size
    if size != remote.size:
        raise ValueError(f"{path} has {size} bytes, expected {remote.size}: {advice}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    if digest != remote.md5:
        raise ValueError(f"{path} has the MD5 {digest}, expected {remote.md5}: {advice}")
