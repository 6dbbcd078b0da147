"""One HTML file that shows a base and an aligned set side by side: table, plots and 3D views, without a network."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from numbers import Real
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch

from elign_lab.evaluation.html_tables import about_list, composition_section, diversity_section
from elign_lab.evaluation.intervals import Interval
from elign_lab.evaluation.report import (
    FRACTIONS,
    Comparison,
    Evaluation,
    FloatArray,
    compare,
    format_interval,
    format_test,
    metric_labels,
)
from elign_lab.evaluation.stability import bond_orders, stability
from elign_lab.molecules import MoleculeBatch

Figure = dict[str, Any]
"""A plotly.js figure: {"data": traces, "layout": ...}. A trace's "meta" is the role that gives its colour."""

_SHOWN = 12
_CURVES = {
    "reward_energy": "energy reward (eV per atom)",
    "reward_force": "force reward (eV/\N{ANGSTROM SIGN})",
    "loss": "loss",
    "surrogate": "surrogate objective",
    "kl": "KL to the reference (nat)",
    "clip_fraction": "clipped ratios (share)",
    "log_ratio_rms": "log ratio, RMS (nat)",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "failed": "oracle failures (molecules)",
    "eval_energy": "evaluation: energy reward (eV per atom)",
    "eval_force": "evaluation: force reward (eV/\N{ANGSTROM SIGN})",
}


def made_now() -> str:
    """Date and versions, for the `about` of a report."""
    from elign_lab import __version__

    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC with elign_lab {__version__}, torch {torch.__version__}"


