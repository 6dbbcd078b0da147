"""The headline figures in the passports of the bundled models, recomputed on small samples with other seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from elign_lab import MoleculeBatch, evaluate, load_model, load_oracle, sample
from elign_lab.checkpoints import ASSETS, read_passport
from elign_lab.evaluation.intervals import wilson
from elign_lab.gpff import load_force_field, quality_from_json, quality_table
from elign_lab.gpff.quality import VARIANTS

HEADLINE = ("atom_stability", "validity", "f_rms_median")
N = 24


def figures_of(name: str) -> dict[str, Any]:
    return read_passport(ASSETS / f"{name}.safetensors")["figures"]


def apart(molecules: MoleculeBatch, figures: dict[str, Any]) -> list[str]:
    """The headline figures whose 95 % intervals, of the passport and of these molecules, have no number in common."""
    with load_oracle("xtb", workers=0) as oracle:
        found = evaluate(molecules, oracle).to_dict()
    return [key for key in HEADLINE if not near(found[key]["value"], figures[key], len(molecules) / figures["n"])]


def near(value: float | None, figure: dict[str, float], share: float) -> bool:
    """Whether the intervals of a figure and of a sample `share` as large meet; what has no value has no interval.

    The width of both comes from the passport: that of a few molecules with one or two failures is too small.
    """
    half = (figure["high"] - figure["low"]) / 2
    return value is not None and abs(value - figure["value"]) <= half * (1 + share**-0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edm-mini", "edm-mini-aligned"])
def test_denoisers(name):
    figures = figures_of(name)
    assert (figures["model"], figures["oracle"]) == (name, "xtb")
    molecules = sample(load_model(name), N, seed=figures["seed"] + 1, steps=figures["steps"])
    assert apart(molecules, figures) == []


def test_a_damaged_denoiser_does_not_have_the_figures():
    model = load_model("edm-mini")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.3 * torch.randn(p.shape, generator=generator))
    assert set(apart(sample(model, N, seed=1, steps=50), figures_of("edm-mini"))) >= {"atom_stability", "validity"}


@pytest.mark.parametrize(("name", "evaluations"), [("gpff-mini", 16), ("gpff-mini-aligned", 8)])
def test_pseudo_force_fields(name, evaluations):
    rows = quality_from_json(figures_of(name)["rows"])
    recorded = {row.sampler: row for row in rows if row.evaluations == evaluations}
    names = ("direct", "adaptive ancestral", "relaxation, momentum")
    found = quality_table(
        load_force_field(name), N, budgets=[evaluations], variants={key: VARIANTS[key] for key in names}, seed=101
    )
    for row in found:
        there = recorded[row.sampler]
        old, new = (wilson(round(r.validity * r.n), r.n) for r in (there, row))
        assert new.low <= old.high, row.sampler
        assert new.high >= old.low, row.sampler
