"""The common behaviour of the oracles, on every oracle that can run here: input in, numbers or a reason out."""

import importlib.util
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones

from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles import ORACLES, Oracle, OracleResult, clip_forces, f_rms, load_oracle
from elign_lab.oracles.protocol import Evaluation

SHARED = Path(__file__).parents[2].parent / "shared"
ANI_WEIGHTS = SHARED / "data" / "ani-2x" / "ani-2x_8x"
needs_ani = pytest.mark.skipif(not ANI_WEIGHTS.is_dir(), reason="the ANI-2x weights are not part of the repository")

needs_fairchem = pytest.mark.skipif(
    importlib.util.find_spec("fairchem") is None, reason="fairchem-core is not installed (extra uma)"
)

WATER = ([8, 1, 1], [[0.0, 0.0, 0.119], [0.0, 0.763, -0.477], [0.0, -0.763, -0.477]])
HYDROGEN = ([1, 1], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.74]])
METHYL = ([6, 1, 1, 1], [[0.0, 0.0, 0.0], [1.079, 0.0, 0.0], [-0.5395, 0.9344, 0.0], [-0.5395, -0.9344, 0.0]])

MAKERS = {
    "xtb": lambda: load_oracle("xtb", workers=2),
    # the smallest basis and grid: what is tested here is the handling, not the chemistry
    "dft": lambda: load_oracle("dft", xc="svwn", basis="sto-3g", grid_level=0, workers=1),
    "ani": lambda: load_oracle("ani", weights=ANI_WEIGHTS),
    "ase": lambda: load_oracle("ase", calculator=EMT()),
    "learned": lambda: load_oracle("learned"),
    "uma": lambda: load_oracle("uma", model="escn-mini"),
}
MARKS = {"ani": needs_ani, "uma": needs_fairchem}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=MARKS.get(name, ())) for name in MAKERS],
)
def oracle(request):
    with MAKERS[request.param]() as made:
        yield made


def batch_of(*molecules, check=False) -> MoleculeBatch:
    return MoleculeBatch.from_arrays(molecules, check=check)


def alkane(carbons: int):
    """A linear alkane, C-C 1.53, C-H 1.09 Angstrom, 2 n + 2 hydrogens."""
    x = np.array([[1.27 * i, 0.0, 0.42 * (-1) ** i] for i in range(carbons)])
    hydrogens = [x[i] + [0.0, side * 0.89, 0.63 * (-1) ** i] for i in range(carbons) for side in (1, -1)]
    ends = [x[0] + [-0.89, 0.0, -0.63], x[-1] + [0.89, 0.0, 0.63 * (-1) ** carbons]]
    return [6] * carbons + [1] * (2 * carbons + 2), np.concatenate([x, hydrogens, ends])


def assert_failed(result: OracleResult, i: int, n_atoms: int, reason: str) -> None:
    assert not result.ok[i]
    assert reason in result.status[i]
    assert torch.isnan(result.energy[i])
    assert torch.isnan(result.forces[i, :n_atoms]).all()
    assert (result.forces[i, n_atoms:] == 0).all()


# ---------------------------------------------------------------------- input
BAD = {
    "nan": (([8, 1], [[0.0, 0.0, 0.0], [0.0, float("nan"), 0.96]]), "non-finite position of atom 1"),
    "infinite": (([8, 1], [[0.0, 0.0, float("inf")], [0.0, 0.0, 0.96]]), "non-finite position of atom 0"),
    "coincident": (([8, 1, 1], [[0.0, 0.0, 0.0], [0.0, 0.9, 0.0], [0.0, 0.9, 0.0]]), "atoms 1 and 2 are 0.000"),
    "unknown element": (([8, 0], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.96]]), "unsupported element number 0"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_molecule_is_a_status_and_its_neighbours_are_not_touched(oracle, kind):
    molecule, reason = BAD[kind]
    alone = oracle(batch_of(WATER))
    result = oracle(batch_of(WATER, molecule, WATER))
    assert_failed(result, 1, len(molecule[0]), reason)
    assert result.status[0] == result.status[2] == "ok"
    assert result.ok.tolist() == [True, False, True]
    torch.testing.assert_close(result.energy[[0, 2]], alone.energy.expand(2), atol=1e-5, rtol=0)


