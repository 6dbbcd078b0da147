"""Stability, validity, physics, intervals, comparison and the HTML report (parity with EDM: tests/parity)."""

import importlib
import json
import shutil
import time
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import elign_lab.evaluation as evaluation
from elign_lab.evaluation import (
    bond_orders,
    compare,
    evaluate,
    novelty,
    physics,
    rdkit_mols,
    smiles,
    stability,
    uniqueness,
    valid_and_unique,
    validity,
    write_html,
)
from elign_lab.evaluation.comparison import composition_control, diversity, diversity_blocks
from elign_lab.evaluation.intervals import Interval, bootstrap, difference, median, paired_difference, pooled, wilson
from elign_lab.evaluation.report import format_interval
from elign_lab.molecules import MoleculeBatch, zero_com_noise

SMILES = ["O", "CO", "C#N", "CC(=O)N", "c1cc[nH]c1", "FC1CC1", "CCO", "C1CC1C#C"]
CHROMIUM = shutil.which("chromium")


class PairOracle:
    """Harmonic springs of length 1.5 Angstrom between all atoms, in eV; refuses molecules with nitrogen."""

    stiffness = 0.7

    def __call__(self, batch):
        x = batch.positions.double().requires_grad_()
        pairs = batch.mask[:, :, None] & batch.mask[:, None] & ~torch.eye(x.shape[1], dtype=torch.bool)
        gap = torch.where(pairs.unsqueeze(-1), x[:, :, None] - x[:, None], torch.ones(3, dtype=x.dtype))
        energy = torch.where(pairs, 0.25 * self.stiffness * (gap.norm(dim=-1) - 1.5) ** 2, 0.0).sum((1, 2))
        (forces,) = torch.autograd.grad(-energy.sum(), x)
        ok = (batch.numbers != 7).all(1)
        return SimpleNamespace(
            energy=torch.where(ok, energy.detach(), torch.nan),
            forces=torch.where(ok[:, None, None], forces, torch.nan),
            ok=ok,
            status=tuple("ok" if good else "unsupported element N" for good in ok.tolist()),
        )

    def formation_energy_per_atom(self, energy, numbers, mask):
        return (energy - 2.0 * (numbers == 6).sum(1)) / mask.sum(1)


@pytest.fixture(scope="module")
def molecules():
    return MoleculeBatch.from_smiles(SMILES)


def shaken(batch, sigma, seed=0):
    noise = zero_com_noise(batch.mask, torch.Generator().manual_seed(seed), batch.positions.dtype)
    return batch.with_positions(batch.positions + sigma * noise)


def diatomic(first, second, angstrom):
    return MoleculeBatch.from_arrays([([first, second], np.array([[0.0, 0, 0], [0, 0, angstrom]]))])


# ---------------------------------------------------------------------- stability
@pytest.mark.parametrize(
    ("first", "second", "angstrom", "order"),
    [
        (6, 6, 1.6399, 1),
        (6, 6, 1.6401, 0),  # 154 + 10 pm
        (6, 6, 1.3899, 2),
        (6, 6, 1.3901, 1),  # 134 + 5 pm
        (6, 6, 1.2299, 3),
        (6, 6, 1.2301, 2),  # 120 + 3 pm
        (8, 8, 1.2, 2),
        (1, 1, 0.5, 1),
        (15, 8, 1.549, 2),
        (16, 15, 1.90, 2),
        (14, 17, 2.119, 1),
        (53, 17, 1.0, 0),  # no typical length for I-Cl
        (13, 6, 1.0, 0),  # aluminium has a valence but no bond lengths
    ],
)
def test_bond_order_at_the_thresholds(first, second, angstrom, order):
    orders = bond_orders(diatomic(first, second, angstrom))
    assert orders.dtype == torch.int8
    assert orders[0].tolist() == [[0, order], [order, 0]]


