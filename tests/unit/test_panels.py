"""The panels without a browser: their functions, and what their controls do when Python moves them."""

from __future__ import annotations

import math
import re
import time
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

import elign_lab.widgets as widgets
from elign_lab import load_model, load_oracle, sample
from elign_lab.alignment import Trainer, cpu_mini, log_density, return_to_go
from elign_lab.alignment.trainer import OracleFailureError
from elign_lab.evaluation import smiles, stability
from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles.protocol import Evaluation, Oracle
from elign_lab.training import load_state
from elign_lab.widgets import AlignmentDashboard, DFTCheck, Live, OracleComparison, RewardInspector, SamplingPanel
from elign_lab.widgets.panels import comparison, dashboard, dft_check, dragging, inspector, sampling
from elign_lab.widgets.panels.base import PLOTLY, Chart, Panel, badge, move_marks, number
from elign_lab.widgets.panels.reward_trace import explain, trace_group

SMALL = replace(
    cpu_mini(), groups=1, members=4, steps=12, skip_prefix=4, potential_stride=3, learning_rate=3e-4, warmup=0
)


@pytest.fixture(scope="module")
def model():
    return load_model("edm-mini")


@pytest.fixture(scope="module")
def oracle():
    # early clean estimates have atoms on top of each other: with this limit all of them are judged
    return load_oracle("learned", min_distance=1e-3)


@pytest.fixture(scope="module")
def trace(model, oracle):
    return trace_group(model, oracle, SMALL, size=18, seed=4)


class Moody(Oracle):
    """Learned energies; refuses molecules whose index in the call is in `bad` (all of them when bad is None)."""

    name = "moody"

    def __init__(self, inner: Oracle, bad) -> None:
        super().__init__(atom_energies=dict(inner.atom_energies), min_distance=inner.min_distance)
        self.elements, self.inner, self.bad = inner.elements, inner, bad

    def _compute(self, molecules):
        good = self.inner._compute(molecules)
        bad = self.bad(len(molecules))
        return [Evaluation.failure("in a bad mood") if i in bad else e for i, e in enumerate(good)]


# ---------------------------------------------------------------------- the arithmetic of the inspector
def compute(text: str) -> float:
    """Do the arithmetic of a line as a reader would."""
    code = text.replace("\N{MINUS SIGN}", "-").replace("×", "*").replace("^", "**")
    code = re.sub(r"√\(", "sqrt(", code)
    names = {"sqrt": math.sqrt, "exp": math.exp, "min": min, "max": max}
    return eval(code, {"__builtins__": {}}, {**names, "clip": lambda x, low, high: min(max(x, low), high)})


def test_every_shown_computation_gives_its_shown_result(trace):
    seen = 0
    for member in range(trace.members):
        for step in range(trace.steps):
            for line in explain(trace, member, step):
                assert compute(line.numbers) == pytest.approx(line.value, rel=4e-3, abs=4e-3), line
                seen += 1
    assert seen == 12 * trace.members * trace.steps


def test_the_trace_is_what_the_trainer_does(trace, model, oracle):
    policy = load_model("edm-mini").with_size_histogram({18: 1})
    trainer = Trainer(policy, oracle, replace(SMALL, seed=4, evaluate_every=10**9))
    done = trainer.step()
    assert torch.equal(trace.rollouts.states, done.rollouts.states)
    assert torch.equal(trace.advantage, done.advantages[0])
    assert torch.equal(trace.return_to_go, done.rewards.return_to_go)
    assert trace.evaluated == done.rewards.evaluated == (0, 3, 6, 7)
    # the model that was given is not the one that was trained
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), load_model("edm-mini").parameters(), strict=True))


def test_the_shown_quantities_belong_together(trace):
    c, last = trace.config, trace.steps - 1
    assert torch.allclose(trace.shaping.sum(1), trace.return_to_go[:, 0], atol=1e-4)  # Eq. 4 telescopes at gamma = 1
    assert torch.equal(trace.return_to_go, return_to_go(trace.potential, trace.energy_reward, c.gamma))
    assert trace.shaping[:, last].tolist() == pytest.approx((trace.energy_reward - trace.potential[:, last]).tolist())
    judged = torch.stack([trace.energy_per_atom[i, [trace.judged_step(i, k) for k in range(8)]] for i in range(4)])
    assert torch.allclose(trace.potential, -judged.clamp(-c.energy_clip, c.energy_clip), atol=1e-5)
    combined = c.energy_weight * trace.energy_advantage + c.force_weight * trace.force_advantage[:, None]
    assert torch.allclose(trace.advantage, combined.clamp(-c.adv_clip, c.adv_clip), atol=1e-6)
    assert torch.allclose(trace.objective.kl, trace.delta_squared / 2, atol=1e-5)
    ratio, a = trace.objective.log_ratio.exp(), trace.advantage
    away = ((ratio > 1 + c.clip_range) & (a > 0)) | ((ratio < 1 - c.clip_range) & (a < 0))
    assert torch.equal(trace.objective.clipped, away)
    assert 0 < int(away.sum()) < away.numel(), "the update is large enough to clip some pairs, and not all"


