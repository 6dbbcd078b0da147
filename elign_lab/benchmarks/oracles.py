"""`elign-lab bench oracles`: time of energy and forces against the number of atoms, as in the paper's Figure 3.

Molecules are straight alkanes, C_n H_(2n+2), with Gaussian noise of 0.02 Angstrom: a series of any length that needs no
search for a geometry, and an easy one (compact molecules have more neighbours, and DFT screens fewer integrals). Every
oracle works with one thread, and all of them take their turn at a size before the next size comes, so that other work
on the machine slows them alike. The best of some repetitions is what counts; CPU time, of worker processes too, is
given besides. An oracle that takes a quarter of the time limit at a size is not asked about larger ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from tqdm.auto import tqdm

from elign_lab.benchmarks.denoiser import machine
from elign_lab.denoiser.threads import one_thread
from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles import Oracle, load_oracle
from elign_lab.oracles._evaluation import Molecule

if TYPE_CHECKING:
    from elign_lab.teaching import Figure

CARBONS = (3, 5, 8, 12, 17, 25, 37, 59)  # 11 to 179 atoms
NOISE = 0.02  # Angstrom
BATCH_ATOMS = 1000  # of the batches, about
ASYMPTOTIC = 30  # atoms from which on the exponent is fitted: below, fixed costs count
DFT_SECONDS = 120.0
PAPER = "Elign, Figure 3"
LABELS = {
    "dft": "DFT, B3LYP/6-31G(d)",
    "xtb": "GFN2-xTB",
    "ani": "ANI-2x",
    "uma": "eSCN-MD (escn-mini)",
    "learned": "learned (oracle-mini)",
}


def oracle_makers(
    ani_weights: str | Path | None = None, dft_seconds: float = DFT_SECONDS
) -> dict[str, Callable[[], Oracle]]:
    """What is compared, by name: functions that make each oracle, with one thread and worker at most."""
    return {
        "dft": lambda: load_oracle("dft", workers=1, timeout=dft_seconds, max_atoms=None),
        "xtb": lambda: load_oracle("xtb", workers=1, chunk_size=1),
        "ani": lambda: load_oracle("ani", **({} if ani_weights is None else {"weights": ani_weights})),
        "uma": lambda: load_oracle("uma", model="escn-mini"),
        "learned": lambda: load_oracle("learned"),
    }


def bench_oracles(
    makers: Mapping[str, Callable[[], Oracle]] | None = None,
    *,
    carbons: Sequence[int] | None = None,
    repeats: int = 3,
    limit: float = DFT_SECONDS,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Time per molecule of each oracle at each size, in seconds; alone, and in a batch of about BATCH_ATOMS atoms.

    makers: as from `oracle_makers`. carbons: of the alkanes, CARBONS unless given. limit: seconds for a molecule; an
    oracle that takes a quarter of them is not asked about larger ones. One that cannot be made is listed with its
    reason.
    """
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    with ExitStack() as stack, one_thread():
        oracles: dict[str, Oracle] = {}
        for name, make in (makers or oracle_makers()).items():
            try:
                oracles[name] = stack.enter_context(make())
            except ValueError as error:
                missing[name] = str(error)
        # what is loaded or compiled at the first call is not part of any time
        for oracle in oracles.values():
            oracle(_chains(1, 1, seed))
        active = set(oracles)
        for k in tqdm(CARBONS if carbons is None else carbons, desc="sizes", disable=not progress):
            chain = _chains(k, 1, seed)
            count = max(2, BATCH_ATOMS // int(chain.sizes[0]))
            batch = _chains(k, count, seed)
            for name, oracle in oracles.items():
                if name not in active:
                    continue
                row = _measure(oracle, chain, batch, repeats, limit)
                rows.append({"oracle": name, "atoms": int(chain.sizes[0]), **row})
                if row["status"] != "ok" or row["seconds"] > limit / 4:
                    active.discard(name)  # the next size would be over the limit
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "molecules": f"straight alkanes, {NOISE} Angstrom of noise, seed {seed}",
        "repeats": repeats,
        "limit_seconds": limit,
        "rows": rows,
        "exponents": {name: scaling_exponent(rows, name) for name in oracles},
        "missing": missing,
    }


def scaling_exponent(rows: Sequence[Mapping[str, Any]], name: str, key: str = "seconds") -> float | None:
    """Slope of log time over log atoms by least squares, from ASYMPTOTIC atoms on; None for fewer than three sizes."""
    chosen = [r for r in rows if r["oracle"] == name and r["status"] == "ok" and r["atoms"] >= ASYMPTOTIC]
    points = [(r["atoms"], r[key]) for r in chosen if r[key] is not None]
    if len(points) < 3:
        return None
    atoms, values = np.log(np.array(points)).T
    return float(np.polyfit(atoms, values, 1)[0])