def test_clean_molecules_are_stable_and_valid(molecules):
    result = stability(molecules)
    assert result.molecule.all()
    assert torch.equal(result.atoms, molecules.mask)
    assert smiles(molecules)[:3] == ["[H]O[H]", "[H]OC([H])([H])[H]", "[H]C#N"]
    missing = molecules.arrays()[1]
    radical = MoleculeBatch.from_arrays([(missing[0][:-1], missing[1][:-1])])  # a hydrogen of methanol is gone
    assert stability(radical).atoms.sum() == len(missing[0]) - 2
    assert not stability(radical).molecule.item()
    assert smiles(radical) != [None]  # EDM's validity forgives it


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_molecules_are_reported_not_raised(molecules, value):
    positions = molecules.positions.clone()
    positions[2, 1, 0] = value
    broken = molecules.with_positions(positions)
    result, whole = stability(broken), stability(molecules)
    assert not result.atoms[2].any()
    assert not result.molecule[2]
    others = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(result.atoms[others], whole.atoms[others])
    texts = smiles(broken)
    assert texts[2] is None
    assert [texts[i] for i in others] == [smiles(molecules)[i] for i in others]
    assert evaluate(broken).validity.value == pytest.approx(7 / 8)


def test_a_molecule_without_atoms_is_neither_stable_nor_valid():
    empty = MoleculeBatch(torch.zeros(1, 2).long(), torch.zeros(1, 2, 3), torch.zeros(1, 2).bool(), check=False)
    assert not stability(empty).molecule.item()
    assert smiles(empty) == [None]


def test_unknown_element_is_named():
    with pytest.raises(ValueError, match=r"molecule 0, atom 1 is Se.*H, B, C"):
        stability(diatomic(6, 34, 1.9))


def test_bond_orders_in_several_chunks(molecules, monkeypatch):
    whole = bond_orders(molecules)
    module = importlib.import_module("elign_lab.evaluation.stability")
    monkeypatch.setattr(module, "_PAIRS_AT_A_TIME", 2 * molecules.mask.shape[1] ** 2)
    assert torch.equal(bond_orders(molecules), whole)


def test_functions_are_not_hidden_by_the_modules_of_the_same_name():
    for name in ("stability", "validity", "physics"):
        importlib.import_module(f"elign_lab.evaluation.{name}")
        assert callable(getattr(evaluation, name))


# ---------------------------------------------------------------------- validity
def test_single_bonds_and_fragments(molecules):
    acetamide = molecules[3]
    assert smiles(acetamide) == ["[H]N([H])C(=O)C([H])([H])[H]"]
    assert smiles(acetamide, single_bonds=True) == ["[H]N([H])C(O)C([H])([H])[H]"]
    water, hydrogen = molecules.arrays()[0], ([1, 1], np.array([[9.0, 0, 0], [9.74, 0, 0]]))
    apart = MoleculeBatch.from_arrays([([*hydrogen[0], *water[0]], np.concatenate([hydrogen[1], water[1]]))])
    assert smiles(apart) == ["[H]O[H]"]  # the largest fragment
    assert smiles(apart, connected=True) == [None]


def test_valence_error_is_invalid_and_quiet(capfd):
    crowded = MoleculeBatch.from_arrays([([1, 1, 1], np.array([[0.0, 0, 0], [0.7, 0, 0], [0, 0.7, 0]]))])
    assert smiles(crowded) == [None]
    out, err = capfd.readouterr()
    assert "valence" not in (out + err).lower()


def test_rdkit_molecules_keep_order_and_positions(molecules):
    mols = rdkit_mols(molecules)
    for mol, (numbers, positions) in zip(mols, molecules.arrays(), strict=True):
        assert [a.GetAtomicNum() for a in mol.GetAtoms()] == numbers.tolist()
        np.testing.assert_array_equal(mol.GetConformer().GetPositions(), positions.astype(float))
        assert mol.GetConformer().Is3D()