def test_the_log_ratio_is_that_of_two_densities(trace, oracle):
    """Independent of the stored-noise form: the two Gaussian densities of the paper, in float64."""
    policy = load_model("edm-mini").with_size_histogram({18: 1})
    trainer = Trainer(policy, oracle, replace(SMALL, seed=4, evaluate_every=10**9))
    trainer.step()
    r, k = trace.rollouts, 2
    t, s = r.times[k], r.times[k + 1]
    step = policy.schedule.transition(t, s)
    old = policy.posterior_mean(r.states[k].double(), r.eps[k].double(), step)
    with torch.no_grad():
        eps = policy.eps(r.states[k], torch.full((4,), t), r.mask).double()
    new = policy.posterior_mean(r.states[k].double(), eps, step)
    z = old + step.sigma * r.noise[k].double()
    difference = log_density(z, new, step.sigma, r.mask) - log_density(z, old, step.sigma, r.mask)
    assert torch.allclose(trace.objective.log_ratio[:, k].double(), difference, atol=2e-4)


def test_a_rollout_that_the_oracle_refuses_is_shown_as_such(model, oracle):
    found = trace_group(model, Moody(oracle, lambda n: {1} if n == 4 else ()), SMALL, size=18, seed=4)
    assert found.ok.tolist() == [True, False, True, True]
    assert "not judged" in inspector.clip_badge(found, 1, 0, strong=True)
    assert "not judged" in inspector.group_html(found, 1, 0)
    lines = {line.name: line for line in explain(found, 1, 0)}
    assert math.isnan(lines["return-to-go"].value)
    assert lines["return-to-go"].numbers == "the oracle could not judge it"
    assert lines["total advantage"].value == 0
    assert compute(lines["force advantage, of the whole rollout"].numbers) == 0
    with pytest.raises(OracleFailureError, match="failed on 4 of 4"):
        trace_group(model, Moody(oracle, range), SMALL, size=9)


def test_a_potential_that_could_not_be_judged_is_held(model, oracle):
    # the call with all clean estimates (32), or with the scheduled ones (16), loses the second scheduled step
    bad = {32: range(12, 16), 16: range(4, 8)}
    found = trace_group(model, Moody(oracle, lambda n: bad.get(n, ())), SMALL, size=18, seed=4)
    assert found.judged_step(0, 3) == found.judged_step(0, 5) == 0
    line = next(line for line in explain(found, 0, 3) if line.name.startswith("potential"))
    assert line.name == "potential, taken from step 0"
    assert compute(line.numbers) == pytest.approx(line.value, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 500}, "size is 500, expected 2 to"),
        ({"size": 1}, "size is 1, expected 2 to"),
        ({"config": replace(SMALL, energy_signal="naive")}, "explains Eq. 4 and Eq. 7"),
        ({"config": replace(SMALL, disentangle=False)}, "explains Eq. 4 and Eq. 7"),
    ],
)
def test_what_the_inspector_cannot_do(model, oracle, change, message):
    with pytest.raises(ValueError, match=message):
        trace_group(model, oracle, **{"config": SMALL, "size": 9, **change})


def test_reward_inspector_panel(model, oracle):
    panel = RewardInspector(model, oracle, SMALL, size=18, seed=4)
    assert repr(panel) == "RewardInspector(rollout 0 of 4, step 0 of 8)"
    first = panel.summary_html()
    panel.step, panel.member = 4, 2
    assert (panel.step, panel.member, panel.viewer.frame) == (4, 2, 4)
    expected = inspector.lines_html(explain(panel.trace, 2, 4))
    assert expected in panel.summary_html() != first
    assert panel.viewer.picture_html() in panel.summary_html()
    assert "; frame 5 of 8: step 4, t = " in panel.summary_html()
    assert "taken from step 3" in panel.summary_html()
    assert torch.equal(panel.viewer.molecules()[0].positions[0], panel.trace.clean[4].positions[2])
    panel.viewer.frame = 7  # what the browser's slider does
    assert {shape.x0 for shape in panel.chart.figure.select_shapes({"name": "shown now"})} == {7}
    assert inspector.lines_html(explain(panel.trace, 2, 7)) in panel.summary_html()
    for wrong in ("step", "member"):
        with pytest.raises(ValueError, match="expected 0 to 3 and 0 to 7"):
            setattr(panel, wrong, 99)
    assert (panel.step, panel.member) == (7, 2)

    before = panel.trace
    panel.size.value = 500
    with pytest.raises(ValueError, match="size is 500"):
        panel._live.start().wait(60)
    assert panel.trace is before
    assert "size is 500" in panel._live.last_error
    panel.size.value, panel.seed.value = 7, 1
    panel._live.start().wait(60)
    assert panel.trace.clean[0].sizes.tolist() == [7] * 4
    assert (panel.step, panel.member) == (0, 0)


