"""A model that is to be judged, whichever kind its file holds, and the molecules that it is judged by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elign_lab.molecules import MoleculeBatch

if TYPE_CHECKING:
    from elign_lab.denoiser import Denoiser
    from elign_lab.gpff import PseudoForceField

VARIANT, EVALUATIONS = "direct, 0.3", 64  # how a pseudo-force field generates unless it is told otherwise


@dataclass(frozen=True)
class Sampling:
    """How molecules are made; None is the default of the kind of model.

    steps: reverse steps of a denoiser (all of the model's), network evaluations of a pseudo-force field (64). spacing:
    of a denoiser's fewer steps (1). variant: sampler of a pseudo-force field, a name in elign_lab.gpff.quality's
    VARIANTS.
    """

    n: int
    steps: int | None = None
    spacing: float | None = None
    variant: str | None = None
    seed: int = 0
    batch_size: int = 64


@dataclass(frozen=True)
class Candidate:
    """A denoiser or a pseudo-force field, with its name and the sha256 of its file."""

    name: str
    sha256: str
    model: Denoiser | PseudoForceField
    is_field: bool

    @property
    def kind(self) -> str:
        """Of the model, as passports name it."""
        return "pseudo-force field" if self.is_field else "denoiser"

    def settings(self, sampling: Sampling) -> dict[str, Any]:
        """The options that apply to this kind of model, with its defaults."""
        if self.is_field:
            return {"steps": sampling.steps or EVALUATIONS, "variant": sampling.variant or VARIANT}
        return {"steps": sampling.steps, "spacing": 1.0 if sampling.spacing is None else sampling.spacing}

    def made_by(self, sampling: Sampling) -> str:
        """The same in words, for a report."""
        found = self.settings(sampling)
        if self.is_field:
            return f"sampler '{found['variant']}', {found['steps']} network evaluations"
        steps, every = found["steps"], self.model.config.timesteps  # type: ignore[union-attr]
        return f"{every if steps is None else steps} of {every} reverse steps, spacing {found['spacing']:g}"


def load_candidate(name: str | Path, device: str = "cpu") -> Candidate:
    """Load a model of either kind: the name of a bundled one, a file, or a folder in the public EDM format.

    Raises FileNotFoundError for an unknown name, ValueError for a damaged or foreign file.
    """
    from elign_lab.checkpoints import load_model, model_file, model_format
    from elign_lab.gpff import load_force_field
    from elign_lab.gpff.model import FORMAT

    is_field = model_format(name) == FORMAT
    model = load_force_field(name, device=device) if is_field else load_model(name, device=device)
    digest = hashlib.sha256(model_file(name).read_bytes()).hexdigest()
    return Candidate(str(name), digest, model, is_field)


def check_sampling(candidates: Sequence[Candidate], sampling: Sampling) -> None:
    """Raise ValueError for an option that applies to none of the models, and for an unknown variant."""
    from elign_lab.gpff.quality import VARIANTS

    names = " and ".join(dict.fromkeys(c.name for c in candidates))
    if sampling.spacing is not None and all(c.is_field for c in candidates):
        raise ValueError(
            f"--spacing {sampling.spacing:g} does not apply to {names}: it spaces the reverse steps of a denoiser, and "
            "a pseudo-force field has none; leave it out, or choose a sampler with --variant"
        )
    if sampling.variant is None:
        return
    if not any(c.is_field for c in candidates):
        raise ValueError(
            f"--variant {sampling.variant!r} does not apply to {names}: it names the sampler of a pseudo-force field, "
            "and a denoiser takes ancestral steps here; leave it out"
        )
    if sampling.variant not in VARIANTS:
        raise ValueError(f"--variant {sampling.variant!r}: expected one of {', '.join(map(repr, VARIANTS))}")


def make_molecules(candidates: Sequence[Candidate], sampling: Sampling) -> list[MoleculeBatch]:
    """Molecules of each model, with the same seed; pseudo-force fields get the same atoms, drawn by the first of them.

    Raises ValueError for what cannot be, KeyboardInterrupt when it was interrupted.
    """
    check_sampling(candidates, sampling)
    fields = [c.model for c in candidates if c.is_field]
    compositions = _compositions(fields[0], sampling) if fields else []
    return [_of_field(c, sampling, compositions) if c.is_field else _of_denoiser(c, sampling) for c in candidates]


def _compositions(model: Any, sampling: Sampling) -> list[tuple[int, ...]]:
    import torch

    from elign_lab.gpff.compositions import draw_compositions

    return draw_compositions(model.config.compositions, sampling.n, torch.Generator().manual_seed(sampling.seed))


def _of_field(candidate: Candidate, sampling: Sampling, compositions: list[tuple[int, ...]]) -> MoleculeBatch:
    from elign_lab.gpff import generate
    from elign_lab.gpff.quality import VARIANTS
    from elign_lab.sampling import require_all

    settings = candidate.settings(sampling)
    sampler, options = VARIANTS[settings["variant"]]
    shared: Mapping[str, Any] = {"seed": sampling.seed, "batch_size": sampling.batch_size, "progress": True}
    model: Any = candidate.model
    made = generate(
        model, compositions=compositions, sampler=sampler, evaluations=settings["steps"], **shared, **options
    )
    return require_all(made, sampling.n)


def _of_denoiser(candidate: Candidate, sampling: Sampling) -> MoleculeBatch:
    from elign_lab.sampling import require_all, sample

    model: Any = candidate.model
    shared: Mapping[str, Any] = {"seed": sampling.seed, "batch_size": sampling.batch_size, "progress": True}
    return require_all(sample(model, sampling.n, **candidate.settings(sampling), **shared), sampling.n)
