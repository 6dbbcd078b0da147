"""Make the bundled evidence: sets of molecules that belong together, judged by several oracles, DFT among them.

python scripts/make_evidence.py alignment --n 128 [--ani-weights DIR] [--workers 2]
python scripts/make_evidence.py gpff --n 32 ...

alignment: samples of edm-mini and edm-mini-aligned, same seeds. gpff: structures of gpff-mini by several samplers and
numbers of network evaluations, and molecules of the data with the same compositions.

The molecules and DFT's answers are kept in --work, by default benchmarks/evidence of the repository: stopped and run
again with the same options, the script goes on where it was. Another --n gives other molecules.
"""

import argparse
import itertools
import platform
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from provenance import provenance
from tqdm import tqdm

from elign_lab import MoleculeBatch, load_dataset, load_model, load_oracle, sample
from elign_lab.checkpoints import ASSETS, read_passport, write_passport
from elign_lab.evaluation.evidence import DFT_SETTINGS, EVIDENCE, GPFF_EVIDENCE, Evidence, judge
from elign_lab.evaluation.intervals import bootstrap, median
from elign_lab.gpff import generate, load_force_field
from elign_lab.gpff.quality import VARIANTS
from elign_lab.sampling import require_all

PACKAGES = {"learned": "torch", "xtb": "tblite", "ani": "torchani", "dft": "pyscf"}
METHODS = {  # the last one is the judge
    "learned": "oracle-mini",
    "xtb": "GFN2-xTB",
    "ani": "ANI-2x",
    "dft": "B3LYP/6-31G(d), RKS or UKS, PySCF, density fitting, grid level 1, convergence 1e-8 Hartree",
}
SETS = {
    "alignment": (EVIDENCE, "Samples of the base and the aligned model, same seeds, judged by several oracles"),
    "gpff": (GPFF_EVIDENCE, "Structures of gpff-mini and molecules of the data, same compositions, judged by several"),
}
GPFF_ROWS = (  # samplers, of VARIANTS, and network evaluations
    ("relaxation, momentum", 6),
    ("direct, 0.3", 16),
    ("direct, 0.3", 256),
    ("relaxation, momentum", 256),
    ("ancestral, sigma_hat", 256),
    ("heun, sigma_hat", 256),
)
WORK = Path(__file__).parents[1] / "benchmarks" / "evidence"  # in git, so that another machine can go on
CHUNK = 8  # molecules that an interrupted DFT loses at most


def makers(what: str, n: int, seed: int) -> dict[str, tuple[str, Callable[[], MoleculeBatch]]]:
    """Name of each set -> what identifies its file, and the function that makes it."""

    def hash_of(name: str) -> str:
        return read_passport(ASSETS / f"{name}.safetensors")["sha256"][:12]

    def diffusion(name: str) -> MoleculeBatch:
        return sample(load_model(name), n, seed=seed, batch_size=n, progress=True)

    def data() -> MoleculeBatch:
        test = load_dataset("bundled", split="test")
        return test.batch(torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))[:n].tolist())

    def pseudo_forces(variant: str, evaluations: int) -> MoleculeBatch:
        atoms = [numbers.tolist() for numbers, _ in data().arrays()]
        sampler, options = VARIANTS[variant]
        shared = {"compositions": atoms, "evaluations": evaluations, "seed": seed, "progress": True}
        return generate(load_force_field("gpff-mini"), sampler=sampler, **shared, **options)

    if what == "alignment":
        return {
            name: (f"{name}-{hash_of(name)}-{n}-all-{seed}", lambda name=name: diffusion(name))
            for name in ("edm-mini", "edm-mini-aligned")
        }
    made = {}
    for variant, k in GPFF_ROWS:
        file = f"gpff-mini-{hash_of('gpff-mini')}-{n}-{variant.replace(', ', '-')}-{k}-{seed}"
        made[f"{variant}, {k} NFE"] = (file, lambda variant=variant, k=k: pseudo_forces(variant, k))
    return {**made, "test molecules": (f"test-molecules-{n}-{seed}", data)}


def kept(path: Path, make: Callable[[], MoleculeBatch], n: int) -> MoleculeBatch:
    """The molecules of a file in the working folder, made where there is none yet."""
    if not path.is_file():
        made = require_all(make(), n)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp.npz")
        made.to_npz(temporary)
        temporary.replace(path)
    return MoleculeBatch.from_npz(path, check=False)


def figures(evidence: Evidence, name: str, oracle: str) -> dict[str, object]:
    """Medians of one set by one oracle, with 95 % intervals."""
    values = dict(zip(("energy_per_atom_median", "f_rms_median"), evidence.of(name, oracle), strict=True))
    medians = {
        key: bootstrap(lambda i, v=v: median(v[i]), len(v), seed=0, n_boot=1000).to_dict() for key, v in values.items()
    }
    return {"set": name, "oracle": oracle, "failures": evidence.failures(name, oracle), **medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=SETS)
    parser.add_argument("--oracles", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--n", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="processes of the DFT oracle")
    parser.add_argument("--ani-weights", type=Path)
    parser.add_argument("--work", type=Path, default=WORK, help="folder of what is kept (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="default: the file in elign_lab/assets")
    arguments = parser.parse_args()
    path, description = SETS[arguments.what]
    path = arguments.out or path

    options = {
        "ani": {"weights": arguments.ani_weights} if arguments.ani_weights else {},
        "dft": {"cache": arguments.work / "dft.sqlite", "workers": arguments.workers, **DFT_SETTINGS},
    }
    with ExitStack() as stack:  # first the oracles: a missing one must not come up after an hour
        oracles = {name: stack.enter_context(load_oracle(name, **options.get(name, {}))) for name in arguments.oracles}
        files = makers(arguments.what, arguments.n, arguments.seed)
        sets = {name: kept(arguments.work / f"{file}.npz", make, arguments.n) for name, (file, make) in files.items()}
        if "dft" in oracles:  # into the cache, a few at a time; what belongs together comes together
            chunks = [list(chunk) for chunk in np.array_split(range(arguments.n), -(-arguments.n // CHUNK))]
            for chunk, batch in tqdm(list(itertools.product(chunks, sets.values())), desc="DFT", unit="chunk"):
                oracles["dft"](batch[chunk].to(dtype=torch.float64))
        evidence = judge(sets, oracles)
    rows = [figures(evidence, name, oracle) for name, oracle in itertools.product(sets, arguments.oracles)]
    for row in rows:
        print(row, file=sys.stderr)
    evidence.save(path)
    write_passport(
        path,
        kind="evidence",
        description=description,
        command=f"python scripts/make_evidence.py {arguments.what} --oracles {' '.join(arguments.oracles)} "
        f"--n {arguments.n} --seed {arguments.seed}",
        molecules={name: file for name, (file, _) in files.items()},
        methods={name: METHODS[name] for name in arguments.oracles},
        n=arguments.n,
        seed=arguments.seed,
        figures=rows,
        machine=f"{platform.machine()}, CPU",
        **provenance(("torch", *(PACKAGES[oracle] for oracle in arguments.oracles))),
    )
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