def test_trace_figure(trace):
    figure = inspector.trace_figure(trace, 1, 5)
    assert len(figure.data) == 3 * trace.members
    chosen = figure.data[3]  # drawn last in its plot
    assert chosen.name == "rollout 1"
    assert chosen.y == pytest.approx(trace.potential[1].tolist(), rel=1e-3)
    assert [curve.line.width for curve in figure.data[:4]] == [1.4, 1.4, 1.4, 3]
    assert [shape.x0 for shape in figure.layout.shapes[:3]] == [5, 5, 5]
    band = figure.layout.shapes[3]
    assert (band.y0, band.y1) == pytest.approx((0.9, 1.1))
    assert figure.layout.xaxis3.title.text == "trained step"
    assert [figure.layout[f"yaxis{k}"].title.text for k in (1, 2, 3)] == ["Φ(s_t) (eV/atom)", "advantage A", "ratio ρ"]
    assert (
        move_marks(figure, 2).to_dict()["layout"]["shapes"]
        == inspector.trace_figure(trace, 1, 2).to_dict()["layout"]["shapes"]
    )


def test_an_estimate_that_was_refused_has_no_forces(model, oracle):
    panel = RewardInspector(model, Moody(oracle, lambda n: {8} if n == 32 else ()), SMALL, size=18, seed=4)
    assert panel.trace.status[2][0] == "in a bad mood"
    forces = [frame.forces for frame in panel.viewer._trajectories[0]]
    assert np.isnan(forces[2]).all(), "unknown, and not zero"
    assert np.isfinite(forces[3]).all()
    assert len(panel.viewer.to_png()) > 100


# ---------------------------------------------------------------------- sampling
def test_sampling_panel_gives_the_molecules_of_sample(model):
    panel = SamplingPanel({"edm-mini": model}, n=4, steps=6)
    panel.set(seed=3)
    panel.start().wait(60)
    expected = sample(model, 4, steps=6, seed=3)
    assert len(set(expected.sizes.tolist())) > 1, "sizes that differ, so that the order matters"
    assert torch.equal(panel.molecules.positions, expected.positions)
    assert torch.equal(panel.molecules.numbers, expected.numbers)
    shown = panel.viewer.molecules()
    assert [m.formula(0) for m in shown] == [expected.formula(i) for i in range(4)]
    assert panel.live.n_done == 7
    assert panel.summary_html() == panel.viewer.picture_html() + sampling.molecule_cards(expected)

    panel.set(temperature=0.5, n=2)
    panel.start().wait(60)
    assert torch.equal(panel.molecules.positions, sample(model, 2, steps=6, seed=3, temperature=0.5).positions)

    panel.set(sampler="dpm_solver", sizes="9", temperature=1.0)
    panel.start().wait(60)
    expected = sample(model, 2, sizes=[9, 9], steps=6, seed=3, sampler="dpm_solver")
    assert torch.equal(panel.molecules.positions, expected.positions)


def test_sampling_panel_keeps_its_settings_when_the_input_is_bad(model):
    panel = SamplingPanel({"edm-mini": model}, n=2, steps=6)
    panel.set(sizes="9 10")
    before = panel.settings
    for text, message in (("nine", "expected nothing, one"), ("9 9 9", "3 numbers for 2"), ("200", "model's limit of")):
        panel.controls["sizes"].value = text  # as the browser does: the message is shown
        assert message in panel.last_error
        assert panel.controls["sizes"].value == "9 10"
        with pytest.raises(ValueError, match=message):  # as Python does
            panel.set(sizes=text)
        assert panel.settings == before
    panel.controls["seed"].value = 5
    assert panel.last_error == ""
    assert panel.settings == replace(before, seed=5)
    for values, message in (
        ({"model": "other"}, "unknown model 'other'"),
        ({"n": 50, "sizes": ""}, "n is 50, expected 1 to 12"),
        ({"steps": 10**6}, "steps"),
        ({"heat": 2}, "unknown setting heat"),
        ({"temperature": 0.5, "sampler": "dpm_solver"}, "has no noise"),
    ):
        with pytest.raises(ValueError, match=message):
            panel.set(**values)
    with pytest.raises(ValueError, match="models is empty"):
        SamplingPanel({})


def test_sampling_panel_is_locked_while_it_runs(model):
    panel = SamplingPanel({"edm-mini": model}, n=1, steps=500)
    panel.start()
    while panel.live.n_done == 0:
        time.sleep(0.01)
    assert all(control.disabled for control in panel.controls.values())
    with pytest.raises(ValueError, match="a run is going on"):
        panel.set(seed=1)
    panel.live.stop()
    panel.live.wait(30)
    assert panel.live.status == "stopped"
    assert panel.molecules is None
    assert not any(control.disabled for control in panel.controls.values())


