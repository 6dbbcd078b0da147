"""Profiles: what changes between a laptop and a GPU server, in one place, so that no notebook has an `if` on it.

The profile is "cpu" unless the environment variable ELIGN_LAB_PROFILE says "gpu".
"""

from __future__ import annotations

import os
from dataclasses import dataclass

VARIABLE = "ELIGN_LAB_PROFILE"


@dataclass(frozen=True)
class Profile:
    """Sizes, steps, devices and names of one way to run the notebooks."""

    name: str
    device: str
    model: str  # for load_model: a bundled name, a file or a folder in the public EDM format
    dataset: str  # for load_dataset
    preference: str  # oracle that gives the rewards
    judge: str  # oracle that judges the result, and is not the preference model
    molecules: int  # samples behind a figure
    steps: int | None  # reverse steps of a sample; None: all T
    align_preset: str  # key of alignment.PRESETS
    groups: int  # FED-GRPO groups an iteration
    iterations: int  # FED-GRPO iterations


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            name="cpu",
            device="cpu",
            model="edm-mini",
            dataset="bundled",
            preference="learned",
            judge="xtb",
            molecules=32,
            steps=100,
            align_preset="cpu_mini",
            groups=4,
            iterations=3,
        ),
        # the paper's experiment (section 4); the folder is the public EDM release; UMA's weights are gated, and
        # "ani" is the open force field that can stand for them; DFT of so many molecules would take months
        Profile(
            name="gpu",
            device="cuda",
            model="outputs/edm_qm9",
            dataset="qm9",
            preference="uma",
            judge="xtb",
            molecules=10_000,
            steps=None,
            align_preset="qm9_paper",
            groups=4,
            iterations=200,
        ),
    )
}


def get_profile(name: str | None = None) -> Profile:
    """The profile of this name, or of the environment variable ELIGN_LAB_PROFILE (default "cpu").

    Raises ValueError for an unknown name.
    """
    name = name or os.environ.get(VARIABLE) or "cpu"
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r} (argument or {VARIABLE}): expected one of {', '.join(PROFILES)}")
    return PROFILES[name]