def write_html(
    path: str | Path,
    base: Evaluation,
    aligned: Evaluation,
    base_batch: MoleculeBatch,
    aligned_batch: MoleculeBatch,
    history: Sequence[Mapping[str, Any]] | None = None,
    *,
    names: tuple[str, str] = ("base", "aligned"),
    title: str = "Base and aligned molecules",
    about: Mapping[str, str] | None = None,
    paired: bool = True,
) -> Path:
    """Write a report of two evaluations, and of the training history if given, to one file; returns its path.

    The batches are those that were evaluated; the first 12 molecules of each are shown. history: one mapping per
    iteration with numbers such as reward_energy, reward_force, kl, clip_fraction, loss; "iteration" is the axis.
    about: how the report was made, label -> text (the models, the oracle, the command); its last entry is set as code.
    paired: molecule i of both sets comes from the same seed, size and noise; the page says if not.
    Raises ValueError when a batch and its evaluation, or the two evaluations, do not belong together, or when the
    history has no numbers.
    """
    for name, evaluation, batch in zip(names, (base, aligned), (base_batch, aligned_batch), strict=True):
        if evaluation.n != len(batch):
            raise ValueError(
                f"the {name} evaluation has {evaluation.n} molecules but its batch {len(batch)}: "
                "pass the batch that was evaluated"
            )
    # loaded here, because the import takes a while and the metrics need none of it
    from plotly.offline import get_plotlyjs

    comparison = compare(base, aligned)
    curves = {} if history is None else _learning_curves(history)
    distributions = {} if base.oracle_failures is None else _distributions(comparison, names)
    elements = np.unique(np.concatenate([b.numbers[b.mask].cpu().numpy() for b in (base_batch, aligned_batch)]))
    energies = [e.molecules.energy_per_atom for e in (base, aligned)]
    data = {
        "plots": curves | distributions,
        "cards": _cards(comparison, (base_batch, aligned_batch), names),
        "elements": _elements(elements.tolist()),
    }
    page = Template(_asset("report.html")).substitute(
        title=html.escape(title),
        lead=html.escape(
            f"{base.n} molecules of each set, {' and '.join(names)}, {'paired by seed' if paired else 'not paired'}."
        ),
        about=about_list(about or {}),
        pairs="; both of a pair come from the same seed" if paired else "",
        css=_asset("report.css"),
        table=_table(comparison, names),
        tests=_tests(comparison),
        failures=_failures(comparison, names),
        composition="" if base.oracle_failures is None else composition_section(base_batch, aligned_batch, energies),
        diversity=diversity_section(base_batch, aligned_batch, names),
        figures=_section("Learning curves", curves) + _section("Cumulative distributions", distributions),
        plotly=get_plotlyjs(),
        # a "</script>" inside a string would end the script
        data=json.dumps(data, allow_nan=False).replace("</", "<\\/"),
        script=_asset("report.js"),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _asset(name: str) -> str:
    return files("elign_lab.evaluation").joinpath(name).read_text(encoding="utf-8")


def _section(heading: str, figures: Mapping[str, Figure]) -> str:
    """A heading and the empty boxes that the page's script draws the figures into."""
    if not figures:
        return ""
    boxes = []
    for key, figure in figures.items():
        x, y = (figure["layout"][axis]["title"]["text"] for axis in ("xaxis", "yaxis"))
        alt = html.escape(f"{heading}: {y} against {x}")
        boxes.append(f'<div id="{key}" class="plot" role="img" aria-label="{alt}"></div>')
    return f'<section><h2>{heading}</h2><div class="plots">{"".join(boxes)}</div></section>'


# ------------------------------------------------------------------ table
def _table(comparison: Comparison, names: tuple[str, str]) -> str:
    evaluations = (comparison.base, comparison.aligned)
    rows = []
    for key, label in metric_labels(evaluations).items():
        intervals = [getattr(e, key) for e in evaluations]
        change = comparison.differences.get(key)
        cells = [_cell(key, interval) for interval in intervals] + [_cell(key, change, signed=True)]
        rows.append(
            f'<tr><th scope="row">{html.escape(label)}</th>{"".join(cells)}<td>{_whiskers(key, intervals)}</td></tr>'
        )
    heads = (
        f'<th scope="col" class="base">{html.escape(names[0])}</th>'
        f'<th scope="col" class="aligned">{html.escape(names[1])}</th>'
    )
    return (
        f'<table><thead><tr><th scope="col">metric</th>{heads}<th scope="col">difference</th>'
        f'<th scope="col">intervals</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _cell(key: str, interval: Interval | None, *, signed: bool = False) -> str:
    value, _, limits = format_interval(key, interval, signed=signed).partition(" ")
    # an interval that leaves out zero is set in bold
    clear = signed and interval is not None and (interval.low > 0 or interval.high < 0)
    return f'<td><span class="{"clear" if clear else ""}">{value}</span><span class="range">{limits}</span></td>'


def _whiskers(key: str, intervals: Sequence[Interval | None], width: int = 150, height: int = 30) -> str:
    """Both intervals as dots with bars: fractions on the scale from 0 to 1, medians on their own."""
    known = [(k, i) for k, i in enumerate(intervals) if i is not None and np.isfinite([i.value, i.low, i.high]).all()]
    if not known:
        return ""
    low, high = (0.0, 1.0) if key in FRACTIONS else (min(i.low for _, i in known), max(i.high for _, i in known))
    span = (high - low) or 1.0
    marks = []
    for k, interval in known:
        x, left, right = (6 + (width - 12) * (v - low) / span for v in (interval.value, interval.low, interval.high))
        y, color = 9 + 12 * k, ("var(--base)", "var(--aligned)")[k]
        marks.append(
            f'<path d="M{left:.1f} {y}H{right:.1f}" stroke="{color}" stroke-width="2" stroke-linecap="round"/>'
            f'<circle cx="{x:.1f}" cy="{y}" r="3.6" fill="{color}"/>'
        )
    text = " against ".join(format_interval(key, i) for _, i in known)
    return f'<svg width="{width}" height="{height}" role="img" aria-label="{text}">{"".join(marks)}</svg>'


def _tests(comparison: Comparison) -> str:
    tests = (("Energy per atom", comparison.energy_per_atom), ("Force RMS", comparison.f_rms))
    items = [f"<li><b>{label}</b>: {html.escape(format_test(test))}</li>" for label, test in tests if test is not None]
    return f'<ul class="tests">{"".join(items)}</ul>' if items else ""


def _failures(comparison: Comparison, names: tuple[str, str]) -> str:
    if comparison.base.oracle_failures is None:
        return "No oracle was used."
    counts = " and ".join(
        f"{e.oracle_failures} of {e.n} ({html.escape(name)})"
        for name, e in zip(names, (comparison.base, comparison.aligned), strict=True)
    )
    return f"The oracle failed on {counts} molecules; medians and distributions leave these out."


# ------------------------------------------------------------------ plots
def _learning_curves(history: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """One figure per quantity of the history; the known ones first, with their units."""
    numeric = {k for row in history for k, v in row.items() if _is_number(v)} - {"iteration"}
    keys = [k for k in _CURVES if k in numeric] + sorted(numeric - set(_CURVES))
    if not keys:
        raise ValueError(
            "the history has no numbers to plot: expected one mapping per iteration, "
            "such as {'iteration': 0, 'reward_energy': -5.1, 'kl': 0.01}"
        )
    figures = {}
    for k, key in enumerate(keys):
        # float: NumPy's and torch's numbers are not JSON
        points = [
            (float(row.get("iteration", i)), float(row[key]))
            for i, row in enumerate(history)
            if _is_number(row.get(key))
        ]
        x, y = zip(*points, strict=True)
        # a few points, such as those of a rare evaluation, need markers to be seen
        trace = {"x": x, "y": y, "mode": "lines+markers" if len(x) < 40 else "lines", "meta": "aligned"}
        layout = _layout("iteration", _CURVES.get(key, key.replace("_", " ")), height=260)
        layout["yaxis"]["rangemode"] = "nonnegative" if min(y) >= 0 else "normal"
        figures[f"curve-{k}"] = {"data": [trace], "layout": layout}
    return figures


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _distributions(comparison: Comparison, names: tuple[str, str]) -> dict[str, Figure]:
    """Empirical cumulative distributions; the force axis is logarithmic because its tail is long."""
    panels = {
        "energy_per_atom": ("formation energy per atom (eV)", "linear"),
        "f_rms": ("force RMS (eV/\N{ANGSTROM SIGN})", "log"),
    }
    figures = {}
    for key, (label, scale) in panels.items():
        sets = [np.sort(getattr(e.molecules, key)) for e in (comparison.base, comparison.aligned)]
        sets = [values[np.isfinite(values)] for values in sets]
        layout = _layout(f"{label}, central 99 %", "share of molecules", height=380)
        layout["xaxis"] |= {"type": scale, "range": _central_range(np.concatenate(sets), scale)}
        layout["yaxis"] |= {"range": [0, 1.02]}
        traces = []
        for role, name, values in zip(("base", "aligned"), names, sets, strict=True):
            share = np.arange(1, len(values) + 1) / max(len(values), 1)
            line = {"shape": "hv", "width": 2.2}
            traces.append(
                {"x": values.tolist(), "y": share.tolist(), "mode": "lines", "line": line, "name": name, "meta": role}
            )
        figures[f"distribution-{key}"] = {"data": traces, "layout": layout}
    return figures


def _layout(x: str, y: str, *, height: int) -> dict[str, Any]:
    return {
        "height": height,
        "margin": {"l": 62, "r": 14, "t": 30, "b": 50},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": {"title": {"text": x}, "automargin": True},
        "yaxis": {"title": {"text": y}, "automargin": True},
    }


def _central_range(values: FloatArray, scale: str) -> list[float] | None:
    """Axis limits that hold the central 99 % of the values, in the units of plotly (log10 on a log axis)."""
    values = np.log10(values[values > 0]) if scale == "log" else values
    if len(values) == 0:
        return None
    low, high = np.quantile(values, [0.005, 0.995])
    margin = 0.04 * (high - low) or 0.1
    return [float(low - margin), float(high + margin)]


# ------------------------------------------------------------------ molecules
def _cards(
    comparison: Comparison, batches: tuple[MoleculeBatch, MoleculeBatch], names: tuple[str, str]
) -> list[list[dict[str, Any]]]:
    """Pairs of molecules for the viewer: the first of both sets, then the second, and so on."""
    evaluations = (comparison.base, comparison.aligned)
    shown = [
        _drawings(evaluation, batch, name, role)
        for evaluation, batch, name, role in zip(evaluations, batches, names, ("base", "aligned"), strict=True)
    ]
    return [list(pair) for pair in zip(*shown, strict=True)]


def _drawings(evaluation: Evaluation, batch: MoleculeBatch, name: str, role: str) -> list[dict[str, Any]]:
    # loaded here, because a table of metrics needs no widget; the views look like the notebooks'
    from elign_lab.widgets.static import orientation

    batch = batch[:_SHOWN].to("cpu")
    orders, stable = bond_orders(batch).numpy(), stability(batch).atoms.numpy()
    drawings = []
    for i, (numbers, positions) in enumerate(batch.arrays()):
        n, usable = len(numbers), bool(np.isfinite(positions).all())
        turned = (positions - positions.mean(0)) @ orientation(positions).T if usable and n else np.zeros((0, 3))
        first, second = np.nonzero(np.tril(orders[i, :n, :n])) if usable else ((), ())
        drawings.append(
            {
                "set": name,
                "role": role,
                "index": i + 1,
                "formula": batch.formula(i),
                "facts": _facts(evaluation, i) if usable else ["positions are not finite"],
                "numbers": numbers.tolist() if usable else [],
                "positions": turned.round(3).tolist(),
                "bonds": [[int(a), int(b), int(orders[i, a, b])] for a, b in zip(first, second, strict=True)],
                "unstable": np.flatnonzero(~stable[i, :n]).tolist() if usable else [],
            }
        )
    return drawings


def _facts(evaluation: Evaluation, i: int) -> list[str]:
    molecules = evaluation.molecules
    facts = [("stable" if molecules.stable[i] else "not stable") + (", valid" if molecules.valid[i] else ", not valid")]
    if evaluation.oracle_failures is None:
        return facts
    energy, force = molecules.energy_per_atom[i], molecules.f_rms[i]
    if not np.isfinite(energy):
        return [*facts, f"oracle: {molecules.status[i]}"]
    return [*facts, f"{energy:.2f} eV per atom, {force:.2f} eV/\N{ANGSTROM SIGN}"]


def _elements(numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
    from elign_lab.widgets.static import palette

    tables = palette()
    return {
        z: {"symbol": tables["symbols"][z], "color": tables["colors"][z], "radius": tables["radii"][z]} for z in numbers
    }
