"""The cache on disk: the same numbers, never another oracle's, with several processes and after a kill."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles import CachedOracle, load_oracle
from elign_lab.oracles._evaluation import Evaluation
from elign_lab.oracles.protocol import Oracle
from elign_lab.testing import SpringOracle

WATER = ([8, 1, 1], [[0.0, 0.0, 0.119], [0.0, 0.763, -0.477], [0.0, -0.763, -0.477]])
HYDROGEN = ([1, 1], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.74]])
SPRINGS = {"rest": 1.5}


def batch_of(*molecules) -> MoleculeBatch:
    return MoleculeBatch.from_arrays(molecules, check=False).to(dtype=torch.float64)


def many(n: int, seed: int = 0) -> MoleculeBatch:
    """n different water molecules."""
    noise = 0.05 * np.random.default_rng(seed).normal(size=(n, 3, 3))
    return batch_of(*[(WATER[0], np.array(WATER[1]) + e) for e in noise])


class Counting(SpringOracle):
    """Springs that count what they are asked."""

    def __init__(self, **options):
        super().__init__(**options)
        self.asked = 0

    def _compute(self, molecules):
        self.asked += len(molecules)
        return super()._compute(molecules)


# ---------------------------------------------------------------------- the same numbers
def test_answers_come_back_bit_by_bit_and_are_asked_once(tmp_path):
    batch, oracle = many(70), Counting()
    expected = SpringOracle()(batch)
    cached = CachedOracle(oracle, tmp_path / "cache.sqlite", identity=SPRINGS)
    for turn in range(2):
        result = cached(batch)
        assert torch.equal(result.energy, expected.energy)
        assert torch.equal(result.forces, expected.forces)
        assert (cached.hits, cached.misses) == (70 * turn, 70)
    # another process, or another day
    later = CachedOracle(Counting(), tmp_path / "cache.sqlite", identity=SPRINGS)
    assert torch.equal(later(batch).forces, expected.forces)
    assert (later.hits, later.misses, later.oracle.asked, oracle.asked) == (70, 0, 0, 70)
    assert len(later) == 70
    assert "70 hits, 0 misses" in repr(later)


def test_repeated_molecules_of_a_batch_are_computed_once(tmp_path):
    cached = CachedOracle(Counting(), tmp_path / "c.sqlite", identity=SPRINGS)
    result = cached(batch_of(WATER, HYDROGEN, WATER, WATER))
    assert cached.oracle.asked == 2
    assert (cached.hits, cached.misses, cached.molecules) == (2, 2, 4)
    assert result.energy[0] == result.energy[2] == result.energy[3]
    cached.reset_counters()
    assert (cached.hits, cached.misses, cached.molecules) == (0, 0, 0)


def test_xtb_through_load_oracle(tmp_path):
    batch = batch_of(WATER, HYDROGEN)
    with load_oracle("xtb", workers=0) as plain, load_oracle("xtb", workers=0, cache=tmp_path / "c.sqlite") as cached:
        first, second, expected = cached(batch), cached(batch), plain(batch)
        assert torch.equal(first.energy, expected.energy)
        assert torch.equal(second.forces, expected.forces)
        assert (cached.hits, cached.misses) == (2, 2)
        assert cached.name == "xtb"
        formation = cached.formation_energy_per_atom(second.energy, batch.numbers, batch.mask)
        assert torch.equal(formation, plain.formation_energy_per_atom(expected.energy, batch.numbers, batch.mask))


def test_uncertainties_are_kept(tmp_path):
    class Unsure(SpringOracle):
        has_uncertainty = True

        def _compute(self, molecules):
            return [a._replace(uncertainty=0.25) for a in super()._compute(molecules)]

    cached = CachedOracle(Unsure(), tmp_path / "c.sqlite", identity=SPRINGS)
    assert [cached(batch_of(WATER)).uncertainty.item() for _ in range(2)] == [0.25, 0.25]


# ---------------------------------------------------------------------- never another's answer
def test_another_setting_or_molecule_has_another_key(tmp_path):
    path = tmp_path / "c.sqlite"
    a = CachedOracle(Counting(rest=1.5), path, identity={"rest": 1.5})
    b = CachedOracle(Counting(rest=1.0), path, identity={"rest": 1.0})
    assert a(batch_of(WATER)).energy != b(batch_of(WATER)).energy
    assert (a.misses, b.misses) == (1, 1)
    moved = (WATER[0], np.nextafter(np.array(WATER[1]), 1.0))
    exchanged = ([1, 8, 1], WATER[1])
    a(batch_of(moved, exchanged, (WATER[0], -0.0 * np.array(WATER[1]) + WATER[1])))
    assert (a.misses, a.hits) == (3, 1)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("xtb", {"workers": 0}, {"workers": 0, "method": "GFN1-xTB"}),
        ("xtb", {"workers": 0}, {"workers": 0, "accuracy": 0.1}),
        ("xtb", {"workers": 0}, {"workers": 0, "max_iterations": 100}),
        ("dft", {"basis": "sto-3g"}, {"basis": "sto-3g", "xc": "pbe"}),
        ("dft", {"basis": "sto-3g"}, {"basis": "6-31g"}),
        ("dft", {"basis": "sto-3g"}, {"basis": "sto-3g", "grid_level": 1}),
        ("learned", {}, {"dtype": torch.float64}),
    ],
)
def test_what_defines_the_numbers_is_in_the_key(name, one, other):
    a, again, b = (load_oracle(name, **options) for options in (one, one, other))
    assert a.identity() == again.identity() != b.identity()


def test_weights_are_in_the_key_and_the_number_of_workers_is_not():
    a, b = load_oracle("learned"), load_oracle("learned")
    with torch.no_grad():
        next(iter(b.model.parameters())).add_(1e-3)
    assert a.identity()["weights"] != b.identity()["weights"]
    assert load_oracle("xtb", workers=1).identity() == load_oracle("xtb", workers=2, chunk_size=7).identity()


def test_an_unknown_oracle_needs_an_identity(tmp_path):
    with pytest.raises(ValueError, match="numbers of a SpringOracle is not known: pass identity= to CachedOracle"):
        CachedOracle(SpringOracle(), tmp_path / "c.sqlite")


# ---------------------------------------------------------------------- failures
def test_failures_are_tried_again_and_refusals_do_not_reach_the_cache(tmp_path):
    class Flaky(Oracle):
        name, elements, turns = "flaky", frozenset({1, 8}), 0

        def _compute(self, molecules):
            self.turns += 1
            if self.turns == 1:
                return [Evaluation.failure("timeout: more than 1 s") for _ in molecules]
            if self.turns == 2:
                return [Evaluation(float("nan"), np.zeros((len(z), 3))) for z, _ in molecules]
            return [Evaluation(1.0, np.zeros((len(z), 3))) for z, _ in molecules]

    cached = CachedOracle(Flaky(), tmp_path / "c.sqlite", identity={})
    statuses = [cached(batch_of(WATER)).status[0] for _ in range(4)]
    assert statuses == ["timeout: more than 1 s", "the backend gave a non-finite energy or force", "ok", "ok"]
    assert (cached.hits, cached.misses, len(cached), cached.failures) == (1, 3, 1, 2)
    bad = ([8, 1], [[0.0, 0.0, 0.0], [0.0, float("nan"), 0.9]])
    assert "non-finite position" in cached(batch_of(bad, ([6], [[0.0] * 3]))).status[0]
    assert len(cached) == 1


def test_files_that_are_no_cache_are_refused(tmp_path):
    (tmp_path / "text").write_text("not a database, and long enough to be looked at " * 20)
    with sqlite3.connect(tmp_path / "other.sqlite") as other:
        other.execute("CREATE TABLE answers (key BLOB)")
    no_cache = "cannot be used as a cache"
    for name, message in (("text", no_cache), ("text/c", no_cache), ("other.sqlite", "database of another program")):
        with pytest.raises(ValueError, match=message):
            CachedOracle(SpringOracle(), tmp_path / name, identity=SPRINGS)
    with pytest.raises(ValueError, match="write_every must be at least 1"):
        CachedOracle(SpringOracle(), tmp_path / "c", identity=SPRINGS, write_every=0)
    assert (tmp_path / "text").read_text().startswith("not a database")


# ---------------------------------------------------------------------- several processes, threads, kills
WORKER = """
import sys, time
import numpy as np
sys.path.insert(0, {folder!r})
from test_oracles_cache import SPRINGS, many, CachedOracle, SpringOracle
class Slow(SpringOracle):
    def _compute(self, molecules):
        time.sleep({pause} * len(molecules))
        return super()._compute(molecules)
