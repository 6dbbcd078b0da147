"""UMA through fairchem-core, on small eSCN-MD models: each trap of fairchem, and each way in which access can fail."""

import importlib.util
import json
import logging
import random
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles import ORACLES, _fairchem, load_oracle
from elign_lab.oracles._fairchem import UMAUnavailableError
from elign_lab.oracles.escn import EscnCheckpoint, EscnConfig, build_escn
from elign_lab.testing import assert_batch_equals_single, assert_forces_match_energy

fairchem = pytest.mark.skipif(
    importlib.util.find_spec("fairchem") is None, reason="fairchem-core is not installed (extra uma)"
)

WATER = ([8, 1, 1], [[0.0, 0.0, 0.119], [0.0, 0.763, -0.477], [0.0, -0.763, -0.477]])
HYDROXYL = ([8, 1], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.97]])
ATOM = ([7], [[0.1, 0.2, 0.3]])
REFERENCES = {1: -13.6, 6: -1030.0, 7: -1485.0, 8: -2040.0}
# experts: the mixture of UMA, whose weights depend on composition, charge and spin
SMALL = EscnConfig(layers=1, lmax=1, channels=8, basis=8, experts=3)


def batch_of(*molecules, check=False) -> MoleculeBatch:
    return MoleculeBatch.from_arrays(molecules, check=check).to(dtype=torch.float64)


def random_checkpoint(**changes) -> EscnCheckpoint:
    """Random weights, enlarged until spin and geometry show in the energy."""
    config = EscnConfig(**{**SMALL.__dict__, **changes})
    return EscnCheckpoint(config, build_escn(config, seed=3).state_dict(), 5.0, REFERENCES, REFERENCES)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return random_checkpoint().save(tmp_path_factory.mktemp("uma") / "random.safetensors")


@pytest.fixture(scope="module")
def pickle_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("uma") / "random.pt"
    torch.save(random_checkpoint(single_atoms=True).inference_checkpoint(), path)
    return path


@pytest.fixture(scope="module")
def oracle(file):
    return load_oracle("uma", model=file, dtype=torch.float64)


# ---------------------------------------------------------------------- numbers
@fairchem
def test_energies_are_those_of_fairchems_calculator(file, tmp_path):
    from fairchem.core import FAIRChemCalculator
    from fairchem.core.units.mlip_unit import load_predict_unit

    torch.save(EscnCheckpoint.load(file).inference_checkpoint(), tmp_path / "model.pt")
    unit = load_predict_unit(tmp_path / "model.pt", "batch", device="cpu")
    batch = batch_of(WATER, HYDROXYL)
    result = load_oracle("uma", model=file)(batch)
    for i, (atoms, spin) in enumerate(zip(batch.to_ase(), (1, 2), strict=True)):
        atoms.info.update(charge=0, spin=spin)
        atoms.calc = FAIRChemCalculator(unit, task_name="omol")
        assert result.energy[i].item() == pytest.approx(atoms.get_potential_energy(), abs=1e-5)
        np.testing.assert_allclose(result.forces[i, : len(atoms)], atoms.get_forces(), atol=1e-5)


@fairchem
def test_spin_follows_the_electron_count_and_is_never_left_out(oracle, monkeypatch):
    """Without r_data_keys fairchem takes a multiplicity of 0, and without a check of parity any other."""
    seen = []
    predict = oracle._unit.predict

    def spy(data, *args):
        seen.append((data.charge.tolist(), data.spin.tolist()))
        return predict(data, *args)

    monkeypatch.setattr(oracle._unit, "predict", spy)
    batch = batch_of(WATER, HYDROXYL)
    right = oracle(batch)
    assert seen == [([0, 0], [1, 2])]
    # that it matters: the same radical with the multiplicities that fairchem would take in silence
    radical = [batch.arrays()[1]]
    for wrong in (0, 1):
        energies, _ = _fairchem.predict(oracle._unit, radical, [wrong], torch.float64)
        assert abs(energies[0] - right.energy[1].item()) > 1e-3


@fairchem
def test_forces_are_the_gradient_and_batches_do_not_matter(oracle):
    batch = MoleculeBatch.from_smiles(["CCO", "O", "NC=O", "[CH3]"]).to(dtype=torch.float64)
    assert_forces_match_energy(oracle, batch, step=1e-4, tolerance=1e-6)
    assert_batch_equals_single(oracle, batch, tolerance=1e-9)


