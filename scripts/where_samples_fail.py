"""Write the table of `elign_lab.evaluation.restarts` for a model: validity after noising real molecules up to step t.

`python scripts/where_samples_fail.py edm-mini --n 128 --out benchmarks/results/restarts.json` takes minutes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tqdm.auto import tqdm

from elign_lab import evaluate, load_dataset, load_model
from elign_lab.evaluation.restarts import restart

TIMES = (0, 50, 100, 200, 300, 400, 600, 800, 1000)

METRICS = ("atom_stability", "molecule_stability", "validity")


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
        result = evaluate(restart(model, reference, t, seed=arguments.seed))
        found = {key: getattr(result, key) for key in METRICS}
        rows.append({"t": t, "n": result.n, **{key: interval.to_dict() for key, interval in found.items()}})
        tqdm.write(f"t = {t:4d}   " + "   ".join(f"{key} {100 * i.value:.1f} %" for key, i in found.items()))
    if arguments.out:
        table = {"model": arguments.model, "seed": arguments.seed, "rows": rows}
        arguments.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
