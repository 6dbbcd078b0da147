"""QM9: both file forms, damaged files, the cache, EDM's split. The molecules are those of the bundled set."""

import bz2
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem

from elign_lab.datasets import load_dataset, qm9
from elign_lab.molecules import symbol

N = 30
EXCLUDED = range(7, 7 + 10 * qm9.N_UNCHARACTERIZED, 10)  # 7, 17, 27, ...
HARTREE = 27.211386024367243


def molecules():
    data = load_dataset("bundled", split="test").subset(slice(0, N))
    generator = np.random.default_rng(0)
    for i, (numbers, positions) in enumerate(data.batch(slice(None)).arrays()):
        yield i + 1, numbers, positions + 0.5, generator.normal(size=15).round(6), str(data.smiles[i])


def xyz_text(gdb_id, numbers, positions, properties, smiles):
    # as in the release: tabs, an empty field at the end, Mulliken charges, small numbers with the exponent *^
    atoms = zip(numbers, positions, strict=True)
    rows = [f"{symbol(int(z))}\t{10 * x:.10f}*^-1\t{y:.10f}\t {w:.10f}\t-0.1" for z, (x, y, w) in atoms]
    head = f"gdb {gdb_id}\t" + "\t".join(f"{v:.6f}" for v in properties) + "\t"
    return "\n".join([str(len(numbers)), head, *rows, "100.0\t200.0", f"{smiles}\tC.C\t", "InChI=1S/\tInChI=1S/", ""])


def write_uncharacterized(root: Path, ids=EXCLUDED):
    head = ["#"] * 9
    rows = [f"{i:6d} CC CC 0.1" for i in ids]
    (root / "uncharacterized.txt").write_text("\n".join([*head, *rows, "#", ""]))


def write_tarball(root: Path, texts: list[str]):
    with tarfile.open(root / qm9.TARBALL.name, "w:bz2") as archive:
        for k, text in enumerate(texts):
            member = tarfile.TarInfo(f"dsgdb9nsd_{k + 1:06d}.xyz")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))


def write_sdf(root: Path, drop_last_lines: int = 0):
    blocks, rows = [], []
    for gdb_id, numbers, positions, properties, _ in molecules():
        mol = Chem.RWMol()
        conformer = Chem.Conformer(len(numbers))
        for k, z in enumerate(numbers):
            mol.AddAtom(Chem.Atom(int(z)))
            conformer.SetAtomPosition(k, positions[k].astype(float).tolist())
        mol.AddConformer(conformer)
        mol.SetProp("_Name", f"gdb_{gdb_id}")
        blocks.append(Chem.MolToMolBlock(mol, kekulize=False) + "$$$$\n")
        rows.append(",".join([f"gdb_{gdb_id}", *map(str, properties), "0,0,0,0"]))
    lines = "".join(blocks).splitlines(keepends=True)
    (root / "gdb9.sdf").write_text("".join(lines[: len(lines) - drop_last_lines]))
    header = "mol_id,A,B,C,mu,alpha,homo,lumo,gap,r2,zpve,u0,u298,h298,g298,cv,u0_atom,u298_atom,h298_atom,g298_atom"
    (root / "gdb9.sdf.csv").write_text("\n".join([header, *rows]) + "\n")


@pytest.fixture
def root(tmp_path):
    write_uncharacterized(tmp_path)
    return tmp_path


def check(data, tolerance):
    kept = [m for m in molecules() if m[0] not in EXCLUDED]
    assert len(data) == len(kept) == N - 3
    for row, (gdb_id, numbers, positions, properties, _) in enumerate(kept):
        batch = data.batch(row)
        assert data.properties["gdb_id"][row] == gdb_id
        assert batch.numbers[0].tolist() == numbers.tolist()
        np.testing.assert_allclose(batch.positions[0], positions - positions.mean(0), atol=tolerance)
        assert data.properties["mu"][row] == pytest.approx(properties[3])
        assert data.properties["homo"][row] == pytest.approx(properties[5] * HARTREE)
        assert data.properties["G"][row] == pytest.approx(properties[13] * HARTREE)
        assert data.properties["Cv"][row] == pytest.approx(properties[14])
    assert data.units["U0"] == "eV"


def test_tarball_and_cache(root):
    write_tarball(root, [xyz_text(*m) for m in molecules()])
    data = load_dataset("qm9", split="all", root=root)
    check(data, 1e-6)
    assert data.smiles.tolist() == [m[4] for m in molecules() if m[0] not in EXCLUDED]

    (root / qm9.TARBALL.name).unlink()  # the cache is enough
    again = load_dataset("qm9", split="all", root=root)
    check(again, 1e-6)
    assert again.smiles.tolist() == data.smiles.tolist()
    assert again.passport == data.passport

    write_tarball(root, [xyz_text(*m) for m in list(molecules())[:5]])  # another file: the cache is not of it
    assert len(load_dataset("qm9", split="all", root=root)) == 5


def test_sdf(root):
    write_sdf(root)
    data = load_dataset("qm9", split="all", root=root)
    check(data, 1e-4)  # four decimals
    assert data.smiles is None


def test_order_of_the_files_does_not_matter(root):
    write_tarball(root, [xyz_text(*m) for m in reversed(list(molecules()))])
    check(load_dataset("qm9", split="all", root=root), 1e-6)


def test_a_part_of_qm9_has_no_split(root):
    write_tarball(root, [xyz_text(*m) for m in molecules()])
    with pytest.raises(ValueError, match=r"130831 characterised molecules of QM9, .* has 27"):
        load_dataset("qm9", split="train", root=root)