@fairchem
def test_batches_are_cut_by_atoms(file):
    oracle = load_oracle("uma", model=file, dtype=torch.float64, batch_atoms=5)
    whole = load_oracle("uma", model=file, dtype=torch.float64)
    batch = batch_of(WATER, HYDROXYL, WATER, WATER, HYDROXYL)
    torch.testing.assert_close(oracle(batch).energy, whole(batch).energy, atol=1e-9, rtol=0)


@fairchem
def test_total_energies_keep_their_digits_in_single_precision(file):
    """The network's float32 must not round a sum of thousands of eV: references are added in double."""
    double, single = (load_oracle("uma", model=file, dtype=d) for d in (torch.float64, torch.float32))
    batch = batch_of(*[WATER] * 2, HYDROXYL)
    torch.testing.assert_close(single(batch).energy, double(batch).energy, atol=5e-5, rtol=0)


@fairchem
def test_mirror_average_makes_mirror_images_equal(file):
    batch = MoleculeBatch.from_smiles("C[C@H](N)C(=O)O").to(dtype=torch.float64)
    mirror = batch.with_positions(batch.positions * torch.tensor([-1.0, 1.0, 1.0]))
    plain = load_oracle("uma", model=file, dtype=torch.float64)
    averaged = load_oracle("uma", model=file, dtype=torch.float64, mirror_average=True)
    a, b = plain(batch), plain(mirror)
    assert abs(a.energy - b.energy) > 1e-5
    c, d = averaged(batch), averaged(mirror)
    assert c.energy.item() == pytest.approx((a.energy + b.energy).item() / 2, abs=1e-9)
    assert c.energy.item() == pytest.approx(d.energy.item(), abs=1e-9)
    torch.testing.assert_close(c.forces, d.forces * torch.tensor([-1.0, 1.0, 1.0]), atol=1e-9, rtol=0)
    assert_forces_match_energy(averaged, batch, step=1e-4, tolerance=1e-6)


# ---------------------------------------------------------------------- single atoms, elements
@fairchem
def test_a_single_atom_in_a_batch_does_not_spoil_it(oracle):
    """fairchem refuses the whole batch, unless the atom is alone in it."""
    together = oracle(batch_of(WATER, ATOM, HYDROXYL))
    assert together.status == ("ok", "ok", "ok")
    assert together.energy[1].item() == REFERENCES[7]
    assert (together.forces[1] == 0).all()
    assert together.energy[0].item() == pytest.approx(oracle(batch_of(WATER)).energy.item(), abs=1e-9)


@fairchem
def test_a_single_atom_without_an_energy_is_a_status(tmp_path):
    checkpoint = random_checkpoint()
    path = EscnCheckpoint(checkpoint.config, checkpoint.state, 1.0, REFERENCES).save(tmp_path / "m.safetensors")
    oracle = load_oracle("uma", model=path)
    result = oracle(batch_of(ATOM, WATER))
    assert "does not do single atoms, and has no energy of N" in result.status[0]
    assert result.status[1] == "ok"
    with pytest.raises(ValueError, match="no isolated-atom energy for H"):
        oracle.formation_energy_per_atom(result.energy[1:], torch.tensor([[8, 1, 1]]), torch.ones(1, 3).bool())


@fairchem
def test_a_model_made_for_single_atoms_is_asked_and_gives_the_atoms_energies(pickle_file):
    oracle = load_oracle("uma", model=pickle_file, allow_pickle=True, dtype=torch.float64)
    (network,) = oracle(batch_of(ATOM)).energy.tolist()
    assert network != REFERENCES[7]
    # the isolated atom has the spin of its ground state (N: quartet), the molecule of one atom its lowest
    energies, _ = _fairchem.predict(oracle._unit, [(np.array([7]), np.zeros((1, 3)))], [4], torch.float64)
    assert oracle.atom_energies[7] == pytest.approx(energies[0], abs=1e-9)
    assert oracle.atom_energies[7] != pytest.approx(network, abs=1e-6)
    with pytest.raises(ValueError, match="does not know F: it knows H, C, N, O"):
        oracle.atom_energies[9]