cached = CachedOracle(Slow(), {path!r}, identity=SPRINGS, write_every={every})
print("ready", flush=True)
result = cached(many({n}))
print(cached.hits, cached.misses, float(result.energy.sum()), flush=True)
"""


def start(path, *, n: int, every: int = 32, pause: float = 0.0) -> subprocess.Popen:
    code = WORKER.format(folder=os.path.dirname(__file__), path=str(path), n=n, every=every, pause=pause)  # noqa: PTH120
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_make_and_share_one_file(tmp_path):
    path, n = tmp_path / "c.sqlite", 60
    processes = [start(path, n=n, every=1) for _ in range(2)]
    outputs = [p.communicate(timeout=120)[0].split() for p in processes]
    assert all(p.returncode == 0 for p in processes)
    expected = SpringOracle()(many(n)).energy.sum().item()
    for _, hits, misses, total in outputs:
        assert int(hits) + int(misses) == n
        assert float(total) == pytest.approx(expected, abs=1e-9)
    cached = CachedOracle(Counting(), path, identity=SPRINGS)
    cached(many(n))
    assert (cached.hits, len(cached)) == (n, n)


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_kill_leaves_the_file_whole_with_what_was_written(tmp_path):
    path, n = tmp_path / "c.sqlite", 200
    process = start(path, n=n, every=5, pause=0.005)
    assert process.stdout.readline() == "ready\n"
    cached = CachedOracle(Counting(), path, identity=SPRINGS)
    until = time.monotonic() + 60
    while len(cached) < 20 and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    kept = len(cached)
    assert 20 <= kept < n
    assert kept % 5 == 0
    result = cached(many(n))
    assert (cached.hits, cached.misses, cached.oracle.asked) == (kept, n - kept, n - kept)
    assert torch.equal(result.forces, SpringOracle()(many(n)).forces)
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_threads_share_an_oracle(tmp_path):
    cached = CachedOracle(SpringOracle(), tmp_path / "c.sqlite", identity=SPRINGS, write_every=4)
    with ThreadPoolExecutor(4) as executor:
        results = list(executor.map(lambda i: cached(many(20, seed=i % 2)), range(8)))
    assert all(r.ok.all() for r in results)
    assert len(cached) == 40
