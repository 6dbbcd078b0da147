"""The bundled set, the form of a data set, and the batches for training."""

import json
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from rdkit import Chem

from elign_lab.datasets import BatchSampler, MoleculeDataset, load_dataset, qm9_size_histogram
from elign_lab.datasets.bundled import ASSETS, save_bundled, split_of

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "build_bundled_set.py"


@pytest.fixture(scope="module")
def bundled() -> MoleculeDataset:
    return load_dataset("bundled", split="all")


@pytest.fixture(scope="module")
def script():
    spec = spec_from_file_location("build_bundled_set", SCRIPT)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def rmsd(a: np.ndarray, b: np.ndarray) -> float:
    """After superposition (Kabsch, proper rotations)."""
    a, b = a - a.mean(0), b - b.mean(0)
    u, _, vt = np.linalg.svd(a.T @ b)
    rotation = u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt
    return float(np.sqrt(((a @ rotation - b) ** 2).sum(1).mean()))


# ---------------------------------------------------------------------- bundled set
def test_bundled_matches_its_passport(bundled):
    passport = json.loads((ASSETS / "qm9_xtb.json").read_text())
    assert len(bundled) == passport["molecules"] >= 10_000
    assert bundled.sizes.sum() == passport["atoms"]
    assert bundled.elements == (1, 6, 7, 8, 9)
    assert (ASSETS / "qm9_xtb.npz").stat().st_size == passport["bytes"] < 8e6
    assert len(set(bundled.smiles)) == len(bundled)


def test_bundled_splits_are_disjoint_and_complete(bundled):
    parts = {split: set(load_dataset("bundled", split=split).smiles) for split in ("train", "validation", "test")}
    assert set().union(*parts.values()) == set(bundled.smiles)
    assert sum(map(len, parts.values())) == len(bundled)
    assert len(parts["train"]) / len(bundled) == pytest.approx(0.8, abs=0.01)
    assert len(parts["validation"]) / len(bundled) == pytest.approx(0.1, abs=0.01)


def test_split_is_of_the_molecule_not_of_its_smiles(bundled):
    test = set(load_dataset("bundled", split="test").smiles)
    for smiles in bundled.smiles[:200]:
        mol = Chem.MolFromSmiles(smiles)
        mirrored = smiles.replace("@@", "#").replace("@", "@@").replace("#", "@") if "#" not in smiles else smiles
        written = [smiles, mirrored, Chem.MolToSmiles(mol, rootedAtAtom=mol.GetNumAtoms() - 1)]
        assert {split_of(text) == 2 for text in written} == {smiles in test}


def test_bundled_molecules_are_those_of_their_smiles(bundled):
    for i in range(0, len(bundled), 997):
        mol = Chem.AddHs(Chem.MolFromSmiles(bundled.smiles[i]))
        expected = [atom.GetAtomicNum() for atom in mol.GetAtoms()]
        batch = bundled.batch(i)
        assert batch.numbers[0].tolist() == expected
        np.testing.assert_allclose(batch.positions.mean(1), 0, atol=1e-6)


def test_bundled_geometries_differ_and_share_the_rest(bundled):
    mmff94 = load_dataset("bundled", split="all", geometry="mmff94")
    np.testing.assert_array_equal(mmff94.smiles, bundled.smiles)
    shift = [rmsd(bundled.batch(i).positions[0].numpy(), mmff94.batch(i).positions[0].numpy()) for i in range(200)]
    assert 0.02 < np.median(shift) < 0.3


def test_bundled_set_is_made_by_the_script(bundled, script):
    mmff94 = load_dataset("bundled", split="all", geometry="mmff94")
    for i in np.argsort(bundled.sizes, kind="stable")[[3, 40, 400]]:
        made = script.relax(str(bundled.smiles[i]))
        assert made.energy == pytest.approx(bundled.properties["energy"][i], abs=1e-3)
        assert made.homo == pytest.approx(bundled.properties["homo"][i], abs=0.01)
        assert made.dipole == pytest.approx(bundled.properties["dipole"][i], abs=0.05)
        assert rmsd(made.xtb, bundled.batch(int(i)).positions[0].numpy()) < 0.03
        assert rmsd(made.mmff94, mmff94.batch(int(i)).positions[0].numpy()) < 0.002


