"""Model files: round trips, passports, damaged files, and public EDM checkpoints that must not execute anything."""

import argparse
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from elign_lab import checkpoints
from elign_lab.checkpoints import (
    FORMAT,
    bundled_models,
    edm_config,
    load_model,
    model_file,
    model_format,
    read_edm_args,
    save_model,
    verify_asset,
    write_passport,
)
from elign_lab.denoiser import Denoiser, DenoiserConfig

GOLDEN = Path(__file__).parents[1] / "golden"
PUBLIC = Path(__file__).parents[2].parent / "shared" / "data" / "edm_small_public"
EDM_ARGS = {
    "dataset": "qm9", "include_charges": True, "nf": 32, "n_layers": 3, "inv_sublayers": 1, "attention": True,
    "tanh": True, "norm_constant": 1, "sin_embedding": False, "model": "egnn_dynamics", "condition_time": True,
    "diffusion_steps": 1000, "diffusion_noise_schedule": "polynomial_2", "diffusion_noise_precision": 1e-5,
    "normalize_factors": [1, 4, 10], "probabilistic_model": "diffusion",
}  # fmt: skip


def make() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(DenoiserConfig(features=8, layers=1, size_histogram=((3, 2), (5, 1))))


def eps(model: Denoiser) -> torch.Tensor:
    mask = torch.ones(2, 4, dtype=torch.bool)
    z = model.noise(mask, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eps(z, torch.tensor([10, 900]), mask)


def public_folder(path: Path, **changes) -> Path:
    """A folder in the public format, with the golden weights."""
    data = np.load(GOLDEN / "edm_small_random.npz")
    state = {k[3:]: torch.from_numpy(data[k]) for k in data.files if k.startswith("sd/")}
    path.mkdir(exist_ok=True)
    torch.save(state, path / "generative_model_ema.npy")
    (path / "args.pickle").write_bytes(pickle.dumps(argparse.Namespace(**EDM_ARGS | changes)))
    return path


def test_round_trip(tmp_path):
    model = make()
    again = load_model(save_model(model, tmp_path / "model.safetensors"))
    assert again.config == model.config
    assert not again.training
    assert torch.equal(eps(again), eps(model))
    half = load_model(save_model(model, tmp_path / "half.safetensors", dtype=torch.float16))
    assert half.dtype == torch.float32
    torch.testing.assert_close(eps(half), eps(model), atol=0.02, rtol=0.02)
    assert (tmp_path / "half.safetensors").stat().st_size < (tmp_path / "model.safetensors").stat().st_size


def test_damaged_and_foreign_files(tmp_path):
    path = save_model(make(), tmp_path / "model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_model(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_model(path)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not a denoiser"):
        load_model(path)
    for config in (
        '{"elements": [1]}',
        '{"layers_of_the_future": 3, "elements": [1], "scale": [1], "size_histogram": []}',
    ):
        save_file({"weight": torch.zeros(2)}, path, metadata={"format": "elign_lab.denoiser/1", "config": config})
        with pytest.raises(ValueError, match="made by another version"):
            load_model(path)
    with pytest.raises(FileNotFoundError, match="no model 'edm-giant'"):
        load_model("edm-giant")


def test_what_a_file_holds(tmp_path):
    path = save_model(make(), tmp_path / "tiny.safetensors")
    assert (model_file(path), model_format(path)) == (path, FORMAT)
    assert model_file("gpff-mini") == checkpoints.ASSETS / "gpff-mini.safetensors"
    assert model_format("gpff-mini") == "elign_lab.gpff/1"
    assert model_format("edm-mini") == FORMAT
    with pytest.raises(ValueError, match=r"is not a denoiser .* `elign-lab gpff sample`"):
        load_model("gpff-mini")
    with pytest.raises(FileNotFoundError, match=r"no model 'edm-giant'.*edm-mini.*gpff-mini"):
        model_file("edm-giant")
    with pytest.raises(FileNotFoundError, match="not in the public EDM format"):
        model_format(tmp_path)
    path.write_bytes(b"none")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        model_format(path)


def test_passport_guards_an_asset(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "ASSETS", tmp_path)
    path = save_model(make(), tmp_path / "tiny.safetensors")
    with pytest.raises(FileNotFoundError, match="no passport"):
        load_model("tiny")
    write_passport(path, kind="denoiser", licence="MIT")
    load_model("tiny")
    assert [p["name"] for p in bundled_models()] == ["tiny"]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="does not match its passport"):
        load_model("tiny")