def test_unsupported_element(oracle):
    result = oracle(batch_of(([112, 1], [[0.0, 0.0, 0.0], [0.0, 0.0, 1.6]]), WATER))
    # without elements= an ASE calculator decides itself
    assert_failed(result, 0, 2, "CalculatorError" if oracle.name == "ase" else "unsupported element Cn")
    assert result.ok[1]


def test_far_apart_molecules_do_not_interact(oracle):
    z, x = WATER
    far = (z + z, np.concatenate([x, np.add(x, [100.0, 0.0, 0.0])]))
    result = oracle(batch_of(WATER, far))
    assert result.ok.all(), result.status
    assert result.energy[1].item() == pytest.approx(2 * result.energy[0].item(), abs=2e-3)
    torch.testing.assert_close(result.forces[1, 3:6], result.forces[0, :3], atol=1e-3, rtol=0)


def test_a_structure_flung_apart_is_refused(oracle):
    """Untrained models make such structures; tblite would not return for them."""
    far = ([1, 6, 1], [[0.0, 0.0, 0.0], [900.0, 0.0, 0.0], [0.0, 800.0, 0.0]])
    result = oracle(batch_of(far, WATER))
    assert_failed(result, 0, 3, "900 Angstrom wide, over the limit of 500")
    assert result.ok[1]


def test_single_atom(oracle):
    result = oracle(batch_of(([1], [[0.3, 0.2, 0.1]])))
    assert result.ok.all(), result.status
    torch.testing.assert_close(result.forces, torch.zeros(1, 1, 3, dtype=result.forces.dtype), atol=1e-6, rtol=0)


def test_odd_electron_count(oracle):
    result = oracle(batch_of(METHYL))
    assert result.ok.all(), result.status
    assert torch.isfinite(result.energy).all()
    # C3 symmetry of the planar radical: the force on carbon vanishes, up to DFT's coarse integration grid
    tolerance = 0.05 if oracle.name == "dft" else 5e-3
    torch.testing.assert_close(result.forces[0, 0], torch.zeros(3, dtype=result.forces.dtype), atol=tolerance, rtol=0)


def test_two_hundred_atoms(oracle):
    result = oracle(batch_of(alkane(66), WATER))
    if oracle.name == "dft":  # hours, so that it has a limit
        assert_failed(result, 0, 200, "200 atoms, over the limit of 60")
    else:
        assert result.ok[0], result.status
        assert f_rms(result.forces[:1], torch.ones(1, 200).bool()) < 5.0
    assert result.ok[1]


def test_empty_batch(oracle):
    calls = oracle.calls
    result = oracle(MoleculeBatch(torch.zeros(0, 5, dtype=torch.long), torch.zeros(0, 5, 3), torch.zeros(0, 5).bool()))
    assert (result.energy.shape, result.forces.shape, result.ok.shape) == ((0,), (0, 5, 3), (0,))
    assert result.status == ()
    assert oracle.calls == calls + 1


def test_molecule_without_atoms(oracle):
    batch = MoleculeBatch(
        torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, 3), torch.zeros(1, 3).bool(), check=False
    )
    assert oracle(batch).status == ("no atoms",)


def test_batch_equals_single_for_mixed_sizes(oracle):
    batch = batch_of(WATER, HYDROGEN, METHYL, WATER)
    together = oracle(batch)
    assert together.ok.all(), together.status
    for i in range(len(batch)):
        single = oracle(batch[i])
        n = int(batch.sizes[i])
        assert single.energy.item() == pytest.approx(together.energy[i].item(), abs=1e-5)
        torch.testing.assert_close(single.forces[0, :n], together.forces[i, :n], atol=1e-5, rtol=0)
        assert (together.forces[i, n:] == 0).all()


