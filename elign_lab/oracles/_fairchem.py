"""The way to fairchem-core (2.24): finding weights, every reason why there are none, loading, and batches.

Importing fairchem.core takes five seconds and fails where its cache cannot be made, and its own download retries for
twenty seconds without a network. So everything that can be wrong is looked at here, before it is imported.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ase import Atoms
from packaging.specifiers import SpecifierSet

from elign_lab.oracles._evaluation import Molecule
from elign_lab.oracles._network import unreachable
from elign_lab.oracles.escn import BUNDLED, TASK, EscnCheckpoint, path_of

if TYPE_CHECKING:
    from fairchem.core.datasets.atomic_data import AtomicData
    from fairchem.core.units.mlip_unit import MLIPPredictUnit

SUPPORTED = ">=2.24,<2.25"
INSTALL = f"pip install 'fairchem-core{SUPPORTED}'"
REPOSITORY = "facebook/UMA"
REQUEST = f"https://huggingface.co/{REPOSITORY}"
MEANWHILE = f"until then take model={BUNDLED!r} (small, not UMA), or the 'ani' or 'learned' oracle"


class UMAUnavailableError(ValueError):
    """UMA cannot be used; `reason` is one of the keys of REASONS, and the message says what to do."""

    REASONS: Mapping[str, str] = {
        "missing": "fairchem-core is not installed",
        "version": "another version of fairchem-core is installed",
        "name": "neither a model of fairchem nor a file",
        "file": "the file is not a checkpoint with the task omol",
        "cache": "the cache folder cannot be written",
        "network": "the weights are not here, and Hugging Face cannot be reached",
        "access": "Hugging Face does not give this account the weights",
        "download": "Hugging Face answered, but not with the weights",
    }

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{self.REASONS[reason]}: {message}")
        self.reason = reason


@dataclass(frozen=True)
class Weights:
    """A model's file, and isolated-atom energies of the task omol in eV by atomic number, where there are any.

    own: the content of a file of this package; None for a checkpoint of fairchem.
    """

    path: Path
    atom_energies: Mapping[int, float] = field(default_factory=dict)
    own: EscnCheckpoint | None = None


# ---------------------------------------------------------------------- is it here?
def require_fairchem() -> None:
    """Raise UMAUnavailableError unless a supported fairchem-core is installed; it is not imported."""
    try:
        version = metadata.version("fairchem-core")
    except metadata.PackageNotFoundError:
        raise UMAUnavailableError("missing", f"run `{INSTALL}`, or use the 'ani' or 'learned' oracle") from None
    if not SpecifierSet(SUPPORTED).contains(version, prereleases=True):
        raise UMAUnavailableError("version", f"{version}, expected {SUPPORTED}: run `{INSTALL}`")


def cache_folder() -> Path:
    """Where fairchem keeps what it downloads: FAIRCHEM_CACHE_DIR, or ~/.cache/fairchem."""
    return Path(os.environ.get("FAIRCHEM_CACHE_DIR") or Path.home() / ".cache" / "fairchem")


def require_cache() -> None:
    """Raise UMAUnavailableError unless the cache folder can be made and written: fairchem cannot even be imported."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        remedy = "set FAIRCHEM_CACHE_DIR to a folder of your own before Python starts"
        raise UMAUnavailableError("cache", f"{folder} ({error.strerror or error}); {remedy}") from error


def registry() -> dict[str, dict[str, Any]]:
    """The models that the installed fairchem-core knows by name: where each is on Hugging Face."""
    package = importlib.util.find_spec("fairchem.core")  # imports the empty namespace `fairchem` only
    if package is None or not package.submodule_search_locations:
        raise UMAUnavailableError("missing", f"run `{INSTALL}`")
    folder = Path(package.submodule_search_locations[0])
    return json.loads((folder / "calculate" / "pretrained_models.json").read_text())


