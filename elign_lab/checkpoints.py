"""Model files: safetensors in and out, passports, and the import of public EDM checkpoints.

Nothing that is loaded is executed: safetensors, torch.load(weights_only=True), and for EDM's args.pickle an unpickler
that accepts argparse.Namespace and plain values only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from elign_lab.denoiser import Denoiser, DenoiserConfig

ASSETS = Path(__file__).parent / "assets"
FORMAT = "elign_lab.denoiser/1"
DENOISERS = ("denoiser",)
GENERATORS = ("denoiser", "pseudo-force field")  # kinds of passports whose models make molecules
EDM_WEIGHTS = ("generative_model_ema.npy", "generative_model.npy")
EDM_ELEMENTS = {
    "qm9": (1, 6, 7, 8, 9),
    "geom": (1, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 33, 35, 53, 80, 83),
}

# public EDM name -> ours, applied in this order
_RENAMES = (
    (r"^dynamics\.e?gnn\.", "network."),
    (r"e_block_(\d+)\.gcl_equiv\.coord_mlp\.4\.", r"blocks.\1.coordinates.out."),
    (r"e_block_(\d+)\.gcl_equiv\.coord_mlp\.0\.", r"blocks.\1.coordinates.edge.first."),
    (r"e_block_(\d+)\.gcl_equiv\.coord_mlp\.2\.", r"blocks.\1.coordinates.edge.second."),
    (r"e_block_(\d+)\.gcl_(\d+)\.", r"blocks.\1.messages.\2."),
    (r"network\.gcl_(\d+)\.", r"network.messages.\1."),
    (r"\.edge_mlp\.0\.", ".edge.first."),
    (r"\.edge_mlp\.2\.", ".edge.second."),
    (r"\.node_mlp\.", ".node."),
    (r"\.att_mlp\.0\.", ".attention."),
)


# ---------------------------------------------------------------------- our own files
def save_model(model: Denoiser, path: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write weights and configuration to one safetensors file, atomically; `dtype` (torch.float16) halves its size."""
    state = {k: v.detach().cpu().to(dtype or v.dtype).contiguous() for k, v in model.state_dict().items()}
    return write_weights(path, state, {"format": FORMAT, "config": json.dumps(asdict(model.config))})


