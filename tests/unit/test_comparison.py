"""Distributions, diversity, composition control and agreement of oracles (elign_lab.evaluation.comparison)."""

import tracemalloc

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdFingerprintGenerator
from rdkit.DataStructs import TanimotoSimilarity
from scipy.stats import spearmanr

from elign_lab.evaluation.comparison import (
    _internal_diversity,
    agreement,
    composition_control,
    cumulative,
    diversity,
    diversity_table,
)
from elign_lab.molecules import MoleculeBatch

BASE = ["CCC", "CCO", "COC", "CC#N", "C1CC1", "CC=O", "CCN", "C1CO1", "CC(=O)N", "FCC", "CCF", "c1cc[nH]c1"]
ALIGNED = ["CCO", "CO", "CCCO", "NC=O", "OCCO", "CC=O", "O=CC=O", "C1CO1", "CC(=O)N", "FCC", "OCC=O", "c1ccoc1"]


@pytest.fixture(scope="module")
def base():
    return MoleculeBatch.from_smiles(BASE)


@pytest.fixture(scope="module")
def aligned():
    return MoleculeBatch.from_smiles(ALIGNED)


# ---------------------------------------------------------------------- distributions
def test_cumulative_sorts_and_leaves_out_what_is_not_finite():
    at, share = cumulative([3.0, np.nan, 1.0, 1.0, np.inf])
    assert at.tolist() == [1.0, 1.0, 3.0]
    assert share.tolist() == pytest.approx([1 / 3, 2 / 3, 1.0])
    with pytest.raises(ValueError, match="none of the 2 values is finite"):
        cumulative([np.nan, np.inf])


# ---------------------------------------------------------------------- diversity
def test_diversity_counts_what_the_molecules_have(base):
    found = diversity(base)
    assert (found.n, found.valid) == (12, 12)
    assert found.unique == 11  # FCC is CCF
    assert found.formulas == 9  # C2H6O, C2H4O and C2H5F occur twice
    assert found.mean_atoms == pytest.approx(float(base.sizes.double().mean()))
    assert sum(found.elements.values()) == pytest.approx(1)
    assert found.elements["F"] == pytest.approx(2 / int(base.sizes.sum()))
    assert found.rings == pytest.approx({"0": 9 / 12, "1": 3 / 12, "2": 0.0, "3 or more": 0.0})
    assert found.groups["alcohol"] == pytest.approx(1 / 12)
    assert found.groups["nitrile"] == pytest.approx(1 / 12)
    assert found.groups["amide"] == pytest.approx(1 / 12)
    assert found.groups["epoxide"] == pytest.approx(1 / 12)


