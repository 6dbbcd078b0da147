"""The benchmark of the oracles: what it measures, what it leaves out, and what it draws."""

import json
import time

import numpy as np
import pytest
from scipy.spatial.distance import pdist

from elign_lab.benchmarks import bench_oracles, oracles_figure, oracles_text
from elign_lab.benchmarks.oracles import alkane, scaling_exponent
from elign_lab.cli import main
from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles import load_oracle
from elign_lab.oracles._evaluation import Evaluation
from elign_lab.testing import SpringOracle

CARBONS = (3, 10, 14, 19)  # 11, 32, 44 and 59 atoms


class Cubic(SpringOracle):
    """Takes at least 1e-7 N^3 seconds for a molecule, and fails above 50 atoms as an overdue worker does."""

    name = "cubic"

    def _compute(self, molecules):
        for numbers, _ in molecules:
            time.sleep(1e-7 * len(numbers) ** 3)
        late = Evaluation.failure("timeout: more than 1 s")
        answers = super()._compute(molecules)
        return [late if len(m[0]) > 50 else a for m, a in zip(molecules, answers, strict=True)]


@pytest.fixture(scope="module")
def result():
    def absent():
        raise ValueError("no weights")

    makers = {"cubic": Cubic, "learned": lambda: load_oracle("learned"), "ani": absent}
    return bench_oracles(makers, carbons=CARBONS, repeats=2, limit=20.0)


def test_the_molecules_are_alkanes():
    for carbons in (3, 8, 59):
        numbers, positions = alkane(carbons)
        assert len(numbers) == 3 * carbons + 2
        assert pdist(positions).min() == pytest.approx(1.09, abs=0.02)
        heavy = positions[numbers == 6]
        np.testing.assert_allclose(np.linalg.norm(np.diff(heavy, axis=0), axis=1), 1.53, atol=0.01)
    # the bonds that the geometry shows make one molecule, with four bonds at each carbon
    numbers, positions = alkane(5)
    (molecule,) = MoleculeBatch.from_arrays([(numbers, positions)]).to_rdkit()
    assert [a.GetDegree() for a in molecule.GetAtoms()] == [4 if z == 6 else 1 for z in numbers]


def test_times_and_exponents_are_those_of_the_oracle(result):
    rows = {(r["oracle"], r["atoms"]): r for r in result["rows"]}
    # a busy machine makes any time longer, and none shorter
    for atoms in (32, 44):
        assert rows["cubic", atoms]["seconds"] >= 1e-7 * atoms**3
        assert rows["cubic", atoms]["batch_seconds"] >= 1e-7 * atoms**3
    assert rows["learned", 59]["batch_seconds"] > 0
    assert rows["learned", 59]["cpu_seconds"] > 0
    json.dumps(result)
    assert result["machine"]["cores"] >= 1


def test_what_is_over_the_limit_or_missing_is_said(result):
    rows = [r for r in result["rows"] if r["oracle"] == "cubic"]
    assert [r["atoms"] for r in rows] == [11, 32, 44, 59]
    assert (rows[-1]["status"], rows[-1]["seconds"]) == ("timeout: more than 1 s", None)
    assert result["missing"] == {"ani": "no weights"}
    text = oracles_text(result)
    assert "over the limit" in text
    assert "ani: not measured, no weights" in text


def test_an_oracle_over_the_limit_is_not_asked_about_larger_molecules():
    result = bench_oracles({"cubic": Cubic}, carbons=(14, 19), repeats=1, limit=0.01)
    assert [r["atoms"] for r in result["rows"]] == [44]


def test_the_exponent_is_a_slope():
    rows = [
        {"oracle": "a", "atoms": n, "seconds": 0.1 if n < 30 else 1e-6 * n**2.5, "status": "ok"}
        for n in (11, 20, 40, 80, 160)
    ]
    assert scaling_exponent(rows, "a") == pytest.approx(2.5, abs=1e-9)
    assert scaling_exponent(rows[:4], "a") is None


def test_the_figure_has_a_line_per_oracle_on_logarithmic_axes(result):
    figure = oracles_figure(result)
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type) == ("log", "log")
    assert [t.name.split(",")[0] for t in figure.data] == ["cubic", "learned (oracle-mini)"]
    assert list(figure.data[0].x) == [11, 32, 44]
    assert all(y > 0 for t in figure.data for y in t.y)


def test_the_command_writes_and_prints(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("elign_lab.benchmarks.oracle_makers", lambda *_: {"cubic": Cubic})
    monkeypatch.setattr("elign_lab.benchmarks.oracles.CARBONS", (3,))
    assert main(["bench", "oracles", "--repeats", "1", "--limit", "5", "--out", str(tmp_path / "r.json")]) == 0
    written = json.loads((tmp_path / "r.json").read_text())
    assert [r["oracle"] for r in written["rows"]].count("cubic") == len(written["rows"])
    assert "milliseconds per molecule" in capsys.readouterr().out
