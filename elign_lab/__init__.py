"""Align molecular diffusion models to physics: Elign with FED-GRPO, and generative pseudo-force fields.

from elign_lab import load_model, load_oracle, sample, align, evaluate, show
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elign_lab.alignment import align
    from elign_lab.checkpoints import load_model
    from elign_lab.datasets import load_dataset
    from elign_lab.evaluation import evaluate
    from elign_lab.molecules import MoleculeBatch
    from elign_lab.oracles import load_oracle
    from elign_lab.sampling import sample
    from elign_lab.widgets import show

__all__ = ["MoleculeBatch", "align", "evaluate", "load_dataset", "load_model", "load_oracle", "sample", "show"]
__version__ = metadata.version("elign-lab")

_MODULE_OF = {
    "MoleculeBatch": "molecules",
    "align": "alignment",
    "evaluate": "evaluation",
    "load_dataset": "datasets",
    "load_model": "checkpoints",
    "load_oracle": "oracles",
    "sample": "sampling",
    "show": "widgets",
}


def __getattr__(name: str) -> Any:
    # lazy: worker processes of an oracle and `elign-lab --help` import this package and must not load torch
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