def test_molecule_cards_say_what_the_metrics_say():
    batch = MoleculeBatch.from_smiles(["CCO", "C"])
    broken = batch.positions.clone()
    broken[1, 1] += 3  # a hydrogen far away
    html = sampling.molecule_cards(batch.with_positions(broken))
    found = stability(batch.with_positions(broken))
    assert found.molecule.tolist() == [True, False]
    assert "9 of 9 atoms stable" in html
    assert f"{int(found.atoms[1].sum())} of 5 atoms stable" in html
    assert html.count("elp-good") == 2 + sum(s is not None for s in smiles(batch)[1:])


# ---------------------------------------------------------------------- dashboard
TINY = replace(
    SMALL, members=2, steps=40, skip_prefix=36, iterations=3, evaluate_every=2, evaluate_n=2, learning_rate=3e-5
)


def test_dashboard_stops_resumes_and_equals_the_trainer(model, oracle, tmp_path):
    panel = AlignmentDashboard(model, oracle, replace(TINY, iterations=50), out=tmp_path / "run", gallery=2)
    panel.start()
    while len(panel.rows) < 2:
        assert panel.live.status == "running", panel.live.last_error
        time.sleep(0.02)
    panel.live.stop()
    panel.live.wait(60)
    done = len(panel.rows)
    assert panel.live.status == "stopped"
    assert panel.trainer.iteration == done < 50
    assert panel.viewer.n_frames == done + 1  # the base model comes first
    assert panel.chart.figure.data[0].x == tuple(range(done))

    # a new panel, as in a new kernel, goes on in the same folder; the numbers are those of one run
    total = done + 1
    again = AlignmentDashboard(model, oracle, replace(TINY, iterations=total), out=tmp_path / "run", gallery=0)
    assert [row["iteration"] for row in again.rows] == list(range(done))
    assert again.chart.figure.data[0].y == panel.chart.figure.data[0].y
    again.start().wait(60)
    assert (again.live.n_done, again.trainer.iteration) == (total, total)
    policy = load_model("edm-mini")
    straight = Trainer(policy, oracle, replace(TINY, iterations=total)).run(progress=False)
    for a, b in zip(again.rows, straight, strict=True):
        assert a["reward_force"] == pytest.approx(b["reward_force"])
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-4)
    assert f"{total} of {total}" in again.summary_html()
    again.start().wait(60)  # nothing is left to do
    assert len(again.rows) == total


def test_dashboard_shows_the_failure_of_a_run(model, oracle):
    panel = AlignmentDashboard(model, Moody(oracle, range), TINY, gallery=0)
    with pytest.raises(OracleFailureError):
        panel.start().wait(60)
    assert "failed on 2 of 2 rollouts" in panel.live.last_error
    assert "No iteration yet" in panel.summary_html()
    with pytest.raises(ValueError, match="gallery is 40"):
        AlignmentDashboard(model, oracle, TINY, gallery=40)


def test_a_run_that_fails_keeps_its_last_good_checkpoint(model, oracle, tmp_path, monkeypatch):
    panel = AlignmentDashboard(model, oracle, replace(TINY, checkpoint_every=2), out=tmp_path / "run", gallery=0)
    good = panel.trainer.step

    def step():
        done = good()
        if panel.trainer.iteration == 3:
            panel.trainer.policy.requires_grad_(False)
            for p in panel.trainer.policy.parameters():
                p.fill_(math.nan)
            raise RuntimeError("diverged")
        return done

    monkeypatch.setattr(panel.trainer, "step", step)
    with pytest.raises(RuntimeError, match="diverged"):
        panel.start().wait(60)
    saved = load_state(tmp_path / "run" / "checkpoint.pt")
    assert saved["iteration"] == 2
    assert all(bool(value.isfinite().all()) for value in saved["policy"].values())


def test_learning_curves_hold_every_metric_that_was_logged():
    rows = [
        {"iteration": i, "reward_force": -4 + i, "reward_energy": 5.0, "kl": 0.1, "clip_fraction": 0.2} for i in (0, 1)
    ]
    rows[1] |= {"eval_force": -3.0, "reward_validity": -0.5}
    figure = dashboard.dashboard_figure(rows, ["validity"])
    curves = {trace.name: (trace.x, trace.y) for trace in figure.data}
    assert curves["force reward r_F (eV/Å)"] == ((0, 1), (-4, -3))
    assert curves["force reward r_F (eV/Å), fixed evaluation set"] == ((1.5,), (-3.0,))  # after iteration 1
    assert curves["energy reward r_E (eV/atom), fixed evaluation set"] == ((), ())
    assert curves["reward validity"] == ((1,), (-0.5,))
    assert "force reward r_F (eV/Å) from -4 to -3; " in figure.layout.meta["alt"]
    assert figure.layout.yaxis5.title.text == "reward validity"
    assert len(dashboard.dashboard_figure([]).data) == 6


