"""Make the figures of the bundled pseudo-force fields, and put them into their passports; the weights stay.

python scripts/gpff_figures.py run [NAME ...]    the runs of many structures: to benchmarks/results
python scripts/gpff_figures.py store             these into the passports, as "headline"
python scripts/gpff_figures.py rows NAME FILE    rows of `elign-lab gpff evaluate --out FILE` into the table of NAME's
                                                 passport, in place of those of the same sampler and evaluations
"""

import argparse
import json
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from elign_lab.checkpoints import ASSETS
from elign_lab.gpff import quality_from_json, quality_json
from elign_lab.gpff.quality import EDM, EDM_SPACING

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
FEW = "--n 1000 --seed 12 --evaluations 6,8 --sampler 'direct, 0.3' --sampler 'relaxation, momentum' --oracle xtb"
RUNS = {
    "gpff-640-gpff-mini": "--model gpff-mini --n 640 --seed 21 --evaluations 256 --sampler 'direct, 0.3' --oracle xtb",
    "gpff-1000-gpff-mini": f"--model gpff-mini {FEW}",
    "gpff-1000-gpff-mini-aligned": f"--model gpff-mini-aligned {FEW}",
}
HEADLINES = {
    "gpff-mini": ("gpff-640-gpff-mini", "gpff-1000-gpff-mini"),
    "gpff-mini-aligned": ("gpff-1000-gpff-mini", "gpff-1000-gpff-mini-aligned"),
}


def run(name: str) -> None:
    """Make one of RUNS, with its command and date in the file."""
    arguments, path = f"gpff evaluate {RUNS[name]}", RESULTS / f"{name}.json"
    subprocess.run([sys.executable, "-m", "elign_lab", *shlex.split(arguments), "--out", str(path)], check=True)
    stamp = {"command": f"elign-lab {arguments}", "date": datetime.now(UTC).date().isoformat()}
    write(path, {**stamp, **json.loads(path.read_text())})


def change_figures(name: str, **fields: Any) -> None:
    """Set figures in the passport of a bundled model; all its rows get the intervals that follow from them."""
    path = ASSETS / f"{name}.json"
    passport = json.loads(path.read_text())
    figures = {**passport["figures"], **fields}
    figures["rows"] = quality_json(quality_from_json(figures["rows"]))
    write(path, {**passport, "figures": figures})


def replace_rows(name: str, made: list[dict[str, Any]]) -> None:
    """Put rows into the table of a passport, in place of those of the same sampler and evaluations."""
    new = {(row["sampler"], row["evaluations"]): row for row in made}
    rows = json.loads((ASSETS / f"{name}.json").read_text())["figures"]["rows"]
    kept = [new.pop((row["sampler"], row["evaluations"]), row) for row in rows]
    spacing = {"denoiser_spacing": EDM_SPACING} if any(row["sampler"].startswith(EDM) for row in made) else {}
    change_figures(name, rows=[*kept, *new.values()], **spacing)


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    tasks.add_parser("run").add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}")
    tasks.add_parser("store")
    rows = tasks.add_parser("rows")
    rows.add_argument("name", choices=list(HEADLINES))
    rows.add_argument("file", type=Path)
    arguments = parser.parse_args()
    if arguments.task == "run":
        if unknown := [name for name in arguments.names if name not in RUNS]:
            parser.error(f"unknown run {unknown[0]!r}: expected some of {', '.join(RUNS)}")
        for name in arguments.names or RUNS:
            run(name)
    elif arguments.task == "store":
        for name, runs in HEADLINES.items():
            change_figures(name, headline=[json.loads((RESULTS / f"{key}.json").read_text()) for key in runs])
    else:
        replace_rows(arguments.name, json.loads(arguments.file.read_text())["rows"])


if __name__ == "__main__":
    main()
