"""What the panels share: the frame with its style sheet and error line, badges, tables, numbers, charts."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ipywidgets
import plotly.graph_objects as go
import traitlets

from elign_lab.teaching.figure import COLORS, faded
from elign_lab.widgets.bundles import PLOTLY, bundle_with, plotly_json
from elign_lab.widgets.errors import raise_in_tests

_CSS = Path(__file__).with_name("panels.css").read_text()
_MARK = "shown now"
MEMBER_COLOR = faded("base", 0.55)

__all__ = [
    "MEMBER_COLOR",
    "Chart",
    "Panel",
    "add_mark",
    "badge",
    "escape",
    "figures_row",
    "move_marks",
    "number",
]

escape = html.escape


class Panel(ipywidgets.VBox):
    """A framed column of widgets with a title and a line for errors.

    What a callback of the browser raises is shown in the panel and kept in `last_error`; Python callers of the same
    methods get the exception. Subclasses give `summary_html()`, which pages without widgets show, and may give
    `summary_figure()`: scripts/add_pictures.py puts its picture over it in the notebooks of the repository.
    """

    last_error = traitlets.Unicode("")

    def __init__(self, title: str, note: str, children: Sequence[ipywidgets.Widget]) -> None:
        self._alert = ipywidgets.HTML(layout={"display": "none"})
        head = ipywidgets.HTML(
            f"<style>{_CSS}</style><div class='elp-title'>{escape(title)}</div><div class='elp-note'>{note}</div>"
        )
        super().__init__([head, *children, self._alert])
        self.add_class("elp")

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Show an exception in the panel instead of raising it: a browser's callback has no caller who could see it.

        A test of a notebook has one, so there it is raised as well (`raise_in_tests`).
        """
        try:
            yield
        except Exception as error:
            self.last_error = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise_in_tests(error)
        else:
            self.last_error = ""

    @traitlets.observe("last_error")
    def _show_error(self, change: dict[str, Any]) -> None:
        self._alert.value = f"<div class='elp-alert' role='alert'>{escape(change['new'])}</div>"
        self._alert.layout.display = "" if change["new"] else "none"

    def summary_html(self) -> str:
        """The content as static HTML."""
        raise NotImplementedError

    def summary_figure(self) -> go.Figure | None:
        """The figure to show above it, None for none."""
        return None

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The widget, and its content (if any) as HTML for pages that run no widgets (GitHub, nbviewer)."""
        content, figure = self.summary_html(), self.summary_figure()
        more: dict[str, Any] = {"text/html": content} if content else {}  # an empty one would hide the text
        if figure is not None:
            more[PLOTLY] = plotly_json(figure)
        return bundle_with(super()._repr_mimebundle_(**kwargs), more)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Chart(ipywidgets.Output):
    """A plotly figure in a panel; `draw` replaces it, from any thread.

    JupyterLab draws it with the plotly extension that it has for plain figures. A FigureWidget would bring five
    megabytes of its own for each figure, and stays empty with plotly 7.1 and anywidget 0.11.
    """

    def __init__(self, figure: go.Figure) -> None:
        super().__init__(layout={"min_height": f"{figure.layout.height}px"})
        self.draw(figure)

    def draw(self, figure: go.Figure) -> None:
        """Show this figure."""
        self.figure = figure
        self.outputs = ({"output_type": "display_data", "data": {PLOTLY: plotly_json(figure)}, "metadata": {}},)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The widget, and the figure for pages that run no widgets; a line of text where nothing is drawn yet."""
        drawn = any(len(getattr(trace, "x", None) or ()) for trace in self.figure.data)
        more = {PLOTLY: plotly_json(self.figure)} if drawn else {"text/html": "A chart in which nothing is drawn yet."}
        return bundle_with(super()._repr_mimebundle_(**kwargs), more)


def add_mark(figure: go.Figure, x: float, **where: int) -> None:
    """A vertical line at x, in all plots or in that of a row and a column: what is shown now."""
    figure.add_vline(x=x, name=_MARK, line={"color": COLORS["aligned"], "width": 1.5, "dash": "dot"}, **where)


def move_marks(figure: go.Figure, x: float) -> go.Figure:
    """Put all marks of a figure to x, which is much faster than to make the figure anew; returns it."""
    for shape in figure.select_shapes({"name": _MARK}):
        shape.update(x0=x, x1=x)
    return figure


def badge(text: str, tone: str = "", strong: bool = False) -> str:
    """A small coloured label; tone: "good", "bad", "warn" or "" (neutral)."""
    classes = ["elp-badge", *([f"elp-{tone}"] if tone else []), *(["elp-strong"] if strong else [])]
    return f"<span class='{' '.join(classes)}'>{escape(text)}</span>"


def number(value: float, digits: int = 4) -> str:
    """A number with `digits` significant digits and a real minus sign; a dash where there is none (NaN)."""
    if math.isnan(value):
        return "\N{EN DASH}"
    return f"{value:.{digits}g}".replace("-", "\N{MINUS SIGN}")


def headed_table(names: Iterable[str], rows: Iterable[str]) -> str:
    """A table of HTML rows (`<tr>...</tr>`) under the names of the columns."""
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def figures_row(values: dict[str, str]) -> str:
    """A row of large figures, each with its name below."""
    cells = "".join(f"<div><b>{value}</b><span>{escape(name)}</span></div>" for name, value in values.items())
    return f"<div class='elp-figures'>{cells}</div>"
