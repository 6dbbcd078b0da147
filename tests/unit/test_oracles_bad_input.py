"""Bad input and bad luck, for every oracle: TABLE says what is expected in each cell, and each cell is tested.

A molecule that cannot be evaluated is a status, and its neighbours in the batch have the numbers that they have alone.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.calculators.emt import EMT

from elign_lab.benchmarks.oracles import alkane
from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles import ORACLES, Oracle, OracleResult, f_rms, load_oracle
from elign_lab.oracles.escn import EscnCheckpoint, EscnConfig, build_escn
from elign_lab.testing import assert_failed

ANI_WEIGHTS = Path(__file__).parents[2].parent / "shared" / "data" / "ani-2x" / "ani-2x_8x"
needs_ani = pytest.mark.skipif(not ANI_WEIGHTS.is_dir(), reason="the ANI-2x weights are not part of the repository")
needs_fairchem = pytest.mark.skipif(
    importlib.util.find_spec("fairchem") is None, reason="fairchem-core is not installed (extra uma)"
)

WATER = ([8, 1, 1], [[0.0, 0.0, 0.119], [0.0, 0.763, -0.477], [0.0, -0.763, -0.477]])
HYDROGEN = ([1, 1], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.74]])
METHYL = ([6, 1, 1, 1], [[0.0, 0.0, 0.0], [1.079, 0.0, 0.0], [-0.5395, 0.934441, 0.0], [-0.5395, -0.934441, 0.0]])
COPERNICIUM_HYDRIDE = ([112, 1], [[0.0, 0.0, 0.0], [0.0, 0.0, 1.6]])

# the smallest basis and grid: what is tested here is the handling, not the chemistry
SMALL_DFT = {"xc": "svwn", "basis": "sto-3g", "grid_level": 0}


def _uma_with_random_weights(folder: Path, **options) -> Oracle:
    """UMA's network, a mixture of experts, through the same code; UMA's own weights are gated."""
    references = {1: -13.6, 6: -1030.0, 7: -1485.0, 8: -2040.0}
    config = EscnConfig(layers=1, lmax=1, channels=8, basis=8, experts=3)
    weights = build_escn(config, seed=3).state_dict()
    path = EscnCheckpoint(config, weights, 5.0, references, references).save(folder / "uma.safetensors")
    return load_oracle("uma", model=path, **options)


MAKERS: dict[str, Callable[..., Oracle]] = {
    "xtb": lambda _, **options: load_oracle("xtb", **{"workers": 2, **options}),
    "dft": lambda _, **options: load_oracle("dft", **{"workers": 1, **SMALL_DFT, **options}),
    "cached": lambda folder, **options: load_oracle(
        "xtb", cache=folder / "answers.sqlite", **{"workers": 2, **options}
    ),
    "ase": lambda _, **options: load_oracle("ase", **{"calculator": EMT(), **options}),
    "learned": lambda _, **options: load_oracle("learned", **options),
    "ani": lambda _, **options: load_oracle("ani", weights=ANI_WEIGHTS, **options),
    "escn-mini": lambda _, **options: load_oracle("uma", model="escn-mini", **options),
    "uma": _uma_with_random_weights,
}
MARKS = {"ani": needs_ani, "escn-mini": needs_fairchem, "uma": needs_fairchem}
WORKERS = ("xtb", "dft", "cached")
NETWORKS = ("learned", "ani", "escn-mini", "uma")


# ---------------------------------------------------------------------- the table
@dataclass(frozen=True)
class Cell:
    """What is expected: "numbers", a "status" or an "error", with words of its text; why, where it is not plain."""

    outcome: str
    text: str = ""
    why: str = ""


NUMBERS = Cell("numbers")


def status(text: str, why: str = "") -> Cell:
    return Cell("status", text, why)


def error(text: str, why: str = "") -> Cell:
    return Cell("error", text, why)


def row(every: Cell, *exceptions: tuple[tuple[str, ...], Cell]) -> dict[str, Cell]:
    """One cell for every oracle, with the exceptions for some."""
    return {name: next((cell for names, cell in exceptions if name in names), every) for name in MAKERS}


NO_WORKER = error(
    "computes in the calling process, without workers or a time limit",
    "a network evaluates whole batches in this process: no worker can die, and nothing can be stopped half-way",
)
TABLE: dict[str, dict[str, Cell]] = {
    "NaN position": row(status("non-finite position of atom 1")),
    "infinite position": row(status("non-finite position of atom 0")),
    "coincident atoms": row(status("atoms 1 and 2 are 0.000 Angstrom apart")),
    "unknown element": row(status("unsupported element number 0")),
    "element without parameters": row(
        status("unsupported element Cn"),
        (("ase",), status("CalculatorError: NotImplementedError", "without elements= the calculator decides itself")),
    ),
    "100 Angstrom apart": row(NUMBERS),
    "flung apart": row(
        status("900 Angstrom wide, over the limit of 500", "tblite does not return for such structures")
    ),
    "single atom": row(NUMBERS),
    "odd number of electrons": row(NUMBERS),
    "200 atoms": row(NUMBERS, (("dft",), status("200 atoms, over the limit of 60", "it would take hours"))),
    "no molecules": row(NUMBERS),
    "molecule without atoms": row(status("no atoms")),
    "mixed sizes": row(NUMBERS),
    "float64": row(NUMBERS),
    "bfloat16": row(NUMBERS),
    "non-contiguous": row(NUMBERS),
    "not a batch": row(error("expected a MoleculeBatch, got list")),
    "worker dies": row(
        status("worker process died (BrokenProcessPool)"),
        (("ase",), status("CalculatorError: CalledProcessError", "the program that a calculator runs is its worker")),
        (NETWORKS, NO_WORKER),
    ),
    "timeout": row(
        status("timeout: more than 0.05 s"),
        (("ase",), status("CalculatorError: TimeoutExpired", "the time limit is the calculator's own")),
        (NETWORKS, NO_WORKER),
    ),
}


# ---------------------------------------------------------------------- tools
class Workbench:
    """Makes oracles of the table, and closes them; the plain one of each name is made once."""

    def __init__(self, folder: Callable[[str], Path], stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._plain: dict[str, Oracle] = {}

    def plain(self, name: str) -> Oracle:
        if name not in self._plain:
            self._plain[name] = self.special(name)
        return self._plain[name]

    def special(self, name: str, **options) -> Oracle:
        return self._stack.enter_context(MAKERS[name](self._folder(name), **options))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with ExitStack() as stack:
        yield Workbench(tmp_path_factory.mktemp, stack)


def batch_of(*molecules) -> MoleculeBatch:
    return MoleculeBatch.from_arrays(molecules, check=False)


def assert_only_the_middle_fails(oracle: Oracle, molecule, cell: Cell, alone: OracleResult) -> None:
    """Of water, the molecule, water; `alone` is the result of one water."""
    result = oracle(batch_of(WATER, molecule, WATER))
    assert cell.outcome == "status"
    assert_failed(result, 1, len(molecule[0]), cell.text)
    assert result.ok.tolist() == [True, False, True], result.status
    torch.testing.assert_close(result.energy[[0, 2]], alone.energy.expand(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(result.forces[[0, 2], :3], alone.forces.expand(2, -1, -1), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------- the checks, one for each row
def refused_molecule(molecule) -> Callable[[Workbench, str, Cell], None]:
    def check(bench: Workbench, name: str, cell: Cell) -> None:
        oracle = bench.plain(name)
        assert_only_the_middle_fails(oracle, molecule, cell, oracle(batch_of(WATER)))

    return check


def check_far_apart(bench: Workbench, name: str, cell: Cell) -> None:
    z, x = WATER
    result = bench.plain(name)(batch_of(WATER, (z + z, np.concatenate([x, np.add(x, [100.0, 0.0, 0.0])]))))
    assert result.ok.all(), result.status
    assert result.energy[1].item() == pytest.approx(2 * result.energy[0].item(), abs=2e-3)
    torch.testing.assert_close(result.forces[1, 3:6], result.forces[0, :3], atol=1e-3, rtol=0)


def check_single_atom(bench: Workbench, name: str, cell: Cell) -> None:
    result = bench.plain(name)(batch_of(([1], [[0.3, 0.2, 0.1]])))
    assert result.ok.all(), result.status
    assert torch.isfinite(result.energy).all()
    torch.testing.assert_close(result.forces, torch.zeros(1, 1, 3, dtype=result.forces.dtype), atol=1e-6, rtol=0)


def check_odd_electrons(bench: Workbench, name: str, cell: Cell) -> None:
    result = bench.plain(name)(batch_of(METHYL))
    assert result.ok.all(), result.status
    assert torch.isfinite(result.energy).all()
    # C3 symmetry of the planar radical: the force on carbon vanishes, up to DFT's coarse integration grid
    tolerance = 0.05 if name == "dft" else 5e-3
    torch.testing.assert_close(result.forces[0, 0], torch.zeros(3, dtype=result.forces.dtype), atol=tolerance, rtol=0)


def check_200_atoms(bench: Workbench, name: str, cell: Cell) -> None:
    oracle = bench.plain(name)
    if cell.outcome == "status":
        assert_only_the_middle_fails(oracle, alkane(66), cell, oracle(batch_of(WATER)))
        return
    result = oracle(batch_of(alkane(66), WATER))
    assert result.ok.all(), result.status
    # a structure near its minimum; random weights know no minimum
    assert f_rms(result.forces[:1], torch.ones(1, 200).bool()) < (float("inf") if name == "uma" else 5.0)


def check_no_molecules(bench: Workbench, name: str, cell: Cell) -> None:
    oracle = bench.plain(name)
    calls = oracle.calls
    result = oracle(MoleculeBatch(torch.zeros(0, 5, dtype=torch.long), torch.zeros(0, 5, 3), torch.zeros(0, 5).bool()))
    assert (result.energy.shape, result.forces.shape, result.ok.shape) == ((0,), (0, 5, 3), (0,))
    assert result.status == ()
    assert oracle.calls == calls + 1


def check_mixed_sizes(bench: Workbench, name: str, cell: Cell) -> None:
    oracle, batch = bench.plain(name), batch_of(WATER, HYDROGEN, METHYL, WATER)
    together = oracle(batch)
    assert together.ok.all(), together.status
    for i in range(len(batch)):
        single, n = oracle(batch[i]), int(batch.sizes[i])
        assert single.energy.item() == pytest.approx(together.energy[i].item(), abs=1e-5)
        torch.testing.assert_close(single.forces[0, :n], together.forces[i, :n], atol=1e-5, rtol=0)
        assert (together.forces[i, n:] == 0).all()


def result_dtype(given: torch.dtype, expected: torch.dtype) -> Callable[[Workbench, str, Cell], None]:
    def check(bench: Workbench, name: str, cell: Cell) -> None:
        # sixteenths: the same positions in every dtype
        oracle, batch = bench.plain(name), batch_of(([8, 1], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.9375]]), HYDROGEN)
        rounded = batch.to(dtype=given)
        single, result = oracle(rounded.to(dtype=torch.float32)), oracle(rounded)
        assert (single.energy.dtype, single.forces.dtype) == (torch.float32, torch.float32)
        assert (result.energy.dtype, result.forces.dtype) == (expected, expected)
        assert result.ok.all(), result.status
        torch.testing.assert_close(result.energy.float(), single.energy, atol=1e-3, rtol=0)
        torch.testing.assert_close(result.forces.float(), single.forces, atol=1e-3, rtol=0)

    return check


def check_non_contiguous(bench: Workbench, name: str, cell: Cell) -> None:
    oracle, batch = bench.plain(name), batch_of(WATER, HYDROGEN)
    strided = MoleculeBatch(
        batch.numbers.t().contiguous().t(),
        batch.positions.permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_(),
        batch.mask.t().contiguous().t(),
    )
    assert not strided.numbers.is_contiguous()
    expected, result = oracle(batch), oracle(strided)
    assert result.ok.all(), result.status
    assert not result.energy.requires_grad
    torch.testing.assert_close(result.energy, expected.energy, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.forces, expected.forces, atol=1e-5, rtol=0)


def check_not_a_batch(bench: Workbench, name: str, cell: Cell) -> None:
    with pytest.raises(TypeError, match=cell.text):
        bench.plain(name)([WATER])


# ---------------------------------------------------------------------- workers
class Stage(Executor):
    """Computes at once in this process, but for radicals of four atoms: their worker dies, or never answers."""

    def __init__(self, lost: Callable[[], Future]) -> None:
        self.lost = lost

    def submit(self, function, molecules):
        if any(len(numbers) == 4 for numbers, _ in molecules):
            return self.lost()
        task: Future = Future()
        task.set_result(function(molecules))
        return task


def dead_worker() -> Future:
    task: Future = Future()
    task.set_exception(BrokenProcessPool("a process of the pool was terminated"))
    return task


class Program(EMT):
    """A calculator that asks another program about molecules of four atoms."""

    def __init__(self, code: str, seconds: float | None = None) -> None:
        super().__init__()
        self.code, self.seconds = code, seconds

    def calculate(self, atoms=None, *arguments, **options):
        if len(atoms) == 4:
            subprocess.run([sys.executable, "-c", self.code], check=True, timeout=self.seconds)
        super().calculate(atoms, *arguments, **options)


def refused_options(bench: Workbench, name: str, cell: Cell, **options) -> None:
    assert cell.outcome == "error"
    with pytest.raises(ValueError, match=f"unexpected keyword argument '{next(iter(options))}'.*{cell.text}"):
        bench.special(name, **options)


def assert_kept(oracle: Oracle, answers: int) -> None:
    """A cache keeps the answers, and not the failure, which may be one of the moment."""
    if hasattr(oracle, "path"):
        assert len(oracle) == answers


def check_worker_dies(bench: Workbench, name: str, cell: Cell) -> None:
    if cell is NO_WORKER:
        refused_options(bench, name, cell, executor=Stage(dead_worker))
        refused_options(bench, name, cell, workers=2)
        return
    alone = bench.plain(name)(batch_of(WATER))
    if name == "ase":
        oracle = bench.special(name, calculator=Program("import os; os._exit(3)"))
        assert_only_the_middle_fails(oracle, METHYL, cell, alone)
        return
    oracle = bench.special(name, executor=Stage(dead_worker))
    assert_only_the_middle_fails(oracle, METHYL, cell, alone)
    assert_kept(oracle, 1)
    # the own workers, killed between two calls: they are replaced, and nothing is lost
    oracle = bench.special(name)
    assert oracle(batch_of(WATER)).ok.all()
    pool = getattr(oracle, "oracle", oracle)._pool
    killed = list(pool._own._processes)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    result = oracle(batch_of(HYDROGEN, METHYL, WATER))
    assert result.ok.all(), result.status
    assert not set(killed) & set(pool._own._processes)
    torch.testing.assert_close(result.energy[2:], alone.energy, atol=1e-5, rtol=0)


def check_timeout(bench: Workbench, name: str, cell: Cell) -> None:
    if cell is NO_WORKER:
        refused_options(bench, name, cell, timeout=0.05)
        return
    alone = bench.plain(name)(batch_of(WATER))
    if name == "ase":
        oracle = bench.special(name, calculator=Program("import time; time.sleep(600)", seconds=0.05))
        assert_only_the_middle_fails(oracle, METHYL, cell, alone)
        return
    oracle = bench.special(name, executor=Stage(Future), timeout=0.05)
    assert_only_the_middle_fails(oracle, METHYL, cell, alone)
    assert_kept(oracle, 1)
    # an own worker that takes too long is stopped; 200 atoms are over this limit on any machine
    limits = {"max_atoms": None} if name == "dft" else {}
    assert_failed(bench.special(name, timeout=0.05, **limits)(batch_of(alkane(66))), 0, 200, cell.text)


CHECKS: dict[str, Callable[[Workbench, str, Cell], None]] = {
    "NaN position": refused_molecule(([8, 1], [[0.0, 0.0, 0.0], [0.0, float("nan"), 0.96]])),
    "infinite position": refused_molecule(([8, 1], [[0.0, 0.0, float("inf")], [0.0, 0.0, 0.96]])),
    "coincident atoms": refused_molecule(([8, 1, 1], [[0.0, 0.0, 0.0], [0.0, 0.9, 0.0], [0.0, 0.9, 0.0]])),
    "unknown element": refused_molecule(([8, 0], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.96]])),
    "element without parameters": refused_molecule(COPERNICIUM_HYDRIDE),
    "100 Angstrom apart": check_far_apart,
    "flung apart": refused_molecule(([1, 6, 1], [[0.0, 0.0, 0.0], [900.0, 0.0, 0.0], [0.0, 800.0, 0.0]])),
    "single atom": check_single_atom,
    "odd number of electrons": check_odd_electrons,
    "200 atoms": check_200_atoms,
    "no molecules": check_no_molecules,
    "molecule without atoms": refused_molecule(([], np.zeros((0, 3)))),
    "mixed sizes": check_mixed_sizes,
    "float64": result_dtype(torch.float64, torch.float64),
    "bfloat16": result_dtype(torch.bfloat16, torch.float32),
    "non-contiguous": check_non_contiguous,
    "not a batch": check_not_a_batch,
    "worker dies": check_worker_dies,
    "timeout": check_timeout,
}


@pytest.mark.parametrize("case", TABLE)
@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in MAKERS])
def test_cell(bench, name, case):
    CHECKS[case](bench, name, TABLE[case][name])


def test_every_oracle_and_every_case_is_in_the_table():
    assert set(ORACLES) <= set(MAKERS)
    assert CHECKS.keys() == TABLE.keys()
    for case, cells in TABLE.items():
        assert cells.keys() == MAKERS.keys(), case
        assert all(cell.text for cell in cells.values() if cell.outcome != "numbers"), case


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in MAKERS])
def test_counters(bench, name):
    oracle = bench.plain(name)
    oracle.reset_counters()
    oracle(batch_of(WATER, COPERNICIUM_HYDRIDE))
    oracle(batch_of(WATER))
    assert (oracle.calls, oracle.molecules, oracle.failures) == (2, 3, 1)
    assert oracle.seconds > 0
