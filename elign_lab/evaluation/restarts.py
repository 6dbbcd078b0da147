"""At which times a model loses its molecules: noise real ones up to step t and denoise them again."""

from __future__ import annotations

import torch

from elign_lab.denoiser import Denoiser
from elign_lab.molecules import MoleculeBatch
from elign_lab.sampling import ancestral, decode_record


def restart(model: Denoiser, reference: MoleculeBatch, t: int, *, seed: int = 0) -> MoleculeBatch:
    """Draw z_t ~ q(z_t | reference) and run the reverse chain from there, with every step of the grid.

    Reverse steps t..0 see the states that training shows them, so that what is wrong in the result was made after t:
    steps above t cannot be blamed. t = 0 is the decoding alone. Raises ValueError for t outside 0..T.
    """
    steps = model.config.timesteps
    if not 0 <= t <= steps:
        raise ValueError(f"t is {t}, expected a step between 0 and {steps}")
    generator = torch.Generator(model.device).manual_seed(seed)
    z, mask = model.encode(reference), reference.mask.to(model.device)
    z_t = model.diffuse(z, torch.full((len(z),), t, device=z.device), model.noise(mask, generator))
    *_, last = ancestral(model, mask, grid=range(t, -1, -1), z=z_t, generator=generator)
    return decode_record(model, last).to("cpu")
