"""What alignment changed besides the means: distributions, diversity, composition, and how far two oracles agree.

The energies of a model fall when its geometries are better, when it moves to elements whose bonds are stronger, or when
it finds the errors of its preference model. These functions tell the three apart. Tests and effect sizes of two sets
are `elign_lab.evaluation.compare`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import ArrayLike, NDArray
from rdkit.Chem import Fragments, Mol, MolFromSmiles, rdFingerprintGenerator
from rdkit.Chem.rdMolDescriptors import CalcNumRings
from rdkit.DataStructs import BulkTanimotoSimilarity
from scipy.stats import rankdata

from elign_lab.evaluation.intervals import Interval, bootstrap, median
from elign_lab.evaluation.report import align_columns
from elign_lab.evaluation.validity import smiles
from elign_lab.molecules import MoleculeBatch

FloatArray = NDArray[np.floating]
# RDKit's fragment counters (rdkit.Chem.Fragments) that are common among small organic molecules
_COUNTERS = {
    "alcohol": "fr_Al_OH",
    "ether": "fr_ether",
    "carbonyl": "fr_C_O",
    "amide": "fr_amide",
    "primary amine": "fr_NH2",
    "nitrile": "fr_nitrile",
    "epoxide": "fr_epoxide",
}
FUNCTIONAL_GROUPS: dict[str, Callable[[Mol], int]] = {
    group: getattr(Fragments, counter)  # made by RDKit when it is imported
    for group, counter in _COUNTERS.items()
}
_MAX_RINGS = 3  # molecules with more are counted here
_FINGERPRINT_RADIUS = 2


# ---------------------------------------------------------------------- distributions
def cumulative(values: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Empirical cumulative distribution of the finite values: sorted values (m,), and the share up to each (m,).

    Raises ValueError when no value is finite.
    """
    array = np.asarray(values, dtype=float).ravel()
    kept = np.sort(array[np.isfinite(array)])
    if len(kept) == 0:
        raise ValueError(f"none of the {len(array)} values is finite: there is no distribution to show")
    return kept, np.arange(1, len(kept) + 1) / len(kept)


# ---------------------------------------------------------------------- diversity
@dataclass(frozen=True)
class Diversity:
    """How varied a set of molecules is.

    n molecules, of which `valid` have a SMILES and `unique` of these are distinct. Of all molecules: `formulas`, the
    number of distinct ones; mean_atoms; elements, symbol -> share of the atoms. Of the valid ones: internal_diversity,
    the mean Tanimoto distance (0 to 1) of two molecules by Morgan fingerprints of radius 2 (Polykovskiy et al. 2020,
    IntDiv_1; NaN for fewer than two); rings, number of rings -> share; groups, functional group -> share that has it.
    """

    n: int
    valid: int
    unique: int
    formulas: int
    mean_atoms: float
    elements: dict[str, float]
    internal_diversity: float
    rings: dict[str, float]
    groups: dict[str, float]


def diversity(batch: MoleculeBatch) -> Diversity:
    """Diversity of a batch. Raises ValueError for an empty one and for an element outside EDM's bond tables.

    A molecule in several fragments counts as its largest one, as in `elign_lab.evaluation.smiles`.
    """
    if len(batch) == 0:
        raise ValueError("cannot describe an empty batch: expected at least one molecule")
    found = [s for s in smiles(batch) if s is not None]
    mols = [MolFromSmiles(s) for s in found]  # hydrogens become implicit, as the fragment counters expect
    counts = Counter(batch.numbers[batch.mask].tolist())
    atoms = sum(counts.values())
    rings = Counter(min(CalcNumRings(m), _MAX_RINGS) for m in mols)
    labels = [*map(str, range(_MAX_RINGS)), f"{_MAX_RINGS} or more"]
    return Diversity(
        n=len(batch),
        valid=len(found),
        unique=len(set(found)),
        formulas=len({batch.formula(i) for i in range(len(batch))}),
        mean_atoms=atoms / len(batch),
        elements={chemical_symbols[z]: counts[z] / atoms for z in sorted(counts)},
        internal_diversity=_internal_diversity(mols),
        rings={label: _share(rings[k], len(mols)) for k, label in enumerate(labels)},
        groups={name: _share(sum(count(m) > 0 for m in mols), len(mols)) for name, count in FUNCTIONAL_GROUPS.items()},
    )


