"""Write the table of `elign_lab.evaluation.restarts` for a model: validity after noising real molecules up to step t.

`python scripts/where_samples_fail.py edm-mini --n 128 --out benchmarks/results/restarts.json` takes minutes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tqdm.auto import tqdm

from elign_lab import load_dataset, load_model
from elign_lab.evaluation.restarts import restart_table

TIMES = (0, 50, 100, 200, 300, 400, 600, 800, 1000)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name or file of a denoiser")
    parser.add_argument("--n", type=int, default=128, help="molecules, of the validation split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the table to this JSON file")
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    reference = load_dataset("bundled", split="validation").batch(torch.arange(arguments.n))
    rows = []
    for t in tqdm(TIMES, desc="times"):
        (result,) = restart_table(model, reference, [t], seed=arguments.seed).values()
        row = {"t": t, "n": result.n}
        for key in ("atom_stability", "molecule_stability", "validity"):
            interval = getattr(result, key)
            row[key] = {"value": interval.value, "low": interval.low, "high": interval.high}
        rows.append(row)
        tqdm.write(f"t = {t:4d}   " + "   ".join(f"{k} {100 * row[k]['value']:.1f} %" for k in list(row)[2:]))
    if arguments.out:
        table = {"model": arguments.model, "seed": arguments.seed, "rows": rows}
        arguments.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