def test_dtype_follows_the_input(oracle):
    batch = batch_of(WATER, HYDROGEN)
    double, single = oracle(batch.to(dtype=torch.float64)), oracle(batch.to(dtype=torch.float32))
    assert (double.energy.dtype, double.forces.dtype) == (torch.float64, torch.float64)
    assert (single.energy.dtype, single.forces.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(single.energy.double(), double.energy, atol=1e-3, rtol=0)
    assert oracle(batch.to(dtype=torch.bfloat16)).energy.dtype == torch.float32


def test_non_contiguous_input_and_gradients(oracle):
    batch = batch_of(WATER, HYDROGEN)
    strided = MoleculeBatch(
        batch.numbers.t().contiguous().t(),
        batch.positions.permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_(),
        batch.mask.t().contiguous().t(),
    )
    assert not strided.numbers.is_contiguous()
    expected, result = oracle(batch), oracle(strided)
    assert not result.energy.requires_grad
    torch.testing.assert_close(result.forces, expected.forces, atol=1e-5, rtol=0)


def test_counters(oracle):
    oracle.reset_counters()
    oracle(batch_of(WATER, BAD["nan"][0]))
    oracle(batch_of(WATER))
    assert (oracle.calls, oracle.molecules, oracle.failures) == (2, 3, 1)
    assert oracle.seconds > 0


def test_anything_but_a_batch_is_refused(oracle):
    with pytest.raises(TypeError, match="expected a MoleculeBatch, got list"):
        oracle([WATER])


# ---------------------------------------------------------------------- limits, options
def test_atom_limit_and_closed_shells():
    with load_oracle("dft", xc="svwn", basis="sto-3g", grid_level=0, workers=0, closed_shell_only=True) as dft:
        result = dft(batch_of(alkane(66), METHYL, HYDROGEN))
    assert_failed(result, 0, 200, "200 atoms, over the limit of 60")
    assert_failed(result, 1, 4, "odd number of electrons (9)")
    assert result.ok[2]


def test_xtb_does_two_hundred_atoms():
    with load_oracle("xtb", workers=0) as xtb:
        result = xtb(batch_of(alkane(66)))
    assert result.ok.all(), result.status
    assert f_rms(result.forces, torch.ones(1, 200).bool()) < 1.5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nope", {}, "unknown oracle 'nope': expected one of"),
        ("xtb", {"method": "GFN3"}, "unknown xTB method 'GFN3'"),
        ("xtb", {"workers": -1}, "workers must be"),
        ("xtb", {"timeout": 0.0}, "timeout must be positive"),
        ("xtb", {"chunk_size": 0}, "chunk_size must be at least 1"),
        ("xtb", {"accuracy": 0.0}, "accuracy must be positive"),
        ("xtb", {"min_distance": -1.0}, "min_distance must be positive"),
        ("xtb", {"max_atoms": 0}, "max_atoms must be at least 1"),
        ("xtb", {"atom_energies": {"Xx": 1.0}}, "unknown element 'Xx'"),
        ("dft", {"xc": "nope"}, "unknown functional 'nope'"),
        ("dft", {"basis": "nope"}, "unknown basis set 'nope'"),
        ("dft", {"grid_level": 10}, "grid_level 0 to 9"),
        ("ase", {"calculator": 3}, "expected an ASE calculator"),
        ("ani", {"weights": "/does/not/exist"}, "no ANI-2x weights at /does/not/exist"),
        ("ani", {"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_wrong_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_oracle(name, **options)


def test_dft_on_a_gpu_without_gpu4pyscf_names_the_remedy():
    if importlib.util.find_spec("gpu4pyscf"):
        pytest.skip("gpu4pyscf is installed")
    with pytest.raises(ValueError, match="pip install gpu4pyscf"):
        load_oracle("dft", gpu=True)


# ---------------------------------------------------------------------- registry
def test_registry_says_what_is_available():
    for name, entry in ORACLES.items():
        ready, reason = entry.available()
        assert entry.name == name
        assert entry.description
        assert entry.needs
        assert ready or reason, f"{name} is not available and does not say why"
    assert ORACLES["xtb"].available()[0]


def test_missing_package_is_named_with_its_remedy():
    class Missing(Oracle):
        name = "missing"
        packages = {"no_such_package_here": "pip install something"}  # noqa: RUF012

        def _compute(self, molecules):
            raise NotImplementedError

    assert Missing.available() == (False, "no_such_package_here not installed: run `pip install something`")


def test_import_loads_no_backend_and_workers_load_no_torch():
    code = (
        "import sys, elign_lab.oracles\n"
        "heavy = {'pyscf', 'tblite', 'torchani', 'fairchem', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import elign_lab.oracles._xtb_worker, elign_lab.oracles._dft_worker\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- what backends can do wrong
class Scripted(Oracle):
    """An oracle whose backend answers what it is told."""

    name = "scripted"
    elements = frozenset({1, 8})

    def __init__(self, *answers, **options):
        super().__init__(**options)
        self.answers = list(answers)

    def _compute(self, molecules):
        return self.answers[: len(molecules)]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Evaluation(float("nan"), np.zeros((3, 3))), "non-finite energy or force"),
        (Evaluation(1.0, np.full((3, 3), np.inf)), "non-finite energy or force"),
        (Evaluation(1.0, np.zeros((2, 3))), "forces of shape (2, 3), expected (3, 3)"),
        (Evaluation(1.0, None), "forces of shape (), expected (3, 3)"),
        (Evaluation(1.0, np.zeros((3, 3)), "SCF not converged"), "SCF not converged"),
    ],
)
def test_bad_answers_of_a_backend_never_become_numbers(answer, reason):
    assert_failed(Scripted(answer)(batch_of(WATER)), 0, 3, reason)


def test_a_missing_answer_is_an_error():
    with pytest.raises(ValueError, match="shorter"):
        Scripted()(batch_of(WATER))


# ---------------------------------------------------------------------- derived numbers
def test_force_rms_by_hand():
    forces = torch.tensor(
        [[[3.0, 4.0, 0.0], [0.0, 0.0, 0.0], [9.0, 9.0, 9.0]], [[1.0, 2.0, 2.0], [0.0] * 3, [0.0] * 3]]
    )
    mask = torch.tensor([[True, True, False], [True, False, False]])
    # sqrt(25/2); sqrt(9)
    torch.testing.assert_close(f_rms(forces, mask), torch.tensor([12.5**0.5, 3.0]))
    forces[1, 0, 0] = torch.nan
    assert f_rms(forces, mask).isnan().tolist() == [False, True]


def test_clip_forces_rescales_vectors():
    clipped = clip_forces(torch.tensor([[3.0, 4.0, 0.0], [0.3, 0.4, 0.0], [0.0, 0.0, 0.0]]), 2.0)
    torch.testing.assert_close(clipped, torch.tensor([[1.2, 1.6, 0.0], [0.3, 0.4, 0.0], [0.0, 0.0, 0.0]]))
    with pytest.raises(ValueError, match="threshold must be positive"):
        clip_forces(clipped, 0.0)


def test_formation_energy_by_hand():
    oracle = Scripted(atom_energies={"H": -1.0, 8: -3.0})
    batch = batch_of(WATER, HYDROGEN)
    # (-14 - (-3 - 1 - 1)) / 3; (-2.5 + 2) / 2
    energy = oracle.formation_energy_per_atom(torch.tensor([-14.0, -2.5]), batch.numbers, batch.mask)
    torch.testing.assert_close(energy, torch.tensor([-3.0, -0.25]))


def test_formation_energy_of_unknown_types():
    oracle = Scripted(atom_energies={"H": -1.0})
    batch = batch_of(WATER, HYDROGEN)
    with pytest.raises(ValueError, match=r"no isolated-atom energy for O \(it has: H\)"):
        oracle.formation_energy_per_atom(torch.tensor([-14.0, -2.5]), batch.numbers, batch.mask)
    # a failed molecule stays NaN, whatever its elements
    energy = oracle.formation_energy_per_atom(torch.tensor([torch.nan, -2.5]), batch.numbers, batch.mask)
    assert energy.isnan().tolist() == [True, False]


# ---------------------------------------------------------------------- xTB
def test_xtb_scf_failure_is_a_status_and_silent(capfd):
    with load_oracle("xtb", workers=0, max_iterations=2) as xtb:
        result = xtb(batch_of(WATER))
    assert_failed(result, 0, 3, "tblite: SCF not converged in 2 cycles")
    assert capfd.readouterr() == ("", "")


def test_xtb_survives_killed_workers():
    with load_oracle("xtb", workers=2) as xtb:
        before = xtb(batch_of(WATER))
        for pid in list(xtb._pool._own._processes):
            os.kill(pid, signal.SIGKILL)
        after = xtb(batch_of(WATER, HYDROGEN))
        assert after.ok.all(), after.status
        assert after.energy[0] == before.energy[0]


def test_xtb_timeout_is_a_status():
    with load_oracle("xtb", workers=1, timeout=0.05) as xtb:
        result = xtb(batch_of(alkane(66)))
    assert_failed(result, 0, 200, "timeout: more than 0.05 s")


def test_xtb_in_another_executor_gives_the_same_numbers():
    batch = batch_of(WATER, HYDROGEN)
    with ThreadPoolExecutor(1) as executor:
        given = load_oracle("xtb", executor=executor, workers=1)(batch)
    assert torch.equal(given.energy, load_oracle("xtb", workers=0)(batch).energy)


def test_xtb_pool_in_a_script_without_a_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from elign_lab.molecules import MoleculeBatch\n"
        "from elign_lab.oracles import load_oracle\n"
        "batch = MoleculeBatch.from_arrays([([1, 1], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.74]])])\n"
        "print(load_oracle('xtb', workers=1)(batch).energy.item())\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(-26.72, abs=0.02)


# ---------------------------------------------------------------------- ASE
def test_ase_calculator_error_is_a_status():
    with load_oracle("ase", calculator=EMT) as oracle:  # a factory; EMT has no fluorine
        result = oracle(batch_of(([9, 1], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.92]]), WATER))
    assert_failed(result, 0, 2, "CalculatorError: NotImplementedError")
    assert result.ok[1]