def diversity_blocks(sets: Mapping[str, Diversity]) -> dict[str, dict[str, list[str]]]:
    """What `diversity` found, in three blocks: "variety", "% of atoms", "% of valid" -> label -> text of each set."""
    columns = list(sets.values())
    elements = sorted({e for d in columns for e in d.elements}, key=chemical_symbols.index)
    variety = {
        "molecules": [str(d.n) for d in columns],
        "valid": [str(d.valid) for d in columns],
        "distinct among them": [str(d.unique) for d in columns],
        "internal diversity": [_text(d.internal_diversity, 2) for d in columns],
        "distinct formulas": [str(d.formulas) for d in columns],
        "atoms, mean": [_text(d.mean_atoms, 1) for d in columns],
    }
    atoms = {e: [_text(100 * d.elements.get(e, 0.0), 1) for d in columns] for e in elements}
    valid = {f"rings: {k}": [_text(100 * d.rings[k], 1) for d in columns] for k in columns[0].rings}
    valid |= {name: [_text(100 * d.groups[name], 1) for d in columns] for name in columns[0].groups}
    return {"variety": variety, "% of atoms": atoms, "% of valid": valid}


def diversity_table(sets: Mapping[str, Diversity]) -> str:
    """A plain-text table, one column per set; shares in per cent."""
    rows = [
        [label if unit == "variety" else f"{label} ({unit})", *values]
        for unit, block in diversity_blocks(sets).items()
        for label, values in block.items()
    ]
    return align_columns([["", *sets], *rows])


# ---------------------------------------------------------------------- composition
@dataclass(frozen=True)
class CompositionControl:
    """Mean formation energy per atom, aligned minus base, in eV, with 95 % intervals; `pairs` were judged in both sets.

    raw = explained + adjusted: what the other composition explains, and what is left at equal composition.
    """

    pairs: int
    raw: Interval
    explained: Interval
    adjusted: Interval


def composition_control(
    base: MoleculeBatch,
    aligned: MoleculeBatch,
    base_energy: ArrayLike,
    aligned_energy: ArrayLike,
    *,
    seed: int = 0,
    n_boot: int = 1000,
) -> CompositionControl:
    """Split a change of the energy per atom into composition and the rest, by an analysis of covariance.

    energy = sum over elements of a_e (share of e) + b / (number of atoms) + d (is aligned), by least squares over both
    sets; d is the adjusted difference. Energies (B,) in eV/atom, paired by index; pairs with a NaN are left out, and
    the bootstrap resamples pairs. What is linear in the composition is accounted for, nothing else: an isomer with
    weaker bonds counts as a worse geometry. Raises ValueError for sets of different size and for too few pairs.
    """
    if len(base) != len(aligned):
        raise ValueError(f"cannot pair {len(base)} base molecules with {len(aligned)} aligned ones")
    energies = np.stack([_per_molecule(base_energy, base, "base"), _per_molecule(aligned_energy, aligned, "aligned")])
    elements = sorted({*base.numbers[base.mask].tolist(), *aligned.numbers[aligned.mask].tolist()})
    kept = np.flatnonzero(np.isfinite(energies).all(0))
    terms = len(elements) + 2
    if len(kept) < terms:
        raise ValueError(
            f"{len(kept)} pairs were judged in both sets, and {terms} coefficients are to be fitted: sample more"
        )
    y = energies[:, kept]
    x = np.stack([_composition(b, elements)[kept] for b in (base, aligned)])
    member = np.repeat([0.0, 1.0], len(kept))[:, None]

    def adjusted(indices: NDArray[np.intp]) -> FloatArray:
        fits = []
        for i in indices:
            design = np.hstack([x[:, i].reshape(-1, x.shape[-1]), member])
            fits.append(np.linalg.lstsq(design, y[:, i].ravel(), rcond=None)[0][-1])
        return np.array(fits)

    def raw(indices: NDArray[np.intp]) -> FloatArray:
        return y[1][indices].mean(-1) - y[0][indices].mean(-1)

    # the same seed draws the same pairs, so that the three intervals belong together
    def interval(statistic: Callable[[NDArray[np.intp]], FloatArray]) -> Interval:
        return bootstrap(statistic, len(kept), seed=seed, n_boot=n_boot)

    return CompositionControl(len(kept), interval(raw), interval(lambda i: raw(i) - adjusted(i)), interval(adjusted))


# ---------------------------------------------------------------------- two oracles
@dataclass(frozen=True)
class Agreement:
    """Preference model against judge on the same molecules, before and after alignment; 95 % bootstrap intervals.

    rank_base, rank_aligned: Spearman's correlation of the two oracles' values in each set. preference_gain, judge_gain:
    fall of the median from base to aligned, positive when it is better; gap: the first minus the second, what the
    preference model sees and the judge does not. preference_share, judge_share, share_gap: the same for the fall as a
    share of the base's median; NaN unless all medians are positive. `pairs` were judged by both oracles in both sets.
    """

    pairs: int
    rank_base: Interval
    rank_aligned: Interval
    preference_gain: Interval
    judge_gain: Interval
    gap: Interval
    preference_share: Interval
    judge_share: Interval
    share_gap: Interval