def test_uniqueness_and_novelty():
    found = ["C", "C", "CC", None, "CO"]
    assert validity(found) == 0.8
    assert uniqueness(found) == 0.75
    assert valid_and_unique(found) == 0.6
    assert novelty(found, ["C", None]) == pytest.approx(2 / 3)
    assert uniqueness([None, None]) == novelty([None], ["C"]) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: validity([]), "no molecules"),
        (lambda: uniqueness("CC"), "expected a list"),
        (lambda: novelty(["C"], []), "has no SMILES"),
        (lambda: novelty(["C"], "C"), "one string"),
        (lambda: novelty(["[H]C([H])([H])[H]"], ["C"]), "explicit hydrogens"),
    ],
)
def test_bad_lists_of_smiles(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_speed_of_stability_and_smiles(molecules):
    """EDM's Python needs 6 ms a molecule for both; the measured time here is about 0.2 ms."""
    many, seconds = MoleculeBatch.cat([molecules] * 40), []
    for _ in range(3):
        start = time.thread_time()  # not the clock: other processes may run
        stability(many)
        smiles(many)
        seconds.append(time.thread_time() - start)
    assert min(seconds) / len(many) < 0.6e-3


# ---------------------------------------------------------------------- physics
def test_physics_by_hand():
    pair = diatomic(6, 6, 2.5)
    result = physics(pair, PairOracle())
    assert result.energy_per_atom.item() == pytest.approx((0.5 * 0.7 * 1.0**2 - 4.0) / 2)
    assert result.f_rms.item() == pytest.approx(0.7 * 1.0)
    assert result.failures == 0


def test_failures_are_counted_and_left_out_of_medians(molecules):
    result = physics(molecules, PairOracle())
    nitrogen = [i for i, s in enumerate(SMILES) if "N" in s.upper()]
    assert result.failures == len(nitrogen) == 3
    assert result.energy_per_atom.isnan().nonzero().flatten().tolist() == nitrogen
    kept = [i for i in range(len(SMILES)) if i not in nitrogen]
    assert result.energy_per_atom_median == pytest.approx(np.median(result.energy_per_atom[kept]))
    assert result.f_rms_median == pytest.approx(np.median(result.f_rms[kept]))
    alone = [float(physics(molecules[i], PairOracle()).f_rms) for i in kept]
    np.testing.assert_allclose(alone, result.f_rms[kept], rtol=1e-6)  # padding adds nothing


def test_all_failed_gives_nan_not_an_error(molecules):
    found = evaluate(molecules[[2, 3]], PairOracle())
    assert found.oracle_failures == 2
    assert np.isnan(found.energy_per_atom_median.value)
    assert found.to_dict()["f_rms_median"] == {"value": None, "low": None, "high": None}
    test = compare(found, found).f_rms
    assert test.n == (0, 0)
    assert np.isnan(test.welch_p)


# ---------------------------------------------------------------------- intervals
def test_wilson_against_published_values():
    """Newcombe, Statistics in Medicine 17, 857 (1998), table I, method 3."""
    for successes, trials, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        interval = wilson(successes, trials)
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)
    assert wilson(0, 0) == Interval(0.0, 0.0, 1.0)


