"""Put a trained denoiser or pseudo-force field into the package's assets, with its passport.

python scripts/pack_model.py RUN_DIR NAME --description TEXT --command TEXT [--figures evaluation.json] [--half]

RUN_DIR is the folder of `elign-lab pretrain`, `elign-lab align` or `elign-lab gpff train`; the figures are what
`elign-lab evaluate --json` or `elign-lab gpff evaluate --json` printed for RUN_DIR/model.safetensors.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from provenance import machine, provenance

from elign_lab.checkpoints import ASSETS, load_model, read_passport, read_weights, save_model, sha256, write_passport
from elign_lab.gpff.model import FORMAT as FORCE_FIELD
from elign_lab.gpff.model import load_force_field, save_force_field
from elign_lab.training import load_state, read_json_lines

PACKAGES = ("torch", "numpy", "rdkit", "tblite", "accelerate")
LOG_ROWS = 100


def _thinned(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """About LOG_ROWS rows: those with a validation loss or an evaluation, others between them, and the last."""
    every = max(1, len(log) // LOG_ROWS)
    special = {"validation_loss", "validation", "eval_force"}
    return [row for k, row in enumerate(log) if k % every == 0 or special & row.keys() or k == len(log) - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--description", required=True)
    parser.add_argument("--command", required=True, help="the command that made the run")
    parser.add_argument("--figures", type=Path, help="JSON of `elign-lab evaluate --json`")
    parser.add_argument("--weights", default="model.safetensors", help="file in the run (default: %(default)s)")
    parser.add_argument("--half", action="store_true", help="store float16")
    parser.add_argument("--machine", help="where the run was made (default: this machine)")
    arguments = parser.parse_args()

    source = arguments.run / arguments.weights
    state = load_state(arguments.run / "checkpoint.pt")
    dtype = torch.float16 if arguments.half else None
    target = ASSETS / f"{arguments.name}.safetensors"
    model: torch.nn.Module
    if read_weights(source)[1].get("format") == FORCE_FIELD:
        kind, model = "pseudo-force field", load_force_field(source)
        path = save_force_field(model, target, dtype=dtype)
    else:
        kind, model = "denoiser", load_model(source)
        path = save_model(model, target, dtype=dtype)
    log = read_json_lines(arguments.run / "log.jsonl")
    data = read_passport(ASSETS / "qm9_xtb.npz")
    write_passport(
        path,
        kind=kind,
        description=arguments.description,
        parameters=sum(p.numel() for p in model.parameters()),
        command=arguments.command,
        steps=state.get("step", state.get("iteration")),
        hours=round(state["seconds"] / 3600, 2) if "seconds" in state else None,
        seed=state["config"]["seed"],
        log=_thinned(log),
        data={"file": data["file"], "sha256": data["sha256"]},
        run_weights_sha256=sha256(source),
        figures=json.loads(arguments.figures.read_text()) if arguments.figures else None,
        machine=arguments.machine or machine(torch.get_num_threads()),
        **provenance(PACKAGES),
    )
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
