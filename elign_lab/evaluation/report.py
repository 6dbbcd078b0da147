"""Evaluate generated molecules, and compare two models on the same seeds (paper section 4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu, ttest_ind

from elign_lab.evaluation.intervals import (
    Interval,
    bootstrap,
    difference,
    median,
    paired_difference,
    pooled,
    wilson,
)
from elign_lab.evaluation.physics import physics
from elign_lab.evaluation.stability import stability
from elign_lab.evaluation.validity import novelty as novel_fraction
from elign_lab.evaluation.validity import smiles
from elign_lab.molecules import MoleculeBatch
from elign_lab.shapes import Shapes

if TYPE_CHECKING:
    from elign_lab.oracles import Oracle

FRACTIONS = {
    "atom_stability": "atom stability",
    "molecule_stability": "molecule stability",
    "validity": "validity",
    "uniqueness": "uniqueness",
    "valid_and_unique": "valid and unique",
    "novelty": "novelty",
}
MEDIANS = {
    "energy_per_atom_median": ("energy per atom, median", "eV"),
    "f_rms_median": ("force RMS, median", "eV/Å"),
}

FloatArray = NDArray[np.floating]


@dataclass(frozen=True, repr=False)
class MoleculeResults(Shapes):
    """The results of every molecule, in the order of the batch: arrays (B,).

    atoms and stable_atoms: counts; smiles: of the largest fragment, or None; energy_per_atom in eV and f_rms in
    eV/Angstrom, NaN where the oracle failed or there is none; status: "ok" or the oracle's reason, empty without one.
    """

    atoms: NDArray[np.integer]
    stable_atoms: NDArray[np.integer]
    smiles: tuple[str | None, ...]
    energy_per_atom: FloatArray
    f_rms: FloatArray
    status: tuple[str, ...]

    @property
    def stable(self) -> NDArray[np.bool_]:
        """Molecules in which every atom is stable."""
        return (self.stable_atoms == self.atoms) & (self.atoms > 0)

    @property
    def valid(self) -> NDArray[np.bool_]:
        """Molecules that RDKit can sanitise."""
        return np.array([s is not None for s in self.smiles])


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a set of molecules, each with a 95 % interval (`elign_lab.evaluation.intervals` says which).

    Fractions from 0 to 1; atom_stability pools the atoms of all molecules, as EDM. uniqueness is over the valid
    molecules, valid_and_unique over all, novelty over the distinct ones (None without a reference).
    energy_per_atom_median (formation energy) in eV and f_rms_median in eV/Angstrom, over the molecules that the oracle
    could evaluate; NaN without an oracle, for which oracle_failures is None.
    """

    n: int
    atom_stability: Interval
    molecule_stability: Interval
    validity: Interval
    uniqueness: Interval
    valid_and_unique: Interval
    novelty: Interval | None
    energy_per_atom_median: Interval
    f_rms_median: Interval
    oracle_failures: int | None
    molecules: MoleculeResults

    def to_dict(self) -> dict[str, object]:
        """For JSON: n, each metric as {"value", "low", "high"} (None where unknown), and oracle_failures.

        novelty is there only when a reference was given.
        """
        keys = [key for key in (*FRACTIONS, *MEDIANS) if key != "novelty" or self.novelty is not None]
        metrics = {key: getattr(self, key).to_dict() for key in keys}
        return {"n": self.n, **metrics, "oracle_failures": self.oracle_failures}

    def table(self, *others: Evaluation, names: Sequence[str] | None = None) -> str:
        """A plain-text table, one column per evaluation; `names` are the headings."""
        columns = (self, *others)
        if names is None:
            names = ["value"] if not others else [f"set {k + 1}" for k in range(len(columns))]
        if len(names) != len(columns):
            raise ValueError(f"{len(columns)} evaluations but {len(names)} names: give one name per evaluation")
        rows = [["", *names], ["molecules", *(str(e.n) for e in columns)]]
        for key, label in metric_labels(columns).items():
            rows.append([label, *(format_interval(key, getattr(e, key)) for e in columns)])
        if any(e.oracle_failures is not None for e in columns):
            rows.append(
                ["oracle failures", *("-" if e.oracle_failures is None else str(e.oracle_failures) for e in columns)]
            )
        return align_columns(rows)

    def __str__(self) -> str:
        return self.table()


@dataclass(frozen=True)
class GroupTest:
    """Are the values of two groups different? Molecules that the oracle could not evaluate are left out.

    n: molecules per group. mann_whitney_p and welch_p: two-sided p-values, of ranks and of means; both take the groups
    as independent, which is conservative for pairs that go up and down together. cliffs_delta: P(aligned > base) -
    P(aligned < base), from -1 to 1. cohens_d: difference of the means over the pooled standard deviation.
    """

    n: tuple[int, int]
    mann_whitney_p: float
    welch_p: float
    cliffs_delta: float
    cohens_d: float