def oracles_text(result: Mapping[str, Any]) -> str:
    """The result as a table for a terminal: milliseconds per molecule, alone / in a batch."""
    rows = result["rows"]
    names = list(dict.fromkeys(row["oracle"] for row in rows))
    lines = ["milliseconds per molecule with energy and forces, one thread: alone / in a batch", ""]
    lines.append("atoms" + "".join(f"{name:>22s}" for name in names))
    for atoms in sorted({row["atoms"] for row in rows}):
        cells = {row["oracle"]: _cell(row) for row in rows if row["atoms"] == atoms}
        lines.append(f"{atoms:5d}" + "".join(f"{cells.get(name, '-'):>22s}" for name in names))
    exponents = {name: result["exponents"][name] for name in names}
    shown = {name: "-" if e is None else f"{e:.2f}" for name, e in exponents.items()}
    lines.append("power" + "".join(f"{shown[name]:>22s}" for name in names))
    m = result["machine"]
    lines += ["", f"{m['processor']}, load {m['load']}, torch {m['torch']}; power: of the atoms, from {ASYMPTOTIC} on"]
    lines += [f"{name}: not measured, {reason}" for name, reason in result["missing"].items()]
    return "\n".join(lines)


def oracles_figure(result: Mapping[str, Any]) -> Figure:
    """Seconds per molecule against atoms, both logarithmic, a line per oracle; the legend has the scaling exponents."""
    from elign_lab.teaching import Figure  # plotly is loaded where a figure is made

    names = list(dict.fromkeys(row["oracle"] for row in result["rows"]))
    figure = Figure(
        x="atoms",
        y="time (s)",
        title=f"Energy and forces of one molecule, one core (compare {PAPER})",
        alt=f"Seconds for energy and forces of one molecule against its atoms, logarithmic axes: {', '.join(names)}.",
        height=450,
    )
    for name in names:
        rows = [r for r in result["rows"] if r["oracle"] == name and r["status"] == "ok"]
        exponent = result["exponents"].get(name)
        power = "" if exponent is None else f", N^{exponent:.1f}"
        figure.add_scatter(
            x=[r["atoms"] for r in rows],
            y=[r["seconds"] for r in rows],
            mode="lines+markers",
            name=f"{LABELS.get(name, name)}{power}",
            hovertemplate="%{x} atoms: %{y:.3g} s<extra>" + LABELS.get(name, name) + "</extra>",
        )
    figure.update_xaxes(type="log").update_yaxes(type="log")
    return figure.legend_right()


def _measure(oracle: Oracle, chain: MoleculeBatch, batch: MoleculeBatch, repeats: int, limit: float) -> dict[str, Any]:
    """Seconds and CPU seconds of one molecule alone, and per molecule of a batch if that is affordable; best times."""
    best, best_cpu, started = math.inf, math.inf, time.perf_counter()
    for _ in range(repeats):
        seconds, cpu, status = _timed(oracle, chain)
        if status != "ok":
            return {"seconds": None, "cpu_seconds": None, "batch_seconds": None, "status": status}
        best, best_cpu = min(best, seconds), min(best_cpu, cpu)
        if time.perf_counter() - started > limit / 4:
            break
    in_batch = None
    if best * len(batch) < limit / 4:
        in_batch = min(_timed(oracle, batch)[0] for _ in range(repeats)) / len(batch)
    return {"seconds": best, "cpu_seconds": best_cpu, "batch_seconds": in_batch, "status": "ok"}


def _timed(oracle: Oracle, batch: MoleculeBatch) -> tuple[float, float, str]:
    """Seconds, CPU seconds and status of one call."""
    cpu, start = _cpu_seconds(), time.perf_counter()
    result = oracle(batch)
    seconds = time.perf_counter() - start
    return seconds, _cpu_seconds() - cpu, next((s for s in result.status if s != "ok"), "ok")


def _cpu_seconds() -> float:
    """CPU time of this process, to the nanosecond, and of its workers, to the 10 ms in which the system counts them."""
    workers = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(t.user + t.system for t in workers)


def alkane(carbons: int) -> Molecule:
    """A straight alkane, C-C 1.53 and C-H 1.09 Angstrom, of 3 carbons + 2 atoms."""
    up = (-1.0) ** np.arange(carbons)[:, None]
    x = np.arange(carbons)[:, None] * [1.27, 0.0, 0.0] + up * [0.0, 0.0, 0.425]
    sides = [x + side * np.array([0.0, 0.89, 0.0]) + up * [0.0, 0.0, 0.63] for side in (1, -1)]
    ends = np.stack([x[0] + [-0.90, 0.0, -0.61], x[-1] + [0.90, 0.0, -0.61 * up[-1, 0]]])
    numbers = np.array([6] * carbons + [1] * (2 * carbons + 2))
    return numbers, np.concatenate([x, *sides, ends])


def _chains(carbons: int, count: int, seed: int) -> MoleculeBatch:
    """`count` noisy copies of an alkane."""
    numbers, positions = alkane(carbons)
    rng = np.random.default_rng([seed, carbons])
    return MoleculeBatch.from_arrays(
        [(numbers, positions + NOISE * rng.normal(size=positions.shape)) for _ in range(count)]
    )


def _cell(row: Mapping[str, Any]) -> str:
    if row["status"] != "ok":
        return "over the limit" if "timeout" in row["status"] else "failed"
    batch = row["batch_seconds"]
    return f"{1e3 * row['seconds']:.1f} / " + ("-" if batch is None else f"{1e3 * batch:.1f}")
