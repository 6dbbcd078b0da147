"""GEOM-Drugs: the MessagePack stream, its conversion in bounded memory, splits, damaged files."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from elign_lab.datasets import load_dataset
from elign_lab.datasets.geom import convert

msgpack = pytest.importorskip("msgpack")

HARTREE = 27.211386024367243


def entries(count: int, conformers: int, seed: int = 0):
    """Molecules of the bundled set with displaced copies as conformers, in the layout of drugs_crude.msgpack."""
    data = load_dataset("bundled", split="train").subset(slice(0, count))
    generator = np.random.default_rng(seed)
    for i, (numbers, positions) in enumerate(data.batch(slice(None)).arrays()):
        listed = []
        for k in range(conformers):
            moved = positions + 0.05 * generator.normal(size=positions.shape)
            xyz = [[float(z), *map(float, x)] for z, x in zip(numbers, moved, strict=True)]
            energy = -30.0 - i + float(generator.normal())
            listed.append({"geom_id": 1000 * i + k, "set": 1, "degeneracy": 1, "totalenergy": energy, "xyz": xyz})
        yield str(data.smiles[i]), {"charge": 0, "uniqueconfs": conformers, "conformers": listed}


def write(path: Path, molecules, group: int = 10) -> dict:
    molecules = list(molecules)
    with path.open("wb") as file:
        for first in range(0, len(molecules), group):
            file.write(msgpack.packb(dict(molecules[first : first + group])))
    return dict(molecules)


@pytest.fixture
def source(tmp_path):
    return tmp_path / "drugs_crude.msgpack"


def test_keeps_the_conformers_of_lowest_energy(source):
    molecules = write(source, entries(25, 6))
    data = load_dataset("geom", split="all", root=source.parent, max_conformers=4)
    assert len(data) == 25 * 4
    for m, (smiles, entry) in enumerate(molecules.items()):
        rows = np.flatnonzero(data.properties["molecule"] == m)
        expected = sorted(entry["conformers"], key=lambda conformer: conformer["totalenergy"])[:4]
        assert set(data.smiles[rows]) == {smiles}
        np.testing.assert_allclose(
            data.properties["energy"][rows], [c["totalenergy"] * HARTREE for c in expected], rtol=1e-12
        )
        for row, conformer in zip(rows, expected, strict=True):
            xyz = np.array(conformer["xyz"])
            batch = data.batch(row)
            assert batch.numbers[0].tolist() == xyz[:, 0].astype(int).tolist()
            np.testing.assert_allclose(batch.positions[0], xyz[:, 1:] - xyz[:, 1:].mean(0), atol=1e-6)


def test_second_call_reads_the_flat_files(source):
    write(source, entries(12, 2))
    first = load_dataset("geom", split="all", root=source.parent)
    assert isinstance(first.positions, np.memmap)
    source.unlink()
    second = load_dataset("geom", split="all", root=source.parent)
    np.testing.assert_array_equal(second.positions, first.positions)
    assert second.passport["conformers"] == 24


def test_flat_files_of_another_source_are_not_used(source):
    write(source, entries(12, 2))
    load_dataset("geom", split="all", root=source.parent)
    write(source, entries(5, 2))
    with pytest.raises(ValueError, match=r"geom_drugs_30 was made from another .*drugs_crude\.msgpack: delete"):
        load_dataset("geom", split="all", root=source.parent)


def test_conformers_of_a_molecule_are_on_one_side(source):
    write(source, entries(60, 3))
    parts = {s: load_dataset("geom", split=s, root=source.parent, seed=4) for s in ("train", "validation", "test")}
    molecules = {split: set(part.properties["molecule"].tolist()) for split, part in parts.items()}
    assert [len(part) for part in parts.values()] == [48 * 3, 6 * 3, 6 * 3]
    assert set().union(*molecules.values()) == set(range(60))
    assert sum(map(len, molecules.values())) == 60
    other = load_dataset("geom", split="test", root=source.parent, seed=5)
    assert set(other.properties["molecule"].tolist()) != molecules["test"]


def test_edm_permutation(source):
    write(source, entries(20, 2))
    order = np.random.default_rng(1).permutation(40).astype(np.int32)
    path = source.parent / "geom_permutation.npy"
    np.save(path, order)
    options = {"root": source.parent, "edm_permutation": path}
    everything = load_dataset("geom", split="all", root=source.parent).properties["energy"]
    for split, part in (("validation", order[:4]), ("test", order[4:8]), ("train", order[8:])):
        energy = load_dataset("geom", split=split, **options).properties["energy"]
        assert set(energy) == set(everything[part])
    np.save(path, order[:-1])
    with pytest.raises(ValueError, match="not a permutation of the 40 conformers"):
        load_dataset("geom", split="test", **options)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Eight times the molecules in one map: the peak stays that of a molecule, far below the map."""

    def peak(count: int) -> tuple[int, int]:
        source = tmp_path / f"{count}.msgpack"
        write(source, entries(count, 20), group=count)
        tracemalloc.start()
        convert(source, tmp_path / str(count))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most, source.stat().st_size

    small, _ = peak(25)
    large, size = peak(200)
    assert size > 2e6
    assert large < 1.3 * small
    assert large < size / 3