@pytest.mark.parametrize(
    ("smiles", "reason"),
    [
        ("C1CC", "invalid"),
        ("C.C", "fragments"),
        ("[NH4+]", "charged"),
        ("[CH3]", "radical"),
        ("O[C@]12C[C@H]1N1C[C@H]12", "ETKDG"),
    ],
)
def test_script_rejects_with_the_reason(script, smiles, reason):
    line = script.outcome(smiles)
    assert line["smiles"] == smiles
    assert reason in line["reason"]


def test_script_rejects_a_geometry_whose_bonds_changed(script):
    water = np.array([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    assert script.bonds_of(np.array([8, 1, 1]), water).sum() == 4
    assert script.bonds_of(np.array([8, 1, 1]), water * [2, 1, 1]).sum() == 2


@pytest.mark.slow
def test_script_resumes_and_packs(tmp_path, script):
    smiles = ["C", "CC", "CO", "O", "N", "[CH3]", "CF", "C=O"]
    (tmp_path / "list.txt").write_text("\n".join(smiles))

    def compute(limit: int, check: bool = True, seed: int = 0) -> subprocess.CompletedProcess:
        options = ["--limit", str(limit), "--chunk-size", "3", "--workers", "1", "--seed", str(seed)]
        command = [sys.executable, SCRIPT, "compute", "--smiles", "list.txt", "--out", "out", *options]
        return subprocess.run(command, cwd=tmp_path, check=check, capture_output=True, text=True)

    compute(4)
    first, second = (tmp_path / "out" / f"chunk_0000{k}.npz" for k in (0, 1))
    before = [path.stat().st_mtime_ns for path in (first, second)]
    compute(8)
    assert first.stat().st_mtime_ns == before[0], "a finished chunk was computed again"
    assert second.stat().st_mtime_ns != before[1], "a chunk cut by --limit was taken for finished"
    refused = compute(8, check=False, seed=1)
    assert refused.returncode == 1
    assert "another run" in refused.stderr

    failures = "".join(path.read_text() for path in (tmp_path / "out").glob("*.failures.jsonl"))
    assert json.loads(failures) == {"smiles": "[CH3]", "reason": "radical"}
    script.pack(tmp_path / "out", tmp_path / "assets", None)
    data = load_dataset("bundled", split="all", root=tmp_path / "assets")
    assert set(data.smiles) == set(smiles) - {"[CH3]"}
    assert data.passport["smiles_tried"] == 8

    # in two parts: the first packed, the second computed from there on
    (tmp_path / "rest").mkdir()
    shutil.copy(tmp_path / "out" / "settings.json", tmp_path / "rest")
    for path in (tmp_path / "out").glob("chunk_00002.npz"):
        shutil.move(path, tmp_path / "rest")
    script.pack(tmp_path / "out", tmp_path / "part", None)
    script.pack(tmp_path / "rest", tmp_path / "both", tmp_path / "part")
    joined = load_dataset("bundled", split="all", root=tmp_path / "both")
    assert joined.smiles.tolist() == data.smiles.tolist()
    np.testing.assert_allclose(joined.positions, data.positions, atol=2.6e-4)  # a step of the packed positions
    np.testing.assert_array_equal(joined.properties["energy"], data.properties["energy"])
    assert joined.passport["smiles_tried"] == 8
    with pytest.raises(SystemExit, match="not where a chunk begins"):
        script.compute(tmp_path / "list.txt", tmp_path / "out", workers=1, limit=8, seed=0, chunk_size=3, start=4)


def test_damaged_and_missing_asset(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"qm9_xtb\.npz"):
        load_dataset("bundled", root=tmp_path)
    for name in ("qm9_xtb.npz", "qm9_xtb.json"):
        shutil.copy(ASSETS / name, tmp_path)
    content = bytearray((tmp_path / "qm9_xtb.npz").read_bytes())
    content[1000] ^= 1
    (tmp_path / "qm9_xtb.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"qm9_xtb\.npz is damaged"):
        load_dataset("bundled", root=tmp_path)


def test_save_bundled_round_trip_and_limit(tmp_path, bundled):
    part = bundled.subset(slice(0, 50))
    batch = part.batch(slice(None))
    positions = batch.positions[batch.mask].numpy()
    content = {
        "smiles": part.smiles.tolist(),
        "sizes": part.sizes,
        "numbers": batch.numbers[batch.mask].numpy(),
        "xtb_positions": positions,
        "mmff94_positions": positions + np.float32(0.3),
        "properties": part.properties,
        "made_by": {"licence": "CC0-1.0"},
    }
    save_bundled(tmp_path, **content)
    again = load_dataset("bundled", split="all", root=tmp_path).batch(slice(None))
    assert torch.equal(again.numbers, batch.numbers)
    # half a step, and as much again from centring
    assert float((again.positions - batch.positions).abs().max()) < 2.6e-4
    with pytest.raises(ValueError, match=r"over the limit of 8\.19 A"):
        save_bundled(tmp_path, **{**content, "xtb_positions": 3 * positions})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "qm10"}, "unknown data set 'qm10'"),
        ({"split": "valid"}, "unknown split 'valid'"),
        ({"geometry": "dft"}, "unknown geometry 'dft'"),
        ({"name": "qm9"}, "pass root="),
        ({"name": "geom"}, "pass root="),
        ({"colour": "red"}, "colour"),
    ],
)
def test_bad_arguments_of_load_dataset(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(**arguments)


# ---------------------------------------------------------------------- MoleculeDataset
def test_batch_takes_any_index(bundled):
    mask = np.zeros(len(bundled), dtype=bool)
    mask[[5, 9]] = True
    for index in ([5, 9], np.array([5, 9]), torch.tensor([5, 9]), mask, slice(5, 10, 4)):
        batch = bundled.batch(index)
        assert batch.sizes.tolist() == bundled.sizes[[5, 9]].tolist()
    assert len(bundled.batch([])) == 0
    with pytest.raises(IndexError):
        bundled.batch(len(bundled))


def test_batch_holds_the_molecules(bundled):
    batch = bundled.batch([7, 3])
    for row, i in enumerate((7, 3)):
        n, start = bundled.sizes[i], bundled.starts[i]
        np.testing.assert_array_equal(batch.numbers[row, :n], bundled.numbers[start : start + n])
        np.testing.assert_array_equal(batch.positions[row, :n], bundled.positions[start : start + n])
    batch.validate()


def test_subset_of_subset_and_elements(bundled):
    part = bundled.subset(slice(100, 200)).subset(np.arange(99, -1, -1))
    assert part.positions is bundled.positions
    assert part.smiles[0] == bundled.smiles[199]
    assert torch.equal(part.batch(0).positions, bundled.batch(199).positions)
    fluorine = np.array(["F" in smiles for smiles in bundled.smiles])
    assert fluorine.any()
    assert 9 not in bundled.subset(~fluorine).elements
    assert bundled.subset(slice(0, 0)).elements == ()


def test_size_histogram(bundled):
    histogram = bundled.size_histogram()
    assert sum(histogram.values()) == len(bundled)
    assert all(count == (bundled.sizes == n).sum() for n, count in histogram.items())


def test_qm9_size_histogram_is_edms():
    golden = np.load(ROOT / "tests" / "golden" / "edm_small_random.npz")
    histogram = qm9_size_histogram()
    assert sum(histogram.values()) == 100_000
    edm = dict(zip(golden["nodes/n"].tolist(), golden["nodes/prob"].tolist(), strict=True))
    assert histogram.keys() == edm.keys()
    for n, probability in edm.items():
        assert histogram[n] / 100_000 == pytest.approx(probability, rel=1e-6)
    histogram.clear()
    assert qm9_size_histogram(), "the table can be changed by a caller"


def test_inconsistent_arrays_are_refused():
    good = {"name": "x", "numbers": np.ones(4), "positions": np.zeros((4, 3))}
    with pytest.raises(ValueError, match="positions have shape"):
        MoleculeDataset(**{**good, "positions": np.zeros((3, 3))}, starts=np.zeros(1), sizes=np.array([4]))
    with pytest.raises(ValueError, match="energy has 2 rows, expected 1"):
        MoleculeDataset(
            **good, starts=np.zeros(1), sizes=np.array([4]), properties={"energy": np.zeros(2)}, units={"energy": "eV"}
        )
    with pytest.raises(ValueError, match="units"):
        MoleculeDataset(**good, starts=np.zeros(1), sizes=np.array([4]), properties={"energy": np.zeros(1)})


# ---------------------------------------------------------------------- BatchSampler
@pytest.mark.parametrize("mode", ["bucketed", "mixed"])
def test_epoch_covers_every_molecule_once(bundled, mode):
    sampler = BatchSampler(bundled.sizes, 64, seed=3, mode=mode)
    batches = list(sampler.epoch(0))
    assert len(batches) == len(sampler) == -(-len(bundled) // 64)
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(len(bundled)))
    assert sorted(map(len, batches))[1] == 64


def test_bucketed_batches_have_almost_no_padding(bundled):
    def padding(mode: str) -> float:
        sizes = [bundled.sizes[b] for b in BatchSampler(bundled.sizes, 64, mode=mode).epoch(0)]
        return 1 - sum((s**2).sum() for s in sizes) / sum(len(s) * s.max() ** 2 for s in sizes)

    assert padding("bucketed") < 0.05
    assert padding("mixed") > 0.4


def test_order_depends_on_seed_and_epoch_only(bundled):
    one, two = (BatchSampler(bundled.sizes, 64, seed=5) for _ in range(2))
    assert torch.equal(torch.cat(list(one.epoch(2))), torch.cat(list(two.epoch(2))))
    assert not torch.equal(torch.cat(list(one.epoch(2))), torch.cat(list(one.epoch(3))))
    other = BatchSampler(bundled.sizes, 64, seed=6)
    assert not torch.equal(torch.cat(list(one.epoch(2))), torch.cat(list(other.epoch(2))))


def test_batches_of_all_sizes_come_at_any_time(bundled):
    """Sorted windows must not put the small molecules first."""
    means = np.array([bundled.sizes[b].mean() for b in BatchSampler(bundled.sizes, 64).epoch(0)])
    assert means.std() > 1.5
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2


def test_stream_resumes_at_a_step():
    sampler = BatchSampler(np.arange(1, 24), 4, seed=1, window=2)
    whole = [batch.tolist() for batch, _ in zip(sampler.stream(), range(20), strict=False)]
    resumed = [batch.tolist() for batch, _ in zip(sampler.stream(13), range(7), strict=False)]
    assert resumed == whole[13:]
    assert [b.tolist() for b in sampler.epoch(1, 3)] == whole[9:12]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": []}, "M >= 1"),
        ({"batch_size": 0}, "1 or more"),
        ({"window": 0}, "1 or more"),
        ({"mode": "sorted"}, "unknown mode 'sorted'"),
    ],
)
def test_bad_arguments_of_the_sampler(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchSampler(**{"sizes": [3, 4], "batch_size": 1, **arguments})


def test_bad_position_of_an_epoch():
    with pytest.raises(ValueError, match="position 0 to 2"):
        next(BatchSampler([3, 4], 1).epoch(0, 3))
