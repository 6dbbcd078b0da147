"""What the passports of the bundled files say of their making, and the table of `elign-lab models`."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from elign_lab.catalogue import catalogue, headline
from elign_lab.checkpoints import ASSETS, bundled_assets
from elign_lab.cli import main

PASSPORTS = sorted(ASSETS.glob("*.json"))
WANTED = ("sha256", "command", "commit", "seed", "data", "versions", "hours", "machine", "licence", "date", "figures")
ELSEWHERE = {"command": "commands", "figures": "errors"}  # names that some passports use instead
SCRIPT = Path(__file__).parents[2] / "scripts" / "provenance.py"


def lacks(passport: dict[str, Any]) -> list[str]:
    """What a passport neither says nor explains with a note."""
    wanted = set(WANTED)
    if passport["kind"] == "evidence":  # its input are models, and DFT's answers come from a cache of several runs
        wanted -= {"data", "hours"}
        assert all(re.search(r"-[0-9a-f]{12}-|^test-molecules", name) for name in passport["molecules"].values())
    found = {key for key in wanted if passport.get(key) is not None or passport.get(ELSEWHERE.get(key, "")) is not None}
    return sorted(key for key in wanted - found if not (key in passport and passport.get(f"{key}_note")))


def values(content: Any) -> list[dict[str, Any]]:
    """All mappings inside a passport."""
    inside = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return [content] * isinstance(content, dict) + [v for item in inside for v in values(item)]


@pytest.mark.parametrize("path", PASSPORTS, ids=lambda p: p.stem)
def test_a_passport_says_how_its_file_was_made(path):
    passport = json.loads(path.read_text())
    assert lacks(passport) == []
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", passport["commit"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", passport["date"])
    if passport["kind"] != "evidence":
        assert re.fullmatch(r"[0-9a-f]{64}", passport["data"]["sha256"])
    inside = values(passport.get("figures") or passport["errors"])
    intervals = [v for v in inside if {"value", "low", "high"} <= v.keys()]
    # the rows of a table are shares, whose intervals follow from n
    assert intervals or any("validity" in v and v["n"] > 0 for v in inside) or passport["errors_note"]
    assert all(v["low"] <= v["value"] <= v["high"] for v in intervals)
    assert any({"n", "molecules"} & v.keys() for v in [passport, *inside])


def test_a_gap_is_found_and_a_note_explains_it():
    passport = json.loads((ASSETS / "edm-mini.json").read_text())
    assert lacks({**passport, "hours": None}) == ["hours"]
    assert lacks({**passport, "hours": None, "hours_note": "not recorded"}) == []
    del passport["commit"]
    assert lacks({**passport, "commit_note": "lost"}) == ["commit"]  # the note explains a null, not an absence


def test_the_commit_of_changed_code_is_dirty(tmp_path):
    spec = importlib.util.spec_from_file_location("provenance", SCRIPT)
    provenance = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(provenance)

    def git(*arguments: str) -> None:
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *name, *arguments], check=True, capture_output=True)

    files = [tmp_path / name for name in ("elign_lab/a.py", "scripts/b.py", "elign_lab/assets/c.json", "README.md")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "start")
    clean = provenance.commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", clean)
    for file in (files[2], files[3], tmp_path / "elign_lab" / "new.py"):  # an asset, a document, an untracked file
        file.write_text("2\n")
        assert provenance.commit(tmp_path) == clean
    for file in files[:2]:
        file.write_text("2\n")
        assert provenance.commit(tmp_path) == f"{clean}-dirty"
        file.write_text("1\n")
    assert provenance.machine(3).endswith("3 threads")


def test_models_lists_every_bundled_file(capsys):
    assert main(["models", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [p["file"] for p in listed] == [json.loads(p.read_text())["file"] for p in PASSPORTS]
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    assert text == catalogue(listed) + "\n"
    assert max(map(len, text.splitlines())) <= 130
    for passport in listed:
        (line,) = (row for row in text.splitlines() if row.startswith(f"{passport['name']} "))
        for part in (passport["kind"], f"{passport['bytes'] / 1e6:.2f}", passport["date"], passport["licence"]):
            assert part in line
        assert re.search(r"\d \[-?[\d.]+, -?[\d.]+\].*, n \d+$", line) or passport["name"] == "escn-mini"
    assert "GFN2-xTB by tblite" not in text  # the method of its labels is not what the learned oracle is


def test_the_figure_of_each_kind():
    found = {p["name"]: headline(p) for p in bundled_assets()}
    figures = json.loads((ASSETS / "edm-mini.json").read_text())["figures"]
    assert found["edm-mini"].startswith(f"f_RMS {figures['f_rms_median']['value']:.2f} [")
    assert found["edm-mini"].endswith(f"n {figures['n']}")
    assert found["escn-mini"].startswith("force error ")
    assert headline({"figures": None}) == headline({}) == headline({"figures": {"n": 3}}) == ""
    row = {"sampler": "direct, 0.3", "evaluations": 8, "n": 4, "validity": 0.5}
    figures = {"rows": [row, {**row, "sampler": "heun"}, {**row, "evaluations": 64}]}
    assert headline({"figures": figures}) == "valid 50.0 [15.0, 85.0] % at 8 NFE, n 4"
    runs = [{"model": "a", "rows": [{**row, "n": 40}]}, {"model": "b", "rows": [{**row, "n": 400}]}]
    assert headline({"name": "a", "figures": {**figures, "headline": runs}}).endswith("n 40")  # more, and its own
    assert headline({"figures": {"rows": []}}) == ""
