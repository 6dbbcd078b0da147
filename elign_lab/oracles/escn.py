"""Small eSCN-MD models, the architecture of UMA (arXiv:2506.23971), in a file that runs no code when it is read.

fairchem's own checkpoints are pickles. Ours are safetensors files: weights, and the numbers that fairchem-core needs to
build the network. `EscnCheckpoint.inference_checkpoint` makes fairchem's object of them, so that they go the same way
through fairchem as UMA. scripts/train_small_escn.py trains such a model; fairchem-core is imported when it is used.

    E = sum_i reference(z_i) + scale * network(z, x, charge, spin),     forces = -dE/dx
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elign_lab.checkpoints import ASSETS, read_weights, verify_asset, write_weights

if TYPE_CHECKING:
    from fairchem.core.models.base import HydraModel
    from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint

BUNDLED = "escn-mini"
FORMAT = "elign_lab.escn/1"
TASK = "omol"
MAX_ELEMENTS = 100  # rows of fairchem's element embedding


@dataclass(frozen=True)
class EscnConfig:
    """Sizes of the network; UMA-S has 4 layers of 128 channels and 32 experts.

    lmax: highest degree of the spherical channels. basis: number of Gaussians of the distance. cutoff in Angstrom.
    experts: of the mixture of linear experts, whose weights depend on composition, charge and spin; 0 for none.
    single_atoms: whether the network may be asked about one atom; otherwise it gets the isolated-atom energy.
    """

    layers: int = 2
    lmax: int = 2
    channels: int = 16
    basis: int = 32
    cutoff: float = 5.0
    experts: int = 0
    single_atoms: bool = False

    def hydra(self) -> dict[str, Any]:
        """What fairchem (2.24) builds the network from."""
        backbone = {
            "model": "fairchem.core.models.uma.escn_moe.eSCNMDMoeBackbone",
            "num_layers": self.layers,
            "lmax": self.lmax,
            "mmax": self.lmax,
            "sphere_channels": self.channels,
            "hidden_channels": self.channels,
            "edge_channels": self.channels,
            "num_distance_basis": self.basis,
            "cutoff": self.cutoff,
            "num_experts": self.experts,
            "moe_layer_type": "pytorch",
            "moe_dropout": 0.0,
            "use_composition_embedding": self.experts > 0,
            "max_num_elements": MAX_ELEMENTS,
            "otf_graph": True,
            "max_neighbors": 300,
            # the default puts a molecule into a periodic box of 1 Angstrom
            "always_use_pbc": False,
            "distance_function": "gaussian",
            "regress_forces": True,
            "regress_stress": False,
            "direct_forces": False,
            "norm_type": "rms_norm_sh",
            "act_type": "gate",
            "ff_type": "spectral",
            "chg_spin_emb_type": "rand_emb",
            "cs_emb_grad": True,
            "dataset_emb_grad": False,
            "dataset_mapping": {TASK: TASK},
        }
        head = {
            "module": "fairchem.core.models.uma.escn_moe.DatasetSpecificSingleHeadWrapper",
            "head_cls": "fairchem.core.models.uma.escn_md.MLP_EFS_Head",
            "head_kwargs": {"wrap_property": False},
            "dataset_names": [TASK],
        }
        return {
            "_target_": "fairchem.core.models.base.HydraModel",
            # without a name fairchem takes it for UMA 1.0 and refuses it; the names of the UMAs switch on their quirks
            "model_id": "elign_lab-escn-1",
            "otf_graph": True,
            "pass_through_head_outputs": True,
            "supports_single_atoms": self.single_atoms,
            "backbone": backbone,
            "heads": {"efs": head},
        }


def build_escn(config: EscnConfig, seed: int = 0) -> HydraModel:
    """A network with random weights, in float32; needs fairchem-core."""
    from fairchem.core.models.base import HydraModel

    arguments = {key: value for key, value in config.hydra().items() if key != "_target_"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # PyTorch's initialisers take no generator
        return HydraModel(**arguments)


def path_of(name: str | Path) -> Path:
    """The file of a model: the bundled one by name, or a path."""
    return ASSETS / f"{BUNDLED}.safetensors" if str(name) == BUNDLED else Path(name)


@dataclass(frozen=True)
class EscnCheckpoint:
    """A small eSCN-MD model: sizes, weights (a state dict), and its units.

    scale: eV (and eV/Angstrom) per unit of the network's output. references: eV an element, which the network's energy
    is added to; its keys are the elements that the model knows. atom_energies: isolated atoms (eV) by the method of the
    labels.
    """

    config: EscnConfig
    state: Mapping[str, Tensor]
    scale: float
    references: Mapping[int, float]
    atom_energies: Mapping[int, float] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically."""
        about = {
            "config": asdict(self.config),
            "scale": self.scale,
            "references": {str(z): e for z, e in self.references.items()},
            "atom_energies": {str(z): e for z, e in self.atom_energies.items()},
        }
        state = {key: value.detach().cpu().contiguous() for key, value in self.state.items()}
        return write_weights(path, state, {"format": FORMAT, **{k: json.dumps(v) for k, v in about.items()}})

    @classmethod
    def load(cls, name: str | Path = BUNDLED) -> EscnCheckpoint:
        """Read the bundled model by name, or a .safetensors file.

        Raises FileNotFoundError when there is none, ValueError for a damaged or foreign file.
        """
        path = path_of(name)
        if not path.is_file():
            raise FileNotFoundError(f"no eSCN-MD model {str(name)!r}: neither a file nor the bundled {BUNDLED}")
        if str(name) == BUNDLED:
            verify_asset(path)
        state, about = read_weights(path)
        if about.get("format") != FORMAT:
            raise ValueError(f"{path} is not an eSCN-MD model: format {about.get('format')!r}, expected {FORMAT!r}")
        references, atoms = (
            {int(z): float(e) for z, e in json.loads(about[key]).items()} for key in ("references", "atom_energies")
        )
        config = EscnConfig(**json.loads(about["config"]))
        return cls(config, state, float(about["scale"]), references, atoms)

    def inference_checkpoint(self) -> MLIPInferenceCheckpoint:
        """The same model in fairchem's form; needs fairchem-core."""
        from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint

        # inference reads the averaged weights, under the names of torch's AveragedModel
        averaged = {f"module.{key}": value for key, value in self.state.items()} | {"n_averaged": torch.tensor(1)}
        return MLIPInferenceCheckpoint(
            model_config=self.config.hydra(),
            model_state_dict=dict(self.state),
            ema_state_dict=averaged,
            tasks_config=[self._task("energy", "system", 1), self._task("forces", "atom", 3)],
        )

    def _task(self, quantity: str, level: str, width: int) -> dict[str, Any]:
        normalizer = {
            "_target_": "fairchem.core.modules.normalization.normalizer.Normalizer",
            "mean": 0.0,
            "rmsd": self.scale,
        }
        table = [self.references.get(z, 0.0) for z in range(MAX_ELEMENTS + 1)]
        references = {
            "_target_": "fairchem.core.modules.normalization.element_references.ElementReferences",
            # a tensor of doubles: total energies do not fit into float32
            "element_references": {"_target_": "torch.DoubleTensor", "_args_": [table]},
        }
        return {
            "_target_": "fairchem.core.units.mlip_unit.mlip_unit.Task",
            "name": f"{TASK}_{quantity}",
            "level": level,
            "property": quantity,
            "out_spec": {"dim": [width], "dtype": "float32"},
            "normalizer": normalizer,
            "element_references": references if quantity == "energy" else None,
            "datasets": [TASK],
            "metrics": ["mae"],
        }