def write_weights(path: str | Path, state: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    """Write tensors and metadata to a safetensors file, atomically; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # replace is atomic, so that a kill leaves the old file or the new one
    temporary = path.with_name(path.name + ".tmp")
    save_file(state, temporary, metadata=metadata)
    temporary.replace(path)
    return path


def load_model(name: str | Path, *, device: torch.device | str = "cpu") -> Denoiser:
    """Load a denoiser: the name of a bundled model, a .safetensors file, or a folder in the public EDM format.

    A bundled model's file is checked against the sha256 in its passport. Weights come back as float32, in eval mode.
    Raises FileNotFoundError for an unknown name, ValueError for a damaged or foreign file.
    """
    path = Path(name)
    if path.is_dir():
        model = _load_public_edm(path)
    elif path.is_file():
        model = _load_own(path)
    else:
        path = _bundled_file(name, DENOISERS)
        verify_asset(path)
        model = _load_own(path)
    return model.to(device).eval()


def model_file(name: str | Path) -> Path:
    """The file with the weights of a model that makes molecules, of either kind: see `load_model` for the names.

    Raises FileNotFoundError for an unknown name, and for a folder without weights.
    """
    path = Path(name)
    if path.is_dir():
        return _public_edm_files(path)[0]
    return path if path.is_file() else _bundled_file(name, GENERATORS)


def model_format(name: str | Path) -> str:
    """What a model's file says that it holds, such as FORMAT; a folder in the public EDM format holds a denoiser.

    Raises FileNotFoundError for an unknown name, ValueError for a file that is not a readable safetensors file.
    """
    path = model_file(name)
    if Path(name).is_dir():
        return FORMAT
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format", "unknown")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _bundled_file(name: str | Path, kinds: Collection[str]) -> Path:
    path = ASSETS / f"{name}.safetensors"
    if not path.is_file():
        known = ", ".join(p["name"] for p in bundled_models() if p["kind"] in kinds) or "none"
        raise FileNotFoundError(f"no model {str(name)!r}: neither a path nor a bundled model (bundled: {known})")
    return path


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises ValueError for a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _load_own(path: Path) -> Denoiser:
    state, metadata = read_weights(path)
    if metadata.get("format") != FORMAT:
        hint = "; `elign-lab gpff sample` and load_force_field read it" if "gpff" in metadata.get("format", "") else ""
        found = f"format {metadata.get('format')!r}, not {FORMAT!r}{hint}"
        raise ValueError(f"{path} is not a denoiser of this package: {found}")
    try:
        config = json.loads(metadata["config"])
        config["elements"], config["scale"] = tuple(config["elements"]), tuple(config["scale"])
        config["size_histogram"] = tuple((int(n), int(c)) for n, c in config["size_histogram"])
        model = Denoiser(DenoiserConfig(**config))
        model.load_state_dict({key: value.float() for key, value in state.items()})
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or made by another version: {error}") from error
    return model


# ---------------------------------------------------------------------- passports
def sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hash(module: torch.nn.Module) -> str:
    """Hexadecimal sha256 of the names and values of all weights and buffers."""
    total = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def read_passport(path: str | Path) -> dict[str, Any]:
    """The JSON beside an asset: what it is, what made it, its figures, its sha256."""
    passport = Path(path).with_suffix(".json")
    if not passport.is_file():
        raise FileNotFoundError(f"{path} has no passport {passport.name}: an asset without one is not loaded")
    return json.loads(passport.read_text())


def write_passport(path: str | Path, **fields: Any) -> Path:
    """Write the passport of an asset; sha256 and size are computed here."""
    path = Path(path)
    passport = path.with_suffix(".json")
    content = {"name": path.stem, "file": path.name, "sha256": sha256(path), "bytes": path.stat().st_size, **fields}
    passport.write_text(json.dumps(content, indent=2) + "\n")
    return passport


def verify_asset(path: str | Path) -> dict[str, Any]:
    """Check a file against its passport's sha256; returns the passport, raises ValueError on a mismatch."""
    passport = read_passport(path)
    found = sha256(path)
    if found != passport["sha256"]:
        raise ValueError(
            f"{path} does not match its passport: sha256 {found[:12]}... instead of {passport['sha256'][:12]}...; "
            "restore the file, for example with git checkout"
        )
    return passport


def bundled_models() -> list[dict[str, Any]]:
    """Passports of the bundled models, by name."""
    return [read_passport(path) for path in sorted(ASSETS.glob("*.safetensors"))]


def bundled_assets() -> list[dict[str, Any]]:
    """Passports of all bundled files, by name: the models, the data, and the figures that oracles gave."""
    return [json.loads(path.read_text()) for path in sorted(ASSETS.glob("*.json"))]


# ---------------------------------------------------------------------- public EDM checkpoints
class _NamespaceUnpickler(pickle.Unpickler):
    """Accepts argparse.Namespace and built-in values; anything else could run code and is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("argparse", "Namespace"):
            return argparse.Namespace
        raise pickle.UnpicklingError(
            f"refused to load {module}.{name}: only argparse.Namespace and plain values are read"
        )


def read_edm_args(path: str | Path) -> dict[str, Any]:
    """Settings of a public EDM checkpoint from its args.pickle, without executing anything in it."""
    try:
        with Path(path).open("rb") as file:
            value = _NamespaceUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not an EDM args.pickle: {error}") from error
    if not isinstance(value, argparse.Namespace):
        raise ValueError(f"{path} holds {type(value).__name__}, expected argparse.Namespace")
    return vars(value)


def edm_config(args: Mapping[str, Any]) -> DenoiserConfig:
    """Our configuration for the settings of a public EDM run."""
    from elign_lab.datasets import qm9_size_histogram

    dataset = str(args["dataset"])
    family = "geom" if dataset.startswith("geom") else "qm9" if dataset.startswith("qm9") else None
    if family is None or args.get("remove_h"):
        raise ValueError(
            f"EDM data set {dataset!r} (remove_h={args.get('remove_h')}) is not supported: qm9 or geom with H"
        )
    if args.get("probabilistic_model", "diffusion") != "diffusion":
        raise ValueError(f"probabilistic_model is {args['probabilistic_model']!r}, only 'diffusion' is supported")
    if args["diffusion_noise_schedule"] == "learned":
        raise ValueError("the learned noise schedule of EDM is not supported: use a checkpoint with polynomial_2")
    return DenoiserConfig(
        elements=EDM_ELEMENTS[family],
        include_charges=bool(args["include_charges"]),
        features=args["nf"],
        layers=args["n_layers"],
        sublayers=args["inv_sublayers"],
        attention=args["attention"],
        tanh=args["tanh"],
        norm_constant=args["norm_constant"],
        sin_embedding=args["sin_embedding"],
        # both are absent in the released files, whose evaluation scripts fill in these values
        normalization_factor=args.get("normalization_factor", 1),
        aggregation=args.get("aggregation_method", "sum"),
        network=args["model"].removesuffix("_dynamics"),
        condition_time=args["condition_time"],
        context=args.get("context_node_nf", 0),
        timesteps=args["diffusion_steps"],
        schedule=args["diffusion_noise_schedule"],
        precision=args["diffusion_noise_precision"],
        scale=tuple(args["normalize_factors"]),
        size_histogram=tuple(sorted(qm9_size_histogram().items())) if family == "qm9" else (),
    )


def from_edm_state(state: Mapping[str, Tensor], config: DenoiserConfig) -> Denoiser:
    """Denoiser from a state dict with the public EDM names ('dynamics.egnn...', 'gamma.gamma')."""
    renamed = {}
    for key, value in state.items():
        if key.startswith("dynamics."):
            for pattern, replacement in _RENAMES:
                key = re.sub(pattern, replacement, key)
            renamed[key] = value.float()
    model = Denoiser(config, gamma=state.get("gamma.gamma"))
    try:
        model.load_state_dict(renamed)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit its settings: {error}") from error
    return model


def _public_edm_files(folder: Path) -> tuple[Path, Path]:
    """Weights and settings of a folder in the public EDM format."""
    weights = next((folder / name for name in EDM_WEIGHTS if (folder / name).is_file()), None)
    args = folder / "args.pickle"
    if weights is None or not args.is_file():
        raise FileNotFoundError(f"{folder} is not in the public EDM format: expected {EDM_WEIGHTS[0]} and args.pickle")
    return weights, args


def _load_public_edm(folder: Path) -> Denoiser:
    weights, args = _public_edm_files(folder)
    try:
        config = edm_config(read_edm_args(args))
    except KeyError as error:
        raise ValueError(f"{args} has no setting {error}: it is not of a public EDM run") from error
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{weights} is not a readable PyTorch state dict: {error}") from error
    # files saved from DataParallel carry this prefix
    state = {key.removeprefix("module."): value for key, value in state.items()}
    return from_edm_state(state, config)
