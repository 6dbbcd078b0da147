"""The bundled evidence: the files, and two of its DFT results computed again."""

import numpy as np
import pytest
import torch

from elign_lab import load_model, load_oracle, sample
from elign_lab.checkpoints import ASSETS, read_passport
from elign_lab.evaluation import physics
from elign_lab.evaluation.evidence import DFT_SETTINGS, EVIDENCE, GPFF_EVIDENCE, Evidence, judge
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


def test_evidence_is_what_the_oracles_say():
    model, learned = load_model("edm-mini"), load_oracle("learned")
    strict = load_oracle("learned", max_atoms=9)
    batch = sample(model, 3, steps=4, seed=2)
    made = judge({"a": batch, "b": batch[[2, 1, 0]]}, {"learned": learned, "strict": strict})
    expected = physics(batch.to(dtype=torch.float64), learned)
    energy, force = made.of("a", "learned")
    np.testing.assert_allclose(force, expected.f_rms.numpy())
    np.testing.assert_allclose(energy, expected.energy_per_atom.numpy())
    np.testing.assert_allclose(made.of("b", "learned")[1], force[::-1], rtol=1e-4)
    assert made.failures("a", "strict") == int((batch.sizes > 9).sum()) > 0
    with pytest.raises(ValueError, match="got 1 sets and 0 oracles"):
        judge({"a": batch}, {})
    with pytest.raises(ValueError, match="sets of 3, 2 molecules: expected one size"):
        judge({"a": batch, "b": batch[:2]}, {"learned": learned})


@pytest.mark.parametrize("path", [EVIDENCE, GPFF_EVIDENCE], ids=["alignment", "gpff"])
def test_the_bundled_files_are_whole(path):
    evidence, passport = Evidence.load(path), read_passport(path)
    assert tuple(passport["molecules"]) == evidence.models
    assert tuple(passport["methods"]) == evidence.oracles == ("learned", "xtb", "ani", "dft")
    assert (evidence.status == "ok").mean() > 0.9
    for row in passport["figures"]:
        found = zip(("energy_per_atom_median", "f_rms_median"), evidence.of(row["set"], row["oracle"]), strict=True)
        assert {key: np.nanmedian(values) for key, values in found} == {
            key: pytest.approx(row[key]["value"]) for key in ("energy_per_atom_median", "f_rms_median")
        }
    for values in (evidence.energy_per_atom, evidence.f_rms):
        assert np.array_equal(np.isfinite(values), evidence.status == "ok")
    for name, file in passport["molecules"].items():  # made with the models that are bundled now
        for model in ("edm-mini-aligned", "edm-mini", "gpff-mini"):
            if name.startswith(model):
                assert file.startswith(f"{model}-{read_passport(ASSETS / f'{model}.safetensors')['sha256'][:12]}-")
                break


def test_the_molecules_belong_together():
    base, aligned = Evidence.load().molecules
    assert len(base) == 128
    assert torch.equal(base.sizes, aligned.sizes)  # drawn from the same seed
    formulas = [[batch.formula(i) for i in range(len(batch))] for batch in Evidence.load(GPFF_EVIDENCE).molecules]
    assert formulas[0] == formulas[1] == formulas[2]


@pytest.mark.parametrize("path", [EVIDENCE, GPFF_EVIDENCE], ids=["alignment", "gpff"])
def test_the_cheap_columns_are_computed_again(path):
    evidence = Evidence.load(path)
    rows = [0, len(evidence.molecules[0]) - 1]
    with load_oracle("xtb", workers=1) as xtb:
        for name, batch in zip(evidence.models, evidence.molecules, strict=True):
            for oracle, one in (("learned", load_oracle("learned")), ("xtb", xtb)):
                again = physics(batch[rows].to(dtype=torch.float64), one)
                energy, force = evidence.of(name, oracle)
                np.testing.assert_allclose(again.energy_per_atom.numpy(), energy[rows], atol=1e-4)
                np.testing.assert_allclose(again.f_rms.numpy(), force[rows], atol=2e-3)


def test_two_dft_results_are_computed_again():
    evidence = Evidence.load()
    with load_oracle("dft", workers=1, **DFT_SETTINGS) as dft:
        for k, (model, batch) in enumerate(zip(evidence.models, evidence.molecules, strict=True)):
            ok = evidence.status[k, evidence.oracles.index("dft")] == "ok"
            smallest = int(torch.where(torch.from_numpy(ok), batch.sizes, 10**6).argmin())
            again = physics(batch[[smallest]].to(dtype=torch.float64), dft)
            energy, force = evidence.of(model, "dft")
            assert float(again.energy_per_atom) == pytest.approx(energy[smallest], abs=2e-5)
            assert float(again.f_rms) == pytest.approx(force[smallest], abs=2e-4)
