"""Panels of the notebooks: interactive views, each a thin wiring of functions that run without a browser."""

from __future__ import annotations

from elign_lab.widgets.panels.comparison import OracleComparison
from elign_lab.widgets.panels.dashboard import AlignmentDashboard
from elign_lab.widgets.panels.dft_check import DFTCheck
from elign_lab.widgets.panels.editor import MoleculeEditor
from elign_lab.widgets.panels.inspector import RewardInspector
from elign_lab.widgets.panels.sampling import SamplingPanel

__all__ = ["AlignmentDashboard", "DFTCheck", "MoleculeEditor", "OracleComparison", "RewardInspector", "SamplingPanel"]
