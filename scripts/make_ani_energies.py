"""ANI-2x formation energies of the bundled test split (MMFF94 geometries), for the epsilon of theorem 2 in notebook 13.

python scripts/make_ani_energies.py --weights FOLDER      (needs torchani; see load_oracle("ani"))
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from provenance import machine, provenance

from elign_lab.checkpoints import ASSETS, write_passport
from elign_lab.datasets import load_dataset
from elign_lab.evaluation import physics
from elign_lab.evaluation.intervals import bootstrap, median
from elign_lab.oracles import load_oracle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="the weights of ANI-2x")
    options = parser.parse_args()
    test = load_dataset("bundled", split="test", geometry="mmff94")
    molecules = test.batch(np.arange(len(test)))
    started = time.monotonic()
    with load_oracle("ani", weights=options.weights) as ani:
        found = physics(molecules, ani)
    hours = (time.monotonic() - started) / 3600
    energies = found.energy_per_atom.numpy()
    path = ASSETS / "ani-2x-energies.npz"
    np.savez_compressed(path, formation_energy_per_atom=energies)
    typical = bootstrap(lambda i: median(energies[i]), len(energies), seed=0, n_boot=1000)
    write_passport(
        path,
        kind="reference energies",
        description="ANI-2x formation energies of the test molecules, for the epsilon of theorem 2 (notebook 13)",
        molecules=len(test),
        not_evaluated=found.failures,
        unit="eV/atom, NaN where ANI-2x gave no answer",
        method="ANI-2x (Devereux et al., J. Chem. Theory Comput. 16, 4192, 2020), mean of its 8 networks, by torchani",
        geometries="test split of the bundled set, MMFF94",
        command="python scripts/make_ani_energies.py --weights FOLDER",
        figures={"n": len(energies), "energy_per_atom_median": typical.to_dict()},
        data={name: test.passport[name] for name in ("file", "sha256")},
        seed=None,
        seed_note="nothing is random",
        hours=round(hours, 3),
        machine=machine(torch.get_num_threads()),
        **provenance(("torch", "torchani")),
    )


if __name__ == "__main__":
    main()
