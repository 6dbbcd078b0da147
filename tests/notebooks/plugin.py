"""pytest plugin for the notebooks: no network, no swallowed error, limited memory; a table of what each one used.

`pytest -p tests.notebooks.plugin --nbval-lax ... notebooks`, as in the Makefile: it rides on nbval's own run of the
notebooks, so that nothing is executed twice. A cell that tries to leave the machine fails, also when it catches the
error; so does one whose callback raises, although the widget shows the error (`elign_lab.widgets.errors`), and one
after which the notebook is over MEMORY_LIMIT. Memory is the peak of the kernel and of its worker processes that are
there at the end of a cell, each at its own peak; `-`, and no test, where the system has no /proc. Time is a figure to
look at and no test: machines differ, and are shared.
With pytest-xdist (`-n`) notebooks run side by side, by `--dist loadfile`, since the cells of one share its kernel.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

OFFLINE = Path(__file__).with_name("offline")
VARIABLE = "ELIGN_LAB_REFUSED"
RAISE = "ELIGN_LAB_RAISE"  # elign_lab.widgets.errors.VARIABLE; its import would bring torch into pytest
MEMORY_LIMIT = 1_500_000_000  # bytes


@dataclass
class Use:
    """What one notebook has used: seconds from the start of its kernel to the end of its last cell, peak bytes."""

    started: float
    seconds: float = 0.0
    memory: int = 0


class Plugin:
    """Block the network of the kernels, and keep account of the notebooks."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.seen = 0
        self.used: dict[Path, Use] = {}

    def refused(self) -> list[str]:
        """The attempts since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        new, self.seen = lines[self.seen :], len(lines)
        return new

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        use = self.used.setdefault(item.path, Use(time.monotonic()))
        result = yield
        use.seconds = time.monotonic() - use.started
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if call.when == "call":
            use, kernel = self.used[item.path], getattr(item.parent, "kernel", None)
            before, use.memory = use.memory, max(use.memory, peak_memory(kernel.km.provisioner.pid) if kernel else 0)
            problems = []
            if attempts := self.refused():
                problems.append(f"the notebook tried the network: {', '.join(attempts)}")
            if before <= MEMORY_LIMIT < use.memory:  # the cell that did it, and not all that follow
                problems.append(
                    f"the notebook's peak memory is {use.memory / 1e6:.0f} MB, the limit is {MEMORY_LIMIT / 1e6:.0f} MB"
                )
            if problems:
                own = [str(report.longrepr)] if report.failed else []
                report.outcome, report.longrepr = "failed", "\n".join([*own, *problems])
        return report

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A worker of pytest-xdist hands its account to the process that prints."""
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["notebooks"] = [(str(path), use.seconds, use.memory) for path, use in self.used.items()]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Take the account of a worker that is done (one that crashed has none)."""
        for path, seconds, memory in getattr(node, "workeroutput", {}).get("notebooks", ()):
            self.used[Path(path)] = Use(0.0, seconds, memory)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.used:
            return
        terminalreporter.section("notebooks: size, time, memory")
        rows = [
            (path.stem, path.stat().st_size / 1e3, use.seconds, use.memory / 1e6)
            for path, use in sorted(self.used.items())
        ]
        width = max(len(row[0]) for row in rows)
        terminalreporter.line(f"{'':{width}s}  size kB  seconds  peak MB")
        for name, size, seconds, memory in rows:
            terminalreporter.line(
                f"{name:{width}s} {size:8.0f} {seconds:8.1f} {f'{memory:.0f}' if memory else '-':>8s}"
            )
        terminalreporter.line(f"{'all':{width}s} {sum(r[1] for r in rows):8.0f} {sum(r[2] for r in rows):8.1f}")


def peak_memory(pid: int) -> int:
    """Bytes: the peak of a process plus those of its living children; 0 where the system does not tell."""
    try:
        process = psutil.Process(pid)
        pids = [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for number in pids:
        try:
            status = Path(f"/proc/{number}/status").read_text()
        except OSError:
            continue
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):
            total += 1024 * int(found[1])
    return total


def pytest_configure(config: pytest.Config) -> None:
    """Kernels inherit the environment of pytest: put the block on their path, and let callbacks raise."""
    folder = tempfile.TemporaryDirectory(prefix="elign_lab_")
    log = Path(folder.name) / "refused.txt"
    patch = pytest.MonkeyPatch()
    patch.setenv(VARIABLE, str(log))
    patch.setenv(RAISE, "1")
    patch.setenv("PYTHONPATH", str(OFFLINE), prepend=os.pathsep)
    config.pluginmanager.register(Plugin(log), "elign_lab_notebooks")
    config.add_cleanup(folder.cleanup)
    config.add_cleanup(patch.undo)
