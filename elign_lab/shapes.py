"""Records of arrays that print their shapes: one at the end of a cell is a few lines, not pages of numbers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

WIDTH = 100
FEW = 4  # entries of a tuple or dictionary that are printed


class Shapes:
    """Mixin for data classes made with repr=False: of arrays it shows shape and type, of long sequences the length."""

    def __repr__(self) -> str:
        shown = [f"{f.name}={_in_words(getattr(self, f.name))}" for f in fields(self)]  # type: ignore[arg-type]
        line = f"{type(self).__name__}({', '.join(shown)})"
        if len(line) <= WIDTH:
            return line
        return "\n    ".join([f"{type(self).__name__}(", *(f"{entry}," for entry in shown)]) + "\n)"


def _in_words(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{tuple(value.shape)} {kind}" + (f", {int(value.sum())} true" if kind == "bool" else "")
    if isinstance(value, (tuple, list, dict)) and len(value) > FEW:
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_in_words(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(_in_words(entry) for entry in value) + ")"
    if isinstance(value, Shapes):  # a record in a record
        return repr(value).replace("\n", "\n    ")
    return f"{value:.4g}" if isinstance(value, float) else repr(value)
