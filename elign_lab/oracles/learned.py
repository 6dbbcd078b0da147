"""The learned oracle: a small equivariant force field whose forces are the exact gradient of its energy.

    E = sum_i (E_atom(z_i) + shift(z_i)) + scale * sum_i network_i(z, x) + sum_{i<j} repulsion(z_i, z_j, r_ij)

E_atom are isolated-atom energies of the labelling oracle, the shifts a least-squares fit over composition, the network
is PaiNN (elign_lab.painn). The repulsion is fixed and not learned: below 1.3 covalent distances it grows to the nuclear
repulsion of Ziegler, Biersack and Littmark, and below 0.65 Angstrom the network fades out and leaves the pair to it; so
a clash is not attractive, whatever the network has learned. `elign_lab.oracles.fit` trains it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import covalent_radii
from torch import Tensor, nn
from torch.nn.functional import silu

from elign_lab.checkpoints import ASSETS, read_weights, verify_asset, weights_hash, write_weights
from elign_lab.molecules import MoleculeBatch, symbol
from elign_lab.oracles._evaluation import Evaluation, Molecule
from elign_lab.oracles.protocol import Oracle, precision_of
from elign_lab.painn import PaiNN, PaiNNConfig, smooth_step

BUNDLED = "oracle-mini"
FORMAT = "elign_lab.energy/1"
COULOMB = 14.399645  # e^2 / (4 pi epsilon_0) in eV Angstrom, CODATA 2022
# universal screening function of Ziegler, Biersack and Littmark (The Stopping and Range of Ions in Solids, 1985)
_ZBL_WEIGHTS = (0.18175, 0.50986, 0.28022, 0.02817)
_ZBL_RATES = (3.19980, 0.94229, 0.40290, 0.20162)
_ZBL_LENGTH, _ZBL_POWER = 0.46850, 0.23  # Angstrom


@dataclass(frozen=True)
class EnergyConfig:
    """What defines an energy model. Energies in eV, one per element.

    atom_energies: isolated atoms by the labelling oracle; shifts: what a least-squares fit over composition adds to
    them; scale: unit of the network's output; contact: distance at which the repulsion ends, in sums of covalent radii.
    """

    elements: tuple[int, ...] = (1, 6, 7, 8, 9)
    atom_energies: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 0.0)
    shifts: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 0.0)
    scale: float = 1.0
    contact: float = 1.3
    network: PaiNNConfig = field(default_factory=PaiNNConfig)

    def __post_init__(self) -> None:
        if not len(self.elements) == len(self.atom_energies) == len(self.shifts):
            raise ValueError(
                f"{len(self.elements)} elements, {len(self.atom_energies)} atom energies, {len(self.shifts)} shifts: "
                "expected one of each per element"
            )


class EnergyModel(nn.Module):
    """Energy of molecules from (soft) element types and positions; differentiable in both."""

    elements: Tensor
    radii: Tensor

    def __init__(self, config: EnergyConfig) -> None:
        super().__init__()
        self.config = config
        f = config.network.features
        self.embedding = nn.Parameter(torch.randn(len(config.elements), f))
        self.network = PaiNN(config.network)
        self.readout_hidden = nn.Linear(f, f)
        self.readout = nn.Linear(f, 1)
        elements = torch.tensor(config.elements)
        self.register_buffer("elements", elements, persistent=False)
        self.register_buffer("radii", torch.tensor(covalent_radii[list(config.elements)]).float(), persistent=False)

    def type_weights(self, numbers: Tensor) -> Tensor:
        """Atomic numbers (B, N) -> one-hot types (B, N, elements) in the dtype of the weights; padding is zero."""
        return numbers.unsqueeze(-1).eq(self.elements).to(self.embedding.dtype)

    def forward(self, type_weights: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """type_weights (B, N, elements), positions (B, N, 3) in Angstrom, mask (B, N) -> energy (B,) in eV, float64.

        The energy above the offsets is computed in the dtype of the weights.
        """
        type_weights, positions = type_weights.to(self.embedding.dtype), positions.to(self.embedding.dtype)
        return self.interaction(type_weights, positions, mask).double() + self.reference(type_weights, mask)

    def reference(self, type_weights: Tensor, mask: Tensor) -> Tensor:
        """Sum of the atoms' offsets, (B,) in eV, float64."""
        # not a buffer: .to(dtype) would round the total energies
        offsets = np.add(self.config.atom_energies, self.config.shifts)
        return torch.where(mask, type_weights.double() @ torch.as_tensor(offsets).to(mask.device), 0.0).sum(-1)

    def interaction(self, type_weights: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Energy above the atoms' offsets, (B,) in eV, in the dtype of the weights."""
        s, _ = self.network(type_weights @ self.embedding, positions, mask)
        atoms = self.readout(silu(self.readout_hidden(s))).squeeze(-1)
        charges = type_weights @ self.elements.to(type_weights.dtype)
        radii = self.config.contact * (type_weights @ self.radii.to(type_weights.dtype))
        repulsion = nuclear_repulsion(charges, radii, positions, mask)
        return self.config.scale * torch.where(mask, atoms, 0.0).sum(-1) + repulsion


def nuclear_repulsion(charges: Tensor, radii: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """ZBL repulsion of all pairs, switched off smoothly at the sum of the radii.

    charges (B, N), radii (B, N) in Angstrom, positions (B, N, 3) in Angstrom, mask (B, N) -> (B,) in eV. Finite at zero
    distance.
    """
    n = mask.shape[1]
    i, j = torch.triu_indices(n, n, 1, device=mask.device)
    distance = ((positions[:, i] - positions[:, j]).square().sum(-1) + 1e-8).sqrt()
    power = charges.clamp(min=1e-6).pow(_ZBL_POWER)
    x = distance * (power[:, i] + power[:, j]) / _ZBL_LENGTH
    screening = sum(w * torch.exp(-rate * x) for w, rate in zip(_ZBL_WEIGHTS, _ZBL_RATES, strict=True))
    contact = (radii[:, i] + radii[:, j]).clamp(min=1e-3)
    pair = COULOMB * charges[:, i] * charges[:, j] / distance * screening * smooth_step(distance / contact)
    return torch.where(mask[:, i] & mask[:, j], pair, 0.0).sum(-1)


# ---------------------------------------------------------------------- files
def save_energy_model(model: EnergyModel, path: str | Path) -> Path:
    """Write weights (float32) and configuration to one safetensors file, atomically."""
    state = {k: v.detach().float().cpu().contiguous() for k, v in model.state_dict().items()}
    return write_weights(path, state, {"format": FORMAT, "config": json.dumps(asdict(model.config))})


def load_energy_model(name: str | Path = BUNDLED) -> EnergyModel:
    """Load an energy model: the name of a bundled one, or a .safetensors file; in eval mode, float32.

    A bundled file is checked against the sha256 in its passport. Raises FileNotFoundError for an unknown name,
    ValueError for a damaged or foreign file.
    """
    path = Path(name)
    if not path.is_file():
        path = ASSETS / f"{name}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"no energy model {str(name)!r}: neither a file nor bundled (bundled: {BUNDLED})")
        verify_asset(path)
    state, metadata = read_weights(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not an energy model: format {metadata.get('format')!r}, expected {FORMAT!r}")
    config = json.loads(metadata["config"])
    config["network"] = PaiNNConfig(**config["network"])
    lists = {key: tuple(config[key]) for key in ("elements", "atom_energies", "shifts")}
    model = EnergyModel(EnergyConfig(**{**config, **lists}))
    model.load_state_dict(state)
    return model.eval()


# ---------------------------------------------------------------------- the oracle
class LearnedOracle(Oracle):
    """The bundled force field (H, C, N, O, F; GFN2-xTB level), or one that `fit_oracle` made.

    model: name of a bundled model, a .safetensors file, or an EnergyModel.
    device, dtype: where and how the network is evaluated; torch.float64 for derivatives and tight tests.
    batch_size: molecules evaluated at a time; molecules of near-equal size go together.
    Other options: see Oracle; the isolated-atom energies are those of the labelling oracle.
    """

    name = "learned"

    def __init__(
        self,
        model: str | Path | EnergyModel = BUNDLED,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 64,
        min_distance: float = 0.3,
        max_atoms: int | None = None,
        closed_shell_only: bool = False,
        atom_energies: Mapping[int | str, float] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        loaded = EnergyModel(model.config) if isinstance(model, EnergyModel) else load_energy_model(model)
        if isinstance(model, EnergyModel):
            loaded.load_state_dict(model.state_dict())  # a copy: freezing it must not freeze the caller's
        self.model = loaded.to(device, dtype).eval().requires_grad_(False)
        config = self.model.config
        super().__init__(
            min_distance=min_distance,
            max_atoms=max_atoms,
            closed_shell_only=closed_shell_only,
            atom_energies=atom_energies or dict(zip(config.elements, config.atom_energies, strict=True)),
        )
        self.elements = frozenset(config.elements)
        self.device, self.dtype, self.batch_size = torch.device(device), dtype, batch_size

    def energy(self, numbers: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Energy (B,) in eV, float64, differentiable in the positions.

        numbers (B, N), positions (B, N, 3) in Angstrom, mask (B, N). Raises ValueError for an element without
        parameters; there is no other check, and no status.
        """
        weights = self.model.type_weights(numbers)
        unknown = mask & (weights.sum(-1) == 0)
        if bool(unknown.any()):
            i, a = (int(k) for k in unknown.nonzero()[0])
            known = ", ".join(symbol(z) for z in self.model.config.elements)
            raise ValueError(f"molecule {i}, atom {a} has number {int(numbers[i, a])}, outside the elements {known}")
        return self.model(weights, positions, mask)

    def energy_soft(self, type_weights: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Energy (B,) in eV, float64, of atoms that are mixtures of elements; differentiable in both arguments.

        type_weights (B, N, elements), in the order of `model.config.elements`; one-hot weights give `energy`. Minus its
        gradient in the weights is the alchemical force of theorem 5.
        """
        want = (*mask.shape, len(self.model.config.elements))
        if tuple(type_weights.shape) != want:
            raise ValueError(f"type_weights has shape {tuple(type_weights.shape)}, expected {want}")
        return self.model(type_weights, positions, mask)

    def identity(self) -> dict[str, Any]:
        """See Oracle.identity."""
        precision = precision_of(self.dtype, self.device)
        return {"weights": weights_hash(self.model), "config": repr(self.model.config), **precision}

    def _compute(self, molecules: list[Molecule]) -> list[Evaluation]:
        order = np.argsort([len(numbers) for numbers, _ in molecules], kind="stable")
        answers: dict[int, Evaluation] = {}
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size].tolist()
            batch = MoleculeBatch.from_arrays([molecules[i] for i in chosen], check=False)
            energy, forces = self._energy_and_forces(batch.to(self.device, self.dtype))
            for k, i in enumerate(chosen):
                answers[i] = Evaluation(float(energy[k]), forces[k, : len(molecules[i][0])])
        return [answers[i] for i in range(len(molecules))]

    def _energy_and_forces(self, batch: MoleculeBatch) -> tuple[np.ndarray, np.ndarray]:
        with torch.enable_grad():
            positions = batch.positions.detach().requires_grad_(True)
            energy = self.energy(batch.numbers, positions, batch.mask)
            (gradient,) = torch.autograd.grad(energy.sum(), positions)
        return energy.detach().cpu().numpy(), -gradient.double().cpu().numpy()
