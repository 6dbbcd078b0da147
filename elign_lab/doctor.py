"""What `elign-lab doctor` reports: versions, oracles, devices, bundled files, and what to do about each problem.

Only the standard library is imported at the top: the doctor must be able to speak when an installation is broken.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).parent
REINSTALL = "run `make setup`, or `pip install -c constraints.txt -e .` in the checkout"


@dataclass(frozen=True)
class Package:
    """One dependency: its installed version (None when missing), what pyproject.toml asks for, and for which extra."""

    name: str
    version: str | None
    required: str
    extra: str | None
    ok: bool


@dataclass(frozen=True)
class OracleState:
    """One oracle: whether it can run here; if not, the reason with the remedy, else what its first use still needs."""

    name: str
    description: str
    usable: bool
    reason: str

    @property
    def state(self) -> str:
        """In words: usable, usable after something, or not usable."""
        if not self.usable:
            return f"NOT USABLE: {self.reason}"
        return f"usable, but {self.reason}" if self.reason else "usable"


@dataclass(frozen=True)
class AssetState:
    """One bundled file: whether its SHA-256 is that of its passport; if not, the problem."""

    file: str
    ok: bool
    problem: str


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, what to do about it, and whether the package can work without it."""

    what: str
    remedy: str
    essential: bool


@dataclass
class Report:
    """Everything that the doctor found; `ok` is False when something essential is broken."""

    python: str = platform.python_version()
    platform: str = platform.platform()
    cores: int = field(default_factory=lambda: _cores())
    memory_gb: float | None = field(default_factory=lambda: _memory_gb())
    commit: str | None = field(default_factory=lambda: _commit())
    elign_lab: str | None = None
    packages: list[Package] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)
    oracles: list[OracleState] = field(default_factory=list)
    assets: list[AssetState] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing essential is broken."""
        return not any(problem.essential for problem in self.problems)

    def to_dict(self) -> dict[str, object]:
        """The report as plain values, for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def text(self) -> str:
        """The report for a terminal."""
        memory = "unknown" if self.memory_gb is None else f"{self.memory_gb:.1f} GB"
        lines = [
            f"elign_lab {self.elign_lab or 'not installed'}" + (f", commit {self.commit}" if self.commit else ""),
            f"Python {self.python} on {self.platform}",
            f"{self.cores} cores, {memory} of memory; devices: {', '.join(self.devices) or 'unknown'}",
            "",
            "packages",
        ]
        for p in self.packages:
            note = "" if p.ok else ("  MISSING" if p.version is None else "  WRONG VERSION")
            extra = f"  (extra {p.extra})" if p.extra else ""
            lines.append(f"  {p.name:14s} {p.version or '-':14s} {p.required}{extra}{note}")
        lines += ["", "oracles"]
        for o in self.oracles:
            lines.append(f"  {o.name:14s} {o.state}")
        lines += ["", "bundled files"]
        lines += [f"  {a.file:24s} {'ok' if a.ok else a.problem}" for a in self.assets] or ["  none"]
        lines += ["", "problems" if self.problems else "no problems"]
        for problem in self.problems:
            lines.append(f"  {'essential' if problem.essential else 'optional '}  {problem.what}: {problem.remedy}")
        return "\n".join(lines)


def examine() -> Report:
    """Look at the installation. Nothing is changed, and no network is used."""
    report = Report()
    _examine_packages(report)
    _examine_devices(report)
    _examine_oracles(report)
    _examine_assets(report)
    return report


def _examine_packages(report: Report) -> None:
    try:
        report.elign_lab = metadata.version("elign-lab")
        requirements = metadata.requires("elign-lab") or []
    except metadata.PackageNotFoundError:
        report.problems.append(Problem("elign-lab is not installed", REINSTALL, essential=True))
        return
    wanted: dict[str, list[str]] = defaultdict(list)
    for text in requirements:
        package = _package(text)
        report.packages.append(package)
        if package.ok:
            continue
        state = "is missing" if package.version is None else f"is {package.version}, not {package.required}"
        if package.extra:
            wanted[package.extra].append(f"{package.name} {state}")
        else:
            report.problems.append(Problem(f"{package.name} {state}", REINSTALL, essential=True))
    for extra, states in wanted.items():  # one line for each: nine test tools on nine lines would hide what matters
        remedy = f"pip install 'elign-lab[{extra}]'"
        report.problems.append(Problem(f"extra {extra}: {', '.join(states)}", remedy, essential=False))


def _package(requirement: str) -> Package:
    """The state of one line of the package's metadata, such as "torch<2.14,>=2.13" or "torchani; extra == 'ani'"."""
    name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
    extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
    required = requirement.split(";")[0].removeprefix(name).strip()
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = None
    fits = version is not None and _satisfies(version, required)
    return Package(name, version, required, extra[1] if extra else None, fits)


def _satisfies(version: str, required: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # it comes with accelerate, whose absence is reported on its own
        return True
    return SpecifierSet(required).contains(version, prereleases=True)


def _examine_devices(report: Report) -> None:
    try:
        import torch
    except Exception as error:  # a broken torch raises OSError as well as ImportError
        report.problems.append(Problem(f"torch cannot be imported ({error})", REINSTALL, essential=True))
        return
    report.devices = [f"cpu ({torch.get_num_threads()} threads)"]
    report.devices += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        report.devices.append("mps (not used by this package)")
    if not torch.cuda.is_available() and _has_nvidia_driver():
        remedy = "install the CUDA build, `pip install --force-reinstall torch==2.13.0`"
        report.problems.append(Problem("there is an NVIDIA GPU that torch does not see", remedy, essential=False))


def _examine_oracles(report: Report) -> None:
    try:
        from elign_lab.oracles import ORACLES
    except Exception as error:
        report.problems.append(Problem(f"the oracles cannot be imported ({error})", REINSTALL, essential=True))
        return
    for entry in ORACLES.values():
        usable, reason = entry.available()
        report.oracles.append(OracleState(entry.name, entry.description, usable, reason))
    if not any(o.usable for o in report.oracles):
        report.problems.append(Problem("no oracle is usable", REINSTALL, essential=True))
    report.problems += [
        Problem(f"the {o.name} oracle is not usable", o.reason, essential=False) for o in report.oracles if not o.usable
    ]


def _examine_assets(report: Report) -> None:
    from hashlib import sha256

    remedy = "restore it with `git checkout elign_lab/assets`, or reinstall"
    for path in sorted((PACKAGE / "assets").glob("*.json")):
        try:
            passport = json.loads(path.read_text())
            file = path.with_name(passport["file"])
            fine = sha256(file.read_bytes()).hexdigest() == passport["sha256"]
            state = AssetState(file.name, fine, "" if fine else "damaged: its SHA-256 is not that of its passport")
        except (OSError, ValueError, KeyError) as error:
            state = AssetState(path.name, False, f"unreadable: {type(error).__name__} {error}")
        report.assets.append(state)
        if not state.ok:
            report.problems.append(Problem(f"{state.file} is {state.problem}", remedy, essential=True))
    if not report.assets:
        report.problems.append(Problem("there are no bundled files", remedy, essential=True))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _memory_gb() -> float | None:
    """Physical memory in GB, None where the system does not say."""
    if sys.platform == "win32" or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


def _commit() -> str | None:
    """Commit of the checkout, with '-dirty' when files were changed; None outside a checkout."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    command = ["git", "-C", str(PACKAGE.parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists()
