"""Oracles: energies and forces of molecules, from tight binding to density functional theory.

`load_oracle("xtb")` makes one; `oracle(batch)` evaluates a MoleculeBatch. Backends are imported when they are used.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elign_lab.oracles.cache import CachedOracle
    from elign_lab.oracles.protocol import Oracle, OracleResult, clip_forces, f_rms

__all__ = ["ORACLES", "CachedOracle", "Oracle", "OracleEntry", "OracleResult", "clip_forces", "f_rms", "load_oracle"]


@dataclass(frozen=True)
class OracleEntry:
    """One line of the registry: what an oracle is, what it needs, and where its class is."""

    name: str
    description: str
    needs: str
    module: str
    class_name: str

    def load(self) -> type[Oracle]:
        """The oracle's class. Raises ImportError when its module cannot be imported."""
        return getattr(importlib.import_module(self.module), self.class_name)

    def available(self) -> tuple[bool, str]:
        """Whether the oracle can run here; if not, the reason and the remedy."""
        try:
            return self.load().available()
        except ImportError as error:
            return False, f"{self.module} cannot be imported ({error}); {self.needs}"


def _entry(name: str, class_name: str, description: str, needs: str) -> OracleEntry:
    return OracleEntry(name, description, needs, f"elign_lab.oracles.{name}", class_name)


ORACLES: dict[str, OracleEntry] = {
    entry.name: entry
    for entry in (
        _entry("learned", "LearnedOracle", "small equivariant force field, bundled with the package", "needs nothing"),
        _entry("xtb", "XTBOracle", "GFN2-xTB tight binding by tblite", "needs `pip install tblite`"),
        _entry("dft", "DFTOracle", "density functional theory by PySCF, B3LYP/6-31G(d)", "needs `pip install pyscf`"),
        _entry(
            "ani",
            "ANIOracle",
            "ANI-2x neural network potential by torchani, wB97X/6-31G(d) level",
            "needs `pip install elign-lab[ani]` and the weights, a download or a folder",
        ),
        _entry(
            "uma",
            "UMAOracle",
            "UMA by fairchem-core, task omol, the paper's preference model; or the bundled escn-mini",
            "needs `pip install elign-lab[uma]`, and access on Hugging Face for UMA's weights",
        ),
        _entry("ase", "ASEOracle", "any ASE calculator", "needs calculator=, an ASE calculator or a factory of one"),
    )
}


def load_oracle(name: str, *, cache: str | Path | None = None, **options: Any) -> Oracle:
    """Make an oracle by name: "learned", "xtb", "dft", "ani", "uma" or "ase"; `options` go to its class.

    cache: a file that keeps its answers, see CachedOracle; worth it for oracles that take seconds (dft, uma).
    Raises ValueError for an unknown name, for an oracle that cannot run here, with the remedy, and for options that it
    does not have.
    """
    if name not in ORACLES:
        raise ValueError(f"unknown oracle {name!r}: expected one of {', '.join(ORACLES)}")
    ready, reason = ORACLES[name].available()
    if not ready:
        raise ValueError(f"the {name} oracle is not available: {reason}")
    oracle_class = ORACLES[name].load()
    _check_options(name, oracle_class, options)
    oracle = oracle_class(**options)
    if cache is None:
        return oracle
    from elign_lab.oracles.cache import CachedOracle

    return CachedOracle(oracle, cache)


def _check_options(name: str, oracle_class: type[Oracle], options: dict[str, Any]) -> None:
    signature = inspect.signature(oracle_class)
    try:
        signature.bind(**options)
    except TypeError as error:
        no_pool = options.keys() & {"workers", "executor", "timeout"} and "workers" not in signature.parameters
        where = "; it computes in the calling process, without workers or a time limit" if no_pool else ""
        expected = ", ".join(signature.parameters)
        raise ValueError(f"options of the {name} oracle: {error}; expected {expected}{where}") from None


def __getattr__(name: str) -> Any:
    # lazy: worker processes import this package and must not load torch
    if name == "CachedOracle":
        return importlib.import_module("elign_lab.oracles.cache").CachedOracle
    if name in __all__:
        return getattr(importlib.import_module("elign_lab.oracles.protocol"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