def test_median_ignores_nan():
    rows = np.array([[3.0, np.nan, 1.0, 2.0], [np.nan] * 4, [4.0, 1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(median(rows), [2.0, np.nan, 2.5])


def test_bootstrap_is_seeded_and_agrees_with_the_standard_error():
    values = np.random.default_rng(5).normal(size=400)
    mean = lambda i: values[i].mean(-1)  # noqa: E731
    one, two, other = (bootstrap(mean, 400, seed=s, n_boot=2000) for s in (1, 1, 2))
    assert one == two != other
    assert one.high - one.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)
    with pytest.raises(ValueError, match="n_boot"):
        bootstrap(mean, 400, seed=1, n_boot=0)


def coverage(truth, draw, repeats):
    inside = [interval.low <= truth <= interval.high for interval in (draw() for _ in range(repeats))]
    return np.mean(inside)


@pytest.mark.parametrize(
    "weights",
    [np.ones(2000), np.ones(200), np.ones(20), 1 / np.arange(1, 3000), np.r_[2000, np.ones(2000)]],
    ids=["few duplicates", "many duplicates", "collapsed", "long tail", "one dominant mode"],
)
def test_coverage_of_uniqueness(weights):
    """Draws of n molecules from laws with known probabilities: the expected uniqueness is known exactly."""
    rng, p, n = np.random.default_rng(0), weights / weights.sum(), 200
    expected = (1 - (1 - p) ** n).sum() / n
    found = coverage(expected, lambda: wilson(len(np.unique(rng.choice(len(p), size=n, p=p))), n), 300)
    assert found > 0.92


def test_bootstrapping_uniqueness_would_fail():
    """Why the module does not: the percentile interval of all-different molecules excludes the truth."""
    kinds = np.arange(300)
    naive = bootstrap(lambda i: np.array([len(set(row)) / 300 for row in kinds[i].tolist()]), 300, seed=0, n_boot=200)
    assert naive.value == 1.0
    assert naive.high < 0.7


def test_coverage_of_pooled_atoms_and_of_medians():
    """Atoms of a molecule are correlated: an interval from independent atoms would be too narrow."""
    rng = np.random.default_rng(1)

    def draw():
        atoms = rng.integers(10, 25, size=150)
        return pooled(rng.binomial(atoms, rng.beta(9, 1, size=150)), atoms, seed=int(rng.integers(1 << 30)), n_boot=300)

    def draw_median():
        values = rng.lognormal(size=80)
        return bootstrap(lambda i: median(values[i]), 80, seed=int(rng.integers(1 << 30)), n_boot=300)

    assert 0.91 < coverage(0.9, draw, 300) < 0.98
    assert 0.91 < coverage(1.0, draw_median, 300) < 0.985


def test_pooled_interval_does_not_collapse_when_all_atoms_are_stable():
    interval = pooled(np.full(20, 9), np.full(20, 9), seed=0, n_boot=100)
    assert interval == wilson(20, 20)
    assert interval.low < 0.9


def test_coverage_of_paired_differences():
    rng = np.random.default_rng(2)

    def draw():
        shared = rng.random(60)
        return paired_difference(shared < 0.9, np.where(rng.random(60) < 0.5, shared, rng.random(60)) < 0.97)

    def draw_unpaired():
        return difference(wilson(rng.binomial(60, 0.9), 60), wilson(rng.binomial(60, 0.97), 60))

    assert coverage(0.07, draw, 300) > 0.92
    assert coverage(0.07, draw_unpaired, 300) > 0.92


def test_paired_difference_against_published_values():
    """Newcombe, Statistics in Medicine 17, 2635 (1998), table II, method 10: 36, 12, 2 and 0 pairs."""
    first = np.r_[np.ones(36), np.ones(12), np.zeros(2)].astype(bool)
    second = np.r_[np.ones(36), np.zeros(12), np.ones(2)].astype(bool)
    interval = paired_difference(second, first)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)


# ---------------------------------------------------------------------- report
KEYS = [
    *("atom_stability", "molecule_stability", "validity", "uniqueness", "valid_and_unique"),
    *("energy_per_atom_median", "f_rms_median"),
]


@pytest.fixture(scope="module")
def pair(molecules):
    many = MoleculeBatch.cat([molecules] * 4)
    base, aligned = shaken(many, 0.12), shaken(many, 0.02)
    return base, aligned, evaluate(base, PairOracle()), evaluate(aligned, PairOracle())


def test_evaluate_pools_atoms_and_counts(pair):
    base, _, found, _ = pair
    result, texts = stability(base), smiles(base)
    assert found.n == 32
    assert found.atom_stability.value == pytest.approx(float(result.atoms.sum() / base.mask.sum()))
    mean_of_molecules = float((result.atoms.sum(1) / base.sizes).mean())
    assert abs(found.atom_stability.value - mean_of_molecules) > 1e-4  # pooling is not averaging
    assert found.molecule_stability.value == pytest.approx(float(result.molecule.float().mean()))
    assert found.validity.value == pytest.approx(validity(texts))
    assert found.uniqueness.value == pytest.approx(uniqueness(texts))
    assert found.valid_and_unique.value == pytest.approx(valid_and_unique(texts))
    assert found.oracle_failures == 12
    for key in KEYS:
        interval = getattr(found, key)
        assert interval.low <= interval.value <= interval.high


def test_to_dict_is_json_with_the_agreed_keys(pair):
    base, _, found, _ = pair
    assert list(found.to_dict()) == ["n", *KEYS, "oracle_failures"]
    assert all(set(found.to_dict()[k]) == {"value", "low", "high"} for k in KEYS)
    json.dumps(found.to_dict(), allow_nan=False)
    bare = evaluate(base, reference_smiles=smiles(base[:5]))
    assert list(bare.to_dict()) == ["n", *KEYS[:5], "novelty", *KEYS[5:], "oracle_failures"]
    assert bare.to_dict()["oracle_failures"] is None
    json.dumps(bare.to_dict(), allow_nan=False)
    texts = [s for s in smiles(base[:5]) if s is not None]
    assert bare.novelty.value == pytest.approx(novelty(smiles(base), texts))


def test_evaluate_is_reproducible_and_the_seed_matters(pair):
    base, _, found, _ = pair
    assert evaluate(base, PairOracle()).to_dict() == found.to_dict()
    assert evaluate(base, seed=1).atom_stability != found.atom_stability
    assert evaluate(base, seed=1).validity == found.validity


def test_options_reach_validity(molecules):
    fused = MoleculeBatch.from_arrays([([1, 1, 1, 1], np.array([[0.0, 0, 0], [0.74, 0, 0], [9, 0, 0], [9, 0.74, 0]]))])
    assert evaluate(fused).validity.value == 1.0
    assert evaluate(fused, connected=True).validity.value == 0.0
    assert evaluate(molecules[3], single_bonds=True).molecules.smiles == ("[H]N([H])C(O)C([H])([H])[H]",)


def test_evaluate_refuses_an_empty_batch(molecules):
    with pytest.raises(ValueError, match="empty batch"):
        evaluate(molecules[[]])


def test_tables(pair):
    *_, base, aligned = pair
    text = base.table(aligned, names=["base", "aligned"])
    assert f"{100 * base.atom_stability.value:.2f} [{100 * base.atom_stability.low:.2f}" in text
    assert "oracle failures" in text
    assert "novelty" not in text
    assert len({len(line) for line in text.splitlines()}) == 1  # aligned columns
    with pytest.raises(ValueError, match="1 names"):
        base.table(aligned, names=["base"])


def test_compare_finds_the_improvement(pair):
    *_, base, aligned = pair
    result = compare(base, aligned)
    assert result.differences["atom_stability"].low > 0
    for key in KEYS:
        gap = getattr(aligned, key).value - getattr(base, key).value
        assert result.differences[key].value == pytest.approx(gap)
    kept = np.isfinite(base.molecules.f_rms)
    below = aligned.molecules.f_rms[kept][:, None] < base.molecules.f_rms[kept]
    assert result.f_rms.cliffs_delta == pytest.approx(1 - 2 * below.mean())
    assert result.f_rms.n == (20, 20)
    assert "Mann-Whitney" in result.table()
    same = compare(base, base)
    assert same.differences["f_rms_median"] == Interval(0.0, 0.0, 0.0)
    assert same.f_rms.cohens_d == 0.0
    assert same.f_rms.welch_p == pytest.approx(1.0)


def test_a_difference_of_perfect_sets_is_not_taken_as_certain(molecules):
    perfect = evaluate(molecules)
    assert perfect.atom_stability.value == 1.0
    change = compare(perfect, perfect).differences["atom_stability"]
    assert change == difference(perfect.atom_stability, perfect.atom_stability)
    assert change.low < -0.1 < 0.1 < change.high


def test_pairing_narrows_the_interval(pair):
    base_batch, *_, base, _ = pair
    slightly = evaluate(shaken(base_batch, 1e-3, seed=3), PairOracle())
    order = np.random.default_rng(0).permutation(len(base_batch))
    shuffled = evaluate(shaken(base_batch, 1e-3, seed=3)[order], PairOracle())
    widths = [
        (d := compare(base, other).differences["f_rms_median"]).high - d.low for other in (slightly, shuffled)
    ]  # fmt: skip
    assert widths[0] < 0.5 * widths[1]


def test_compare_refuses_what_does_not_pair(pair):
    base_batch, _, base, _ = pair
    with pytest.raises(ValueError, match="cannot pair 32 base molecules with 8"):
        compare(base, evaluate(base_batch[:8], PairOracle()))
    with pytest.raises(ValueError, match="only one of the two"):
        compare(base, evaluate(base_batch))


# ---------------------------------------------------------------------- HTML
HISTORY = [{"iteration": i, "reward_energy": 5 + i, "kl": np.float32(0.01 * i), "note": "text"} for i in range(5)] + [
    {"extra": 1}
]


ABOUT = {"base": "edm-mini (sha256 cef2af182bac)", "oracle": "a <judge>", "command": "elign-lab report 'a b' c"}


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.data, self.inside = [], "", False

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset")]
        self.inside = ("id", "report-data") in attrs

    def handle_data(self, data):
        if self.inside:
            self.data += data

    def handle_endtag(self, tag):
        self.inside = False


@pytest.fixture(scope="module")
def report(pair, tmp_path_factory):
    base_batch, aligned_batch, base, aligned = pair
    path = tmp_path_factory.mktemp("report") / "report.html"
    options = {"names": ("<base>", "aligned"), "about": ABOUT}
    assert write_html(path, base, aligned, base_batch, aligned_batch, HISTORY, **options) == path
    return path


def test_report_is_one_file_with_the_numbers(report, pair):
    page = Links()
    text = report.read_text(encoding="utf-8")
    page.feed(text)
    assert page.links == []
    data = json.loads(page.data)
    assert len(data["cards"]) == 12
    assert set(data["plots"]) == {"curve-0", "curve-1", "curve-2", "distribution-energy_per_atom", "distribution-f_rms"}
    assert data["plots"]["curve-0"]["data"][0]["y"] == [5, 6, 7, 8, 9]
    assert data["plots"]["curve-2"]["data"][0]["x"] == [5]  # no iteration: its place in the list
    base_batch, _, base, _ = pair
    first = data["cards"][0][0]
    assert first["numbers"] == base_batch.arrays()[0][0].tolist()
    ours, theirs = (torch.pdist(torch.as_tensor(x).double()) for x in (first["positions"], base_batch.arrays()[0][1]))
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)  # turned, and rounded to 0.001 Angstrom
    assert f"{100 * base.validity.value:.2f}" in text
    assert "&lt;base&gt;" in text