@fairchem
def test_only_trained_elements_are_taken(oracle, file):
    """fairchem takes any number below 100, with an embedding that no data has touched, and breaks at 100."""
    assert oracle.elements == {1, 6, 7, 8}
    result = oracle(batch_of(([9, 1], [[0.0] * 3, [0.0, 0.0, 0.92]]), ([100, 1], [[0.0] * 3, [0.0, 0.0, 2.0]]), WATER))
    assert result.status == ("unsupported element F", "unsupported element Fm", "ok")
    assert load_oracle("uma", model=file, elements=["H", 8]).elements == {1, 8}


@fairchem
def test_a_batch_that_fairchem_refuses_is_done_one_by_one(oracle, monkeypatch):
    predict = oracle._unit.predict

    def fragile(data, *args):
        if (data.atomic_numbers == 6).any():
            raise RuntimeError("zeros: Dimension size must be non-negative.")
        return predict(data, *args)

    monkeypatch.setattr(oracle._unit, "predict", fragile)
    methyl = ([6, 1, 1, 1], [[0.0, 0.0, 0.0], [1.08, 0.0, 0.0], [-0.54, 0.93, 0.0], [-0.54, -0.93, 0.0]])
    result = oracle(batch_of(WATER, methyl, HYDROXYL))
    assert result.status == ("ok", "fairchem: RuntimeError: zeros: Dimension size must be non-negative.", "ok")


# ---------------------------------------------------------------------- what fairchem does to its surroundings
@fairchem
def test_global_state_is_left_as_it_was(file):
    """fairchem seeds Python, NumPy and torch with 41, and installs a handler on the root logger."""
    random.seed(5)
    torch.manual_seed(6)
    np.random.seed(7)  # noqa: NPY002
    root = logging.getLogger()
    handlers = list(root.handlers)
    before = (random.getstate(), torch.get_rng_state(), np.random.get_state()[1])  # noqa: NPY002
    load_oracle("uma", model=file)(batch_of(WATER))
    after = (random.getstate(), torch.get_rng_state(), np.random.get_state()[1])  # noqa: NPY002
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])
    np.testing.assert_array_equal(before[2], after[2])
    assert root.handlers == handlers
    assert root.filters == []
    assert torch.get_default_dtype() == torch.float32


@fairchem
def test_nothing_is_merged_compiled_or_computed_in_vain(oracle):
    """The default preset compiles for minutes, for one composition; the stress of a molecule means nothing."""
    settings = oracle._unit.inference_settings
    assert not any((settings.merge_mole, settings.compile, settings.tf32, settings.activation_checkpointing))
    assert [task.property for task in oracle._unit.dataset_to_tasks["omol"]] == ["energy", "forces"]
    assert not oracle._unit.model.module.backbone.always_use_pbc


# ---------------------------------------------------------------------- files and options
@fairchem
def test_a_pickle_is_loaded_only_when_it_is_trusted(pickle_file):
    with pytest.raises(ValueError, match=r"pickle, which can run any code.*allow_pickle=True"):
        load_oracle("uma", model=pickle_file)


@fairchem
@pytest.mark.parametrize("content", ["text", "state dict", "safetensors"])
def test_a_foreign_file_is_named(tmp_path, content):
    path = tmp_path / ("model.safetensors" if content == "safetensors" else "model.pt")
    if content == "state dict":
        torch.save({"a": torch.zeros(2)}, path)
    else:
        path.write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"model\.(pt|safetensors)"):
        load_oracle("uma", model=path, allow_pickle=True)


@fairchem
def test_a_checkpoint_of_another_task_is_refused(tmp_path):
    checkpoint = random_checkpoint().inference_checkpoint()
    backbone, head = checkpoint.model_config["backbone"], checkpoint.model_config["heads"]["efs"]
    backbone["dataset_mapping"], head["dataset_names"] = {"oc20": "oc20"}, ["oc20"]
    for task in checkpoint.tasks_config:
        task["datasets"], task["name"] = ["oc20"], task["name"].replace("omol", "oc20")
    for state in (checkpoint.model_state_dict, checkpoint.ema_state_dict):
        for key in [key for key in state if ".omol." in key]:
            state[key.replace(".omol.", ".oc20.")] = state.pop(key)
    torch.save(checkpoint, tmp_path / "oc20.pt")
    with pytest.raises(UMAUnavailableError, match="its tasks are for oc20: take one for omol") as caught:
        load_oracle("uma", model=tmp_path / "oc20.pt", allow_pickle=True)
    assert caught.value.reason == "file"