@dataclass(frozen=True)
class Comparison:
    """Aligned minus base, paired by index: differences with 95 % intervals, and tests of energy and force.

    differences: by the names of `Evaluation`'s metrics, in their units; what one of the sets lacks is not there.
    energy_per_atom and f_rms: None without an oracle.
    """

    base: Evaluation
    aligned: Evaluation
    differences: Mapping[str, Interval]
    energy_per_atom: GroupTest | None
    f_rms: GroupTest | None

    def table(self, names: tuple[str, str] = ("base", "aligned")) -> str:
        """A plain-text table: both sets, the difference with its interval, and the tests."""
        rows = [["", *names, "difference"], ["molecules", str(self.base.n), str(self.aligned.n), ""]]
        for key, label in metric_labels((self.base, self.aligned)).items():
            values = (format_interval(key, getattr(e, key)) for e in (self.base, self.aligned))
            rows.append([label, *values, format_interval(key, self.differences.get(key), signed=True)])
        lines = [align_columns(rows)]
        for label, test in (("energy per atom", self.energy_per_atom), ("force RMS", self.f_rms)):
            if test is not None:
                lines.append(f"{label}: {format_test(test)}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def evaluate(
    batch: MoleculeBatch,
    oracle: Oracle | None = None,
    *,
    reference_smiles: Iterable[str | None] | None = None,
    connected: bool = False,
    single_bonds: bool = False,
    seed: int = 0,
    n_boot: int = 1000,
) -> Evaluation:
    """Stability, validity, uniqueness, and by an oracle the energy and the forces, with 95 % intervals.

    reference_smiles: the training set's, for novelty (see `elign_lab.evaluation.novelty`). connected: molecules in
    more than one fragment are not valid (stricter than EDM). single_bonds: validity with single bonds only, as EDM
    for GEOM-Drugs. seed and n_boot: of the bootstrap. Raises ValueError for an empty batch, an element outside EDM's
    tables, or an unusable reference.
    """
    if len(batch) == 0:
        raise ValueError("cannot evaluate an empty batch: expected at least one molecule")
    stable_atoms = stability(batch).atoms.sum(1).cpu().numpy()
    texts = tuple(smiles(batch, connected=connected, single_bonds=single_bonds))
    quality = None if oracle is None else physics(batch, oracle)
    unknown = np.full(len(batch), np.nan)
    molecules = MoleculeResults(
        atoms=batch.sizes.cpu().numpy(),
        stable_atoms=stable_atoms,
        smiles=texts,
        energy_per_atom=unknown if quality is None else quality.energy_per_atom.numpy(),
        f_rms=unknown if quality is None else quality.f_rms.numpy(),
        status=() if quality is None else quality.status,
    )
    n, valid, distinct = len(batch), int(molecules.valid.sum()), len({s for s in texts if s is not None})
    novelty = None
    if reference_smiles is not None:
        novelty = wilson(round(novel_fraction(texts, reference_smiles) * distinct), distinct)
    return Evaluation(
        n=n,
        atom_stability=pooled(stable_atoms, molecules.atoms, seed=seed, n_boot=n_boot),
        molecule_stability=wilson(int(molecules.stable.sum()), n),
        validity=wilson(valid, n),
        uniqueness=wilson(distinct, valid),
        valid_and_unique=wilson(distinct, n),
        novelty=novelty,
        energy_per_atom_median=_median_interval(molecules.energy_per_atom, seed, n_boot),
        f_rms_median=_median_interval(molecules.f_rms, seed, n_boot),
        oracle_failures=None if quality is None else quality.failures,
        molecules=molecules,
    )


