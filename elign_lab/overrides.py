"""Change fields of a configuration dataclass from text such as 'learning_rate=1e-4' or 'model.features=32'."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

Config = TypeVar("Config")


def override(config: Config, assignments: Iterable[str]) -> Config:
    """A copy of a frozen dataclass with 'field=value' assignments applied in order; 'a.b=value' reaches inside.

    Values are Python literals (None, True, 1e-4, (1, 2)); what is not a literal is text. Raises ValueError for an
    unknown field and for a value of the wrong type, with the fields and the type that are expected.
    """
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise ValueError(f"{assignment!r} is not an assignment: expected field=value")
        config = _assigned(config, path.strip().split("."), text.strip(), assignment)
    return config


def _assigned(config: Any, path: list[str], text: str, assignment: str) -> Any:
    name, *rest = path
    hints = get_type_hints(type(config))
    names = [f.name for f in fields(config)]
    if name not in names:
        raise ValueError(f"{assignment!r}: {type(config).__name__} has no field {name!r}; it has {', '.join(names)}")
    if rest:
        inner = getattr(config, name)
        if not is_dataclass(inner):
            raise ValueError(f"{assignment!r}: {name!r} is a single value and has no field {'.'.join(rest)!r}")
        return replace(config, **{name: _assigned(inner, rest, text, assignment)})
    return replace(config, **{name: _parsed(text, hints[name], assignment)})


def _parsed(text: str, kind: Any, assignment: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    allowed = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    plain = tuple(get_origin(a) or a for a in allowed)
    if str in plain and not isinstance(value, plain):
        value = text  # a folder may be called 2024
    if float in plain and isinstance(value, int) and not isinstance(value, bool) and int not in plain:
        value = float(value)
    # a bool is an int in Python, but 'steps=True' is a mistake
    if not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain):
        names = " or ".join("None" if a is type(None) else a.__name__ for a in plain)
        raise ValueError(f"{assignment!r}: expected {names}, got {type(value).__name__}")
    return value
