"""The alignment dashboard: learning curves and samples while FED-GRPO runs, with stop and resume."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ipywidgets

from elign_lab.alignment.config import AlignConfig, cpu_mini
from elign_lab.alignment.rewards import TerminalChannel
from elign_lab.alignment.trainer import Trainer
from elign_lab.denoiser import Denoiser
from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles.protocol import Oracle
from elign_lab.sampling import sample
from elign_lab.teaching.figure import COLORS, PANEL, Figure
from elign_lab.training import read_json_lines
from elign_lab.widgets.live import Live
from elign_lab.widgets.panels.base import Chart, Panel, badge, figures_row, number
from elign_lab.widgets.viewer import MoleculeViewer

Metrics = Mapping[str, float]
_CURVES = (
    ("force reward r_F (eV/Å)", "reward_force", "eval_force", COLORS["tilt"]),
    ("energy reward r_E (eV/atom)", "reward_energy", "eval_energy", COLORS["aligned"]),
    ("KL to the base model (nat)", "kl", None, COLORS["other"]),
    ("clipped pairs (share)", "clip_fraction", None, COLORS["base"]),
)


# ---------------------------------------------------------------------- pure functions
def dashboard_figure(rows: Sequence[Metrics], channels: Sequence[str] = ()) -> Figure:
    """Learning curves: force, energy, KL, clip fraction, and one more for each further reward channel.

    A star is the mean over the fixed evaluation set. A metric that a row lacks is left out.
    """
    curves = [*_CURVES, *((f"reward {name}", f"reward_{name}", None, COLORS["aligned"]) for name in channels)]
    lines = -(-len(curves) // 2)
    known = [_curve(rows, key) for _, key, *_ in curves]
    named = [(title, y) for (title, *_), (_, y) in zip(curves, known, strict=True) if y]
    words = "; ".join(f"{title} from {y[0]:.3g} to {y[-1]:.3g}" for title, y in named) or "none yet"
    alt = f"Learning curves over {len(rows)} iterations: {words}."
    figure = Figure(x="iteration", y=curves[0][0], alt=alt, height=215 * lines, template=PANEL)
    figure.set_subplots(lines, 2, horizontal_spacing=0.1, vertical_spacing=0.24 / lines)
    for k, ((title, _, evaluated, color), (x, y)) in enumerate(zip(curves, known, strict=True)):
        where = {"row": k // 2 + 1, "col": k % 2 + 1}
        style = {"line": {"color": color}, "marker": {"size": 5}}
        figure.add_scatter(x=x, y=y, mode="lines+markers", name=title, **style, **where)
        if evaluated:
            x, y = _curve(rows, evaluated)
            star = {"symbol": "star", "size": 12, "color": color, "line": {"width": 1, "color": "white"}}
            name = f"{title}, fixed evaluation set"
            figure.add_scatter(x=[v + 0.5 for v in x], y=y, mode="markers", name=name, marker=star, **where)
        figure.update_xaxes(title_text="iteration", rangemode="tozero", **where).update_yaxes(title_text=title, **where)
    return figure.update_layout(showlegend=False)


def _curve(rows: Sequence[Metrics], key: str) -> tuple[list[float], list[float]]:
    kept = [row for row in rows if key in row]
    return [row["iteration"] for row in kept], [row[key] for row in kept]


def progress_html(rows: Sequence[Metrics], config: AlignConfig) -> str:
    """Where the run is: iteration, KL, clip fraction, failures, and what the iteration cost."""
    if not rows:
        return (
            f"<span class='elp-note'>No iteration yet: Start runs {config.iterations} and draws after each the rewards "
            "r_F and r_E, the KL divergence to the base model, the share of clipped pairs, and samples.</span>"
        )
    now, first = rows[-1], rows[0]
    gain = now["reward_force"] - first["reward_force"]
    seconds = sum(now[f"seconds_{part}"] for part in ("rollout", "oracle", "update"))
    figures = {
        "iterations done": f"{int(now['iteration']) + 1} of {config.iterations}",
        "r_F (eV/Å)": number(now["reward_force"], 3),
        "since iteration 0": f"{'+' if gain >= 0 else ''}{number(gain, 2)}",
        "KL (nat)": number(now["kl"], 2),
        "clipped": f"{100 * now['clip_fraction']:.0f} %",
        "oracle calls": f"{int(now['oracle_molecules'])}",
        "s an iteration": f"{seconds:.1f}",
    }
    rollouts = config.groups * config.members
    failed = int(now["failed"])
    tone = "good" if failed == 0 else "warn"
    return figures_row(figures) + badge(f"{failed} of {rollouts} rollouts not judged", tone)


# ---------------------------------------------------------------------- the panel
class AlignmentDashboard(Panel):
    """Align a copy of `model` with `oracle`, live: start, pause, stop, and start again to go on where it stopped.

    config: default `cpu_mini`; out: folder of the run, which is continued when it exists (also by a new kernel).
    gallery: molecules that are sampled from the policy after every iteration, with the same sizes and noise each time;
    0 for none. The frame slider of the gallery goes back to earlier policies. `trainer.policy` is the aligned model,
    `rows` the metrics of all iterations.
    """

    def __init__(
        self,
        model: Denoiser,
        oracle: Oracle,
        config: AlignConfig | None = None,
        *,
        out: str | Path | None = None,
        channels: Sequence[TerminalChannel] = (),
        gallery: int = 4,
    ) -> None:
        if not 0 <= gallery <= 12:
            raise ValueError(f"gallery is {gallery}, expected 0 to 12 molecules")
        self.config = config or cpu_mini()
        self.trainer = Trainer(copy.deepcopy(model), oracle, self.config, out=out, channels=channels)
        log = Path(out) / "log.jsonl" if out is not None else None
        self.rows: list[Metrics] = []
        if log is not None and log.exists():
            self.rows += read_json_lines(log)
        self._gallery = gallery
        self.live: Live[Metrics] = Live(self._iterations, total=self.config.iterations, description="alignment")
        self._channels = [channel.name for channel in channels]
        self.chart = Chart(dashboard_figure(self.rows, self._channels))
        self._progress = ipywidgets.HTML()
        names: dict[str, list[MoleculeBatch]] = {f"sample {i}": [] for i in range(gallery)}
        self.viewer = MoleculeViewer(names, title="the same noise, policy by policy", height=190) if gallery else None
        super().__init__(
            "Alignment",
            f"FED-GRPO, {self.config.groups} groups of {self.config.members} rollouts an iteration. "
            "Stop ends after the iteration in hand; Start goes on from there.",
            [self.live, self._progress, self.chart, *([self.viewer] if self.viewer else [])],
        )
        self._draw()

    def start(self) -> Live[Metrics]:
        """Start, or go on after a stop, as the button does; `.wait()` on what it returns."""
        return self.live.start()

    def summary_html(self) -> str:
        """Where the run is, and the samples of the policy."""
        pictures = self.viewer.picture_html() if self.viewer is not None and self.viewer.n_frames else ""
        return self._progress.value + pictures

    def summary_figure(self) -> Figure | None:
        """The learning curves, after the first iteration."""
        return dashboard_figure(self.rows, self._channels) if self.rows else None

    def __repr__(self) -> str:
        return f"AlignmentDashboard({len(self.rows)} of {self.config.iterations} iterations)"

    # ------------------------------------------------------------------ wiring
    def _iterations(self) -> Iterator[Metrics]:
        yield from list(self.rows)  # what is done counts in the progress bar
        if self.viewer is not None and self.viewer.n_frames == 0:
            self._push_gallery()
        try:
            for iteration in self.trainer.steps(self.config.iterations):
                self.rows.append(iteration.metrics)
                self._draw()
                if self.viewer is not None:
                    self._push_gallery()
                yield iteration.metrics
        except GeneratorExit:  # stopped
            self._save()
            raise
        self._save()

    def _save(self) -> None:
        """A checkpoint of where the run ends, unless it fails: then the last good one is kept."""
        if self.trainer.iteration % self.config.checkpoint_every:
            self.trainer.save()

    def _draw(self) -> None:
        self.chart.draw(dashboard_figure(self.rows, self._channels))
        self._progress.value = progress_html(self.rows, self.config)

    def _push_gallery(self) -> None:
        if self.viewer is None:
            return
        done = self.trainer.iteration
        label = f"after {done}" if done else "base"
        c = self.config
        molecules = sample(self.trainer.policy, self._gallery, steps=c.steps, spacing=c.spacing, seed=c.seed)
        for i in range(self._gallery):
            self.viewer.push(molecules[i], label=f"{label}: {molecules.formula(i)}", panel=i)