# ---------------------------------------------------------------------- oracles
def test_stretching_a_bond_moves_one_side_and_nothing_else():
    ethanol = MoleculeBatch.from_smiles("CCO").to(dtype=torch.float64)
    numbers, x = ethanol.arrays()[0]
    _, moved = comparison.stretch_bond(ethanol, 0, 1, 2.4).arrays()[0]
    assert np.linalg.norm(moved[1] - moved[0]) == pytest.approx(2.4)
    side = np.isclose(moved, x).all(1)
    methyl = [0, *np.flatnonzero(np.linalg.norm(x - x[0], axis=1) < 1.2)[1:]]
    assert np.flatnonzero(side).tolist() == sorted(methyl)
    shift = (moved - x)[~side]
    assert np.allclose(shift, shift[0])
    ring = MoleculeBatch.from_smiles("C1CC1").to(dtype=torch.float64)
    _, before = ring.arrays()[0]
    _, after = comparison.stretch_bond(ring, 0, 1, 2.0).arrays()[0]
    assert (np.abs(after - before).max(1) > 1e-6).tolist() == [k == 1 for k in range(9)]
    for i, j, length, message in ((0, 0, 1.0, "two different"), (0, 99, 1.0, "0 to 8"), (0, 1, -1.0, "positive")):
        with pytest.raises(ValueError, match=message):
            comparison.stretch_bond(ethanol, i, j, length)
    assert numbers[0] == 6


def test_moving_an_atom():
    water = MoleculeBatch.from_smiles("O").to(dtype=torch.float64)
    moved = comparison.move_atom(water, 1, (0.1, 0, -0.2))
    assert (moved.positions - water.positions)[0].tolist() == [[0, 0, 0], pytest.approx([0.1, 0, -0.2]), [0, 0, 0]]
    with pytest.raises(ValueError, match="atom 7"):
        comparison.move_atom(water, 7, (0, 0, 0))


def test_scan_forces_are_the_slope_of_the_energy(oracle):
    xtb = load_oracle("xtb", workers=0)
    water = MoleculeBatch.from_smiles("O").to(dtype=torch.float64)
    found = comparison.scan(water, comparison.Coordinate(0, 1), {"learned": oracle, "xtb": xtb}, points=61)
    along = water.positions[0, 1] - water.positions[0, 0]
    along = along / along.norm()
    for name, tolerance in (("learned", 0.15), ("xtb", 0.15)):
        slope = np.gradient(found.energy[name], found.values)
        projected = -(found.forces[name][:, 1].double() @ along).numpy()  # only atom 1 moves
        assert np.abs(slope - projected)[3:-3].max() < tolerance * np.abs(slope[3:-3]).max()
        best = found.values[np.nanargmin(found.energy[name])]
        assert 0.9 < best < 1.05, "the bond length of water"
        assert found.energy[name].min() == 0
    figure = comparison.scan_figure(found, 10)
    assert [trace.name for trace in figure.data] == ["learned", "learned", "xtb", "xtb"]
    assert figure.layout.shapes[0].x0 == pytest.approx(found.values[10])
    assert (figure.layout.yaxis.title.text, figure.layout.yaxis2.title.text) == (
        "energy above the lowest (eV)",
        "force RMS (eV/Å)",
    )


def test_a_point_that_was_refused_has_no_forces():
    panel = OracleComparison("C=O", {"learned": load_oracle("learned", min_distance=0.9)})
    refused = [k for k, status in enumerate(panel.scan.status["learned"]) if status != "ok"]
    assert refused
    frames = panel.viewer._trajectories[0]
    for k, frame in enumerate(frames):
        assert bool(np.isnan(frame.forces).all()) == (k in refused), "unknown, and not zero"


def test_oracle_comparison_panel(oracle):
    panel = OracleComparison("C=O", {"learned": oracle})
    assert panel.coordinate.label == "bond C0–O1"
    rest = panel.viewer.molecules()[0].positions[0]
    assert float((rest[0] - rest[1]).norm()) == pytest.approx(panel.scan.values[panel.point], abs=1e-3)
    panel.point = 0
    assert number(float(panel.scan.f_rms["learned"][0])) in panel.summary_html()
    assert panel.chart.figure.layout.shapes[0].x0 == pytest.approx(panel.scan.values[0])
    panel.coordinate.index = len(panel.coordinate.options) - 1
    assert panel.scan.label == "atom H3 along z: shift (Å)"
    assert panel.scan.values[panel.point] == pytest.approx(0, abs=1e-9)
    panel.smiles.value = "C(("
    assert "not a valid SMILES" in panel.last_error
    assert (panel.smiles.value, panel.molecule.formula(0)) == ("C=O", "CH2O")
    panel.smiles.value = "CS"  # an element that the oracle does not know
    assert "learned oracle cannot evaluate CH4S: unsupported element S" in panel.last_error
    assert panel.molecule.formula(0) == "CH2O"
    panel.smiles.value = "CC"
    assert (panel.last_error, panel.molecule.formula(0)) == ("", "C2H6")
    with pytest.raises(ValueError, match="oracles is empty"):
        OracleComparison("C", {})