def agreement(
    preference: tuple[ArrayLike, ArrayLike], judge: tuple[ArrayLike, ArrayLike], *, seed: int = 0, n_boot: int = 1000
) -> Agreement:
    """Compare a preference model with a judge; each argument is (base (B,), aligned (B,)), where lower is better.

    A rank correlation that falls, with a gap above zero, is reward hacking: the policy went where the preference model
    is wrong. Raises ValueError for arrays of different length, and for fewer than three pairs.
    """
    arrays = [np.asarray(v, dtype=float).ravel() for v in (*preference, *judge)]
    if len({len(a) for a in arrays}) != 1:
        raise ValueError(f"the four arrays have {', '.join(str(len(a)) for a in arrays)} values: expected one length")
    values = np.stack(arrays)
    values = values[:, np.isfinite(values).all(0)]
    if values.shape[1] < 3:
        raise ValueError(f"{values.shape[1]} molecules were judged by both oracles in both sets: expected at least 3")

    def interval(statistic: Callable[[NDArray[np.intp]], FloatArray]) -> Interval:
        return bootstrap(statistic, values.shape[1], seed=seed, n_boot=n_boot)

    def gain(base: FloatArray, aligned: FloatArray) -> Callable[[NDArray[np.intp]], FloatArray]:
        return lambda i: median(base[i]) - median(aligned[i])

    def share(base: FloatArray, aligned: FloatArray) -> Callable[[NDArray[np.intp]], FloatArray]:
        def statistic(i: NDArray[np.intp]) -> FloatArray:
            before, after = median(base[i]), median(aligned[i])
            positive = (before > 0) & (after > 0)  # energies have no natural zero to take shares of
            return np.where(positive, 1 - after / np.where(positive, before, 1.0), np.nan)

        return statistic

    seen, real = gain(values[0], values[1]), gain(values[2], values[3])
    seen_share, real_share = share(values[0], values[1]), share(values[2], values[3])
    return Agreement(
        pairs=values.shape[1],
        rank_base=interval(lambda i: _spearman(values[0][i], values[2][i])),
        rank_aligned=interval(lambda i: _spearman(values[1][i], values[3][i])),
        preference_gain=interval(seen),
        judge_gain=interval(real),
        gap=interval(lambda i: seen(i) - real(i)),
        preference_share=interval(seen_share),
        judge_share=interval(real_share),
        share_gap=interval(lambda i: seen_share(i) - real_share(i)),
    )


def _spearman(first: FloatArray, second: FloatArray) -> FloatArray:
    """Correlation of the ranks over the last axis; NaN where one side is constant."""
    a, b = (rankdata(v, axis=-1) for v in (first, second))
    a, b = (v - v.mean(-1, keepdims=True) for v in (a, b))
    norm = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return np.divide((a * b).sum(-1), norm, out=np.full(norm.shape, np.nan), where=norm > 0)


def _internal_diversity(mols: list[Mol]) -> float:
    if len(mols) < 2:
        return float("nan")
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=_FINGERPRINT_RADIUS)
    prints = [generator.GetFingerprint(m) for m in mols]
    # a sum for each row: ten thousand molecules have fifty million pairs
    total = sum(sum(BulkTanimotoSimilarity(p, prints[:k])) for k, p in enumerate(prints))
    return 1 - total / (len(prints) * (len(prints) - 1) / 2)


def _composition(batch: MoleculeBatch, elements: list[int]) -> FloatArray:
    """Share of each element, and one over the number of atoms, (B, elements + 1)."""
    sizes = batch.sizes.clamp(min=1).double()
    shares = [((batch.numbers == z) & batch.mask).sum(1) / sizes for z in elements]
    return np.stack([v.cpu().numpy() for v in (*shares, 1 / sizes)], -1)


def _per_molecule(energy: ArrayLike, batch: MoleculeBatch, name: str) -> FloatArray:
    array = np.asarray(energy, dtype=float)
    if array.shape != (len(batch),):
        raise ValueError(f"the {name} energies have shape {array.shape}, expected ({len(batch)},): one per molecule")
    return array


def _share(count: int, total: int) -> float:
    return count / total if total else float("nan")


def _text(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else "-"
