"""What generated molecules are worth: stability, validity, physics, and reports with error bars."""

from elign_lab.evaluation.html_report import write_html
from elign_lab.evaluation.intervals import Interval
from elign_lab.evaluation.physics import Physics, physics
from elign_lab.evaluation.report import (
    Comparison,
    Evaluation,
    GroupTest,
    MoleculeResults,
    compare,
    evaluate,
    group_test,
)
from elign_lab.evaluation.stability import StabilityResult, bond_orders, stability
from elign_lab.evaluation.validity import novelty, rdkit_mols, smiles, uniqueness, valid_and_unique, validity

# `stability`, `validity` and `physics` are the functions here, not the modules of the same name. It stays so: Python
# binds a module to its package when it is first loaded, which is before the imports above bind the functions.
__all__ = [
    "Comparison",
    "Evaluation",
    "GroupTest",
    "Interval",
    "MoleculeResults",
    "Physics",
    "StabilityResult",
    "bond_orders",
    "compare",
    "evaluate",
    "group_test",
    "novelty",
    "physics",
    "rdkit_mols",
    "smiles",
    "stability",
    "uniqueness",
    "valid_and_unique",
    "validity",
    "write_html",
]
