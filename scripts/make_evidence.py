"""Make the bundled evidence: samples of two models, same seeds, judged by several oracles, DFT among them.

python scripts/make_evidence.py --n 128 [--ani-weights DIR] [--workers 2]

The samples and DFT's answers are kept in --work, by default benchmarks/evidence of the repository: stopped and run
again with the same options, the script goes on where it was. Another --n gives other molecules.
"""

import argparse
import itertools
import sys
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from elign_lab import MoleculeBatch, load_model, load_oracle, sample
from elign_lab.checkpoints import ASSETS, read_passport, write_passport
from elign_lab.evaluation.evidence import DFT_SETTINGS, EVIDENCE, judge
from elign_lab.sampling import require_all

PACKAGES = {"learned": "torch", "xtb": "tblite", "dft": "pyscf", "ani": "torchani"}
METHODS = {
    "learned": "oracle-mini",
    "xtb": "GFN2-xTB",
    "dft": "B3LYP/6-31G(d), RKS or UKS, PySCF, density fitting, grid level 1, convergence 1e-8 Hartree",
    "ani": "ANI-2x",
}
WORK = Path(__file__).parents[1] / "benchmarks" / "evidence"  # in git, so that another machine can go on
CHUNK = 8  # molecules that an interrupted DFT loses at most


def samples_of(name: str, sha256: str, arguments: argparse.Namespace) -> MoleculeBatch:
    """The samples of a bundled model, from the working folder where they are there already."""
    path = arguments.work / f"{name}-{sha256[:12]}-{arguments.n}-{arguments.steps or 'all'}-{arguments.seed}.npz"
    if not path.is_file():
        options = {"steps": arguments.steps, "seed": arguments.seed, "batch_size": arguments.n, "progress": True}
        made = require_all(sample(load_model(name), arguments.n, **options), arguments.n)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp.npz")
        np.savez(temporary, numbers=made.numbers, positions=made.positions)
        temporary.replace(path)
    with np.load(path) as archive:
        numbers, positions = torch.from_numpy(archive["numbers"]), torch.from_numpy(archive["positions"])
    return MoleculeBatch(numbers, positions, numbers > 0, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["edm-mini", "edm-mini-aligned"])
    parser.add_argument("--oracles", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--n", type=int, default=128)
    parser.add_argument("--steps", type=int, help="diffusion steps (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="processes of the DFT oracle")
    parser.add_argument("--ani-weights", type=Path)
    parser.add_argument("--work", type=Path, default=WORK, help="folder of what is kept (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=EVIDENCE)
    arguments = parser.parse_args()

    sha256 = {name: read_passport(ASSETS / f"{name}.safetensors")["sha256"] for name in arguments.models}
    samples = {name: samples_of(name, sha256[name], arguments) for name in arguments.models}
    options = {
        "ani": {"weights": arguments.ani_weights} if arguments.ani_weights else {},
        "dft": {"cache": arguments.work / "dft.sqlite", "workers": arguments.workers, **DFT_SETTINGS},
    }
    with ExitStack() as stack:
        oracles = {name: stack.enter_context(load_oracle(name, **options.get(name, {}))) for name in arguments.oracles}
        if "dft" in oracles:  # into the cache, a few at a time; pairs of the models together
            chunks = [list(chunk) for chunk in np.array_split(range(arguments.n), -(-arguments.n // CHUNK))]
            for chunk, batch in tqdm(list(itertools.product(chunks, samples.values())), desc="DFT", unit="chunk"):
                oracles["dft"](batch[chunk].to(dtype=torch.float64))
        evidence = judge(samples, oracles)
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
        models=sha256,
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
