"""The equivariant denoiser: noise schedule, network, diffusion."""

from elign_lab.denoiser.diffusion import Denoiser, DenoiserConfig, LossTerms
from elign_lab.denoiser.layout import Layout
from elign_lab.denoiser.schedule import NoiseSchedule, Transition

__all__ = ["Denoiser", "DenoiserConfig", "Layout", "LossTerms", "NoiseSchedule", "Transition"]
