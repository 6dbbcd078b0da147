"""Widgets of the notebooks: the live molecule viewer, the controls of long loops, and the panels."""

from __future__ import annotations

import base64
import importlib
import inspect
import urllib.request
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from elign_lab.molecules import MoleculeBatch
from elign_lab.widgets.live import Live
from elign_lab.widgets.viewer import HasFrames, MoleculeViewer, TrajectoryLike, compare, read_molecules

if TYPE_CHECKING:
    from IPython.display import HTML

    from elign_lab.widgets.panels import (
        AlignmentDashboard,
        DFTCheck,
        MoleculeEditor,
        OracleComparison,
        RewardInspector,
        SamplingPanel,
    )

_PANELS = (
    "AlignmentDashboard",
    "DFTCheck",
    "MoleculeEditor",
    "OracleComparison",
    "RewardInspector",
    "SamplingPanel",
)
__all__ = [
    "AlignmentDashboard",
    "DFTCheck",
    "Live",
    "MoleculeEditor",
    "MoleculeViewer",
    "OracleComparison",
    "RewardInspector",
    "SamplingPanel",
    "compare",
    "show",
]

_GRID_LIMIT = 12  # a larger batch gets a slider
_SCRIPT_TIMEOUT = 3.0  # seconds


def show(
    x: TrajectoryLike | tuple[Any, ...] | Mapping[str, Any], *, style: str | None = None, **options: Any
) -> MoleculeViewer | HTML:
    """Show a molecule, a batch, a trajectory or a comparison.

    x: a MoleculeBatch (one molecule: a view; up to 12: a grid; more: a slider over the molecules), a list of batches
        or an object with `frames()` (a trajectory), a tuple of these or a mapping from title to these (side by side).
        In the place of a batch: a SMILES string, an RDKit molecule with a conformer, ASE's Atoms. A list of Mol or
        Atoms is a trajectory where all have the same atoms, otherwise, and for a list of SMILES, a batch.
    style: None for the live viewer; "py3dmol" for py3Dmol's publication style (the last frame of a trajectory).
        py3Dmol loads a script: from its own address, or from the option `js`. Where it cannot be loaded a warning says
        so and the live viewer is returned.
    options: as for MoleculeViewer.

    Raises ValueError for an unknown style and for input that cannot be drawn.
    """
    if style not in (None, "py3dmol"):
        raise ValueError(f"style is {style!r}, expected None or 'py3dmol'")
    return _show_py3dmol(x, **options) if style == "py3dmol" else _viewer(x, **options)


def _viewer(x: Any, **options: Any) -> MoleculeViewer:
    if isinstance(x, tuple):
        x = {f"{k + 1}": part for k, part in enumerate(x)}
    x = read_molecules(x)
    if isinstance(x, MoleculeBatch) and 1 < len(x) <= _GRID_LIMIT and not _per_frame(options):
        panels = {f"{i}: {x.formula(i)}": x[i] for i in range(len(x))}
        return MoleculeViewer(panels, **{"shared_orientation": False, "height": 220, **options})
    if isinstance(x, MoleculeBatch) and not options.get("labels"):
        options = {**options, "labels": [x.formula(i) for i in range(len(x))]}
    if not isinstance(x, MoleculeBatch | Mapping | Sequence | HasFrames):
        raise ValueError(
            f"cannot show a {type(x).__name__}: expected a MoleculeBatch, a SMILES string, an RDKit molecule, ASE's "
            "Atoms, a list of them, an object with frames(), or a tuple or mapping of these"
        )
    return MoleculeViewer(x, **options)


def _per_frame(options: Mapping[str, Any]) -> bool:
    """Whether there are options that belong to the frames of one trajectory: then the batch is one."""
    return any(options.get(name) is not None for name in ("labels", "forces", "type_weights"))


def _show_py3dmol(x: Any, *, js: str | None = None, height: int = 380, **options: Any) -> MoleculeViewer | HTML:
    import py3Dmol
    from IPython.display import HTML

    viewer = _viewer(x, height=height, **options)
    address = js or inspect.signature(py3Dmol.view).parameters["js"].default
    reason = _unreachable(address)
    if reason:
        warnings.warn(f"py3Dmol's script cannot be loaded ({reason}): the live viewer is shown", stacklevel=3)
        return viewer
    viewer.frame = max(0, viewer.n_frames - 1)
    picture = base64.b64encode(viewer.to_png()).decode()
    molecules, columns = viewer.molecules(), viewer.n_columns
    viewer.close()
    grid = (-(-len(molecules) // columns), columns) if len(molecules) > 1 else None
    view = py3Dmol.view(width="100%", height=height, viewergrid=grid, js=address)
    # The browser may be cut off where the kernel is not: then it shows the picture behind the view, not a blank box.
    view.startjs += 'document.getElementById("3dmolviewer_UNIQUEID").parentNode.style.background = "none";\n'
    for k, molecule in enumerate(molecules):
        cell = {"viewer": divmod(k, columns)} if grid else {}
        view.addModel(molecule.to_xyz(), "xyz", **cell)
        view.setStyle({"stick": {"radius": 0.14}, "sphere": {"scale": 0.26}}, **cell)
        view.zoomTo(**cell)
    box = f"height:{height}px;background:url(data:image/png;base64,{picture}) center/contain no-repeat"
    return HTML(f'<div style="{box}">{view.write_html()}</div>')


def _unreachable(address: str) -> str:
    """Why a script cannot be loaded from an http(s) address, or "" when it can (or when only a browser can say)."""
    if not address.startswith(("http://", "https://")):
        return ""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_SCRIPT_TIMEOUT):
            return ""
    except OSError as error:
        return f"{address}: {error}"


def __getattr__(name: str) -> Any:
    # lazy: the panels need the trainer and plotly, a viewer does not
    if name in _PANELS:
        return getattr(importlib.import_module("elign_lab.widgets.panels"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
