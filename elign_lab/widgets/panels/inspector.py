"""The reward inspector: step along the rollouts of one group and see where every number comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import ipywidgets

from elign_lab.alignment.config import AlignConfig, cpu_mini
from elign_lab.denoiser import Denoiser
from elign_lab.oracles.protocol import Oracle
from elign_lab.teaching.figure import COLORS, PANEL, Figure, faded
from elign_lab.widgets.live import Live
from elign_lab.widgets.panels.base import (
    MEMBER_COLOR,
    Chart,
    Panel,
    add_mark,
    badge,
    escape,
    headed_table,
    move_marks,
    number,
)
from elign_lab.widgets.panels.reward_trace import UNJUDGED, Line, RewardTrace, explain, trace_group
from elign_lab.widgets.viewer import MoleculeViewer

_CURVES = (
    ("Φ(s_t) (eV/atom)", "potential"),
    ("advantage A", "advantage"),
    ("ratio ρ", "ratio"),
)
_RATIO_RANGE = 4  # the axis of the ratio shows this many clip ranges on each side of 1


# ---------------------------------------------------------------------- pure functions
def lines_html(lines: Sequence[Line]) -> str:
    """The table of `explain`: name and formula, numbers put in, result."""
    rows = []
    for section, part in groupby(lines, lambda line: line.section):
        rows.append(f"<tr class='elp-section'><td colspan='3'>{escape(section)}</td></tr>")
        rows += [
            f"<tr><td>{escape(line.name)} <span class='elp-source'>{escape(line.source)}</span><br>"
            f"<span class='elp-formula'>{line.formula}</span></td>"
            f"<td class='elp-numbers'>{_numbers_html(line)}</td>"
            f"<td>{number(line.value)}{f' <small>{escape(line.unit)}</small>' if line.unit else ''}</td></tr>"
            for line in part
        ]
    columns = "".join(f"<col style='width: {width}%'>" for width in (40, 34, 26))
    table = f"<colgroup>{columns}</colgroup><tbody>{''.join(rows)}</tbody>"
    return f"<div class='elp-scroll'><table class='elp-trace'>{table}</table></div>"


def _numbers_html(line: Line) -> str:
    text = re.sub(r"\^(\d+)", r"<sup>\1</sup>", escape(line.numbers))
    return text if line.numbers == UNJUDGED else f"= {text}"


def group_html(trace: RewardTrace, member: int, step: int) -> str:
    """The whole group at one step, one row a rollout; the chosen rollout is marked."""
    names = ("rollout", "result", "r_E", "r_F", "G_t", "A^E", "A^F", "A", "ρ", "")
    rows = []
    for i in range(trace.members):
        values = (
            trace.energy_reward[i],
            trace.force_reward[i],
            trace.return_to_go[i, step],
            trace.energy_advantage[i, step],
            trace.force_advantage[i],
            trace.advantage[i, step],
            trace.objective.log_ratio[i, step].exp(),
        )
        cells = "".join(f"<td>{number(float(v), 3)}</td>" for v in values)
        here = " class='elp-here'" if i == member else ""
        formula = trace.rollouts.molecules.formula(i)
        rows.append(f"<tr{here}><td>{i}</td><td>{formula}</td>{cells}<td>{clip_badge(trace, i, step)}</td></tr>")
    return (
        f"<div class='elp-scroll'>{headed_table(names, rows)}</div>"
        "<div class='elp-note'>r_E, G_t in eV/atom, r_F in eV/Å; r_E and r_F are rewards of the result, "
        "G_t to ρ belong to this step.</div>"
    )


def clip_badge(trace: RewardTrace, member: int, step: int, *, strong: bool = False) -> str:
    """Whether the clip takes this pair's gradient away, and on which side."""
    if not bool(trace.ok[member]):
        return badge("not judged", "warn", strong)
    if not bool(trace.objective.clipped[member, step]):
        return badge("not clipped: the pair teaches", "good", strong) if strong else badge("free", "good")
    above = float(trace.objective.log_ratio[member, step]) > 0
    if not strong:
        return badge("clipped", "bad")
    bound = trace.config.clip_range
    return badge(f"clipped: ρ is {'above 1 + ' if above else 'below 1 − '}{bound:g}, no gradient", "bad", True)


def trace_figure(trace: RewardTrace, member: int, step: int) -> Figure:
    """Potential, advantage and ratio of all rollouts against the step; the chosen rollout in colour, the step marked.

    The ratio is that after the update; the band of its plot is the range that the clip leaves free.
    """
    words = (
        f"Potential, total advantage and ratio after the update of {trace.members} rollouts against the trained step: "
        f"rollout {member} in colour, the chosen step marked, and a band where the clip leaves the ratio free."
    )
    figure = Figure(x="trained step", y=_CURVES[0][0], alt=words, height=440, template=PANEL)
    figure.set_subplots(rows=3, shared_xaxes=True, vertical_spacing=0.06)
    chosen, other = {"color": COLORS["tilt"], "width": 3}, {"color": MEMBER_COLOR, "width": 1.4}
    order = [i for i in range(trace.members) if i != member] + [member]  # the chosen one is drawn on top
    for row, (title, name) in enumerate(_CURVES, start=1):
        values = trace.objective.log_ratio.exp() if name == "ratio" else getattr(trace, name)
        for i in order:
            y = [float(f"{v:.4g}") for v in values[i].tolist()]
            line = chosen if i == member else other
            figure.add_scatter(y=y, name=f"rollout {i}", mode="lines", line=line, row=row, col=1)
        add_mark(figure, step, row=row, col=1)
        figure.update_xaxes(title_text="trained step" if row == 3 else "", row=row, col=1)
        figure.update_yaxes(title_text=title, row=row, col=1)
    figure.update_layout(showlegend=False)
    bound = trace.config.clip_range
    figure.update_yaxes(range=[1 - _RATIO_RANGE * bound, 1 + _RATIO_RANGE * bound], row=3, col=1)
    band = {"fillcolor": faded("good", 0.14), "line": {"width": 0}, "layer": "below"}
    figure.add_hrect(y0=1 - bound, y1=1 + bound, row=3, col=1, **band)
    return figure


