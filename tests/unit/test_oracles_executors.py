"""CPU-bound oracles in executors of the user: the same numbers, and a worker that is killed costs nothing."""

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import loky
import numpy as np
import pytest
import torch

from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles import load_oracle
from elign_lab.oracles._evaluation import Evaluation
from elign_lab.oracles.labels import label
from elign_lab.oracles.pool import WorkerPool

WATER = ([8, 1, 1], [[0.0, 0.0, 0.119], [0.0, 0.763, -0.477], [0.0, -0.763, -0.477]])
DIES = 99


def hexanes(n: int) -> MoleculeBatch:
    """n distorted hexanes: 20 atoms, some 10 ms of GFN2-xTB each."""
    (numbers, positions), rng = MoleculeBatch.from_smiles("CCCCCC").arrays()[0], np.random.default_rng(0)
    return MoleculeBatch.from_arrays(
        [(numbers, positions + 0.05 * rng.normal(size=positions.shape)) for _ in range(n)]
    ).to(dtype=torch.float64)


@pytest.fixture(scope="module")
def expected():
    with load_oracle("xtb", workers=0) as xtb:
        return xtb(hexanes(60))


EXECUTORS = {
    "threads": lambda: ThreadPoolExecutor(2),
    "processes": lambda: ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")),
    "loky": lambda: loky.get_reusable_executor(2),
}


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("name", ["xtb", "dft"])
def test_any_executor_gives_the_same_numbers_and_stays_open(kind, name):
    options = {} if name == "xtb" else {"xc": "svwn", "basis": "sto-3g", "grid_level": 0}
    batch = MoleculeBatch.from_arrays([WATER] * 5).to(dtype=torch.float64)
    with EXECUTORS[kind]() as executor, load_oracle(name, executor=executor, workers=2, **options) as given:
        result = given(batch)
        given.close()
        assert executor.submit(int, "4").result(timeout=60) == 4
    plain = load_oracle(name, workers=0, **options)(batch)
    assert result.ok.all(), result.status
    torch.testing.assert_close(result.energy, plain.energy, atol=1e-6, rtol=0)
    assert given.molecules == 5


@pytest.fixture(scope="module")
def client():
    """A cluster of two worker processes of this machine."""
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, env=environment
        ) as cluster,
        distributed.Client(cluster) as connected,
    ):
        yield connected


def test_a_killed_dask_worker_loses_nothing_and_doubles_nothing(client, expected, monkeypatch):
    victim = list(client.run(os.getpid).values())[:1]
    oracle = load_oracle("xtb", executor=client.get_executor(), workers=4, chunk_size=2)
    collect, done = oracle._pool._collect, []

    def kill_in_the_middle(flight, answers):
        lost = collect(flight, answers)
        done.append(len(answers))
        if len(answers) >= 20 and victim:
            os.kill(victim.pop(), signal.SIGKILL)
        return lost

    monkeypatch.setattr(oracle._pool, "_collect", kill_in_the_middle)
    result = oracle(hexanes(60))
    assert not victim
    assert min(n for n in done if n >= 20) < 40, "the worker was not killed in the middle"
    assert result.status == ("ok",) * 60
    torch.testing.assert_close(result.energy, expected.energy, atol=1e-6, rtol=0)
    torch.testing.assert_close(result.forces, expected.forces, atol=1e-6, rtol=0)
    assert (oracle.calls, oracle.molecules, oracle.failures) == (1, 60, 0)


def test_labels_through_dask(client, expected):
    """The example of the documentation: the labels of a force field, made on a cluster."""
    with load_oracle("xtb", executor=client.get_executor(), workers=4) as xtb:
        labels = label(xtb, {"thermal": hexanes(60)[:12].arrays()}, progress=False)
    assert labels.counts() == {"thermal": 12}
    np.testing.assert_allclose(labels.energy, expected.energy[:12], atol=1e-6)


def test_a_molecule_that_kills_each_dask_worker_is_a_status(client, monkeypatch):
    monkeypatch.setattr(client.cluster.scheduler, "allowed_failures", 0)  # the default of 3 takes a minute

    def function(batch):  # nested, so that it is sent by value
        import os

        if any(z[0] == DIES for z, _ in batch):
            os._exit(3)
        return [Evaluation(float(z[0]), np.zeros((1, 3))) for z, _ in batch]

    def molecules(*numbers):
        return [(np.array([z]), np.zeros((1, 3))) for z in numbers]

    # alone: with no failures allowed, dask gives up what waits for the same worker too
    pool = WorkerPool(function, executor=client.get_executor(), workers=2)
    assert [a.status for a in pool.map(molecules(DIES))] == ["worker process died (KilledWorker)"]
    assert [a.energy for a in pool.map(molecules(1, 2, 3))] == [1, 2, 3]
