"""What every passport that a script writes says of its making."""

import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata


def provenance(packages: Iterable[str]) -> dict[str, object]:
    """Date, commit of the checkout, versions of the packages, licence."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "versions": {name: metadata.version(name) for name in packages},
        "licence": "MIT",
    }