@fairchem
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:1"}, "device must be 'cpu' or 'cuda'"),
        ({"dtype": torch.float16}, "dtype must be torch.float32 or torch.float64"),
        ({"batch_atoms": 0}, "batch_atoms must be at least 1"),
        ({"elements": ["Xx"]}, "unknown element 'Xx'"),
        ({"model": "/does/not/exist.safetensors"}, "no eSCN-MD model '/does/not/exist.safetensors'"),
    ],
)
def test_wrong_options_are_named(file, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_oracle("uma", **{"model": file, **options})


@fairchem
def test_cuda_without_a_gpu_is_named(file):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="torch sees no GPU here"):
        load_oracle("uma", model=file, device="cuda")


# ---------------------------------------------------------------------- ways in which access can fail
NAMES = {"uma-m-1p1": ("facebook/UMA", "checkpoints"), "uma-s-1p2": ("facebook/UMA", "checkpoints")}


@pytest.fixture
def outside(monkeypatch, tmp_path):
    """fairchem-core as if installed, with an empty cache; nothing of it is imported."""
    references = {"subfolder": "references", "filename": "iso_atom_elem_refs.yaml"}
    table = {
        name: {"filename": f"{name}.pt", "repo_id": repo, "subfolder": folder, "atom_refs": references}
        for name, (repo, folder) in NAMES.items()
    }
    monkeypatch.setenv("FAIRCHEM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_fairchem.metadata, "version", lambda _: "2.24.0")
    monkeypatch.setattr(_fairchem, "registry", lambda: table)
    return tmp_path


def reason_of(name="uma-m-1p1") -> tuple[str, str]:
    seconds = []
    for _ in range(2):  # the better of two, for busy machines
        start = time.monotonic()
        with pytest.raises(UMAUnavailableError) as caught:
            _fairchem.find_weights(name, allow_pickle=False)
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 2.0
    assert isinstance(caught.value, ValueError)
    assert _fairchem.UMAUnavailableError.REASONS[caught.value.reason] in str(caught.value)
    return caught.value.reason, str(caught.value)


def test_missing_package(outside, monkeypatch):
    def missing(name):
        raise _fairchem.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_fairchem.metadata, "version", missing)
    reason, text = reason_of()
    assert reason == "missing"
    assert "pip install 'fairchem-core>=2.24,<2.25'" in text
    ready, why = ORACLES["uma"].available()
    assert not ready
    assert "pip install 'fairchem-core" in why
    with pytest.raises(ValueError, match="the uma oracle is not available: fairchem-core is not installed"):
        load_oracle("uma")


@pytest.mark.parametrize("version", ["2.21.0", "2.25.1", "1.10.0"])
def test_wrong_version(outside, monkeypatch, version):
    monkeypatch.setattr(_fairchem.metadata, "version", lambda _: version)
    reason, text = reason_of()
    assert reason == "version"
    assert version in text


def test_cache_that_cannot_be_written(outside, monkeypatch):
    (outside / "a file").write_text("")
    monkeypatch.setenv("FAIRCHEM_CACHE_DIR", str(outside / "a file" / "cache"))
    reason, text = reason_of()
    assert reason == "cache"
    assert "set FAIRCHEM_CACHE_DIR" in text


@pytest.mark.parametrize(("name", "hint"), [("uma-m", "did you mean 'uma-m-1p1'?"), ("nope", "expected a file")])
def test_bad_name(outside, name, hint):
    reason, text = reason_of(name)
    assert reason == "name"
    assert hint in text
    assert "escn-mini" in text


