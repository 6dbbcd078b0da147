"""Parts of the HTML report beside its metrics: how it was made, energy at equal composition, diversity."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np

from elign_lab.evaluation.comparison import composition_control, diversity, diversity_blocks
from elign_lab.evaluation.intervals import Interval
from elign_lab.evaluation.report import FloatArray, format_interval
from elign_lab.molecules import MoleculeBatch

_ENERGY = "energy_per_atom_median"  # the metric whose unit and digits the energies below have
_PARTS = {
    "raw": "mean energy per atom",
    "explained": "of this, by the other composition",
    "adjusted": "left at equal composition",
}
_HEADINGS = {"variety": "variety", "% of atoms": "elements, % of atoms", "% of valid": "groups, % of valid"}


def about_list(entries: Mapping[str, str]) -> str:
    """How a report was made, as a list of labels and texts; the last one is set as code."""
    if not entries:
        return ""
    *first, (label, code) = entries.items()
    # the colours of the two sets
    roles = {name: f' class="{name}"' for name in ("base", "aligned")}
    items = [f"<dt{roles.get(name, '')}>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in first]
    items.append(f"<dt>{html.escape(label)}</dt><dd><code>{html.escape(code)}</code></dd>")
    return f'<dl class="about">{"".join(items)}</dl>'


def composition_section(base: MoleculeBatch, aligned: MoleculeBatch, energies: Sequence[FloatArray]) -> str:
    """The change of the energy, split into composition and the rest; a word instead where too few were judged."""
    try:
        control = composition_control(base, aligned, *energies)
    except ValueError as error:
        return _section("Energy at equal composition", f'<p class="note">Not known: {html.escape(str(error))}.</p>')
    parts = {label: getattr(control, key) for key, label in _PARTS.items()}
    limits = [0.0, *(x for i in parts.values() for x in (i.low, i.high) if np.isfinite(x))]
    rows = []
    for label, interval in parts.items():
        value, _, brackets = format_interval(_ENERGY, interval, signed=True).partition(" ")
        clear = "clear" if interval.low > 0 or interval.high < 0 else ""
        rows.append(
            f'<tr><th scope="row">{label}</th><td><span class="{clear}">{value}</span>'
            f'<span class="range">{brackets}</span></td><td>{_bar(interval, min(limits), max(limits))}</td></tr>'
        )
    table = (
        '<table><thead><tr><th scope="col">aligned less base</th><th scope="col">eV per atom</th>'
        f'<th scope="col">interval, and zero</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )
    note = (
        f"From the {control.pairs} pairs that the oracle judged in both sets, by an analysis of covariance with the "
        "share of each element and the inverse size. Brackets are 95&nbsp;% bootstrap intervals; bold leaves out zero. "
        "What is not linear in the composition counts as geometry."
    )
    return _section("Energy at equal composition", f'<div class="scroll">{table}</div><p class="note">{note}</p>')


def diversity_section(base: MoleculeBatch, aligned: MoleculeBatch, names: tuple[str, str]) -> str:
    """How varied both sets are: formulas, elements, rings, functional groups."""
    found = [diversity(batch) for batch in (base, aligned)]
    blocks = diversity_blocks(dict(zip(("base", "aligned"), found, strict=True)))
    heads = "".join(
        f'<th scope="col" class="{role}">{html.escape(name)}</th>'
        for role, name in zip(("base", "aligned"), names, strict=True)
    )
    tables = []
    for key, block in blocks.items():
        rows = "".join(
            f'<tr><th scope="row">{html.escape(label)}</th>{"".join(f"<td>{text}</td>" for text in texts)}</tr>'
            for label, texts in block.items()
        )
        tables.append(
            f'<table class="small"><thead><tr><th scope="col">{_HEADINGS[key]}</th>{heads}</tr></thead>'
            f"<tbody>{rows}</tbody></table>"
        )
    fewest = min(d.valid for d in found)
    chance = (
        f" A share of {fewest} molecules is known to about &plusmn;{98 / fewest**0.5:.0f} points (95&nbsp;%)."
        if fewest
        else ""
    )
    note = (
        "Internal diversity: mean Tanimoto distance of two valid molecules, by Morgan fingerprints of radius 2. "
        f"These figures have no intervals.{chance}"
    )
    return _section("Diversity", f'<div class="blocks">{"".join(tables)}</div><p class="note">{note}</p>')


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{heading}</h2>{content}</section>"


def _bar(interval: Interval, low: float, high: float, width: int = 190, height: int = 18) -> str:
    """An interval as a dot with a bar, and a line at zero."""
    if not np.isfinite([interval.value, interval.low, interval.high]).all():
        return ""
    span = (high - low) or 1.0
    x, left, right, zero = (
        6 + (width - 12) * (v - low) / span for v in (interval.value, interval.low, interval.high, 0.0)
    )
    y = height // 2
    text = format_interval(_ENERGY, interval, signed=True)
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="{text}">'
        f'<path d="M{zero:.1f} 1V{height - 1}" stroke="var(--muted)" stroke-width="1" stroke-dasharray="2 2"/>'
        f'<path d="M{left:.1f} {y}H{right:.1f}" stroke="var(--aligned)" stroke-width="2" stroke-linecap="round"/>'
        f'<circle cx="{x:.1f}" cy="{y}" r="3.6" fill="var(--aligned)"/></svg>'
    )
