"""What the oracles have in common: options, registry, answers of backends, derived numbers; and what one alone has."""

import importlib.util
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones

from elign_lab.benchmarks.oracles import alkane
from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles import ORACLES, Oracle, clip_forces, f_rms, load_oracle
from elign_lab.oracles._network import unreachable
from elign_lab.oracles.protocol import Evaluation
from elign_lab.testing import assert_failed

SHARED = Path(__file__).parents[2].parent / "shared"
ANI_WEIGHTS = SHARED / "data" / "ani-2x" / "ani-2x_8x"
needs_ani = pytest.mark.skipif(not ANI_WEIGHTS.is_dir(), reason="the ANI-2x weights are not part of the repository")

WATER = ([8, 1, 1], [[0.0, 0.0, 0.119], [0.0, 0.763, -0.477], [0.0, -0.763, -0.477]])
HYDROGEN = ([1, 1], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.74]])
METHYL = ([6, 1, 1, 1], [[0.0, 0.0, 0.0], [1.079, 0.0, 0.0], [-0.5395, 0.9344, 0.0], [-0.5395, -0.9344, 0.0]])


def batch_of(*molecules, check=False) -> MoleculeBatch:
    return MoleculeBatch.from_arrays(molecules, check=check)


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
        ("ase", {}, "missing a required argument: 'calculator'; expected calculator, elements"),
        ("dft", {"chunk_size": 4}, "unexpected keyword argument 'chunk_size'; expected xc, .* atom_energies$"),
        ("ani", {"weights": "/does/not/exist"}, "no ANI-2x weights at /does/not/exist"),
        ("ani", {"batch_size": 0}, "batch_size must be at least 1"),
        ("ani", {"max_uncertainty": 0.0}, "max_uncertainty must be positive"),
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
    with pytest.raises(ValueError, match=r"cannot be downloaded \(no network\).*github.com/aiqm/ani-model-zoo"):
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


@needs_ani
def test_ani_may_refuse_what_its_members_disagree_about():
    batch = batch_of(WATER, HYDROGEN)  # H2 is outside the training set
    free = load_oracle("ani", weights=ANI_WEIGHTS)
    gated = load_oracle("ani", weights=ANI_WEIGHTS, max_uncertainty=0.1)
    assert free(batch).ok.all()
    result = gated(batch)
    assert_failed(result, 1, 2, "eV per atom, over the limit of 0.1 (max_uncertainty)")
    assert result.status[0] == "ok"
    assert result.uncertainty[1].isnan()
    assert free.identity() != gated.identity()  # a cache must not give the one the other's answer


# ---------------------------------------------------------------------- network
@pytest.mark.parametrize(
    ("answer", "reason"), [(b"HTTP/1.1 404 no\r\nContent-Length: 0\r\n\r\n", ""), (b"garbage\r\n", "garbage")]
)
def test_a_server_that_answers_anything_in_http_is_reachable(answer, reason):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        assert unreachable(f"http://127.0.0.1:{server.getsockname()[1]}") == reason


def test_what_is_no_address_is_said(recwarn):
    assert "unknown url type" in unreachable("hub.example.org")
    assert not recwarn.list  # of an exception in the thread