def test_download_is_not_stopped_by_the_cache_of_a_part(root, monkeypatch):
    texts = [xyz_text(*m) for m in molecules()]
    write_tarball(root, texts[:5])
    assert len(load_dataset("qm9", split="all", root=root)) == 5
    (root / qm9.TARBALL.name).unlink()
    monkeypatch.setattr(qm9, "fetch", lambda remote, _: remote is qm9.TARBALL and write_tarball(root, texts))
    check(load_dataset("qm9", split="all", root=root, download=True), 1e-6)


def test_full_set_is_split_as_edm_does(root):
    """All 130,831 molecules, as single atoms, by way of the cache."""
    ids = np.setdiff1d(np.arange(1, 133_886), EXCLUDED)
    assert len(ids) == qm9.N_CHARACTERIZED
    info = np.array('{"passport": {}, "of": []}')
    ones = np.ones(len(ids), dtype=np.uint8)
    values = dict.fromkeys(qm9.UNITS, np.zeros(len(ids)))
    atoms = {"numbers": ones, "positions": np.zeros((len(ids), 3)), "sizes": ones}
    np.savez(root / qm9.CACHE, info=info, gdb_id=ids, **atoms, **values)
    parts = {split: load_dataset("qm9", split=split, root=root) for split in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [100_000, 17_748, 13_083]
    np.random.seed(0)  # noqa: NPY002 - EDM's own call
    order = np.random.permutation(130_831)  # noqa: NPY002
    assert set(parts["validation"].properties["gdb_id"]) == set(ids[order[100_000:117_748]])
    assert set(parts["test"].properties["gdb_id"]) == set(ids[order[117_748:]])
    assert set(parts["train"].properties["gdb_id"]) == set(ids[order[:100_000]])


# ---------------------------------------------------------------------- what can be wrong
def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no QM9 in .*download=True"):
        load_dataset("qm9", split="all", root=tmp_path)
    write_tarball(tmp_path, [xyz_text(*m) for m in molecules()])
    with pytest.raises(FileNotFoundError, match=r"uncharacterized\.txt"):
        load_dataset("qm9", split="all", root=tmp_path)
    write_uncharacterized(tmp_path, EXCLUDED[:-1])
    with pytest.raises(ValueError, match=r"uncharacterized\.txt lists 3053 molecules, expected 3054"):
        load_dataset("qm9", split="all", root=tmp_path)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.98])
def test_truncated_or_empty_tarball(root, part):
    write_tarball(root, [xyz_text(*m) for m in molecules()])
    path = root / qm9.TARBALL.name
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"dsgdb9nsd\.xyz\.tar\.bz2 is truncated or damaged .* download it again"):
        load_dataset("qm9", split="all", root=root)
    assert not (root / qm9.CACHE).exists()


def test_corrupt_tarball(root):
    write_tarball(root, [xyz_text(*m) for m in molecules()])
    path = root / qm9.TARBALL.name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is truncated or damaged"):
        load_dataset("qm9", split="all", root=root)
    path.write_bytes(bz2.compress(b"not a tar file" * 100))
    with pytest.raises(ValueError, match="is truncated or damaged"):
        load_dataset("qm9", split="all", root=root)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("gdb 4", "xyz 4"),
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("C\t", "Qq\t", 1),
        lambda text: text.replace("0.5", "nan").replace("1.", "nan"),
        lambda text: "",
    ],
)
def test_damaged_member_is_named(root, damage):
    texts = [xyz_text(*m) for m in molecules()]
    texts[3] = damage(texts[3])
    write_tarball(root, texts)
    with pytest.raises(ValueError, match=r"dsgdb9nsd_000004\.xyz in .* is not a QM9 xyz file"):
        load_dataset("qm9", split="all", root=root)


def test_molecule_twice(root):
    texts = [xyz_text(*m) for m in molecules()]
    write_tarball(root, [*texts, texts[4]])
    with pytest.raises(ValueError, match="gdb 5 twice"):
        load_dataset("qm9", split="all", root=root)


@pytest.mark.parametrize("lines", [1, 2, 5, 200])
def test_truncated_sdf(root, lines):
    write_sdf(root, drop_last_lines=lines)
    if lines == 1:  # only the last separator is gone: the molecule is whole
        check(load_dataset("qm9", split="all", root=root), 1e-4)
        return
    with pytest.raises(ValueError, match=r"gdb9\.sdf.* truncated"):
        load_dataset("qm9", split="all", root=root)


def test_damaged_csv(root):
    write_sdf(root)
    path = root / "gdb9.sdf.csv"
    text = path.read_text()
    path.write_text(text.replace("u0,", "energy,", 1))
    with pytest.raises(ValueError, match=r"gdb9\.sdf\.csv has no column u0"):
        load_dataset("qm9", split="all", root=root)
    path.write_text(text[:-60])
    with pytest.raises(ValueError, match=r"gdb9\.sdf\.csv, line 31 is truncated"):
        load_dataset("qm9", split="all", root=root)
    path.write_text("\n".join(text.splitlines()[:-1]))
    with pytest.raises(ValueError, match="'gdb_30', has no row"):
        load_dataset("qm9", split="all", root=root)


def test_damaged_cache(root):
    write_tarball(root, [xyz_text(*m) for m in molecules()])
    load_dataset("qm9", split="all", root=root)
    path = root / qm9.CACHE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"qm9_elign_lab\.npz is damaged .* delete it"):
        load_dataset("qm9", split="all", root=root)