# ---------------------------------------------------------------------- what can be wrong
def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"drugs_crude\.msgpack.*dataverse"):
        load_dataset("geom", root=tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="max_conformers"):
        load_dataset("geom", root=tmp_path, max_conformers=0)


@pytest.mark.parametrize("part", [0.05, 0.5, 0.999])
def test_truncated(source, part):
    write(source, entries(30, 2))
    source.write_bytes(source.read_bytes()[: int(part * source.stat().st_size)])
    with pytest.raises(ValueError, match=r"drugs_crude\.msgpack is truncated"):
        load_dataset("geom", split="all", root=source.parent)
    assert not (source.parent / "geom_drugs_30").exists()


def test_corrupt_and_empty(source):
    content = write(source, entries(3, 2))
    source.write_bytes(b"\xc1" + source.read_bytes())
    with pytest.raises(ValueError, match="not a map of GEOM"):
        load_dataset("geom", split="all", root=source.parent)
    source.write_bytes(msgpack.packb(list(content)))
    with pytest.raises(ValueError, match="not a map of GEOM"):
        load_dataset("geom", split="all", root=source.parent)
    source.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no molecule"):
        load_dataset("geom", split="all", root=source.parent)


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.pop("conformers"),
        lambda entry: entry["conformers"][0].pop("totalenergy"),
        lambda entry: entry["conformers"][0]["xyz"].append([1.0, 2.0]),
        lambda entry: entry["conformers"][0].update(xyz=[]),
        lambda entry: entry["conformers"][0]["xyz"][0].__setitem__(0, 6.5),
        lambda entry: entry["conformers"][0]["xyz"][0].__setitem__(1, float("nan")),
    ],
)
def test_damaged_molecule_is_named(source, change):
    molecules = list(entries(3, 2))
    change(molecules[1][1])
    write(source, molecules)
    with pytest.raises(ValueError, match="is not an entry of GEOM") as error:
        load_dataset("geom", split="all", root=source.parent)
    assert repr(molecules[1][0]) in str(error.value)


def test_molecule_without_conformers_is_counted(source):
    molecules = list(entries(3, 2))
    molecules[1][1]["conformers"] = []
    write(source, molecules)
    data = load_dataset("geom", split="all", root=source.parent)
    assert len(data) == 4
    assert data.passport["molecules_without_conformer"] == 1
    assert sorted(set(data.smiles)) == sorted([molecules[0][0], molecules[2][0]])


def test_damaged_flat_file(source):
    write(source, entries(3, 2))
    load_dataset("geom", split="all", root=source.parent)
    path = source.parent / "geom_drugs_30" / "positions.bin"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"positions\.bin is missing or not of .* bytes: delete"):
        load_dataset("geom", split="all", root=source.parent)
