"""How good the structures of a pseudo-force field are, against the number of network evaluations, for all samplers."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from plotly.colors import qualitative
from rdkit.Chem import MolToSmiles
from tqdm.auto import tqdm

from elign_lab.checkpoints import ASSETS, read_passport
from elign_lab.denoiser import Denoiser
from elign_lab.evaluation import evaluate
from elign_lab.evaluation.intervals import Interval, paired_difference, wilson
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
EDM_SPACING = 2.0  # of a denoiser's grid, see `denoiser_table`
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


_COMPUTED = ("validity_low", "validity_high")  # in JSON, from validity and n
_UNKNOWN: dict[str, Any] = {"f_rms": math.nan, "f_rms_low": math.nan, "f_rms_high": math.nan, "valid": ""}


@dataclass(frozen=True)
class Quality:
    """Figures of n structures that one sampler made with at most `evaluations` network calls each.

    Fractions from 0 to 1. validity: see `valid_smiles`; edm_validity and stability: connected and sanitised, and all
    atoms stable, with EDM's bonds from distance tables, which an error of 0.02 Angstrom breaks in one molecule of
    seven; uniqueness: distinct SMILES over valid ones. f_rms: median by the oracle in eV/Angstrom, NaN without one;
    failures: molecules that the oracle could not evaluate. seconds: computing time per structure. f_rms_low and
    f_rms_high: bootstrap 95 % interval of the median, NaN where it is not known. valid: a digit for each structure in
    order, 1 where it is valid; empty where that is not known.
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
    f_rms_low: float = math.nan
    f_rms_high: float = math.nan
    valid: str = field(default="", repr=False)

    @property
    def validity_interval(self) -> Interval:
        """The validity with Wilson's 95 % interval."""
        return wilson(round(self.validity * self.n), self.n)


def judge(batch: MoleculeBatch, oracle: Oracle | None = None) -> dict[str, Any]:
    """All figures of Quality that belong to structures, by their names there."""
    result = evaluate(batch, oracle, connected=True)
    texts = valid_smiles(batch)
    found = [text for text in texts if text is not None]
    return {
        "validity": len(found) / len(batch),
        "edm_validity": result.validity.value,
        "stability": result.molecule_stability.value,
        "uniqueness": len(set(found)) / len(found) if found else 0.0,
        "f_rms": result.f_rms_median.value,
        "failures": result.oracle_failures,
        "f_rms_low": result.f_rms_median.low,
        "f_rms_high": result.f_rms_median.high,
        "valid": "".join("0" if text is None else "1" for text in texts),
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
    """The same figures for a denoiser, which draws its own atoms; the last of its `budgets` calls decodes.

    The steps have spacing 2 (see NoiseSchedule.grid), which is better for it than even steps: of 128 structures of
    edm-mini with 16 and 32 calls 43 and 59 % are valid by the ancestral sampler, 29 and 50 % with even steps; by
    dpm_solver 46 and 49 %, and 27 and 48 %.
    """

    def make(sampler: str, budget: int) -> MoleculeBatch:
        return sample(
            model,
            n,
            steps=budget - 1,
            spacing=EDM_SPACING,
            sampler=sampler.removeprefix(EDM),
            seed=seed,
            batch_size=batch_size,
        )

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


def validity_gain(first: Quality, second: Quality) -> Interval:
    """Validity of the second row less that of the first, with Newcombe's 95 % interval for pairs.

    Structure i of both is a pair: give rows of the same n and seed, so that both have the same atoms and noise. Raises
    ValueError for rows of different n, and for old ones that do not say which structures are valid.
    """
    for row in (first, second):
        if len(row.valid) != row.n:
            raise ValueError(
                f"the row {row.sampler!r} with {row.evaluations} evaluations does not say which of its {row.n} "
                "structures are valid: make it again with quality_table"
            )
    if first.n != second.n:
        raise ValueError(f"cannot pair {first.n} structures with {second.n}: make the same number, with the same seed")
    outcomes = [np.array([digit == "1" for digit in row.valid]) for row in (first, second)]
    return paired_difference(*outcomes)


def quality_text(rows: Sequence[Quality]) -> str:
    """A plain-text table of the rows, with 95 % intervals of the validity and, by an oracle, of the median f_RMS."""
    head = ["sampler", "NFE", "valid %", "EDM valid %", "stable %", "unique %", "f_RMS", "ms"]
    return align_columns([head, *(_cells(row) for row in rows)])


def quality_from_json(rows: Iterable[Mapping[str, Any]]) -> list[Quality]:
    """Rows from what `quality_json` made, now or before there were intervals."""
    return [Quality(**{k: v for k, v in {**row, **_unknown(row)}.items() if k not in _COMPUTED}) for row in rows]


def bundled_quality(name: str = BUNDLED) -> list[Quality]:
    """The table of a bundled model, and of the denoiser if its passport names one, by GFN2-xTB: from the passport."""
    return quality_from_json(read_passport(ASSETS / f"{name}.safetensors")["figures"]["rows"])


def bundled_headline(name: str = BUNDLED) -> list[Quality]:
    """The rows of a bundled model that have many structures, by GFN2-xTB: from the passport."""
    runs = read_passport(ASSETS / f"{name}.safetensors")["figures"]["headline"]
    return quality_from_json(row for run in runs if run["model"] == name for row in run["rows"])


def quality_json(rows: Sequence[Quality]) -> list[dict[str, Any]]:
    """The rows for JSON, with validity_low and validity_high, Wilson's 95 % interval: what is not known is None."""
    return [_known({**asdict(row), **_limits(row.validity_interval)}) for row in rows]


def _limits(share: Interval) -> dict[str, float]:
    return dict(zip(_COMPUTED, (share.low, share.high), strict=True))


def _known(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if v == "" or (isinstance(v, float) and math.isnan(v)) else v for k, v in row.items()}


def _unknown(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in _UNKNOWN.items() if row.get(key) is None}


def _cells(row: Quality) -> list[str]:
    share = row.validity_interval
    valid = f"{100 * share.value:.1f} ({100 * share.low:.1f}-{100 * share.high:.1f})"
    fractions = (row.edm_validity, row.stability, row.uniqueness)
    force = "-" if math.isnan(row.f_rms) else f"{row.f_rms:.2f}"
    if not math.isnan(row.f_rms_low):
        force += f" ({row.f_rms_low:.2f}-{row.f_rms_high:.2f})"
    return [
        row.sampler,
        str(row.evaluations),
        valid,
        *(f"{100 * v:.1f}" for v in fractions),
        force,
        f"{1000 * row.seconds:.0f}",
    ]
