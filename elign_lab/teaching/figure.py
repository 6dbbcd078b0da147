"""The look of every plotly figure, and the figure itself: titled axes with units, and its content in words."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio
from IPython.display import display

COLORS = {
    "base": "#8a93a3",
    "tilt": "#d1495b",
    "aligned": "#2e86ab",
    "energy": "#3c3c3c",
    "other": "#e0a030",
    "good": "#2a9d6f",
}
"""One colour for each thing that the notebooks and panels show."""


def faded(name: str, opacity: float) -> str:
    """One of COLORS, see-through: for grids, bands, and lines that stand back."""
    red, green, blue = (int(COLORS[name][k : k + 2], 16) for k in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity:g})"


_PANEL_AXIS = {
    "gridcolor": faded("base", 0.25),
    "zerolinecolor": faded("base", 0.25),
    "title": {"standoff": 6, "font": {"size": 12}},
}
pio.templates["elign_lab"] = go.layout.Template(
    layout={
        "colorway": [COLORS[name] for name in ("aligned", "tilt", "other", "energy", "base")],
        "margin": {"l": 60, "r": 20, "t": 40, "b": 50},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02},
    }
)
pio.templates["elign_lab_panel"] = go.layout.Template(
    layout={
        "margin": {"l": 58, "r": 14, "t": 34, "b": 46},
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        # this grey is legible on white and on black: a figure does not know the theme of the page
        "font": {"color": COLORS["base"], "size": 12},
        "legend": {"x": 0},
        "hoverlabel": {"namelength": -1},
        "xaxis": _PANEL_AXIS,
        "yaxis": _PANEL_AXIS,
    }
)
PAGE = "plotly_white+elign_lab"
"""The template of figures on a white page."""
PANEL = "plotly_white+elign_lab+elign_lab_panel"
"""The template of figures in a panel, which may be light or dark."""


class Figure(go.Figure):
    """An empty figure to add traces to: `Figure(x="t", y="energy (eV)", alt="...").add_scatter(...)`.

    x, y: titles of the axes, with the unit where there is one. alt: what a reader who does not see the figure has to
    know; it is folded away under the figure ("in words"), pages that cannot draw the figure (GitHub, a terminal) show
    it, and it travels with the figure as `layout.meta["alt"]`. height in pixels; template: PAGE or PANEL. Raises
    ValueError for an empty title or text.
    """

    def __init__(self, *, x: str, y: str, alt: str, title: str = "", height: int = 340, template: str = PAGE) -> None:
        for name, text in (("x", x), ("y", y), ("alt", alt)):
            if not text.strip():
                raise ValueError(f"{name} is empty: a figure needs axis titles, with units, and alternative text")
        super().__init__()
        self.update_layout(template=template, xaxis_title=x, yaxis_title=y, height=height, meta={"alt": alt})
        if title:
            # room for the title and two rows of the legend
            self.update_layout(title={"text": title, "y": 0.97, "yanchor": "top"}, margin_t=80)

    @property
    def words(self) -> str:
        """The alternative text as HTML, folded away."""
        return f"<details><summary>in words</summary>{html.escape(self.layout.meta['alt'])}</details>"

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

    def legend_right(self) -> Figure:
        """Put the legend beside the plot instead of above it, for many traces; returns the figure."""
        return self.update_layout(legend={"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"})

    def _ipython_display_(self) -> None:
        figure = json.loads(self.to_json())
        display({"application/vnd.plotly.v1+json": figure, "text/plain": self.layout.meta["alt"]}, raw=True)
        display({"text/html": self.words}, raw=True)
