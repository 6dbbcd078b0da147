"""The generative pseudo-force field: atom types and positions in, pseudo-forces out; no time, no noise level.

Pseudo-potential of a reference x_ref (GPFF, arXiv:2605.19050), taken at the nearest image g x_ref of the reference
under translations, rotations, inversion and permutations of identical atoms:

    E(x) = min_g |x - g x_ref|^2,        F(x) = -grad E = 2 (g* x_ref - x),        x0_hat(x) = x + F(x) / 2

One network has to answer for displacements from hundredths of an Angstrom to ten. What makes that possible without a
noise input is that the size of the structure gives large noise levels away. With s^2 = |x|^2 / (3 (N - 1)), which is
about spread^2 + sigma^2, and as in the preconditioning of Karras et al. (arXiv:2206.00364, table 1), with s in place of
the true level and W the largest spread of a real molecule,

    x0_hat(x) = c(s) x + r(x),      c(s) = W^2 / max(s, W)^2

The network learns the residual r only, which is never larger than a molecule: for a cloud of any size it is a molecule,
near a molecule it is the displacement, linear in what is wrong with the structure. (With the mean spread in place of W
the residual would have to take back c(s) x - x for every molecule over the mean.) What the network sees is x shrunk to
a spread of at most W, so that distances stay where the radial functions are; smaller structures are seen as they are.

Two variants. direct: r is a vector output, one evaluation of the network. conservative: F is the exact gradient of
E(x) = |x|^2 - 2 Int c(s) x . dx + e(x) with a scalar output e, at about three times the cost.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from elign_lab.checkpoints import ASSETS, bundled_models, read_weights, verify_asset, write_weights
from elign_lab.molecules import MoleculeBatch, zero_com
from elign_lab.painn import PaiNN, PaiNNConfig

BUNDLED = "gpff-mini"
FORMAT = "elign_lab.gpff/1"
VARIANTS = ("direct", "conservative")


def _network() -> PaiNNConfig:
    return PaiNNConfig(
        features=96,
        vectors=48,
        channels=32,
        layers=4,
        basis=16,
        shortest=0.4,
        reach=10.0,
        cutoff=False,
        normalise=True,
    )


@dataclass(frozen=True)
class GPFFConfig:
    """What defines a pseudo-force field. Lengths in Angstrom.

    spread: mean root mean square coordinate of a centred molecule (1.42 in the bundled set), sigma_d of the loss;
    widest: the largest one, W (2.16 in the bundled set); sigma_min, sigma_max: range of noise that it was
    trained on; compositions: formulas of the training set with their counts, for sampling.
    """

    elements: tuple[int, ...] = (1, 6, 7, 8, 9)
    variant: str = "direct"
    spread: float = 1.42
    widest: float = 2.2
    sigma_min: float = 0.02
    sigma_max: float = 10.0
    max_atoms: int = 40
    network: PaiNNConfig = field(default_factory=_network)
    compositions: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"unknown variant {self.variant!r}: expected one of {', '.join(VARIANTS)}")
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"expected 0 < sigma_min < sigma_max (Angstrom), got {self.sigma_min} and {self.sigma_max}"
            )
        if not 0 < self.spread < self.widest:
            raise ValueError(f"expected 0 < spread < widest (Angstrom), got {self.spread} and {self.widest}")


class PseudoForceField(nn.Module):
    """Pseudo-forces of structures from atomic numbers and positions."""

    elements: Tensor

    def __init__(self, config: GPFFConfig) -> None:
        super().__init__()
        self.config = config
        f, v = config.network.features, config.network.vectors
        self.embedding = nn.Embedding(len(config.elements), f)
        # composition (fractions), number of atoms and spread of the structure: known to every atom
        self.whole = nn.Linear(len(config.elements) + 2, f)
        self.network = PaiNN(config.network)
        self.readout_hidden = nn.Linear(f, f)
        if config.variant == "direct":
            self.gate = nn.Linear(f, v)
            self.readout = nn.Linear(v, 1, bias=False)
        else:
            self.readout = nn.Linear(f, 1)
        with torch.no_grad():
            self.readout.weight.mul_(0.1)  # the loss begins near 1, with what the spread alone says
        self.register_buffer("elements", torch.tensor(config.elements), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, in which everything is computed."""
        return self.embedding.weight.dtype

    def forward(self, numbers: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Pseudo-forces F (B, N, 3) in Angstrom (k = 2, unit energy per Angstrom^2), of zero sum, zero on padding.

        numbers (B, N), positions (B, N, 3) in Angstrom at any place, mask (B, N). The numbers must be among the
        config's elements (`check` says so). Differentiable in the weights; the conservative variant also without
        gradients enabled outside.
        """
        x = zero_com(positions.to(self.dtype), mask)
        if self.config.variant == "direct":
            return 2 * (self._scaling(x, mask)[1] * x + self._residual(numbers, x, mask))
        training = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            energy = self._energy(numbers, x, mask).sum()
            (gradient,) = torch.autograd.grad(energy, x, create_graph=training)
        return -zero_com(gradient, mask)

    def energy(self, numbers: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Pseudo-potential (B,) in Angstrom^2 up to a constant per composition; conservative variant only."""
        if self.config.variant != "conservative":
            raise ValueError("this model has no energy: its variant is 'direct', an energy needs 'conservative'")
        return self._energy(numbers, zero_com(positions.to(self.dtype), mask), mask)

    def check(self, batch: MoleculeBatch) -> MoleculeBatch:
        """The batch, if the model can evaluate it; else ValueError that names the molecule and the reason."""
        batch.validate(max_atoms=self.config.max_atoms, elements=self.config.elements)
        if bool((batch.sizes < 2).any()):
            i = int((batch.sizes < 2).nonzero()[0])
            raise ValueError(f"molecule {i} is a single atom: it has no structure to generate, expected 2 or more")
        return batch

    def _scaling(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log(s / sigma_d), c(s) - 1, and the factor that shrinks the input; each (B, 1, 1)."""
        degrees = 3 * (mask.sum(1).clamp(min=2) - 1).to(x.dtype).view(-1, 1, 1)
        square = (x.square().sum((1, 2), keepdim=True) / degrees).clamp(min=1e-6)
        excess = (square / self.config.widest**2).clamp(min=1)
        return 0.5 * (square / self.config.spread**2).log(), 1 / excess - 1, excess.rsqrt()

    def _features(self, numbers: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        log_spread, _, shrink = self._scaling(x, mask)
        one_hot = (numbers.unsqueeze(-1) == self.elements).to(x.dtype) * mask.unsqueeze(-1)
        n = mask.sum(1, keepdim=True).to(x.dtype)
        whole = torch.cat([one_hot.sum(1) / n, n / 20, log_spread.squeeze(-1)], -1)
        s = one_hot @ self.embedding.weight + self.whole(whole).unsqueeze(1)
        return self.network(s, x * shrink, mask)

    def _residual(self, numbers: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        s, v = self._features(numbers, x, mask)
        gate = self.gate(silu(self.readout_hidden(s)))
        return zero_com(self.readout(v * gate.unsqueeze(2)).squeeze(-1), mask)

    def _energy(self, numbers: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        s, _ = self._features(numbers, x, mask)
        atoms = self.readout(silu(self.readout_hidden(s))).squeeze(-1)
        degrees = 3 * (mask.sum(1).clamp(min=2) - 1).to(x.dtype)
        widest = self.config.widest**2
        excess = (x.square().sum((1, 2)) / degrees / widest).clamp(min=1)
        # gradient of the first term: 2 (1 - c(s)) x
        base = degrees * widest * (excess - 1 - excess.log())
        shrink = self._scaling(x, mask)[2].view(-1)
        return base + torch.where(mask, atoms, 0.0).sum(1) / shrink


# ---------------------------------------------------------------------- files
def save_force_field(model: PseudoForceField, path: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write weights and configuration to one safetensors file, atomically; `dtype` (torch.float16) halves its size."""
    state = {k: v.detach().cpu().to(dtype or torch.float32).contiguous() for k, v in model.state_dict().items()}
    return write_weights(path, state, {"format": FORMAT, "config": json.dumps(asdict(model.config))})


def load_force_field(name: str | Path = BUNDLED, *, device: torch.device | str = "cpu") -> PseudoForceField:
    """Load a pseudo-force field: the name of a bundled one, or a .safetensors file; float32, in eval mode.

    A bundled file is checked against the sha256 in its passport. Raises FileNotFoundError for an unknown name,
    ValueError for a damaged or foreign file.
    """
    path = Path(name)
    if not path.is_file():
        path = ASSETS / f"{name}.safetensors"
        if not path.is_file():
            bundled = ", ".join(repr(p["name"]) for p in bundled_models() if p["kind"] == "pseudo-force field")
            raise FileNotFoundError(
                f"no pseudo-force field {str(name)!r}: neither a file nor a bundled model ({bundled}); "
                "train one with: elign-lab gpff train --out DIR"
            )
        verify_asset(path)
    state, metadata = read_weights(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a pseudo-force field: format {metadata.get('format')!r}, expected {FORMAT!r}")
    config = json.loads(metadata["config"])
    config["network"] = PaiNNConfig(**config["network"])
    config["elements"] = tuple(config["elements"])
    config["compositions"] = tuple((str(formula), int(count)) for formula, count in config["compositions"])
    model = PseudoForceField(GPFFConfig(**config))
    model.load_state_dict({key: value.float() for key, value in state.items()})
    return model.to(device).eval()
