"""The bundled evidence: the file, and two of its DFT results computed again."""

import numpy as np
import pytest
import torch

from elign_lab import load_model, load_oracle, sample
from elign_lab.evaluation import physics
from elign_lab.evaluation.evidence import DFT_SETTINGS, EVIDENCE, Evidence, collect, load_or_collect
from elign_lab.molecules import MoleculeBatch


def make() -> Evidence:
    batches = (MoleculeBatch.from_smiles(["O", "CO"]), MoleculeBatch.from_smiles(["N", "C"]))
    values = np.arange(8.0).reshape(2, 2, 2)
    values[1, 1, 1] = np.nan
    status = np.where(np.isnan(values), "SCF did not converge", "ok")
    return Evidence(("base", "aligned"), ("xtb", "dft"), batches, values, values + 1, status)


def test_a_saved_file_is_read_back(tmp_path):
    made = make()
    read = Evidence.load(made.save(tmp_path / "evidence.npz"))
    assert (read.models, read.oracles) == (made.models, made.oracles)
    for a, b in zip(read.molecules, made.molecules, strict=True):
        for i in range(2):
            (numbers, positions), (expected_numbers, expected) = a.arrays()[i], b.arrays()[i]
            assert np.array_equal(numbers, expected_numbers)
            assert np.array_equal(positions, expected.astype(np.float32))
    np.testing.assert_array_equal(read.of("aligned", "dft")[0], [6.0, np.nan])
    assert (read.failures("aligned", "dft"), read.failures("base", "dft")) == (1, 0)


def test_a_molecule_that_diverged_is_read_back(tmp_path):
    made = make()
    made.molecules[1].positions[1, 0] = torch.nan
    read = Evidence.load(made.save(tmp_path / "evidence.npz"))
    assert torch.isfinite(read.molecules[1].positions).all(-1).all(-1).tolist() == [True, False]


def test_a_damaged_file_is_named(tmp_path):
    path = make().save(tmp_path / "evidence.npz")
    whole = path.read_bytes()
    for part in (0, 300, len(whole) - 30):
        path.write_bytes(whole[:part])
        with pytest.raises(ValueError, match=r"evidence\.npz is not an evidence file, or damaged"):
            Evidence.load(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"array\.npy is not an evidence file"):
        Evidence.load(tmp_path / "array.npy")


def test_bad_requests_are_named(tmp_path):
    with pytest.raises(ValueError, match="no oracle 'uma' in the evidence: expected one of xtb, dft"):
        make().of("base", "uma")
    with pytest.raises(FileNotFoundError, match="make_evidence"):
        Evidence.load(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", models=np.array(["a"]))
    with pytest.raises(ValueError, match="not an evidence file"):
        Evidence.load(tmp_path / "other.npz")


def test_collected_evidence_is_what_the_oracles_say_of_the_same_seeds(tmp_path):
    model, learned = load_model("edm-mini"), load_oracle("learned")
    strict = load_oracle("learned", max_atoms=9)
    made = collect({"a": model, "b": model}, {"learned": learned, "strict": strict}, 3, steps=4, seed=2)
    assert torch.equal(made.molecules[0].positions, made.molecules[1].positions)
    assert torch.equal(made.molecules[0].positions, sample(model, 3, steps=4, seed=2).positions)
    expected = physics(made.molecules[0].to(dtype=torch.float64), learned)
    for name in made.models:
        energy, force = made.of(name, "learned")
        np.testing.assert_allclose(force, expected.f_rms.numpy())
        np.testing.assert_allclose(energy, expected.energy_per_atom.numpy())
        assert made.failures(name, "strict") == int((made.molecules[0].sizes > 9).sum()) > 0
    with pytest.raises(ValueError, match="got 1 and 0"):
        collect({"a": model}, {}, 3)
    read, source = load_or_collect(("x",), ("y",), 1, path=made.save(tmp_path / "evidence.npz"))
    assert read.models == ("a", "b")
    assert source == "read from evidence.npz: 3 molecules of each of a, b, judged by learned, strict"


def test_without_a_file_a_small_evidence_is_computed_and_says_so(tmp_path):
    found, source = load_or_collect(("edm-mini",), ("learned",), 2, steps=3, path=tmp_path / "evidence.npz")
    assert (found.models, found.oracles, len(found.molecules[0])) == (("edm-mini",), ("learned",), 2)
    assert source.startswith("computed now, there is no evidence.npz")
    assert not (tmp_path / "evidence.npz").exists()


@pytest.mark.skipif(not EVIDENCE.exists(), reason="no bundled evidence yet")
def test_two_molecules_are_computed_again():
    evidence = Evidence.load()
    dft, xtb = load_oracle("dft", workers=1, **DFT_SETTINGS), load_oracle("xtb", workers=1)
    for model, batch in zip(evidence.models, evidence.molecules, strict=True):
        ok = evidence.status[evidence.models.index(model), evidence.oracles.index("dft")] == "ok"
        smallest = int(torch.where(torch.from_numpy(ok), batch.sizes, 10**6).argmin())
        for name, oracle in (("dft", dft), ("xtb", xtb)):
            again = physics(batch[[smallest]].to(dtype=torch.float64), oracle)
            energy, force = evidence.of(model, name)
            assert float(again.energy_per_atom) == pytest.approx(energy[smallest], abs=2e-5)
            assert float(again.f_rms) == pytest.approx(force[smallest], abs=2e-4)
    dft.close()
    xtb.close()