def test_internal_diversity_is_the_mean_tanimoto_distance():
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2)
    prints = [generator.GetFingerprint(Chem.MolFromSmiles(s)) for s in ("CCO", "CC=O", "c1ccoc1")]
    pairs = [TanimotoSimilarity(prints[a], prints[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert diversity(MoleculeBatch.from_smiles(["CCO", "CC=O", "c1ccoc1"])).internal_diversity == pytest.approx(
        1 - np.mean(pairs)
    )
    assert diversity(MoleculeBatch.from_smiles(["CCO", "CCO", "OCC"])).internal_diversity == pytest.approx(0)
    assert np.isnan(diversity(MoleculeBatch.from_smiles(["CCO"])).internal_diversity)


def test_internal_diversity_does_not_keep_the_pairs():
    mols = [Chem.MolFromSmiles("CCO")] * 600
    tracemalloc.start()
    assert _internal_diversity(mols) == pytest.approx(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 600 * 599 // 2 * 8  # bytes of one number for each pair


def test_molecules_that_are_not_valid_count_in_sizes_and_formulas_only(base):
    crushed = MoleculeBatch.cat([base[:2], base[:1].with_positions(0.5 * base[:1].positions)])
    found = diversity(crushed)
    assert (found.n, found.valid, found.formulas) == (3, 2, 2)
    none = diversity(crushed[2:])
    assert none.valid == 0
    assert np.isnan(none.rings["0"])
    with pytest.raises(ValueError, match="empty batch"):
        diversity(base[:0])


def test_diversity_table_has_a_column_for_each_set_and_every_element(base, aligned):
    table = diversity_table({"before": diversity(base), "after": diversity(aligned[:3])})
    lines = {line.split("  ")[0].strip(): line.split()[-2:] for line in table.splitlines()[1:]}
    assert table.splitlines()[0].split() == ["before", "after"]
    assert lines["molecules"] == ["12", "3"]
    assert lines["F (% of atoms)"][1] == "0.0"
    assert lines["alcohol (% of valid)"] == ["8.3", "100.0"]
    assert lines["rings: 1 (% of valid)"] == ["25.0", "0.0"]


# ---------------------------------------------------------------------- composition
def linear_energy(batch):
    """Energy per atom that depends on the composition only, in eV."""
    worth = {1: -2.0, 6: -7.0, 7: -5.0, 8: -4.5, 9: -3.0}
    return np.array([(sum(worth[z] for z in numbers.tolist()) + 3.0) / len(numbers) for numbers, _ in batch.arrays()])


def test_a_change_of_composition_alone_is_explained(base, aligned):
    found = composition_control(base, aligned, linear_energy(base), linear_energy(aligned), n_boot=200)
    assert found.pairs == 12
    assert abs(found.raw.value) > 0.02  # the compositions do differ
    assert found.adjusted.value == pytest.approx(0, abs=1e-9)
    assert found.explained.value == pytest.approx(found.raw.value)


def test_better_geometries_are_what_is_left_at_equal_composition(base, aligned):
    rng = np.random.default_rng(0)
    first, second = (linear_energy(b) + 0.01 * rng.normal(size=len(b)) for b in (base, aligned))
    found = composition_control(base, aligned, first, second - 0.2, n_boot=200)
    assert found.adjusted.value == pytest.approx(-0.2, abs=0.03)
    assert found.adjusted.high < 0
    assert found.raw.value == pytest.approx(found.explained.value + found.adjusted.value)


def test_composition_control_leaves_out_pairs_and_names_bad_input(base, aligned):
    first, second = linear_energy(base), linear_energy(aligned)
    second[3] = np.nan
    assert composition_control(base, aligned, first, second, n_boot=50).pairs == 11
    with pytest.raises(ValueError, match="aligned energies have shape"):
        composition_control(base, aligned, first, second[:5])
    with pytest.raises(ValueError, match="cannot pair 12 base molecules with 5"):
        composition_control(base, aligned[:5], first, second[:5])
    with pytest.raises(ValueError, match="sample more"):
        composition_control(base[:4], aligned[:4], first[:4], second[:4])


# ---------------------------------------------------------------------- two oracles
def test_agreement_is_spearman_of_each_set():
    rng = np.random.default_rng(1)
    proxy = rng.normal(size=(2, 40))
    judge = proxy + rng.normal(size=(2, 40)) * [[0.1], [2.0]]
    found = agreement(tuple(proxy), tuple(judge), n_boot=200)
    for k, interval in enumerate((found.rank_base, found.rank_aligned)):
        assert interval.value == pytest.approx(spearmanr(proxy[k], judge[k]).statistic)
        assert interval.low < interval.value < interval.high
    assert found.rank_base.low > found.rank_aligned.high


@pytest.mark.parametrize("hacked", [True, False])
def test_the_gap_tells_hacking_from_a_real_gain(hacked):
    rng = np.random.default_rng(2)
    truth = rng.normal(3.0, 0.5, size=60)
    proxy = truth + 0.05 * rng.normal(size=60)
    found = agreement((proxy, proxy - 1.0), (truth, truth if hacked else truth - 1.0), n_boot=200)
    assert found.preference_gain.value == pytest.approx(1.0)
    assert found.judge_gain.value == pytest.approx(0.0 if hacked else 1.0)
    assert (found.gap.low > 0.5) == hacked
    assert (found.gap.low <= 0 <= found.gap.high) == (not hacked)


def test_an_equal_fall_from_a_higher_floor_is_a_smaller_share():
    """1 to 0.5 for the preference model, 2 to 1.5 for the judge: no gap, and 50 against 25 per cent."""
    falls = np.linspace(0.9, 1.1, 21)
    found = agreement((falls, falls - 0.5), (falls + 1, falls + 0.5), n_boot=100)
    assert found.gap.value == pytest.approx(0.0)
    assert [found.preference_share.value, found.judge_share.value] == pytest.approx([0.5, 0.25])
    assert found.share_gap.value == pytest.approx(0.25)
    assert found.share_gap.low > 0.2
    energies = agreement((falls - 6, falls - 7), (falls - 6, falls - 7), n_boot=100)
    assert np.isnan([energies.preference_share.value, energies.share_gap.value]).all()


def test_agreement_needs_molecules_that_all_could_judge():
    values = np.arange(6.0)
    broken = values.copy()
    broken[0] = np.nan
    assert agreement((values, values), (values, broken), n_boot=50).pairs == 5
    with pytest.raises(ValueError, match="expected one length"):
        agreement((values, values), (values, values[:4]))
    with pytest.raises(ValueError, match="at least 3"):
        agreement((values[:2], values[:2]), (values[:2], values[:2]))
