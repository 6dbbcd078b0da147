"""Reading NumPy archives of this package, with one kind of error for whatever else the file may be."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def read_archive(path: str | Path, names: Iterable[str], wrong: str) -> dict[str, NDArray[Any]]:
    """The named arrays of an .npz file; nothing in it is executed.

    wrong: what to say of another file, such as "not a label file". Raises FileNotFoundError, and ValueError for a
    foreign or damaged file and for missing arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged zip raises any of a dozen types
        raise ValueError(f"{path} is {wrong}, or damaged: {error}") from None
    if missing := set(names) - arrays.keys():
        raise ValueError(f"{path} is {wrong}: it has no {', '.join(sorted(missing))}")
    return {name: arrays[name] for name in names}