def test_offline_mode(outside, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reason, text = reason_of()
    assert reason == "network"
    assert "HF_HUB_OFFLINE is set" in text


def test_no_network(outside, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"  # nobody listens
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        reason, text = reason_of()
    assert reason == "network"
    assert "model='escn-mini'" in text


def test_a_name_server_that_does_not_answer(outside, monkeypatch):
    def silent(*_, **__):
        time.sleep(3)
        raise OSError("too late to be told")

    monkeypatch.setattr("urllib.request.urlopen", silent)
    reason, text = reason_of()
    assert (reason, "no answer in 1.5 s" in text) == ("network", True)


@pytest.fixture
def hub(outside, monkeypatch):
    """A Hugging Face of our own on this machine; `answers` says what it does with a file."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            status, headers, body = self.server.answers(self.path)
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            return body

        def do_GET(self):
            self.wfile.write(self.do_HEAD())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answers = lambda _: (200, {}, b"")
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "headers", "body", "reason", "text"),
    [
        (401, {"X-Error-Code": "GatedRepo"}, b"", "access", "is gated, and you are not logged in"),
        (403, {"X-Error-Code": "GatedRepo"}, b"", "access", "is gated, and you are not logged in"),
        (401, {"X-Error-Code": "RepoNotFound"}, b"", "access", "is not there for this account"),
        (404, {"X-Error-Code": "EntryNotFound"}, b"", "download", "checkpoints/uma-m-1p1.pt is not in facebook/UMA"),
        (200, {}, b"<html>log in here</html>", "network", "a proxy or a login page"),
        (400, {}, b"", "download", "try again later"),
    ],
    ids=["no token", "not granted", "no repository", "no file", "login page", "another error"],
)
def test_what_hugging_face_answers(hub, monkeypatch, status, headers, body, reason, text):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    hub.answers = lambda path: (status, headers, body) if "/resolve/" in path else (200, {}, b"")
    found, message = reason_of()
    assert found == reason
    assert text in message


def test_a_token_without_access_is_told_so(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    hub.answers = lambda path: (403, {"X-Error-Code": "GatedRepo"}, b"") if "/resolve/" in path else (200, {}, b"")
    reason, text = reason_of()
    assert reason == "access"
    assert "your token has no access to it" in text
    assert "hf_secret" not in text


def test_a_server_that_is_down_is_not_asked_for_the_file(hub):
    """huggingface_hub would ask again for 23 s."""
    hub.answers = lambda _: (503, {}, b"")
    reason, text = reason_of()
    assert (reason, "HTTP Error 503" in text) == ("network", True)


def test_a_disk_that_refuses_the_weights_and_a_line_that_breaks(hub, monkeypatch):
    def fails_with(error):
        def download(**_):
            raise error

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        return reason_of()

    reason, text = fails_with(OSError(28, "No space left on device"))
    assert (reason, "could not be kept in" in text, "No space left" in text) == ("cache", True, True)
    reason, text = fails_with(httpx.ReadError("connection reset"))
    assert (reason, "try again" in text) == ("network", True)


@fairchem
def test_a_granted_name_is_downloaded_once_and_then_needs_no_network(hub, monkeypatch, tmp_path):
    """The whole way of a name: registry, download, reference energies, fairchem, energies; then from the cache."""
    torch.save(random_checkpoint().inference_checkpoint(), tmp_path / "served.pt")
    table = {z: {0: e, 1: e + 12.0} for z, e in REFERENCES.items()}
    files = {
        "uma-m-1p1.pt": (tmp_path / "served.pt").read_bytes(),
        "iso_atom_elem_refs.yaml": json.dumps({"omol_elem_refs": table}).replace('"', "").encode(),
    }
    asked = []

    def answers(path):
        name = path.rsplit("/", 1)[-1]
        asked.append(name)
        if name not in files:
            return 200, {}, b""
        return 200, {"ETag": f'"{name}"', "X-Repo-Commit": "0" * 40}, files[name]

    hub.answers = answers
    first = load_oracle("uma")
    assert dict(first.atom_energies) == REFERENCES
    energy = first(batch_of(WATER, ATOM)).energy
    assert energy[1].item() == REFERENCES[7]
    asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert torch.equal(load_oracle("uma")(batch_of(WATER, ATOM)).energy, energy)
    assert asked == []


@fairchem
def test_the_registry_is_fairchems_own():
    from fairchem.core import pretrained_mlip

    assert tuple(_fairchem.registry()) == pretrained_mlip.available_models
    assert set(NAMES) <= set(_fairchem.registry())
    from fairchem.core._config import CACHE_DIR

    assert str(_fairchem.cache_folder()) == CACHE_DIR


def test_the_bundled_model_reads_without_fairchem_and_runs_no_code(tmp_path):
    checkpoint = EscnCheckpoint.load()
    assert set(checkpoint.references) == {1, 6, 7, 8, 9}
    again = EscnCheckpoint.load(checkpoint.save(tmp_path / "copy.safetensors"))
    assert again.config == checkpoint.config
    assert again.references == checkpoint.references
    assert all(torch.equal(again.state[k], v) for k, v in checkpoint.state.items())
    assert (tmp_path / "copy.safetensors").stat().st_size < 3e6
