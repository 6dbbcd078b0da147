"""The command line, called as a user does: in a process of its own where that matters, else by main()."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch

import elign_lab
from elign_lab import MoleculeBatch, doctor
from elign_lab.alignment import OracleFailureError
from elign_lab.checkpoints import load_model, save_model
from elign_lab.cli import main
from elign_lab.denoiser import Denoiser, DenoiserConfig
from elign_lab.evaluation.candidates import Sampling, load_candidate, make_molecules
from elign_lab.gpff import generate
from elign_lab.gpff.compositions import draw_compositions
from elign_lab.gpff.model import GPFFConfig, PseudoForceField, save_force_field
from elign_lab.gpff.quality import VARIANTS
from elign_lab.oracles.learned import EnergyConfig, EnergyModel, save_energy_model
from elign_lab.overrides import override
from elign_lab.painn import PaiNNConfig
from elign_lab.profiles import PROFILES, get_profile
from elign_lab.sampling import sample
from elign_lab.training import read_json_lines

SMALL = ["--set", "model.features=16", "--set", "model.layers=1", "--batch-size", "16", "--set", "log_every=1"]
SMALL_FIELD = ["--batch-size", "8", "--set", "workers=1", "--set", "log_every=1"]
SMALL_FIELD += [f"--set=model.network.{name}=8" for name in ("features", "vectors", "channels")]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> str:
    """An untrained model: its molecules are rubbish, which is the hardest input for what judges them."""
    torch.manual_seed(0)
    config = DenoiserConfig(features=16, layers=2, timesteps=50, size_histogram=((3, 5), (5, 3), (8, 1)))
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(Denoiser(config), path)
    return str(path)


@pytest.fixture(scope="module")
def energy_file(tmp_path_factory) -> str:
    """An untrained force field: quick, and an answer for every geometry."""
    torch.manual_seed(0)
    config = EnergyConfig(network=PaiNNConfig(features=8, vectors=4, channels=4, layers=1))
    return str(save_energy_model(EnergyModel(config), tmp_path_factory.mktemp("oracle") / "tiny.safetensors"))


@pytest.fixture(scope="module")
def field_file(tmp_path_factory) -> str:
    """An untrained pseudo-force field."""
    torch.manual_seed(0)
    network = PaiNNConfig(features=8, vectors=4, channels=4, layers=1, shortest=0.4, reach=10.0, cutoff=False)
    config = GPFFConfig(network=network, compositions=(("CH4", 2), ("H2O", 1), ("C2H6O", 1)))
    return str(save_force_field(PseudoForceField(config), tmp_path_factory.mktemp("field") / "tiny.safetensors"))


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "elign_lab", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)


# ---------------------------------------------------------------------- the package and its help
def test_public_names():
    for name in ("MoleculeBatch", "align", "evaluate", "load_dataset", "load_model", "load_oracle", "sample", "show"):
        assert callable(getattr(elign_lab, name))
        assert name in dir(elign_lab)
    with pytest.raises(AttributeError, match="nothing"):
        elign_lab.nothing  # noqa: B018


def test_help_loads_no_heavy_package():
    code = (
        "import sys\nfrom elign_lab.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'numpy', 'rdkit', 'scipy'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.rstrip().endswith("set()")
    for command in ("doctor", "models", "start", "pretrain", "align", "sample", "evaluate", "report", "demo", "bench"):
        assert command in out


def test_no_command_prints_the_help(capsys):
    assert main([]) == 0
    assert "usage: elign-lab" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert elign_lab.__version__ in capsys.readouterr().out


# ---------------------------------------------------------------------- errors
def test_errors_are_one_line_with_status_2(capsys):
    assert main(["sample", "--model", "no-such-model", "--n", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("elign-lab: error: no model 'no-such-model'")
    with pytest.raises(FileNotFoundError):
        main(["sample", "--model", "no-such-model", "--debug"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--n", "2", "--sizes", "3,4,5"], "expected (2,)"),
        (["--n", "1", "--sizes", "99"], "limit of 8 atoms"),
        (["--n", "1", "--sampler", "magic"], "unknown sampler 'magic'"),
        (["--n", "1", "--steps", "51"], "51"),
        (["--n", "1", "--out", "molecules.pdb"], ".xyz, .sdf or .npz"),
        (["--n", "1", "--device", "abacus"], "--device abacus cannot be used"),
    ],
)
def test_bad_sampling_input(model_file, arguments, text, capsys):
    assert main(["sample", "--model", model_file, *arguments]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_benchmark_without_a_gpu(capsys):
    assert main(["bench", "denoiser", "--device", "cuda"]) == 2
    assert "--device cuda cannot be used" in capsys.readouterr().err


def test_batch_size_changes_the_noise_and_not_the_sizes(model_file, tmp_path):
    found = []
    for size in ("2", "64"):
        path = tmp_path / f"{size}.npz"
        assert main(["sample", "--model", model_file, "--n", "5", "--batch-size", size, "--out", str(path)]) == 0
        found.append(np.load(path))
    assert (found[0]["mask"] == found[1]["mask"]).all()
    assert (found[0]["positions"] != found[1]["positions"]).any()


def test_unknown_names(model_file, tmp_path, capsys):
    assert main(["evaluate", "--model", model_file, "--n", "1", "--steps", "5", "--oracle", "tarot"]) == 2
    assert "unknown oracle 'tarot'" in capsys.readouterr().err
    assert main(["align", "--model", model_file, "--preset", "fast", "--out", str(tmp_path)]) == 2
    assert "unknown preset 'fast'" in capsys.readouterr().err
    for option in (["--n", "0"], ["--n", "many"], ["--seed", "-1"], ["--sizes", "5,0"]):
        with pytest.raises(SystemExit) as stop:
            main(["sample", "--model", model_file, *option])
        assert stop.value.code == 2
        assert "expected a whole number of at least" in capsys.readouterr().err


def test_a_cache_of_answers_says_what_it_saved(model_file, energy_file, tmp_path, capsys):
    path = tmp_path / "answers.sqlite"
    oracle = ["--oracle", "learned", "--oracle-option", f"model={energy_file}", "--oracle-option", f"cache={path}"]
    command = ["evaluate", "--model", model_file, "--n", "4", "--steps", "5", *oracle, "--json"]
    found = []
    for said in (f"{path}: 0 molecules answered from it, 4 new", f"{path}: 4 molecules answered from it, 0 new"):
        assert main(command) == 0
        out, err = capsys.readouterr()
        assert said in err
        found.append(json.loads(out))
    assert found[0] == found[1]


@pytest.mark.parametrize("error", [OracleFailureError("the oracle failed on 3 of 4"), ImportError("needs msgpack")])
def test_a_demo_that_cannot_go_on_says_why(error, monkeypatch, capsys):
    def failing(*_):
        raise error

    monkeypatch.setattr("elign_lab.demo.run_demo", failing)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == f"elign-lab: error: {error}\n"


def test_a_sign_that_the_terminal_lacks_loses_no_result(model_file, energy_file):
    command = ["evaluate", "--model", model_file, "--n", "2", "--steps", "2", "--oracle", "learned"]
    option = ["--oracle-option", f"model={energy_file}"]
    for encoding, unit in (("ascii", "eV/?"), ("cp1252", "eV/Å")):  # cp1252: a file on Windows
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        found = run(*command, *option, env=environment, encoding=encoding)
        assert found.returncode == 0, found.stderr
        assert f"force RMS, median ({unit})" in found.stdout


def test_a_mistake_is_found_before_the_sampling(model_file, energy_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("elign_lab.sampling.sample", lambda *_, **__: pytest.fail("sampled first"))
    oracle = ["--oracle", "learned", "--oracle-option", f"model={energy_file}"]
    empty = tmp_path / "log.jsonl"
    empty.write_text("")
    for command, text in (
        (["evaluate", "--model", model_file, "--oracle", "tarot"], "unknown oracle 'tarot'"),
        (["report", model_file, "typo", *oracle], "no model 'typo'"),
        (["report", model_file, model_file, "--oracle", "tarot"], "unknown oracle 'tarot'"),
        (["report", model_file, model_file, *oracle, "--history", str(empty)], "holds no iteration"),
        (["evaluate", "--model", model_file, *oracle, "--variant", "direct"], "does not apply to"),
        (["report", model_file, "gpff-mini", *oracle, "--variant", "indirect"], "expected one of 'ancestral'"),
        (["evaluate", "--model", "gpff-mini", *oracle, "--spacing", "2"], "--spacing 2 does not apply to gpff-mini"),
    ):
        assert main(command) == 2
        assert text in capsys.readouterr().err


TARGETS = [
    (["sample", "--model", "edm-mini", "--n", "1"], "molecules.xyz"),
    (["gpff", "sample", "--n", "1"], "molecules.xyz"),
    (["report", "edm-mini", "edm-mini"], "report.html"),
    (["gpff", "evaluate", "--n", "1"], "table.json"),
    (["bench", "oracles"], "times.json"),
]


@pytest.mark.parametrize(("command", "name"), TARGETS, ids=lambda x: " ".join(x[:2]) if isinstance(x, list) else "")
def test_a_target_that_cannot_be_written_is_found_first(command, name, tmp_path, capsys, monkeypatch):
    for heavy in ("checkpoints.load_model", "gpff.load_force_field", "benchmarks.bench_oracles", "oracles.load_oracle"):
        monkeypatch.setattr(f"elign_lab.{heavy}", lambda *_, **__: pytest.fail("computed first"))
    suffix = Path(name).suffix
    folder, file = tmp_path / f"folder{suffix}", tmp_path / "file"
    folder.mkdir()
    file.write_text("")
    for out, text in (
        (folder, "is a folder: expected a file that ends in"),
        (tmp_path / "table.txt", "expected a file that ends in"),
        (file / "new" / name, f"{file} is a file, expected a folder"),
    ):
        assert main([*command, "--out", str(out)]) == 2
        captured = capsys.readouterr()
        assert text in captured.err
        assert suffix in captured.err
        assert captured.out == ""
    assert sorted(tmp_path.iterdir()) == [file, folder]  # nothing was made


RUNS = (
    *(["pretrain"], ["align", "--model", "edm-mini"], ["gpff", "train"], ["gpff", "align"]),
    *(["fit-oracle"], ["demo"]),
)


@pytest.mark.parametrize("command", RUNS, ids=" ".join)
def test_a_run_whose_folder_is_a_file(command, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("kept")
    for out, text in ((file, "is a file: expected the folder of a run"), (file / "run", f"{file} is a file, expected")):
        assert main([*command, "--out", str(out)]) == 2
        assert text in capsys.readouterr().err
    assert file.read_text() == "kept"


@pytest.mark.skipif(os.name == "nt", reason="permissions of Unix")
def test_a_target_without_permission(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    assert main(["gpff", "evaluate", "--out", str(tmp_path / "new" / "table.json")]) == 2
    assert f"no permission to write to {tmp_path}" in capsys.readouterr().err


# ---------------------------------------------------------------------- doctor, models, start
def test_doctor_reports_this_installation(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    packages = {p["name"]: p for p in report["packages"]}
    assert packages["torch"]["version"] == torch.__version__
    oracles = {o["name"]: o for o in report["oracles"]}
    assert oracles["xtb"]["usable"] is True
    assert oracles["ani"]["usable"] or oracles["ani"]["reason"]
    assert {"file": "qm9_xtb.npz", "ok": True, "problem": ""} in report["assets"]
    assert report["devices"][0].startswith("cpu")
    assert main(["doctor"]) == 0
    assert "no problems" in (text := capsys.readouterr().out) or "pip install" in text


REQUIREMENTS = ["torch<2", "no-such-package>=1", "x; extra == 'lab'", "y; extra == 'lab'"]


def test_doctor_finds_what_is_broken(monkeypatch, tmp_path, capsys):
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "a.bin").write_bytes(b"changed")
    (assets / "a.json").write_text(json.dumps({"file": "a.bin", "sha256": "0" * 64}))
    (assets / "b.json").write_text("{")
    monkeypatch.setattr(doctor, "PACKAGE", tmp_path)
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: REQUIREMENTS)
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    essential = [p["what"] for p in report["problems"] if p["essential"]]
    assert [what.split()[0] for what in essential] == ["torch", "no-such-package", "a.bin", "b.json"]
    assert all(p["remedy"] for p in report["problems"])
    (lab,) = (p for p in report["problems"] if p["remedy"] == "pip install 'elign-lab[lab]'")
    assert lab["what"] == "extra lab: x is missing, y is missing"


def test_doctor_says_what_the_first_use_of_an_oracle_needs():
    usable, later, never = (
        doctor.OracleState("ani", "", ready, reason)
        for ready, reason in ((True, ""), (True, "the weights are not here yet"), (False, "run pip"))
    )
    report = doctor.Report(oracles=[usable, later, never])
    lines = [line.strip() for line in report.text().splitlines() if line.strip().startswith("ani")]
    states = ("usable", "usable, but the weights are not here yet", "NOT USABLE: run pip")
    assert [line.removeprefix("ani").strip() for line in lines] == list(states)


@pytest.mark.parametrize("here", [True, False])
def test_doctor_and_the_weights_of_ani(here, tmp_path, monkeypatch):
    from elign_lab.oracles import ani

    monkeypatch.setattr(ani, "_cached", lambda: tmp_path / "weights")
    if here:
        (tmp_path / "weights").write_text("")
    (found,) = (o for o in doctor.examine().oracles if o.name == "ani")
    if found.usable:  # torchani is an extra
        assert found.state == "usable" if here else "downloaded on first use" in found.state


def test_start_copies_and_never_overwrites(tmp_path, capsys):
    folder = tmp_path / "mine"
    assert main(["start", str(folder)]) == 0
    notebook = folder / "00_quickstart.ipynb"
    assert json.loads(notebook.read_text())["nbformat"] == 4
    assert (folder / "docs" / "metrics.md").is_file()  # which notebooks point to
    notebook.write_text("my work")
    capsys.readouterr()
    assert main(["start", str(folder)]) == 0
    assert notebook.read_text() == "my work"
    assert f"kept      {notebook}" in capsys.readouterr().out


# ---------------------------------------------------------------------- sampling and judging
def test_sample_writes_every_format(model_file, tmp_path, capsys):
    expected = sample(load_model(model_file), 4, sizes=[3, 5, 3, 8], steps=10, seed=7)
    common = ["sample", "--model", model_file, "--n", "4", "--sizes", "3,5,3,8", "--steps", "10", "--seed", "7"]
    assert main(common) == 0
    assert capsys.readouterr().out == expected.to_xyz()
    for suffix in ("xyz", "sdf", "npz"):
        assert main([*common, "--out", str(tmp_path / "new" / f"m.{suffix}")]) == 0
    assert torch.equal(MoleculeBatch.from_xyz(tmp_path / "new" / "m.xyz").numbers, expected.numbers)
    assert torch.equal(MoleculeBatch.from_sdf(tmp_path / "new" / "m.sdf").sizes, expected.sizes)
    arrays = np.load(tmp_path / "new" / "m.npz")
    np.testing.assert_array_equal(arrays["positions"], expected.positions.numpy())
    np.testing.assert_array_equal(arrays["mask"], expected.mask.numpy())


def test_one_size_for_all(model_file, capsys):
    assert main(["sample", "--model", model_file, "--n", "3", "--sizes", "4", "--steps", "2"]) == 0
    assert MoleculeBatch.from_xyz(capsys.readouterr().out).sizes.tolist() == [4, 4, 4]


def test_evaluate_prints_json_only(model_file):
    done = run(
        "evaluate", "--model", model_file, "--n", "6", "--oracle", "xtb", "--seed", "3", "--steps", "5", "--json"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for key in (
        "atom_stability",
        "molecule_stability",
        "validity",
        "uniqueness",
        "valid_and_unique",
        "energy_per_atom_median",
        "f_rms_median",
    ):
        assert set(found[key]) == {"value", "low", "high"}
    assert (
        0 <= found["atom_stability"]["low"] <= found["atom_stability"]["value"] <= found["atom_stability"]["high"] <= 1
    )
    assert (found["n"], found["seed"], found["model"], found["oracle"], found["steps"]) == (6, 3, model_file, "xtb", 5)


def test_evaluate_of_a_pseudo_force_field(field_file, energy_file, capsys):
    oracle = ["--oracle", "learned", "--oracle-option", f"model={energy_file}"]
    command = ["evaluate", "--model", field_file, "--n", "3", "--steps", "2", "--seed", "4", *oracle, "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["n"], found["steps"], found["variant"], found["seed"]) == (3, 2, "direct, 0.3", 4)
    assert "spacing" not in found
    assert main([*command, "--variant", "relaxation"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["variant"] == "relaxation"
    assert other["f_rms_median"] != found["f_rms_median"]


def test_the_molecules_of_fields_are_paired(field_file):
    first = load_candidate(field_file)
    assert first.settings(Sampling(2)) == {"steps": 64, "variant": "direct, 0.3"}
    sampling = Sampling(3, steps=2, seed=5)
    base, other = make_molecules([first, load_candidate("gpff-mini")], sampling)
    assert torch.equal(base.numbers, other.numbers)  # the atoms that the first one drew
    assert not torch.equal(base.positions, other.positions)
    sampler, options = VARIANTS["direct, 0.3"]
    atoms = draw_compositions(first.model.config.compositions, 3, torch.Generator().manual_seed(5))
    ours = generate(first.model, compositions=atoms, sampler=sampler, evaluations=2, seed=5, **options)
    assert torch.equal(base.positions, ours.positions)


def test_report_of_fields_and_of_both_kinds(model_file, field_file, energy_file, tmp_path, capsys):
    oracle = ["--oracle", "learned", "--oracle-option", f"model={energy_file}"]
    common = ["--n", "3", "--steps", "2", *oracle]
    html = tmp_path / "report.html"
    command = ["report", field_file, field_file, *common, "--out", str(html)]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "not paired" not in captured.err
    for line in captured.out.splitlines()[2:7]:
        assert "+0.00" in line  # the same model, the same molecules
    page = html.read_text()
    digest = hashlib.sha256(Path(field_file).read_bytes()).hexdigest()[:12]
    for text in (digest, "direct, 0.3", "2 network evaluations", shlex.join(["elign-lab", *command]), "paired by seed"):
        assert escape(text) in page
    assert f"elign_lab {elign_lab.__version__}" in page

    assert main(["report", model_file, field_file, *common, "--spacing", "2", "--out", str(html)]) == 0
    assert "not paired" in capsys.readouterr().err
    page = html.read_text()
    assert "2 of 50 reverse steps, spacing 2" in page
    assert "paired by seed" not in page
    assert "come from the same seed" not in page


# ---------------------------------------------------------------------- training
def test_pretrain_align_and_report(tmp_path, energy_file, capsys):
    base, aligned, html = tmp_path / "base", tmp_path / "aligned", tmp_path / "new" / "report.html"
    assert main(["pretrain", "--preset", "edm_mini", "--steps", "3", "--out", str(base), *SMALL]) == 0
    assert len(read_json_lines(base / "log.jsonl")) == 3
    model = load_model(base / "model.safetensors")
    assert (model.config.features, model.config.layers) == (16, 1)
    assert str(base / "model.safetensors") in capsys.readouterr().out

    settings = ["groups=2", "members=2", "steps=6", "skip_prefix=4", "max_failure_share=1.0", "checkpoint_every=1"]
    options = [part for setting in settings for part in ("--set", setting)]
    oracle = ["--oracle", "learned", "--oracle-option", f"model={energy_file}"]
    command = ["align", "--model", str(base / "model.safetensors"), *oracle, "--out", str(aligned), *options]
    assert main([*command, "--iterations", "1"]) == 0
    assert main([*command, "--iterations", "2"]) == 0  # continues
    log = read_json_lines(aligned / "log.jsonl")
    assert [row["iteration"] for row in log] == [0, 1]
    assert main([*command, "--iterations", "2", "--set", "gamma=0.5"]) == 2
    assert "use another folder" in capsys.readouterr().err

    files = [str(base / "model.safetensors"), str(aligned / "model.safetensors")]
    history = ["--history", str(aligned / "log.jsonl")]
    assert main(["report", *files, "--n", "4", "--steps", "5", *oracle, "--out", str(html), *history]) == 0
    assert "difference" in capsys.readouterr().out
    assert "<html" in html.read_text()


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize("command", [["pretrain", *SMALL], ["gpff", "train", *SMALL_FIELD]], ids=["pretrain", "gpff"])
def test_ctrl_c_keeps_a_checkpoint_and_says_how_to_resume(command, tmp_path):
    command = [*command, "--steps", "100000", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "elign_lab", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 100
    log = tmp_path / "log.jsonl"
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to continue from the last checkpoint" in errors.splitlines()[-1]
    steps = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    assert steps >= 2
    again = run(*command, "--max-minutes", "0.0001")
    assert again.returncode == 0, again.stderr
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] > steps


# ---------------------------------------------------------------------- overrides and profiles
@dataclass(frozen=True)
class Inner:
    width: int = 1


@dataclass(frozen=True)
class Settings:
    rate: float = 0.1
    clip: float | None = 2.0
    name: str = "a"
    shared: bool = True
    scale: tuple[float, float] = (1.0, 2.0)
    inner: Inner = field(default_factory=Inner)


def test_override_parses_by_type():
    changed = override(
        Settings(), ["rate=1", "clip=None", "name=b=c", "shared=False", "scale=(3.0, 4.0)", "inner.width=5"]
    )
    assert changed == Settings(1.0, None, "b=c", False, (3.0, 4.0), Inner(5))
    assert isinstance(changed.rate, float)
    for text in ("3d", "2024", "1e5", "None"):
        assert override(Settings(), [f"name={text}"]).name == text


@pytest.mark.parametrize(
    ("assignment", "text"),
    [
        ("rate", "expected field=value"),
        ("speed=1", "it has rate, clip, name"),
        ("rate=fast", "expected float, got str"),
        ("inner.width=1.5", "expected int, got float"),
        ("inner.width=True", "expected int, got bool"),
        ("shared=1", "expected bool, got int"),
        ("rate.x=1", "single value"),
        ("inner.depth=1", "it has width"),
    ],
)
def test_override_names_the_mistake(assignment, text):
    with pytest.raises(ValueError, match=text):
        override(Settings(), [assignment])


def test_profiles(monkeypatch):
    from elign_lab.alignment import PRESETS
    from elign_lab.oracles import ORACLES

    monkeypatch.delenv("ELIGN_LAB_PROFILE", raising=False)
    assert get_profile().name == "cpu"
    monkeypatch.setenv("ELIGN_LAB_PROFILE", "gpu")
    assert get_profile().name == "gpu"
    assert get_profile("cpu").device == "cpu"
    with pytest.raises(ValueError, match="expected one of cpu, gpu"):
        get_profile("tpu")
    for profile in PROFILES.values():
        assert profile.align_preset in PRESETS
        assert {profile.preference, profile.judge} <= ORACLES.keys()
        assert profile.preference != profile.judge