def test_report_says_what_it_compares(report, pair, tmp_path):
    text = report.read_text(encoding="utf-8")
    assert '<dt class="base">base</dt><dd>edm-mini (sha256 cef2af182bac)</dd>' in text
    assert "<dd>a &lt;judge&gt;</dd>" in text
    assert "<dd><code>elign-lab report &#x27;a b&#x27; c</code></dd>" in text
    assert "paired by seed" in text
    base_batch, aligned_batch, base, aligned = pair
    bare = write_html(tmp_path / "r.html", base, aligned, base_batch, aligned_batch, paired=False)
    text = bare.read_text(encoding="utf-8")
    assert '<dl class="about">' not in text
    assert "not paired" in text
    assert "same seed" not in text


def test_report_has_the_energy_at_equal_composition_and_the_diversity(report, pair, tmp_path):
    base_batch, aligned_batch, base, aligned = pair
    energies = [e.molecules.energy_per_atom for e in (base, aligned)]
    control = composition_control(base_batch, aligned_batch, *energies)
    text = report.read_text(encoding="utf-8")
    for interval in (control.raw, control.explained, control.adjusted):
        value, _, limits = format_interval("energy_per_atom_median", interval, signed=True).partition(" ")
        assert f'{value}</span><span class="range">{limits}</span>' in text
    assert f"From the {control.pairs} pairs" in text
    sets = {"base": diversity(base_batch), "aligned": diversity(aligned_batch)}
    for block in diversity_blocks(sets).values():
        for label, (first, second) in block.items():
            assert f'<th scope="row">{label}</th><td>{first}</td><td>{second}</td>' in text
    few = [batch[:2] for batch in (base_batch, aligned_batch)]
    path = write_html(tmp_path / "few.html", *(evaluate(batch, PairOracle()) for batch in few), *few)
    assert "Not known: 2 pairs were judged in both sets" in path.read_text(encoding="utf-8")


