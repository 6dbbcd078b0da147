"""constraints.txt, environment.yml, binder/environment.yml and pyproject.toml say the same."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="file modes and bash")


def requirements(lines: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def pins(lines: list[str]) -> dict[str, Version]:
    """Versions of 'name==version' lines; the local part (+cpu) says which build it is, not which version."""
    found = {}
    for name, requirement in requirements(lines).items():
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{requirement} is not an exact pin"
        found[name] = Version(Version(specifier.version).public)
    return found


def pip_lines(path: Path) -> list[str]:
    content = yaml.safe_load(path.read_text())
    assert "python=3.11" in content["dependencies"]
    (pip,) = (item["pip"] for item in content["dependencies"] if isinstance(item, dict))
    return pip


CONSTRAINTS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
CONDA = pip_lines(ROOT / "environment.yml")
BINDER = [line for line in pip_lines(ROOT / "binder" / "environment.yml") if not line.startswith("--")]
LAB = PROJECT["dependencies"] + EXTRAS["lab"]
FULL = LAB + EXTRAS["ani"] + EXTRAS["dev"]


@pytest.mark.parametrize(
    ("lines", "needed"),
    [(CONSTRAINTS, FULL), (CONDA, FULL), (BINDER, LAB)],
    ids=["constraints", "conda", "binder"],
)
def test_every_dependency_is_pinned_inside_its_range(lines, needed):
    pinned = pins(lines)
    for name, requirement in requirements(needed).items():
        assert name in pinned, f"{name} is not pinned"
        assert requirement.specifier.contains(pinned[name], prereleases=True), f"{name} {pinned[name]} vs {requirement}"


def test_pins_are_equal():
    exact = pins(CONSTRAINTS)
    conda, binder = pins(CONDA), pins(BINDER)
    fairchem = conda.pop("fairchem-core")
    assert requirements(EXTRAS["uma"])["fairchem-core"].specifier.contains(fairchem)
    assert binder.items() <= conda.items() <= exact.items()


def test_binder_is_small():
    assert pins(BINDER).keys() == requirements(LAB).keys()  # no test tools, nor oracles whose weights are downloads
    assert "torch==2.13.0+cpu" in BINDER
    assert not [line for line in CONSTRAINTS if line.lower().startswith(("nvidia", "triton"))]


def test_constraints_name_no_file():
    for line in CONSTRAINTS:
        assert re.fullmatch(r"[\w.-]+==[\w.!]+", line), f"{line!r} is not name==version"


def test_installed_versions_are_the_pinned_ones():
    """The tests run with what the files say: a pin that nobody tested is worth nothing."""
    from importlib import metadata

    pinned = pins(CONSTRAINTS)
    for name in requirements(PROJECT["dependencies"]):
        assert Version(Version(metadata.version(name)).public) == pinned[name], name


@pytest.mark.parametrize("script", [".ci/run", "binder/postBuild", "binder/start"])
def test_scripts_are_executable_bash(script):
    path = ROOT / script
    assert path.stat().st_mode & 0o111
    assert path.read_text().startswith(("#!/bin/bash", "#!/usr/bin/env bash"))
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_setup_is_idempotent(tmp_path):
    """A second call with the same pyproject.toml and constraints.txt runs no pip; a changed pin makes it run again."""
    import hashlib
    import shutil
    import sys

    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "setup_env.py"
    shutil.copy(ROOT / "scripts" / "setup_env.py", script)
    fake = tmp_path / ".venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    calls = tmp_path / "calls"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    fake.chmod(0o755)
    content = (tmp_path / "pyproject.toml").read_bytes() + (tmp_path / "constraints.txt").read_bytes()
    stamp = tmp_path / ".venv" / ".elign-lab-setup"
    stamp.write_text(hashlib.sha256(content).hexdigest())

    environment = {**os.environ, "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    subprocess.run([sys.executable, script], check=True, env=environment)
    assert not calls.exists()

    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n")
    subprocess.run([sys.executable, script], check=True, env=environment)
    torch, package = calls.read_text().splitlines()
    assert "torch==2.13.0" in torch
    assert package.endswith(f"-e {tmp_path}[lab,ani,dev]")
    subprocess.run([sys.executable, script], check=True, env=environment)
    assert len(calls.read_text().splitlines()) == 2


def test_make_targets_exist():
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", text, re.MULTILINE))
    assert {"setup", "demo", "test", "lab", "notebooks", "bench", "lint", "clean"} <= targets
