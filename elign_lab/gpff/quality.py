"""How good the structures of a pseudo-force field are, against the number of network evaluations, for all samplers."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from plotly.colors import qualitative
from rdkit.Chem import MolToSmiles
from tqdm.auto import tqdm

from elign_lab.checkpoints import ASSETS, read_passport
from elign_lab.denoiser import Denoiser
from elign_lab.evaluation import evaluate
from elign_lab.evaluation.intervals import wilson
from elign_lab.evaluation.report import align_columns
from elign_lab.gpff.compositions import draw_compositions
from elign_lab.gpff.editing_bonds import perceive
from elign_lab.gpff.generate import SAMPLERS, generate
from elign_lab.gpff.model import BUNDLED, PseudoForceField
from elign_lab.molecules import MoleculeBatch
from elign_lab.sampling import require_all, sample
from elign_lab.teaching import Figure

if TYPE_CHECKING:
    from elign_lab.oracles import Oracle

EDM = "EDM "  # before the names of a denoiser's samplers
BUDGETS = (4, 6, 8, 16, 32, 64, 128, 256)

# name -> sampler and its options
VARIANTS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "ancestral": ("ancestral", {"level": "grid"}),
    "ancestral, sigma_hat": ("ancestral", {"level": "force"}),
    "heun": ("heun", {"level": "grid"}),
    "heun, sigma_hat": ("heun", {"level": "force"}),
    "adaptive ancestral": ("adaptive_ancestral", {}),
    "adaptive heun": ("adaptive_heun", {}),
    "direct": ("direct", {"strength": 1.0}),
    "direct, 0.3": ("direct", {"strength": 0.3}),
    "relaxation": ("direct", {"strength": 0.0}),
    # sigma: from a cloud as wide as the molecules are, which the force does not first have to draw together
    "relaxation, momentum": ("direct", {"strength": 0.0, "momentum": 0.5, "sigma": 1.42}),
}


@dataclass(frozen=True)
class Quality:
    """Figures of n structures that one sampler made with at most `evaluations` network calls each.

    Fractions from 0 to 1. validity: see `valid_smiles`; edm_validity and stability: connected and sanitised, and all
    atoms stable, with EDM's bonds from distance tables, which an error of 0.02 Angstrom breaks in one molecule of
    seven; uniqueness: distinct SMILES over valid ones. f_rms: median by the oracle in eV/Angstrom, NaN without one;
    failures: molecules that the oracle could not evaluate. seconds: computing time per structure.
    """

    sampler: str
    evaluations: int
    n: int
    validity: float
    edm_validity: float
    stability: float
    uniqueness: float
    f_rms: float
    failures: int | None
    seconds: float


def judge(batch: MoleculeBatch, oracle: Oracle | None = None) -> dict[str, Any]:
    """validity, edm_validity, stability, uniqueness, f_rms and failures of structures; see Quality."""
    result = evaluate(batch, oracle, connected=True, n_boot=1)
    found = [text for text in valid_smiles(batch) if text is not None]
    return {
        "validity": len(found) / len(batch),
        "edm_validity": result.validity.value,
        "stability": result.molecule_stability.value,
        "uniqueness": len(set(found)) / len(found) if found else 0.0,
        "f_rms": result.f_rms_median.value,
        "failures": result.oracle_failures,
    }


def valid_smiles(batch: MoleculeBatch) -> list[str | None]:
    """SMILES of each structure that is one neutral molecule of just its atoms, None of the others.

    What a molecule is, `perceive` says. No hydrogen is added, so the composition is that of the structure.
    Stereochemistry is left out.
    """
    found = [perceive(numbers, positions) for numbers, positions in batch.arrays()]
    return [None if mol is None else MolToSmiles(mol) for mol in found]


def quality_table(
    model: PseudoForceField,
    n: int = 128,
    *,
    budgets: Iterable[int] = BUDGETS,
    variants: Mapping[str, tuple[str, Mapping[str, Any]]] = VARIANTS,
    oracle: Oracle | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> list[Quality]:
    """Quality of n structures for each sampler and budget of network calls; the same compositions and seeds for all.

    Compositions are drawn from the model's training set.
    """
    for name, (sampler, _) in variants.items():
        if sampler not in SAMPLERS:
            raise ValueError(f"variant {name!r} uses the unknown sampler {sampler!r}")
    compositions = draw_compositions(model.config.compositions, n, torch.Generator().manual_seed(seed))

    def make(variant: str, budget: int) -> MoleculeBatch:
        sampler, options = variants[variant]
        return generate(
            model,
            compositions=compositions,
            sampler=sampler,
            evaluations=budget,
            seed=seed,
            batch_size=batch_size,
            **options,
        )

    return _rows(make, n, variants, budgets, oracle, progress)


def denoiser_table(
    model: Denoiser,
    n: int = 128,
    *,
    budgets: Iterable[int] = BUDGETS,
    samplers: Sequence[str] = ("ancestral", "dpm_solver"),
    oracle: Oracle | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> list[Quality]:
    """The same figures for a denoiser, which draws its own atoms; the last of its `budgets` calls decodes."""

    def make(sampler: str, budget: int) -> MoleculeBatch:
        return sample(model, n, steps=budget - 1, sampler=sampler.removeprefix(EDM), seed=seed, batch_size=batch_size)

    return _rows(make, n, [EDM + name for name in samplers], [b for b in budgets if b > 1], oracle, progress)


def _rows(
    make: Callable[[str, int], MoleculeBatch],
    n: int,
    names: Iterable[str],
    budgets: Iterable[int],
    oracle: Oracle | None,
    progress: bool,
) -> list[Quality]:
    rows = []
    for name, budget in tqdm(list(itertools.product(names, budgets)), desc="samplers", disable=not progress):
        started = time.process_time()
        batch = require_all(make(name, budget), n)
        seconds = (time.process_time() - started) / len(batch)
        rows.append(Quality(name, budget, len(batch), **judge(batch, oracle), seconds=seconds))
    return rows


def quality_figure(rows: Sequence[Quality], key: str = "validity") -> Figure:
    """Validity (or edm_validity, stability, uniqueness) against network evaluations, with Wilson's 95 % intervals.

    Uniqueness is a share of the valid structures, the others are shares of all.
    """
    title = {"validity": "valid", "edm_validity": "valid by distance tables", "stability": "stable"}.get(key, key)
    alt = f"Share of structures that are {title} against network evaluations, one line for each sampler."
    figure = Figure(x="network evaluations (NFE)", y=f"{title} (%)", alt=alt, height=460)
    for k, name in enumerate(dict.fromkeys(row.sampler for row in rows)):
        line = sorted((r for r in rows if r.sampler == name), key=lambda r: r.evaluations)
        trials = [round(r.validity * r.n) if key == "uniqueness" else r.n for r in line]
        shares = [wilson(round(getattr(r, key) * n), n) for r, n in zip(line, trials, strict=True)]
        figure.add_estimates(
            [r.evaluations for r in line],
            [100 * s.value for s in shares],
            [100 * s.low for s in shares],
            [100 * s.high for s in shares],
            name=name,
            line={"color": qualitative.Dark24[k], "dash": "dot" if name.startswith(EDM) else "solid"},
        )
    figure.update_xaxes(type="log", tickvals=sorted({r.evaluations for r in rows}))
    figure.update_yaxes(range=[0, 100])
    return figure.legend_right()


def quality_text(rows: Sequence[Quality]) -> str:
    """A plain-text table of the rows."""
    head = ["sampler", "NFE", "valid %", "EDM valid %", "stable %", "unique %", "f_RMS", "ms"]
    return align_columns([head, *(_cells(row) for row in rows)])


def quality_from_json(rows: Iterable[Mapping[str, Any]]) -> list[Quality]:
    """Rows from what `quality_json` made."""
    return [Quality(**{**row, "f_rms": math.nan if row["f_rms"] is None else row["f_rms"]}) for row in rows]


def bundled_quality(name: str = BUNDLED) -> list[Quality]:
    """The table of a bundled model, and of the denoiser if its passport names one, by GFN2-xTB: from the passport."""
    return quality_from_json(read_passport(ASSETS / f"{name}.safetensors")["figures"]["rows"])


def quality_json(rows: Sequence[Quality]) -> list[dict[str, Any]]:
    """The rows for JSON: what is not known is None."""
    return [
        {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in asdict(row).items()} for row in rows
    ]


def _cells(row: Quality) -> list[str]:
    fractions = (row.validity, row.edm_validity, row.stability, row.uniqueness)
    force = "-" if math.isnan(row.f_rms) else f"{row.f_rms:.2f}"
    return [
        row.sampler, str(row.evaluations), *(f"{100 * v:.1f}" for v in fractions), force, f"{1000 * row.seconds:.0f}",
    ]  # fmt: skip
