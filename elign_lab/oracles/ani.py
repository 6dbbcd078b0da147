"""ANI-2x, an ensemble of eight neural network potentials, by torchani."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elign_lab.checkpoints import weights_hash
from elign_lab.molecules import MoleculeBatch, atomic_number
from elign_lab.oracles._evaluation import HARTREE_IN_EV, OK, Evaluation, Molecule
from elign_lab.oracles._network import unreachable
from elign_lab.oracles.protocol import Oracle, precision_of

SYMBOLS = ("H", "C", "N", "O", "S", "F", "Cl")
MEMBERS = 8
STATE_DICT = "ani2x_state_dict.pt"
URL = f"https://huggingface.co/roitberg-group/ani2x/resolve/main/{STATE_DICT}"
NEUROCHEM = "https://github.com/aiqm/ani-model-zoo (folder resources/ani-2x_8x)"


class ANIOracle(Oracle):
    """ANI-2x (doi:10.1021/acs.jctc.0c00121), trained on wB97X/6-31G(d); H, C, N, O, F, S, Cl.

    Energy and forces are the ensemble mean; the uncertainty is the (unbiased) standard deviation of the total energy
    over the eight members, in eV. ANI knows neutral closed-shell molecules only: a molecule with an odd number of
    electrons gets a number all the same, unless closed_shell_only is set. Its isolated-atom energies are the self
    energies that it was fitted with (a linear fit over molecules), not energies of atoms, so formation energies have
    another zero than those of xTB or DFT (about -0.1 eV per atom). For molecules unlike its training set the
    uncertainty is large: 5 eV for H2, against 0.01 eV for ethanol. With max_uncertainty such a molecule is a failure
    with a status, and so gives no reward in an alignment.

    weights: a folder of NeuroChem files (ani-2x_8x), or a torchani state dict (.pt); None for the state dict that
        torchani keeps in its data folder, downloaded from Hugging Face when it is not there.
    device, dtype: where and in which precision the networks run; self energies are added in double precision.
    batch_size: molecules that are evaluated at once.
    max_uncertainty: in eV per atom; None for no limit.
    Other options: see Oracle. Raises ValueError when there are no weights, or they are not those of ANI-2x.
    """

    name = "ani"
    packages = {"torchani": "pip install 'torchani>=2.9,<3'"}  # noqa: RUF012
    has_uncertainty = True
    elements = frozenset(atomic_number(s) for s in SYMBOLS)

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 128,
        max_uncertainty: float | None = None,
        min_distance: float = 0.3,
        max_atoms: int | None = None,
        closed_shell_only: bool = False,
        atom_energies: Mapping[int | str, float] | None = None,
    ) -> None:
        super().__init__(
            min_distance=min_distance,
            max_atoms=max_atoms,
            closed_shell_only=closed_shell_only,
            atom_energies=atom_energies,
        )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if max_uncertainty is not None and not max_uncertainty > 0:
            raise ValueError(f"max_uncertainty must be positive (eV per atom), or None, got {max_uncertainty}")
        path = _downloaded() if weights is None else Path(weights)
        self._model, self_energies = _from_folder(path) if path.is_dir() else _from_state_dict(path)
        self._model.set_enabled("energy_shifter", False)  # type: ignore[operator]
        self._model.requires_grad_(False).to(device=device, dtype=dtype)
        self._self_energies = {atomic_number(s): e * HARTREE_IN_EV for s, e in self_energies.items()}
        if atom_energies is None:
            self.atom_energies = dict(self._self_energies)
        self.device = torch.device(device)
        self.dtype = dtype
        self.batch_size = batch_size
        self.max_uncertainty = max_uncertainty

    @classmethod
    def available(cls) -> tuple[bool, str]:
        """Whether torchani is installed; the second item also says when the weights are not here yet."""
        ready, reason = super().available()
        if ready and not _cached().is_file():
            reason = f"the weights are not here yet: they are downloaded on first use, or pass weights= ({NEUROCHEM})"
        return ready, reason

    def identity(self) -> dict[str, Any]:
        """See Oracle.identity."""
        energies = sorted(self._self_energies.items())
        about = {"weights": weights_hash(self._model), "energies": energies, "max_uncertainty": self.max_uncertainty}
        return {**about, **precision_of(self.dtype, self.device)}

    def _compute(self, molecules: list[Molecule]) -> list[Evaluation]:
        # similar sizes together, so that little of a batch is padding
        order = sorted(range(len(molecules)), key=lambda i: len(molecules[i][0]))
        answers: dict[int, Evaluation] = {}
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            answers.update(zip(chosen, self._evaluate([molecules[i] for i in chosen]), strict=True))
        return [answers[i] for i in range(len(molecules))]

    @torch.enable_grad()
    def _evaluate(self, molecules: list[Molecule]) -> list[Evaluation]:
        batch = MoleculeBatch.from_arrays(molecules).to(self.device, self.dtype)
        species = torch.where(batch.mask, batch.numbers, -1)
        positions = batch.positions.requires_grad_()
        members = self._model((species, positions), ensemble_values=True).energies
        (gradient,) = torch.autograd.grad(members.mean(0).sum(), positions)
        energies = (members.detach().double() * HARTREE_IN_EV).cpu()
        forces = (gradient.double() * -HARTREE_IN_EV).cpu().numpy()
        answers = []
        for i, (numbers, _) in enumerate(molecules):
            energy = float(energies[:, i].mean()) + sum(self._self_energies[z] for z in numbers.tolist())
            deviation = float(energies[:, i].std())
            doubt = self._doubt(deviation / len(numbers))
            answers.append(Evaluation(energy, forces[i, : len(numbers)], doubt, deviation))
        return answers

    def _doubt(self, per_atom: float) -> str:
        """ "ok", or why the members disagree too much (eV per atom)."""
        if self.max_uncertainty is None or per_atom <= self.max_uncertainty:
            return OK
        limit = f"over the limit of {self.max_uncertainty:g} (max_uncertainty)"
        return f"the members differ by {per_atom:.3f} eV per atom, {limit}"


def _architecture() -> Any:  # torchani's modules are not typed
    """ANI-2x without its weights."""
    with warnings.catch_warnings():
        # torchani announces at import that its optional CUDA extensions are not compiled
        warnings.filterwarnings("ignore", message="The extensions")
        from torchani.arch import Assembler

    assembler = Assembler()
    assembler.set_symbols(SYMBOLS)
    assembler.set_global_cutoff_fn("cosine")
    assembler.set_aev_computer(radial="ani2x", angular="ani2x")
    assembler.set_atomic_networks(ctor="ani2x")
    assembler.set_gsaes_as_self_energies("wb97x-631gd")  # a placeholder: the weights bring their own
    return assembler.assemble(MEMBERS)


def _from_state_dict(path: Path) -> tuple[torch.nn.Module, dict[str, float]]:
    """The model and its self energies (Hartree) from a torchani state dict."""
    if not path.is_file():
        raise ValueError(f"no ANI-2x weights at {path}: expected a NeuroChem folder or a state dict; see {NEUROCHEM}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        self_energies = state["energy_shifter.self_energies"].double().tolist()
        model = _architecture()
        model.load_state_dict(state)
    except (RuntimeError, KeyError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a state dict of ANI-2x: {str(error).splitlines()[0]}") from error
    return model, dict(zip(SYMBOLS, self_energies, strict=True))


def _from_folder(folder: Path) -> tuple[torch.nn.Module, dict[str, float]]:
    """The model and its self energies (Hartree) from NeuroChem files: train<k>/networks/ANN-<symbol>.nnf-l<n>.*param.

    Only the arrays of numbers are read. The architecture is ANI-2x's by definition; torchani's own reader would take
    it from the .nnf files, which it evaluates as Python.
    """
    model = _architecture()
    members = model.potentials["nnp"].neural_networks.members
    for k, member in enumerate(members):
        for element in SYMBOLS:
            network = member.atomics[element]
            prefix = folder / f"train{k}" / "networks" / f"ANN-{element}.nnf-l"
            for n, layer in enumerate([*network.layers, network.final_layer], start=1):
                _read_floats(Path(f"{prefix}{n}.wparam"), layer.weight)
                _read_floats(Path(f"{prefix}{n}.bparam"), layer.bias)
    return model, _read_self_energies(folder / "sae_linfit.dat")


def _read_floats(path: Path, parameter: Tensor) -> None:
    if not path.is_file():
        raise ValueError(f"incomplete ANI-2x folder, no {path}; the whole folder is at {NEUROCHEM}")
    values = np.fromfile(path, dtype="<f4")
    if values.size != parameter.numel():
        raise ValueError(f"{path} has {values.size} numbers, ANI-2x has {parameter.numel()} there: a damaged file?")
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(values).view_as(parameter))


def _read_self_energies(path: Path) -> dict[str, float]:
    if not path.is_file():
        raise ValueError(f"incomplete ANI-2x folder, no {path}; the whole folder is at {NEUROCHEM}")
    lines = [line.split("=") for line in path.read_text().splitlines() if "=" in line]
    energies = {left.split(",")[0].strip(): float(right) for left, right in lines}
    if set(energies) != set(SYMBOLS):
        raise ValueError(f"{path} has self energies of {', '.join(energies)}, expected {', '.join(SYMBOLS)}")
    return energies


def _cached() -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The extensions")
        from torchani.paths import data_dir

    return data_dir() / "StateDicts" / STATE_DICT


def _downloaded() -> Path:
    """torchani's copy of the state dict, downloaded when it is not there."""
    path = _cached()
    if path.is_file():
        return path
    problem = unreachable(URL)  # a download has no time limit of its own
    if not problem:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(path), progress=False)
            return path
        except OSError as error:
            problem = str(error)
    raise ValueError(
        f"no ANI-2x weights: {path} is not there and {URL} cannot be downloaded ({problem}). Run this once with a "
        f"network, or pass weights= the NeuroChem folder of {NEUROCHEM} or a state dict file"
    )