def test_a_test_of_a_notebook_gets_what_the_panel_shows(oracle, monkeypatch):
    panel = OracleComparison("C=O", {"learned": oracle})
    monkeypatch.setenv("ELIGN_LAB_RAISE", "1")
    with pytest.raises(ValueError, match="not a valid SMILES"):
        panel.smiles.value = "C(("
    assert "not a valid SMILES" in panel.last_error
    assert "not a valid SMILES" in panel._alert.value
    assert (panel.smiles.value, panel.molecule.formula(0)) == ("C=O", "CH2O")
    panel.smiles.value = "CC"
    assert (panel.last_error, panel.molecule.formula(0)) == ("", "C2H6")
    monkeypatch.setenv("ELIGN_LAB_RAISE", "")
    panel.smiles.value = "C(("
    assert "not a valid SMILES" in panel.last_error


class Logged(Oracle):
    """Another oracle that is not a learned one, with a log of what it is asked."""

    name = "logged"

    def __init__(self, inner: Oracle) -> None:
        super().__init__(atom_energies=dict(inner.atom_energies), min_distance=inner.min_distance)
        self.elements, self.inner, self.asked = inner.elements, inner, []

    def _compute(self, molecules):
        self.asked += [x.copy() for _, x in molecules]
        return self.inner._compute(molecules)


