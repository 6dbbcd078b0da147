"""Worker processes for oracles that compute one molecule at a time on a CPU core.

The default pool is loky's: its workers start clean (no fork, no re-import of the user's script, so that no
`if __name__ == "__main__"` is needed), take an environment, and can be killed.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait

import loky

from elign_lab.oracles._evaluation import Evaluation, Molecule

# One thread a worker: the molecules are the parallel dimension. The libraries read these when they load.
SINGLE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)

Chunk = tuple[int, ...]
"""Indices of the molecules that one task evaluates."""


class WorkerPool:
    """Maps `function(molecules) -> list[Evaluation]` over molecules in worker processes that start when first needed.

    workers: number of processes, None for one per core; 0 evaluates in this process, without a time limit.
    executor: any concurrent.futures executor instead of the own pool, such as dask's (below); then `workers` is the
        number of tasks kept in flight, and `close` leaves it alone. Give no more than it runs at once: the time limit
        counts from when a task is handed over.
    timeout: seconds that a molecule may take, None for no limit. The worker of an overdue molecule is killed (one
        of a given executor cannot be: its result is ignored).
    chunk_size: molecules per task, so that sending them does not dominate.

    A molecule that takes too long, or whose worker dies twice, is a failed Evaluation. An exception from `function`
    is an error of the program and is raised.

    On a cluster of dask.distributed, where the molecules of a worker that dies are computed again by another:

        with LocalCluster(n_workers=4, threads_per_worker=1) as cluster, Client(cluster) as client:
            with load_oracle("xtb", executor=client.get_executor(), workers=4) as xtb:
                labels = make_labels(xtb, "runs/oracle/labels")
    """

    def __init__(
        self,
        function: Callable[[list[Molecule]], list[Evaluation]],
        *,
        workers: int | None = None,
        executor: Executor | None = None,
        timeout: float | None = None,
        chunk_size: int = 1,
    ) -> None:
        if workers is not None and workers < 0:
            raise ValueError(f"workers must be 0 (this process), a positive number or None (all cores), got {workers}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be positive (seconds per molecule), or None for no limit, got {timeout}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.function = function
        self.workers = loky.cpu_count() if workers is None else workers
        self.timeout = timeout
        self.chunk_size = chunk_size
        self._given = executor
        self._own: loky.ProcessPoolExecutor | None = None
        self._owner = os.getpid()

    def map(self, molecules: list[Molecule]) -> list[Evaluation]:
        """Evaluate the molecules; the answers are in their order."""
        if self._given is None and self.workers == 0:
            return self.function(molecules)
        starts = range(0, len(molecules), self.chunk_size)
        waiting = deque(tuple(range(s, min(s + self.chunk_size, len(molecules)))) for s in starts)
        answers: dict[int, Evaluation] = {}
        while waiting:
            for chunk, reason in self._run(waiting, molecules, answers):
                # which molecule of a lost chunk was at fault shows when each runs alone; an overdue one already did
                alone = len(chunk) == 1 and isinstance(reason, TimeoutError)
                answers.update({i: self._overdue() if alone else self._run_alone(molecules[i]) for i in chunk})
        return [answers[i] for i in range(len(molecules))]

    def close(self) -> None:
        """Stop the own worker processes; the next `map` starts new ones."""
        own, self._own = self._own, None
        if own is not None and self._owner == os.getpid():
            own.shutdown(wait=True, kill_workers=True)

    def _run(
        self, waiting: deque[Chunk], molecules: list[Molecule], answers: dict[int, Evaluation]
    ) -> list[tuple[Chunk, Exception]]:
        """Work through `waiting`, one task per worker at a time, until it is empty or tasks are lost; return those."""
        flight: dict[Future, tuple[Chunk, float]] = {}
        lost: list[tuple[Chunk, Exception]] = []
        executor = self._executor()
        try:
            while (waiting or flight) and not lost:
                while waiting and len(flight) < max(self.workers, 1):
                    chunk = waiting.popleft()
                    flight[self._submit(executor, [molecules[i] for i in chunk])] = (chunk, time.monotonic())
                wait(flight, timeout=self._patience(flight.values()), return_when=FIRST_COMPLETED)
                lost = self._collect(flight, answers)
        finally:
            for task in flight:
                task.cancel()
        if lost:
            waiting.extendleft(chunk for chunk, _ in flight.values())
            self.close()
        return lost

    def _collect(
        self, flight: dict[Future, tuple[Chunk, float]], answers: dict[int, Evaluation]
    ) -> list[tuple[Chunk, Exception]]:
        """Take finished and overdue tasks out of `flight`; return the lost ones with the reason."""
        lost: list[tuple[Chunk, Exception]] = []
        for task, (chunk, started) in list(flight.items()):
            overdue = self.timeout is not None and time.monotonic() - started > self.timeout * len(chunk)
            if not task.done() and not overdue:
                continue
            del flight[task]
            try:
                answers.update(zip(chunk, task.result(timeout=0), strict=True))
            except Exception as reason:
                if not _worker_is_gone(reason):
                    raise
                task.cancel()
                lost.append((chunk, reason))
        return lost

    def _patience(self, flight: Iterable[tuple[Chunk, float]]) -> float | None:
        """Seconds until the first task in flight is overdue."""
        if self.timeout is None:
            return None
        deadline = min(started + self.timeout * len(chunk) for chunk, started in flight)
        return max(deadline - time.monotonic(), 0.0)

    def _run_alone(self, molecule: Molecule) -> Evaluation:
        """Evaluate one molecule with nothing else in flight, so that a failure is its own."""
        try:
            return self._submit(self._executor(), [molecule]).result(timeout=self.timeout)[0]
        except TimeoutError:
            self.close()
            return self._overdue()
        except Exception as reason:
            if not _worker_is_gone(reason):
                raise
            self.close()
            return Evaluation.failure(f"worker process died ({type(reason).__name__})")

    def _submit(self, executor: Executor, molecules: list[Molecule]) -> Future:
        """Submit a task; an executor that turns out to be broken shows in the future, as when it breaks later."""
        try:
            return executor.submit(self.function, molecules)
        except BrokenExecutor as reason:
            task: Future = Future()
            task.set_exception(reason)
            return task

    def _overdue(self) -> Evaluation:
        return Evaluation.failure(f"timeout: more than {self.timeout:g} s")

    def _executor(self) -> Executor:
        """The given executor, or the own pool, started and ready."""
        if self._given is not None:
            return self._given
        if self._own is None or self._owner != os.getpid():  # a forked child has its parent's object, not its workers
            self._owner = os.getpid()
            self._own = loky.ProcessPoolExecutor(max_workers=self.workers, env=SINGLE_THREAD)
            # loads the backend before the clock of a time limit starts
            self._own.submit(self.function, []).result()
        return self._own


def _worker_is_gone(error: Exception) -> bool:
    """Whether an error is not the function's own; dask.distributed has a name of its own for a worker that died."""
    known = isinstance(error, (BrokenExecutor, CancelledError, TimeoutError))
    return known or type(error).__name__ == "KilledWorker"
