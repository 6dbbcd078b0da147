"""Make the bundled evidence: samples of two models, same seeds, judged by several oracles, DFT among them.

python scripts/make_evidence.py --n 128 [--ani-weights DIR] [--workers 2]

DFT's answers are kept in a cache file: stopped and run again with the same --n, the script goes on where it was.
Another --n gives other molecules.
"""

import argparse
import itertools
import sys
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from elign_lab import load_model, load_oracle
from elign_lab.checkpoints import ASSETS, read_passport, write_passport
from elign_lab.evaluation.evidence import EVIDENCE, collect

PACKAGES = {"learned": "torch", "xtb": "tblite", "dft": "pyscf", "ani": "torchani"}
METHODS = {
    "learned": "oracle-mini",
    "xtb": "GFN2-xTB",
    "dft": "B3LYP/6-31G(d), RKS or UKS, PySCF",
    "ani": "ANI-2x",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["edm-mini", "edm-mini-aligned"])
    parser.add_argument("--oracles", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--n", type=int, default=128)
    parser.add_argument("--steps", type=int, help="diffusion steps (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="processes of the DFT oracle")
    parser.add_argument("--ani-weights", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("runs/evidence.sqlite"))
    parser.add_argument("--out", type=Path, default=EVIDENCE)
    arguments = parser.parse_args()

    options = {
        "ani": {"weights": arguments.ani_weights} if arguments.ani_weights else {},
        "dft": {"cache": arguments.cache, "workers": arguments.workers},
    }
    with ExitStack() as stack, torch.random.fork_rng():
        oracles = {name: stack.enter_context(load_oracle(name, **options.get(name, {}))) for name in arguments.oracles}
        models = {name: load_model(name) for name in arguments.models}
        evidence = collect(models, oracles, arguments.n, steps=arguments.steps, seed=arguments.seed, progress=True)
    for model, oracle in itertools.product(arguments.models, arguments.oracles):
        print(f"{oracle} of {model}: {evidence.failures(model, oracle)} failures", file=sys.stderr)
    evidence.save(arguments.out)
    command = f"python scripts/make_evidence.py --models {' '.join(arguments.models)} --oracles "
    command += f"{' '.join(arguments.oracles)} --n {arguments.n} --seed {arguments.seed}"
    write_passport(
        arguments.out,
        kind="evidence",
        description="Samples of the base and the aligned model, same seeds, judged by several oracles",
        command=command + (f" --steps {arguments.steps}" if arguments.steps else ""),
        models={name: read_passport(ASSETS / f"{name}.safetensors")["sha256"] for name in arguments.models},
        methods={name: METHODS[name] for name in arguments.oracles},
        seed=arguments.seed,
        versions={
            name: metadata.version(name) for name in ("torch", *(PACKAGES[oracle] for oracle in arguments.oracles))
        },
        date=datetime.now(UTC).date().isoformat(),
        licence="MIT",
    )
    print(arguments.out, arguments.out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