def test_placing_an_atom():
    water = MoleculeBatch.from_smiles("O").to(dtype=torch.float64)
    placed = dragging.place_atom(water, 1, (0.1, 0, -0.2))
    assert placed.positions[0, 1].tolist() == pytest.approx([0.1, 0, -0.2])
    assert torch.equal(placed.positions[0, [0, 2]], water.positions[0, [0, 2]])
    assert dragging.displacement(water, water) == "start"
    far = placed.positions[0, 1] - water.positions[0, 1]
    assert dragging.displacement(water, placed) == f"H1 moved {float(far.norm()):.2f} Å"
    twice = comparison.move_atom(placed, 0, (0, 0, 0.1))
    assert dragging.displacement(water, twice).startswith("2 atoms moved, up to ")
    for i, position, message in (
        (3, (0, 0, 0), "atom 3: expected 0 to 2"),
        (-1, (0, 0, 0), "atom -1"),
        (0, (0, math.nan, 0), "position of atom 0 is .*nan.*expected three finite numbers"),
        (0, (0, 0), "expected three finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            dragging.place_atom(water, i, position)


def cells(html: str) -> list[list[str]]:
    """The rows of a table, without the head."""
    return [re.findall(r"<td>(?:<span[^>]*>)?([^<]*)", row) for row in html.split("<tr>")[2:]]


def test_dragging_an_atom_in_the_oracle_comparison():
    oracle = load_oracle("learned", dtype=torch.float64)  # four digits of a difference of energies, also near zero
    slow = Logged(oracle)
    panel = OracleComparison("C=O", {"learned": oracle, "slow": slow})
    panel.coordinate.value = comparison.DRAG
    assert panel.coordinate.label == "drag an atom"
    assert (panel.last_error, panel.viewer.draggable, panel.viewer.n_frames) == ("", True, 1)
    dragged, start = panel.dragged, panel.dragged.start
    assert [row[1] for row in cells(panel.summary_html())] == ["0", "0"]
    assert dragged.reset_button.disabled
    slow.asked.clear()

    def pull(by: float, done: bool) -> None:
        position = (start.positions[0, 1] + torch.tensor([0, 0, by])).tolist()
        message = {"kind": "drag", "panel": 1, "frame": 0, "atom": 1, "position": position, "done": done}
        panel.viewer._handle_custom_msg(message, [])

    # while the mouse button is down, the learned oracle answers for the structure that is shown
    for by in (0.2, 0.4):
        pull(by, done=False)
        expected = dragging.ask(comparison.move_atom(start, 1, (0, 0, by)), oracle)
        zero = dragging.ask(start, oracle)
        learned, other = cells(panel.summary_html())
        assert learned == [
            "learned",
            *map(number, (expected.energy - zero.energy, expected.f_rms, expected.f_max)),
            "ok",
        ]
        assert other == ["slow", "–", "–", "–", dragging.WHILE_DRAGGING]
        shown = panel.viewer.molecules()
        assert [float(m.positions[0, 1, 2]) for m in shown] == pytest.approx([float(start.positions[0, 1, 2]) + by] * 2)
        frames = [trajectory[0] for trajectory in panel.viewer._trajectories]
        assert frames[0].forces == pytest.approx(expected.forces.numpy(), rel=1e-5)
        assert np.isnan(frames[1].forces).all(), "no force of the old structure"
        assert frames[0].label == f"O1 moved {by:.2f} Å"
    assert slow.asked == []

    # when it is let go, the others are asked, once and for this structure
    pull(0.5, done=True)
    (asked,) = slow.asked
    assert asked == pytest.approx(dragged.molecule.positions[0].numpy())
    learned, other = cells(panel.summary_html())
    assert learned[1:] == other[1:]
    assert learned[4] == "ok"
    assert float(learned[1]) > 0

    # the start is back, with its numbers, and no oracle is asked for them again
    dragged.reset_button.click()
    assert torch.equal(dragged.molecule.positions, start.positions)
    assert [row[1] for row in cells(panel.summary_html())] == ["0", "0"]
    assert len(slow.asked) == 1


def test_a_drag_that_the_oracles_refuse_shows_their_reason():
    panel = OracleComparison("C=O", {"learned": load_oracle("learned")})
    panel.coordinate.value = comparison.DRAG
    dragged = panel.dragged
    dragged.move(1, dragged.start.positions[0, 0].tolist())  # O on C
    assert cells(panel.summary_html())[0][1:4] == ["–", "–", "–"]
    assert "atoms 0 and 1 are 0.000 Angstrom apart" in panel.summary_html()
    assert np.isnan(panel.viewer._trajectories[0][0].forces).all()
    for atom, position, message in ((4, [0, 0, 0], "a drag of atom 4"), (0, [0, math.nan, 0], "three finite numbers")):
        before = dragged.molecule
        message_sent = {"kind": "drag", "panel": 0, "frame": 0, "atom": atom, "position": position, "done": True}
        panel.viewer._handle_custom_msg(message_sent, [])
        assert message in panel.viewer.last_error
        assert dragged.molecule is before
    dragged.reset()
    assert cells(panel.summary_html())[0][4] == "ok"


def test_an_oracle_that_raises_leaves_no_number_of_the_old_structure(oracle):
    class Broken(Logged):
        def _compute(self, molecules):
            if len(self.asked) > 0:
                raise RuntimeError("the backend is gone")
            return super()._compute(molecules)

    dragged = dragging.DraggedMolecule(MoleculeBatch.from_smiles("C=O"), {"learned": oracle, "broken": Broken(oracle)})
    message = {"kind": "drag", "panel": 0, "frame": 0, "atom": 1, "position": [0.0, 0.0, 9.0], "done": True}
    dragged.viewer._handle_custom_msg(message, [])
    assert dragged.viewer.last_error == "RuntimeError: the backend is gone"
    learned, broken = cells(dragged.summary_html())
    assert learned[4] == "ok"
    assert broken == ["broken", "–", "–", "–", dragging.NO_ANSWER]


def test_the_panel_stays_in_the_mode_of_dragging_and_comes_back(oracle):
    panel = OracleComparison("C=O", {"learned": oracle})
    panel.coordinate.value = comparison.DRAG
    panel.smiles.value = "CS"  # an element that the oracle does not know
    assert "learned oracle cannot evaluate CH4S" in panel.last_error
    assert (panel.coordinate.value, panel.dragged.molecule.formula(0)) == (comparison.DRAG, "CH2O")
    panel.smiles.value = "CC"
    assert (panel.last_error, panel.coordinate.value) == ("", comparison.DRAG)
    assert panel.dragged.molecule.formula(0) == "C2H6"
    panel.coordinate.index = 1
    assert panel.dragged is None
    assert panel.coordinate.label == "bond C0–C1"
    assert panel.viewer.n_frames == len(panel.scan.values)
    assert "lowest at" in panel.summary_html()


def test_oracles_that_cannot_be_made_are_named_with_the_reason(tmp_path):
    made, reasons = comparison.usable_oracles(("learned", "ani"), {"ani": {"weights": tmp_path / "nowhere.pt"}})
    assert list(made) == ["learned"]
    assert "ani" in reasons
    assert reasons["ani"]
    assert comparison.missing_html(reasons).startswith("<details class='elp-note'><summary>ani cannot be used here<")


def test_by_default_every_oracle_that_is_installed_is_compared(oracle, monkeypatch):
    def load(name, **options):
        if name != "learned":
            raise ValueError(f"no {name} here")
        return oracle

    monkeypatch.setattr(comparison, "load_oracle", load)
    panel = OracleComparison("C=O")
    assert repr(panel) == "OracleComparison(CH2O, learned)"
    for name in ("xtb", "ani", "uma"):
        assert f"<summary>{name} cannot be used here</summary>no {name} here" in panel.summary_html()


# ---------------------------------------------------------------------- DFT
def test_dft_check_asks_every_oracle_and_says_the_cost_before(oracle):
    pytest.importorskip("pyscf")
    panel = DFTCheck("[H][H]", {"learned": oracle}, dft=load_oracle("dft", workers=0))
    assert "4 basis functions" in panel.children[0].value
    assert "Expect about" in panel.children[0].value
    panel.start().wait(60)
    assert [v.oracle for v in panel.verdicts] == ["learned", "dft"]
    exact = panel.verdicts[1]
    assert exact.status == "ok"
    assert exact.energy_per_atom == pytest.approx(-2.37, abs=0.1)  # D_e of H2 is 4.75 eV (Huber and Herzberg 1979)
    html = panel.summary_html()
    assert number(dft_check.cosine(panel.verdicts[0].forces, exact.forces), 3) in html
    with pytest.raises(ValueError, match="not a valid SMILES"):
        DFTCheck("C((", {})
    with pytest.raises(ValueError, match="batch is empty"):
        DFTCheck(MoleculeBatch.from_smiles("C")[:0], {})


def test_the_cost_of_dft_grows_with_the_molecule():
    assert dft_check.expected_seconds(54) == pytest.approx(8, rel=0.1)
    assert 20 < dft_check.expected_seconds(96) < 45
    water = MoleculeBatch.from_smiles("O")
    assert dft_check.basis_functions(water) == 18


def test_a_failure_is_a_status_in_the_table(oracle):
    sulphur = MoleculeBatch.from_smiles("S")
    verdict = dft_check.judge(sulphur, "learned", oracle)
    assert math.isnan(verdict.f_rms)
    assert "unsupported element S" in dft_check.verdict_html([verdict])


# ---------------------------------------------------------------------- what they share
def test_numbers_and_badges():
    assert number(-0.00012345, 3) == "\N{MINUS SIGN}0.000123"
    assert "&lt;b&gt;" in badge("<b>", "bad")
    assert "elp-bad" in badge("x", "bad", strong=True)


def test_a_page_without_widgets_gets_the_content_as_html(oracle):
    panel = OracleComparison("C=O", {"learned": oracle})
    bundle = panel._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert data["text/html"] == panel.summary_html()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert isinstance(panel, Panel)


def shown_without_widgets(widget) -> dict:
    bundle = widget._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert "application/vnd.jupyter.widget-view+json" in data
    return data


def test_a_panel_that_has_not_run_says_what_it_will_show(model, oracle):
    data = shown_without_widgets(SamplingPanel({"edm-mini": model}, n=3, steps=25))
    assert "Start samples 3 by edm-mini in 25 steps" in data["text/html"]
    assert data["text/plain"].startswith("SamplingPanel('edm-mini'")
    data = shown_without_widgets(AlignmentDashboard(model, oracle, TINY, gallery=1))
    assert "No iteration yet: Start runs 3" in data["text/html"]
    assert PLOTLY not in data
    assert "<img" not in data["text/html"]
    data = shown_without_widgets(DFTCheck("C=O", {"learned": oracle}, dft=oracle))
    assert "No answer yet: Start asks learned, dft." in data["text/html"]


def test_a_dashboard_that_has_run_leaves_its_curves_and_samples(model, oracle):
    panel = AlignmentDashboard(model, oracle, replace(TINY, iterations=1), gallery=1)
    panel.start().wait(120)
    data = shown_without_widgets(panel)
    assert "1 of 1" in data["text/html"]
    assert panel.viewer.picture_html() in data["text/html"]
    assert data[PLOTLY]["data"][0]["y"] == [panel.rows[0]["reward_force"]]
    assert data[PLOTLY]["layout"]["meta"]["alt"].startswith("Learning curves over 1 iterations: force reward")


def test_a_chart_and_a_loop_leave_something_when_shown_alone():
    empty = dashboard.dashboard_figure([])
    assert shown_without_widgets(Chart(empty))["text/html"] == "A chart in which nothing is drawn yet."
    drawn = shown_without_widgets(Chart(dashboard.dashboard_figure([{"iteration": 0, "kl": 0.5}])))
    assert "text/html" not in drawn
    assert drawn[PLOTLY]["data"][4]["y"] == [0.5]
    loop = Live(range(3), description="a <loop>")
    assert shown_without_widgets(loop)["text/html"] == "a &lt;loop&gt;: ready, 0 of 3 items done"
    loop.start().wait(20)
    assert shown_without_widgets(loop)["text/html"] == "a &lt;loop&gt;: finished, 3 of 3 items done"


def test_a_chart_sends_the_figure_as_it_is():
    figure = dashboard.dashboard_figure([{"iteration": 0, "kl": 0.5}])
    chart = Chart(figure)
    (output,) = chart.outputs
    sent = output["data"]["application/vnd.plotly.v1+json"]
    kl = next(trace for trace in sent["data"] if trace["name"].startswith("KL"))
    assert kl["y"] == [0.5]
    assert sent["layout"]["height"] == figure.layout.height
    chart.draw(go.Figure())
    assert chart.outputs[0]["data"]["application/vnd.plotly.v1+json"]["data"] == []


def test_the_panels_are_exported():
    for name in (
        "AlignmentDashboard",
        "DFTCheck",
        "MoleculeEditor",
        "OracleComparison",
        "RewardInspector",
        "SamplingPanel",
    ):
        assert name in widgets.__all__
        assert getattr(widgets, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = widgets.Nonsense