def compare(base: Evaluation, aligned: Evaluation, *, seed: int = 0, n_boot: int = 1000) -> Comparison:
    """Aligned minus base, paired by index: molecule i of both was made with the same seed, size and noise.

    Pairing narrows the intervals when the pairs are alike, and is harmless when they are not. Uniqueness, its product
    with validity, and novelty belong to a set and not to a molecule, so they are compared unpaired. Raises ValueError
    when the sets are not of one size, or only one of them was evaluated by an oracle.
    """
    if base.n != aligned.n:
        raise ValueError(
            f"cannot pair {base.n} base molecules with {aligned.n} aligned ones: "
            "sample the same number of both, with the same seeds"
        )
    if (base.oracle_failures is None) != (aligned.oracle_failures is None):
        raise ValueError("only one of the two sets was evaluated by an oracle: evaluate both with the same one")
    first, second = base.molecules, aligned.molecules
    differences = {
        "atom_stability": _pooled_difference(base, aligned, seed, n_boot),
        "molecule_stability": paired_difference(first.stable, second.stable),
        "validity": paired_difference(first.valid, second.valid),
        "uniqueness": difference(base.uniqueness, aligned.uniqueness),
        "valid_and_unique": difference(base.valid_and_unique, aligned.valid_and_unique),
    }
    if base.novelty is not None and aligned.novelty is not None:
        differences["novelty"] = difference(base.novelty, aligned.novelty)
    if base.oracle_failures is None:
        return Comparison(base, aligned, differences, energy_per_atom=None, f_rms=None)
    energies, forces = (first.energy_per_atom, second.energy_per_atom), (first.f_rms, second.f_rms)
    differences["energy_per_atom_median"] = _median_difference(*energies, seed, n_boot)
    differences["f_rms_median"] = _median_difference(*forces, seed, n_boot)
    return Comparison(base, aligned, differences, group_test(*energies), group_test(*forces))


def group_test(base: FloatArray, aligned: FloatArray) -> GroupTest:
    """Tests and effect sizes of two arrays of values; NaN are left out, and too few values give NaN."""
    first, second = base[np.isfinite(base)], aligned[np.isfinite(aligned)]
    n = (len(first), len(second))
    if min(n) < 2:
        return GroupTest(n, np.nan, np.nan, np.nan, np.nan)
    ranks = mannwhitneyu(second, first)
    spread = ((n[0] - 1) * first.var(ddof=1) + (n[1] - 1) * second.var(ddof=1)) / (sum(n) - 2)
    gap = second.mean() - first.mean()
    return GroupTest(
        n,
        mann_whitney_p=float(ranks.pvalue),
        welch_p=float(ttest_ind(second, first, equal_var=False).pvalue),
        cliffs_delta=float(2 * ranks.statistic / (n[0] * n[1]) - 1),
        cohens_d=float(gap / np.sqrt(spread)) if spread > 0 else (0.0 if gap == 0 else float(np.inf * np.sign(gap))),
    )


def metric_labels(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    """The metrics that at least one evaluation has, with their labels and units."""
    labels = {key: f"{label} (%)" for key, label in FRACTIONS.items()}
    if all(e.novelty is None for e in evaluations):
        del labels["novelty"]
    if any(e.oracle_failures is not None for e in evaluations):
        labels |= {key: f"{label} ({unit})" for key, (label, unit) in MEDIANS.items()}
    return labels


def format_interval(key: str, interval: Interval | None, *, signed: bool = False) -> str:
    """'98.70 [97.90, 99.20]' in the unit of `metric_labels`; '-' where there is no value."""
    if interval is None or not np.isfinite(interval.value):
        return "-"
    scale, digits = (100, 2) if key in FRACTIONS else (1, 4)
    sign = "+" if signed else ""
    value, low, high = (
        f"{scale * number:{sign}.{digits}f}" for number in (interval.value, interval.low, interval.high)
    )
    return f"{value} [{low}, {high}]"


def format_test(test: GroupTest) -> str:
    """One line with the tests, for people."""
    return (
        f"Mann-Whitney p = {test.mann_whitney_p:.2g}, Welch p = {test.welch_p:.2g}, Cliff's delta = "
        f"{test.cliffs_delta:+.2f}, Cohen's d = {test.cohens_d:+.2f} (n = {test.n[0]} and {test.n[1]})"
    )


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Text columns of equal width: the first to the left, the others to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _median_interval(values: FloatArray, seed: int, n_boot: int) -> Interval:
    return bootstrap(lambda i: median(values[i]), len(values), seed=seed, n_boot=n_boot)


def _median_difference(base: FloatArray, aligned: FloatArray, seed: int, n_boot: int) -> Interval:
    return bootstrap(lambda i: median(aligned[i]) - median(base[i]), len(base), seed=seed, n_boot=n_boot)


def _pooled_difference(base: Evaluation, aligned: Evaluation, seed: int, n_boot: int) -> Interval:
    if {base.atom_stability.value, aligned.atom_stability.value} <= {0.0, 1.0}:
        return difference(base.atom_stability, aligned.atom_stability)  # the bootstrap has no width: see `pooled`

    def statistic(i: NDArray[np.intp]) -> FloatArray:
        fractions = [m.stable_atoms[i].sum(-1) / m.atoms[i].sum(-1) for m in (base.molecules, aligned.molecules)]
        return fractions[1] - fractions[0]

    return bootstrap(statistic, base.n, seed=seed, n_boot=n_boot)
