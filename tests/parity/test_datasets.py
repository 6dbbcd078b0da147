"""QM9's real molecules and EDM's split, where the shared data are at hand."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from elign_lab.datasets import load_dataset, qm9
from elign_lab.molecules import symbol

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "qm9" / "qm9_b3lyp_13083.npz"
pytestmark = pytest.mark.skipif(not REAL.exists(), reason=f"needs {REAL}")

HARTREE = 27.211386024367243
KEYS = ("A", "B", "C", "mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "U0", "U", "H", "G", "Cv")


def test_test_split_is_edms():
    """The gdb ids of EDM's test molecules fit our positions.

    A molecule at position p among the characterised ones has the gdb id p + 1 + (uncharacterised ids before it), so
    id - 1 - p must start at 0 or more, never decrease, and stay at 3,054 or less: 13,083 conditions that a wrong
    permutation, order or size of the split breaks.
    """
    ids = np.sort(np.load(REAL)["index"])
    left_out = ids - 1 - qm9.edm_split("test")
    assert left_out[0] >= 0
    assert left_out[-1] <= qm9.N_UNCHARACTERIZED
    assert (np.diff(left_out) >= 0).all()
    wrong = np.sort(np.random.RandomState(1).permutation(qm9.N_CHARACTERIZED)[-len(ids) :])
    assert (np.diff(ids - 1 - wrong) < 0).any()


def test_real_molecules_through_a_tarball(tmp_path):
    real = np.load(REAL)
    ids = real["index"]
    rows = np.flatnonzero(ids < 400)
    with tarfile.open(tmp_path / qm9.TARBALL.name, "w:bz2") as archive:
        for i in rows:
            n = int(real["num_atoms"][i])
            atoms = zip(real["charges"][i, :n], real["positions"][i, :n], strict=True)
            lines = [f"{symbol(int(z))}\t" + "\t".join(f"{v:.8f}" for v in x) + "\t0." for z, x in atoms]
            head = f"gdb {ids[i]}\t" + "\t".join(repr(float(real[key][i])) for key in KEYS) + "\t"
            text = "\n".join([str(n), head, *lines, "0.", "C\tC\t", "InChI=\tInChI=", ""]).encode()
            member = tarfile.TarInfo(f"dsgdb9nsd_{ids[i]:06d}.xyz")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    # not QM9's list: as many ids that are not among these molecules
    others = np.setdiff1d(np.arange(1, 133_886), ids)[: qm9.N_UNCHARACTERIZED]
    (tmp_path / "uncharacterized.txt").write_text("\n".join(f"{i} C C" for i in others))

    data = load_dataset("qm9", split="all", root=tmp_path)
    assert len(data) == len(rows) > 20
    batch = data.batch(slice(None))
    for row, i in enumerate(rows):
        n = int(real["num_atoms"][i])
        expected = real["positions"][i, :n] - real["positions"][i, :n].mean(0)
        np.testing.assert_allclose(batch.positions[row, :n], expected, atol=1e-5)
        assert batch.numbers[row, :n].tolist() == real["charges"][i, :n].tolist()
    np.testing.assert_allclose(data.properties["U0"], real["U0"][rows] * HARTREE, rtol=1e-6)
    np.testing.assert_allclose(data.properties["gap"], real["gap"][rows] * HARTREE, rtol=1e-6)
