"""An oracle's answers kept on disk, under a hash of the question, for oracles that take seconds or minutes.

The key is SHA-256 over what defines the numbers (oracle, settings, weights, versions) and over the molecule (atomic
numbers and positions as they are, bit by bit): an oracle with another setting never gets another's answer. The file is
an SQLite database in write-ahead mode: several processes may use it at once, and a kill at any moment leaves it whole,
with all answers that were written before. Keep it on a local disk: SQLite's locks fail on some network file systems.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from elign_lab.oracles._evaluation import OK, Evaluation, Molecule
from elign_lab.oracles.protocol import Oracle

APPLICATION = 0x456C6967  # SQLite's mark of the program that a file belongs to: "Elig"
BUSY_SECONDS = 60.0
QUESTIONS = 500  # keys in one query; SQLite before 3.32 allows 999
_COLUMNS = "key, energy, uncertainty, forces"
_TABLE = "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, energy REAL, uncertainty REAL, forces BLOB)"


class CachedOracle(Oracle):
    """An oracle that asks another one only what it has not been asked before, in this process or in any other.

    oracle: the one that computes. It makes the checks, and only answers that are "ok" are kept: a failure may be one of
        the moment, such as a timeout, and is tried again.
    path: the cache file; it is made when it is not there. Several oracles may share one file.
    identity: what defines the numbers of `oracle`, as JSON values, for an oracle that cannot say it itself.
    write_every: molecules that are computed between two writes, which is what a kill can cost.

    `hits` and `misses` count molecules, a repeated one in the same batch as a hit. Raises ValueError for an oracle
    that cannot say its identity when none is given, and for a file that is not such a cache.
    """

    def __init__(
        self,
        oracle: Oracle,
        path: str | Path,
        *,
        identity: Mapping[str, Any] | None = None,
        write_every: int = 32,
    ) -> None:
        super().__init__(
            min_distance=oracle.min_distance,
            max_atoms=oracle.max_atoms,
            closed_shell_only=oracle.closed_shell_only,
        )
        if write_every < 1:
            raise ValueError(f"write_every must be at least 1, got {write_every}")
        self.oracle, self.path, self.write_every = oracle, Path(path), write_every
        self.name, self.elements, self.max_extent = oracle.name, oracle.elements, oracle.max_extent
        self.has_uncertainty, self.atom_energies = oracle.has_uncertainty, oracle.atom_energies
        self._about = dict(oracle.identity() if identity is None else identity)
        self._identity = json.dumps({"oracle": oracle.name, **self._about}, sort_keys=True).encode()
        self.hits = self.misses = 0
        _prepare(self.path)

    def identity(self) -> dict[str, Any]:
        """See Oracle.identity: that of the oracle behind."""
        return dict(self._about)

    def reset_counters(self) -> None:
        """Set all counters to zero, those of the oracle behind too."""
        super().reset_counters()
        self.oracle.reset_counters()
        self.hits = self.misses = 0

    def close(self) -> None:
        """Release what the oracle behind holds."""
        self.oracle.close()

    def __len__(self) -> int:
        """Answers in the file, of all oracles that use it."""
        with _opened(self.path) as database:
            return int(database.execute("SELECT count(*) FROM answers").fetchone()[0])

    def __repr__(self) -> str:
        return f"CachedOracle({self.oracle!r}, {self.hits} hits, {self.misses} misses, {self.path})"

    def _compute(self, molecules: list[Molecule]) -> list[Evaluation]:
        keys = [self._key(molecule) for molecule in molecules]
        answers = self._read(set(keys))
        todo = {key: molecule for key, molecule in zip(keys, molecules, strict=True) if key not in answers}
        waiting = list(todo)
        for first in range(0, len(waiting), self.write_every):
            part = waiting[first : first + self.write_every]
            computed = dict(zip(part, self.oracle._compute([todo[key] for key in part]), strict=True))
            self._write({key: answer for key, answer in computed.items() if _sound(answer, len(todo[key][0]))})
            answers |= computed
        self.misses += len(todo)
        self.hits += len(molecules) - len(todo)
        return [answers[key] for key in keys]

    def _key(self, molecule: Molecule) -> bytes:
        numbers, positions = molecule
        # adding zero makes -0.0 the same as 0.0
        content = (np.asarray(numbers, "<i8").tobytes(), (np.asarray(positions, "<f8") + 0.0).tobytes())
        return hashlib.sha256(b"\0".join((self._identity, str(len(numbers)).encode(), *content))).digest()

    def _read(self, keys: set[bytes]) -> dict[bytes, Evaluation]:
        wanted, found = list(keys), {}
        with _opened(self.path) as database:
            for first in range(0, len(wanted), QUESTIONS):
                part = wanted[first : first + QUESTIONS]
                marks = ", ".join("?" * len(part))
                rows = database.execute(f"SELECT {_COLUMNS} FROM answers WHERE key IN ({marks})", part)
                for key, energy, uncertainty, forces in rows:
                    found[key] = Evaluation(energy, np.frombuffer(forces, "<f8").reshape(-1, 3).copy(), OK, uncertainty)
        return found

    def _write(self, answers: Mapping[bytes, Evaluation]) -> None:
        rows = [
            (key, float(a.energy), a.uncertainty, np.asarray(a.forces, "<f8").tobytes()) for key, a in answers.items()
        ]
        with _opened(self.path) as database, database:
            # another process may have computed the same molecule meanwhile
            database.executemany(f"INSERT OR IGNORE INTO answers ({_COLUMNS}) VALUES (?, ?, ?, ?)", rows)


def _sound(answer: Evaluation, n: int) -> bool:
    """Whether an answer is a success that the checks of Oracle will let pass."""
    return (
        answer.status == OK
        and answer.forces is not None
        and answer.forces.shape == (n, 3)
        and bool(np.isfinite(answer.energy) and np.isfinite(answer.forces).all())
    )


# ---------------------------------------------------------------------- the file
@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection of this call's own: one may not cross into a forked process or another thread."""
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as database:
        # with the write-ahead log this survives a kill; a power failure may cost the last answers, not the file
        database.execute("PRAGMA synchronous = NORMAL")
        yield database


def _prepare(path: Path) -> None:
    """Make the file and its table. Raises ValueError where that cannot be, and for a file that is no cache of ours."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _opened(path) as database:
            # look and make in one transaction: another process may be making it now
            with database:
                database.execute("BEGIN IMMEDIATE")
                mark = database.execute("PRAGMA application_id").fetchone()[0]
                if mark != APPLICATION and (mark or database.execute("SELECT 1 FROM sqlite_master").fetchone()):
                    raise ValueError(f"{path} is the database of another program: give the cache a file of its own")
                database.execute(_TABLE)
                database.execute(f"PRAGMA application_id = {APPLICATION}")
            # it stays in the file; while another process holds a lock, the older mode is as safe, and slower
            with suppress(sqlite3.OperationalError):
                database.execute("PRAGMA journal_mode = WAL")
    except (OSError, sqlite3.DatabaseError) as error:
        raise ValueError(
            f"{path} cannot be used as a cache ({error}): delete it, or give the cache a file of its own in a folder "
            "that can be written"
        ) from error
