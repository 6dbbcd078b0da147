"""The bundled files as a table: what each is, and the figure that says most about it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

WIDTH = 110
_NOISE = "noise 0.05"  # of the test molecules whose error is shown, in Angstrom
_DATA = "data set"
_SAMPLER, _EVALUATIONS = "direct, 0.3", 8  # of the structures of a pseudo-force field, whose table has many rows


def catalogue(passports: Iterable[Mapping[str, Any]]) -> str:
    """A line for each file, with its description below."""
    rows = list(passports)
    names = [p.get("name") or Path(p["file"]).stem for p in rows]
    wide, kinds = max(map(len, names)), max(len(p.get("kind", _DATA)) for p in rows)
    lines = [f"{'name':{wide}}  {'kind':{kinds}}     MB  {'date':10}  {'licence':7}  figure [95 % interval]"]
    for name, p in zip(names, rows, strict=True):
        start = f"{name:{wide}}  {p.get('kind', _DATA):{kinds}}  {p['bytes'] / 1e6:5.2f}  {p.get('date') or '-':10}  "
        lines.append(f"{start}{p.get('licence') or '-':7}  {headline(p) or '-'}".rstrip())
        about = p.get("description") or p.get("method", "")
        lines += textwrap.wrap(about, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def headline(passport: Mapping[str, Any]) -> str:
    """The figure that says most about a file, with its interval and its n; empty where its passport has none."""
    figures = passport.get("figures")
    if "errors" in passport:
        return _force_error(passport["errors"].get(_NOISE))
    if not figures:
        return ""
    if isinstance(figures, list):
        return _evidence(figures, passport.get("n"))
    if "rows" in figures:
        runs = [run for run in figures.get("headline", ()) if run["model"] == passport.get("name")]
        return _valid_share([row for run in (figures, *runs) for row in run["rows"]])
    found = next((k for k in ("f_rms_median", "energy_per_atom_median") if k in figures), None)
    if found is None:
        return ""
    name, unit = {"f_rms_median": ("f_RMS", "eV/Å"), "energy_per_atom_median": ("energy", "eV/atom")}[found]
    small = abs(figures[found]["value"]) < 0.2
    return f"{name} {_text(figures[found], digits=4 if small else 2)} {unit}, n {figures['n']}"


def _text(interval: Mapping[str, float], digits: int = 2) -> str:
    value, low, high = (f"{interval[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _force_error(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    interval = row.get("force_mae_interval")
    error = f"{row['force_mae']:.3f}" if interval is None else _text(interval, digits=3)
    return f"force error {error} eV/Å, n {row['molecules']}"


def _evidence(rows: list[Mapping[str, Any]], n: int | None) -> str:
    """Of the sets that a model made, by the last of the judges."""
    judge = rows[-1]["oracle"]
    # one set must do, and a short name leaves room for its figure
    shown = min((r for r in rows if r["oracle"] == judge and "test" not in r["set"]), key=lambda r: len(r["set"]))
    return f"{shown['set']}: f_RMS {_text(shown['f_rms_median'])} eV/Å by {judge}, n {n}"


def _valid_share(rows: list[Mapping[str, Any]]) -> str:
    """Of the row with the most structures."""
    from elign_lab.evaluation.intervals import wilson

    chosen = [row for row in rows if row["sampler"] == _SAMPLER and row["evaluations"] == _EVALUATIONS]
    if not chosen:
        return ""
    row = max(chosen, key=lambda r: r["n"])
    share = wilson(round(row["validity"] * row["n"]), row["n"])
    value, low, high = (f"{100 * x:.1f}" for x in (share.value, share.low, share.high))
    return f"valid {value} [{low}, {high}] % at {row['evaluations']} NFE, n {row['n']}"
