"""The worker pool: order, chunks, dead workers, overdue molecules, given executors."""

import time
from concurrent.futures import BrokenExecutor, Executor, ThreadPoolExecutor

import numpy as np
import pytest

from elign_lab.oracles._evaluation import Evaluation
from elign_lab.oracles.pool import WorkerPool

DIES, SLEEPS = 99, 98


def molecules(*numbers):
    return [(np.array([z]), np.zeros((1, 3))) for z in numbers]


def make_function():
    def function(batch):  # nested, so that it is sent by value and the workers need not import this module
        import os
        import time

        for z, _ in batch:
            if z[0] == 99:
                os._exit(3)
            if z[0] == 98:
                time.sleep(20)
        return [Evaluation(float(z[0]), np.zeros((1, 3))) for z, _ in batch]

    return function


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_order_is_kept(chunk_size):
    pool = WorkerPool(make_function(), workers=2, chunk_size=chunk_size)
    assert [a.energy for a in pool.map(molecules(*range(1, 11)))] == list(range(1, 11))
    assert pool.map([]) == []
    pool.close()


def test_dead_and_overdue_molecules_are_statuses_and_the_others_are_computed():
    pool = WorkerPool(make_function(), workers=2, timeout=0.5, chunk_size=2)
    start = time.monotonic()
    answers = pool.map(molecules(1, 2, DIES, 3, 4, SLEEPS, 5))
    assert time.monotonic() - start < 15
    pool.close()
    assert [a.energy for a in answers if a.status == "ok"] == [1, 2, 3, 4, 5]
    assert "worker process died" in answers[2].status
    assert answers[5].status == "timeout: more than 0.5 s"


def test_closed_pool_starts_again():
    pool = WorkerPool(make_function(), workers=1)
    for _ in range(2):
        assert pool.map(molecules(7))[0].energy == 7
        pool.close()
    pool.close()


def test_an_error_of_the_program_is_raised():
    def function(batch):
        if batch:
            raise KeyError("a bug")
        return []

    pool = WorkerPool(function, workers=1)
    with pytest.raises(KeyError, match="a bug"):
        pool.map(molecules(1))
    pool.close()


def test_given_executor_runs_the_work_and_stays_open():
    with ThreadPoolExecutor(2) as executor:
        pool = WorkerPool(make_function(), executor=executor, workers=2, chunk_size=2)
        assert [a.energy for a in pool.map(molecules(1, 2, 3))] == [1, 2, 3]
        pool.close()
        assert executor.submit(int, "4").result() == 4


def test_overdue_work_in_a_given_executor_is_a_status():
    def function(batch):
        time.sleep(0.6 if batch[0][0][0] == SLEEPS else 0.0)
        return [Evaluation(float(z[0]), np.zeros((1, 3))) for z, _ in batch]

    with ThreadPoolExecutor(2) as executor:
        answers = WorkerPool(function, executor=executor, workers=2, timeout=0.2).map(molecules(SLEEPS, 1, 2))
    assert [a.status for a in answers] == ["timeout: more than 0.2 s", "ok", "ok"]


def test_broken_given_executor_is_a_status():
    class Broken(Executor):
        def submit(self, *_args, **_kwargs):
            raise BrokenExecutor("gone")

    answers = WorkerPool(make_function(), executor=Broken(), workers=2).map(molecules(1, 2))
    assert [a.status for a in answers] == ["worker process died (BrokenExecutor)"] * 2