# ---------------------------------------------------------------------- the panel
class RewardInspector(Panel):
    """Step along the rollouts of one FED-GRPO group: the clean estimate, and every number that follows from it.

    config: default `cpu_mini`. size: atoms of the molecules; seed: of the group. The frame slider of the viewer is the
    step; `member` and `step` can be set from Python too. "new group" rolls out again with other values. The model is
    not changed: the ratio is that of a copy after one iteration of the Trainer on this group.

    Raises ValueError as `trace_group` does; in the browser the message is shown, and the old group stays.
    """

    def __init__(
        self, model: Denoiser, oracle: Oracle, config: AlignConfig | None = None, *, size: int = 15, seed: int = 0
    ) -> None:
        self._model, self._oracle, self._config = model, oracle, config or cpu_mini()
        self.trace = trace_group(model, oracle, self._config, size=size, seed=seed)
        narrow = {"layout": {"width": "112px"}, "style": {"description_width": "42px"}}
        self.size = ipywidgets.IntText(value=size, description="atoms", **narrow)
        self.seed = ipywidgets.IntText(value=seed, description="seed", **narrow)
        self._live: Live[RewardTrace] = Live(self._new_group, self._show_group, total=1, description="new group")
        self._live.layout.flex = "1 1 400px"
        style = {"button_width": "44px", "description_width": "56px"}
        self._member = ipywidgets.ToggleButtons(description="rollout", style=style, layout={"width": "auto"})
        self._badge, self._lines, self._group = (ipywidgets.HTML() for _ in range(3))
        self._stage = ipywidgets.VBox()
        self.chart = Chart(trace_figure(self.trace, 0, 0))
        left = ipywidgets.VBox([self._stage, self.chart], layout={"flex": "1 1 392px", "min_width": "300px"})
        right = ipywidgets.VBox([self._badge, self._lines], layout={"flex": "1.2 1 395px", "min_width": "370px"})
        super().__init__(
            "Reward inspector",
            "A group of rollouts shares its first steps and then branches. Choose a rollout and a step.",
            [
                ipywidgets.HBox([self.size, self.seed, self._live], layout={"flex_flow": "row wrap"}),
                self._member,
                ipywidgets.HBox([left, right], layout={"flex_flow": "row wrap", "grid_gap": "10px"}),
                self._group,
            ],
        )
        self._member.observe(self._member_chosen, "value")
        self._show_group(self.trace)

    # ------------------------------------------------------------------ what a user does
    @property
    def step(self) -> int:
        """The trained step that is shown, 0 to S - 1."""
        return self.viewer.frame

    @step.setter
    def step(self, step: int) -> None:
        explain(self.trace, self.member, step)  # says what is wrong with a step outside the group
        self.viewer.frame = step

    @property
    def member(self) -> int:
        """The rollout that is shown, 0 to K - 1."""
        return self._member.value

    @member.setter
    def member(self, member: int) -> None:
        explain(self.trace, member, self.step)
        self._member.value = member

    def summary_html(self) -> str:
        """The molecule and the table of the chosen rollout and step, and the group."""
        return "<br>".join((self.viewer.picture_html(), self._badge.value, self._lines.value, self._group.value))

    def __repr__(self) -> str:
        return f"RewardInspector(rollout {self.member} of {self.trace.members}, step {self.step} of {self.trace.steps})"

    # ------------------------------------------------------------------ wiring
    def _new_group(self) -> Iterator[RewardTrace]:
        yield trace_group(self._model, self._oracle, self._config, size=self.size.value, seed=self.seed.value)

    def _show_group(self, trace: RewardTrace) -> None:
        self.trace = trace
        self._member.unobserve(self._member_chosen, "value")
        self._member.options = list(range(trace.members))
        self._member.index = 0
        self._member.observe(self._member_chosen, "value")
        self._show_member(0)

    def _member_chosen(self, change: dict[str, Any]) -> None:
        with self._shown():
            self._show_member(self.step)

    def _show_member(self, step: int) -> None:
        i, trace = self.member, self.trace
        frames = [batch[i] for batch in trace.clean]
        labels = [f"step {k}, t = {t}" for k, t in enumerate(trace.rollouts.times[:-1])]
        forces = [f[i] for f in trace.forces]
        self.viewer = MoleculeViewer(frames, title="clean estimate", labels=labels, forces=forces, height=320)
        self.viewer.frame = step
        self.viewer.observe(self._step_chosen, "frame")
        self._stage.children = [self.viewer]
        self.chart.draw(trace_figure(trace, i, step))
        self._show_numbers()

    def _step_chosen(self, change: dict[str, Any]) -> None:
        with self._shown():
            self.chart.draw(move_marks(self.chart.figure, self.step))
            self._show_numbers()

    def _show_numbers(self) -> None:
        i, k, trace = self.member, self.step, self.trace
        status = trace.status[k][i]
        unjudged = "" if status == "ok" else badge(f"clean estimate not judged: {status}", "warn")
        self._badge.value = clip_badge(trace, i, k, strong=True) + unjudged
        self._lines.value = lines_html(explain(trace, i, k))
        self._group.value = group_html(trace, i, k)