def find_weights(model: str | Path, *, allow_pickle: bool) -> Weights:
    """The weights of a model: the bundled one, a file, or a name that fairchem knows, downloaded when it is not here.

    Raises UMAUnavailableError for a missing or wrong fairchem-core, an unknown name, and weights that cannot be had.
    """
    require_fairchem()
    require_cache()
    path, known = Path(model), registry()
    if str(model) in known:
        return _pretrained(known[str(model)], str(model))
    if str(model) == BUNDLED or path.suffix == ".safetensors":
        own = EscnCheckpoint.load(model)
        return Weights(path_of(model), own.atom_energies, own)
    if not path.is_file():
        near = difflib.get_close_matches(str(model), known, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UMAUnavailableError("name", f"{str(model)!r}{hint}; expected a file, {BUNDLED}, or {', '.join(known)}")
    if not allow_pickle:
        raise ValueError(
            f"{path} is a pickle, which can run any code when it is loaded: if you trust its source, pass "
            "allow_pickle=True"
        )
    return Weights(path)


# ---------------------------------------------------------------------- Hugging Face
def _pretrained(entry: Mapping[str, Any], name: str) -> Weights:
    checkpoint = _file(entry, entry, name)
    references = entry.get("atom_refs")
    if references is None:
        return Weights(checkpoint)
    from omegaconf import OmegaConf

    tables = OmegaConf.to_container(OmegaConf.load(_file(entry, references, name)))
    return Weights(checkpoint, _neutral_atoms(tables.get(f"{TASK}_elem_refs", {})))


def _neutral_atoms(table: Mapping[int, Any] | Sequence[float]) -> dict[int, float]:
    """Energies by atomic number from fairchem's table: a list, or by number and charge."""
    if not isinstance(table, Mapping):
        return {z: float(e) for z, e in enumerate(table) if z > 0 and e}
    neutral = {int(z): e.get(0) if isinstance(e, Mapping) else e for z, e in table.items()}
    return {z: float(e) for z, e in neutral.items() if e is not None}


def _file(entry: Mapping[str, Any], part: Mapping[str, Any], name: str) -> Path:
    """A file of the repository, from the cache without asking anyone, or downloaded."""
    import httpx
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    inside = "/".join(p for p in (part.get("subfolder"), part["filename"]) if p)
    where = {"repo_id": entry["repo_id"], "revision": entry.get("revision"), "cache_dir": str(cache_folder())}
    cached = try_to_load_from_cache(filename=inside, **where)
    if isinstance(cached, str):
        return Path(cached)
    _require_network(name)
    try:
        return Path(hf_hub_download(filename=inside, **where))
    except OSError as error:
        raise _explained(error, inside, name) from error
    except httpx.HTTPError as error:  # the connection broke on the way
        raise UMAUnavailableError("network", f"{type(error).__name__} in {inside}: {error}; try again") from error


def _require_network(name: str) -> None:
    from huggingface_hub import constants

    # read at its import, and from the environment in case it was set after that
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UMAUnavailableError("network", f"HF_HUB_OFFLINE is set; unset it to download {name}; {MEANWHILE}")
    problem = unreachable(constants.ENDPOINT)
    if problem:
        advice = f"connect, or copy {cache_folder()} from a machine that has {name}"
        raise UMAUnavailableError("network", f"{constants.ENDPOINT}: {problem}; {advice}; {MEANWHILE}")


def _explained(error: OSError, file: str, name: str) -> UMAUnavailableError:
    """What an error of huggingface_hub means, and what to do."""
    from huggingface_hub import errors, get_token

    if isinstance(error, errors.GatedRepoError):
        account = (
            "your token has no access to it: ask for it, or wait for the answer,"
            if get_token()
            else "you are not logged in: ask for access, then `hf auth login` or set HF_TOKEN"
        )
        return UMAUnavailableError("access", f"{name} is gated, and {account} at {REQUEST}; {MEANWHILE}")
    if isinstance(error, errors.RepositoryNotFoundError):
        message = f"{REQUEST} is not there for this account: check your token with `hf auth whoami`; {MEANWHILE}"
        return UMAUnavailableError("access", message)
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return UMAUnavailableError(
            "download", f"{file} is not in {REPOSITORY}: another version has it; run `{INSTALL}`"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        cause = error.__cause__ or error
        if isinstance(cause, errors.HfHubHTTPError):
            return UMAUnavailableError("download", f"{file}: {cause}; try again later; {MEANWHILE}")
        proxy = "a proxy or a login page may answer in its place: open it in a browser"
        return UMAUnavailableError("network", f"{type(cause).__name__} for {REQUEST}; {proxy}; {MEANWHILE}")
    if isinstance(error, errors.HfHubHTTPError):
        return UMAUnavailableError("download", f"{file}: {error}")
    return UMAUnavailableError("cache", f"{file} could not be kept in {cache_folder()}: {error}")


# ---------------------------------------------------------------------- loading and asking
def load_unit(weights: Weights, device: str, dtype: torch.dtype) -> MLIPPredictUnit:
    """fairchem's predict unit, for batches of any molecules.

    Nothing is merged or compiled: that is for one composition. No stress, which molecules do not have. On CUDA
    fairchem takes its fast kernels where they know the model. Raises UMAUnavailableError for a file that is none.
    """
    with _undisturbed():
        from fairchem.core.units.mlip_unit import InferenceSettings, load_predict_unit

        settings = InferenceSettings(
            activation_checkpointing=False,
            merge_mole=False,
            compile=False,
            auto_add_default_untrained_tasks=False,
            base_precision_dtype=dtype,
        )
        references = {f"{TASK}_elem_refs": {z: {0: e} for z, e in weights.atom_energies.items()}}
        with _as_file(weights) as path:
            try:
                unit = load_predict_unit(path, settings, device=device, atom_refs=references)
            except Exception as error:  # a foreign pickle fails in any way
                text = f"{path}: {type(error).__name__}: {error}"
                raise UMAUnavailableError("file", text) from error
    if TASK not in unit.dataset_to_tasks:
        raise UMAUnavailableError("file", f"its tasks are for {', '.join(unit.dataset_to_tasks)}: take one for {TASK}")
    return unit


@contextmanager
def _as_file(weights: Weights) -> Iterator[Path]:
    """A file that fairchem reads; ours is written for the moment."""
    if weights.own is None:
        yield weights.path
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inference_checkpoint.pt"
        torch.save(weights.own.inference_checkpoint(), path)
        yield path


def predict(
    unit: MLIPPredictUnit, molecules: Sequence[Molecule], multiplicities: Sequence[int], dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Energies (M,) in eV and forces (A, 3) in eV/Angstrom of all atoms one after the other, float64."""
    with _undisturbed():
        answer = unit.predict(atomic_data(molecules, multiplicities, dtype))
    energies, forces = (answer[key].detach().double().cpu().numpy() for key in ("energy", "forces"))
    return energies, forces


def atomic_data(molecules: Sequence[Molecule], multiplicities: Sequence[int], dtype: torch.dtype) -> AtomicData:
    """fairchem's batch of neutral molecules; the network makes its own graph."""
    from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch

    # charge and spin multiplicity must be named in r_data_keys: without them fairchem takes a multiplicity of 0
    items = [
        AtomicData.from_ase(
            Atoms(numbers=z, positions=x, info={"charge": 0, "spin": int(spin)}),
            task_name=TASK,
            r_data_keys=["charge", "spin"],
            target_dtype=dtype,
        )
        for (z, x), spin in zip(molecules, multiplicities, strict=True)
    ]
    return atomicdata_list_to_batch(items)


def multiplicity(numbers: np.ndarray) -> int:
    """Spin multiplicity 2S + 1 of a neutral molecule in its lowest spin: 1 for an even number of electrons, else 2."""
    return 1 + int(numbers.sum()) % 2


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave the global random state and the root logger as they are: fairchem seeds the one and writes to the other."""
    root, silence = logging.getLogger(), logging.NullHandler()
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    root.addHandler(silence)  # without a handler the first message would install one for good
    root.addFilter(_not_from_fairchem)
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        root.removeFilter(_not_from_fairchem)
        root.removeHandler(silence)
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


def _not_from_fairchem(record: logging.LogRecord) -> bool:
    """Its messages are about presets that are not used here; errors pass."""
    return record.levelno >= logging.ERROR or "fairchem" not in Path(record.pathname).parts
