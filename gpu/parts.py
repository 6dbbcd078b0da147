"""Split a file into parts below a size, and join them again: python gpu/parts.py split FILE DIR | join DIR FILE."""

import hashlib
import json
import sys
from pathlib import Path

PART_BYTES = 15 << 20


def split(path: Path, folder: Path, part_bytes: int = PART_BYTES) -> list[Path]:
    """Write folder/NAME.000, .001, ... and folder/NAME.parts.json with the sha256 of the whole."""
    folder.mkdir(parents=True, exist_ok=True)
    data = path.read_bytes()
    parts = []
    for k in range(0, max(len(data), 1), part_bytes):
        part = folder / f"{path.name}.{k // part_bytes:03d}"
        part.write_bytes(data[k : k + part_bytes])
        parts.append(part)
    manifest = {"file": path.name, "sha256": hashlib.sha256(data).hexdigest(), "parts": [p.name for p in parts]}
    (folder / f"{path.name}.parts.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return parts


def join(folder: Path, path: Path) -> Path:
    """Rebuild the file `path.name` from its parts in `folder`; raises ValueError when they do not fit the manifest."""
    manifest_path = folder / f"{path.name}.parts.json"
    if not manifest_path.is_file():
        raise FileNotFoundError(f"{folder} has no {manifest_path.name}: copy all parts and the manifest there first")
    manifest = json.loads(manifest_path.read_text())
    data = b"".join((folder / name).read_bytes() for name in manifest["parts"])
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise ValueError(
            f"the parts of {path.name} in {folder} do not have the sha256 of the manifest: copy them again"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ("split", "join"):
        sys.exit(__doc__)
    {"split": split, "join": join}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