def test_report_without_oracle_and_with_broken_molecules(pair, tmp_path):
    base_batch, aligned_batch, *_ = pair
    broken = base_batch.with_positions(base_batch.positions.clone().index_fill_(0, torch.tensor([0]), torch.nan))
    path = write_html(tmp_path / "r.html", evaluate(broken), evaluate(aligned_batch), broken, aligned_batch)
    page = Links()
    page.feed(path.read_text(encoding="utf-8"))
    data = json.loads(page.data)
    assert data["plots"] == {}
    assert data["cards"][0][0]["facts"] == ["positions are not finite"]
    assert data["cards"][0][0]["positions"] == []


def test_report_refuses_what_does_not_belong_together(pair, tmp_path):
    base_batch, aligned_batch, base, aligned = pair
    with pytest.raises(ValueError, match="32 molecules but its batch 3"):
        write_html(tmp_path / "r.html", base, aligned, base_batch[:3], aligned_batch)
    with pytest.raises(ValueError, match="no numbers to plot"):
        write_html(tmp_path / "r.html", base, aligned, base_batch, aligned_batch, [{"iteration": 1}])


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_in_a_browser(report, scheme):
    sync_api = pytest.importorskip("playwright.sync_api")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    errors, requests = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(color_scheme=scheme)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: requests.append(request.url))
        page.goto(report.as_uri())
        page.wait_for_selector("#distribution-f_rms .scatterlayer .trace")
        canvas = page.locator("canvas").first
        pixels = "c => { const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let s = 0; "
        pixels += "for (let k = 0; k < d.length; k++) s = (31 * s + d[k]) % 1000003; return s; }"
        blank = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.every((v) => v === 0)"
        assert page.locator("canvas").count() == 24
        assert not canvas.evaluate(blank)
        canvas.scroll_into_view_if_needed()
        seen = [canvas.evaluate(pixels)]
        box = canvas.bounding_box()
        page.mouse.move(box["x"] + 60, box["y"] + 60)
        page.mouse.wheel(0, -200)
        page.wait_for_timeout(200)
        free = [canvas.evaluate(pixels), canvas.bounding_box()["y"] - box["y"]]
        canvas.scroll_into_view_if_needed()
        page.mouse.wheel(0, 200)
        page.wait_for_timeout(200)
        box = canvas.bounding_box()
        page.mouse.move(box["x"] + 60, box["y"] + 60)
        page.mouse.down()
        page.mouse.move(box["x"] + 110, box["y"] + 80, steps=4)
        page.mouse.up()
        seen.append(canvas.evaluate(pixels))
        page.mouse.wheel(0, -300)  # the drag has given the pair the focus
        page.wait_for_timeout(100)
        seen.append(canvas.evaluate(pixels))
        page.keyboard.press("ArrowLeft")
        seen.append(canvas.evaluate(pixels))
        page.mouse.dblclick(box["x"] + 60, box["y"] + 60)
        seen.append(canvas.evaluate(pixels))
        browser.close()
    assert errors == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert free[0] == seen[0]
    assert free[1] > 0  # until a pair is clicked, the wheel is the page's
    assert len(set(seen[:4])) == 4  # drag, wheel and key each change the view
    assert seen[4] == seen[0]  # and a double click undoes them