def test_every_bundled_file_matches_its_passport():
    passports = sorted(checkpoints.ASSETS.glob("*.json"))
    assert passports
    for passport in passports:
        content = json.loads(passport.read_text())
        assert verify_asset(checkpoints.ASSETS / content["file"])["sha256"] == content["sha256"]
    named = {json.loads(p.read_text())["file"] for p in passports}
    present = {
        p.name for p in checkpoints.ASSETS.iterdir() if p.suffix != ".json" and not p.name.startswith(("_", "."))
    }
    assert named == present


def test_public_folder(tmp_path):
    folder = public_folder(tmp_path / "edm")
    assert (model_file(folder).parent, model_format(folder)) == (folder, FORMAT)
    model = load_model(folder)
    data = np.load(GOLDEN / "edm_small_random.npz")
    mask = torch.from_numpy(data["in/node_mask"][..., 0] > 0)
    with torch.no_grad():
        out = model.eps(torch.from_numpy(data["net/z_t"][3]), torch.from_numpy(data["in/t_int"][3]).long(), mask)
    want = torch.from_numpy(data["net/eps_hat"][3])
    assert float((out - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert model.config.max_atoms == 29


@pytest.mark.skipif(not PUBLIC.exists(), reason="the small public EDM checkpoint is not beside the repository")
def test_real_public_checkpoint():
    model = load_model(PUBLIC)
    assert (model.config.features, model.config.layers, model.config.timesteps) == (128, 5, 200)
    assert torch.isfinite(eps(model)).all()


class Attack:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_pickles_are_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = public_folder(tmp_path / "edm")
    for payload in (Attack(), argparse.Namespace(**EDM_ARGS, evil=Attack()), {"evil": Attack()}):
        (folder / "args.pickle").write_bytes(pickle.dumps(payload))
        with pytest.raises(ValueError, match="refused to load"):
            load_model(folder)
    folder = public_folder(tmp_path / "edm")
    torch.save({"a": Attack()}, folder / "generative_model_ema.npy")
    with pytest.raises(ValueError, match="not a readable PyTorch state dict"):
        load_model(folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "not an EDM args.pickle"), (b"garbage", "not an EDM args.pickle"), (pickle.dumps({"nf": 3}), "holds dict")],
)
def test_damaged_args(tmp_path, content, message):
    path = tmp_path / "args.pickle"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_edm_args(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "zinc"}, "'zinc'"),
        ({"remove_h": True}, "remove_h=True"),
        ({"diffusion_noise_schedule": "learned"}, "learned noise schedule"),
        ({"probabilistic_model": "flow"}, "'flow'"),
    ],
)
def test_unsupported_settings(change, message):
    with pytest.raises(ValueError, match=message):
        edm_config(EDM_ARGS | change)


def test_settings_that_do_not_fit_the_weights(tmp_path):
    with pytest.raises(ValueError, match="does not fit its settings"):
        load_model(public_folder(tmp_path / "edm", n_layers=4))
    (tmp_path / "edm" / "args.pickle").write_bytes(pickle.dumps(argparse.Namespace(dataset="qm9")))
    with pytest.raises(ValueError, match=r"args\.pickle has no setting 'diffusion_noise_schedule'"):
        load_model(tmp_path / "edm")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="not in the public EDM format"):
        load_model(tmp_path / "empty")