def test_ase_lennard_jones_dimer_by_hand():
    sigma, epsilon, r = 3.4, 0.0104, 4.0
    calculator = LennardJones(sigma=sigma, epsilon=epsilon, rc=50.0)
    result = load_oracle("ase", calculator=calculator, elements=["Ar"])(
        batch_of(([18, 18], [[0.0, 0.0, 0.0], [0.0, 0.0, r]]), WATER)
    )
    s6 = (sigma / r) ** 6
    shift = 4 * epsilon * ((sigma / 50) ** 12 - (sigma / 50) ** 6)
    assert result.energy[0].item() == pytest.approx(4 * epsilon * (s6**2 - s6) - shift, abs=1e-9)
    assert result.forces[0, 1, 2].item() == pytest.approx(24 * epsilon * (2 * s6**2 - s6) / r, abs=1e-9)
    assert_failed(result, 1, 3, "unsupported element H, O")


# ---------------------------------------------------------------------- ANI
def test_ani_without_weights_and_network_says_where_they_are(monkeypatch, tmp_path):
    def unreachable(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setenv("TORCHANI_DATA_DIR", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    assert "weights are not here yet" in ORACLES["ani"].available()[1]
    with pytest.raises(ValueError, match=r"cannot be reached \(no network\).*github.com/aiqm/ani-model-zoo"):
        load_oracle("ani")
    assert not any(tmp_path.iterdir())


def test_ani_rejects_files_that_are_not_its_weights(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("not a state dict")
    for name in ("other.pt", "text.pt"):
        with pytest.raises(ValueError, match="is not a state dict of ANI-2x"):
            load_oracle("ani", weights=tmp_path / name)
    with pytest.raises(ValueError, match="incomplete ANI-2x folder"):
        load_oracle("ani", weights=tmp_path)


@needs_ani
def test_ani_state_dict_gives_the_same_numbers_as_the_folder(tmp_path):
    folder = load_oracle("ani", weights=ANI_WEIGHTS)
    state = folder._model.state_dict()
    hartree = [folder.atom_energies[z] / 27.211386245981 for z in (1, 6, 7, 8, 16, 9, 17)]
    state["energy_shifter.self_energies"] = torch.tensor(hartree, dtype=torch.float64)
    torch.save(state, tmp_path / "weights.pt")
    batch = batch_of(WATER, METHYL)
    expected, result = folder(batch), load_oracle("ani", weights=tmp_path / "weights.pt")(batch)
    torch.testing.assert_close(result.energy, expected.energy, atol=1e-8, rtol=0)
    assert torch.equal(result.forces, expected.forces)


@needs_ani
def test_ani_uncertainty_is_the_deviation_of_the_members():
    ani = load_oracle("ani", weights=ANI_WEIGHTS)
    result = ani(batch_of(WATER, ([8, 1], [[0.0, 0.0, 0.0], [0.0, 0.0, float("nan")]]), METHYL))
    assert result.uncertainty.shape == (3,)
    assert torch.isnan(result.uncertainty).tolist() == [False, True, False]
    # the radical is not in the training set, water is
    assert result.uncertainty[2] > result.uncertainty[0] > 0
