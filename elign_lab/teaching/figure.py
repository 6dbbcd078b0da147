"""The plotly figure of the notebooks: one style, titled axes with units, and alternative text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from IPython.display import display

COLORS = {"base": "#8a93a3", "tilt": "#d1495b", "aligned": "#2e86ab", "energy": "#3c3c3c", "other": "#e0a030"}
"""One colour for each thing that the notebooks and panels show."""

_COLORWAY = [COLORS[name] for name in ("aligned", "tilt", "other", "energy", "base")]


class Figure(go.Figure):
    """An empty figure to add traces to: `Figure(x="t", y="energy (eV)", alt="...").add_scatter(...)`.

    x, y: titles of the axes, with the unit where there is one. alt: what a reader who does not see the figure has to
    know; pages that cannot draw it (GitHub, a terminal) show this text, and it travels with the figure as
    `layout.meta["alt"]`. height in pixels. Raises ValueError for an empty title or text.
    """

    def __init__(self, *, x: str, y: str, alt: str, title: str = "", height: int = 340) -> None:
        for name, text in (("x", x), ("y", y), ("alt", alt)):
            if not text.strip():
                raise ValueError(f"{name} is empty: a figure needs axis titles, with units, and alternative text")
        super().__init__()
        self.update_layout(
            title=title,
            xaxis_title=x,
            yaxis_title=y,
            height=height,
            template="plotly_white",
            colorway=_COLORWAY,
            margin={"l": 60, "r": 20, "t": 60 if title else 40, "b": 50},
            legend={"orientation": "h", "y": 1.12},
            meta={"alt": alt},
        )

    def add_estimates(
        self, x: Sequence[float], y: Sequence[float], low: Sequence[float], high: Sequence[float], **options: Any
    ) -> Figure:
        """Add a line of estimates with thin bars from low to high; options are those of add_scatter."""
        bars = {
            "array": [top - middle for top, middle in zip(high, y, strict=True)],
            "arrayminus": [middle - bottom for middle, bottom in zip(y, low, strict=True)],
            "thickness": 0.8,
            "width": 0,
        }
        return self.add_scatter(x=x, y=y, error_y=bars, **options)

    def _ipython_display_(self) -> None:
        figure = json.loads(self.to_json())
        display({"application/vnd.plotly.v1+json": figure, "text/plain": self.layout.meta["alt"]}, raw=True)
