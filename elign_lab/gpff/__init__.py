"""Generative pseudo-force fields (GPFF, arXiv:2605.19050): structures of given atoms by a force field without time."""

from __future__ import annotations

from elign_lab.gpff.calibration import Calibration, calibrate
from elign_lab.gpff.compositions import parse_formula
from elign_lab.gpff.constraints import Constraints, Sphere, pocket
from elign_lab.gpff.editing import Edit, replace_group
from elign_lab.gpff.generate import SAMPLERS, generate, get_sampler, start_positions
from elign_lab.gpff.model import GPFFConfig, PseudoForceField, load_force_field, save_force_field
from elign_lab.gpff.pseudo_forces import nearest_image, perturb
from elign_lab.gpff.quality import (
    Quality,
    bundled_quality,
    denoiser_table,
    judge,
    quality_figure,
    quality_from_json,
    quality_json,
    quality_table,
    quality_text,
)
from elign_lab.gpff.record import ForceRecord
from elign_lab.gpff.relaxation import Relaxation, relax_by_denoising, relax_by_optimiser, relaxation_figure, rmsd
from elign_lab.gpff.task import SamplingTask

__all__ = [
    "SAMPLERS",
    "Calibration",
    "Constraints",
    "Edit",
    "ForceRecord",
    "GPFFConfig",
    "PseudoForceField",
    "Quality",
    "Relaxation",
    "SamplingTask",
    "Sphere",
    "bundled_quality",
    "calibrate",
    "denoiser_table",
    "generate",
    "get_sampler",
    "judge",
    "load_force_field",
    "nearest_image",
    "parse_formula",
    "perturb",
    "pocket",
    "quality_figure",
    "quality_from_json",
    "quality_json",
    "quality_table",
    "quality_text",
    "relax_by_denoising",
    "relax_by_optimiser",
    "relaxation_figure",
    "replace_group",
    "rmsd",
    "save_force_field",
    "start_positions",
]
