"""Sliders over the pure figure functions of the notebooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets
import traitlets

from elign_lab.teaching.figure import Figure
from elign_lab.widgets.bundles import PLOTLY, bundle_with, plotly_json
from elign_lab.widgets.errors import raise_in_tests
from elign_lab.widgets.live import alert_html
from elign_lab.widgets.panels.base import Chart

Range = tuple[float, float, float, float]
"""(first value, least, largest, step) of a slider."""


def explore(draw: Callable[..., Figure], **ranges: Range) -> Explorer:
    """One slider for each keyword of `draw`, and the figure that it makes of their values.

    `explore(figures.tilt_figure, beta=(1.0, 0.0, 6.0, 0.25))`. The figure follows when a slider is let go. Raises
    ValueError for a range that is no (first value, least, largest, step).
    """
    for name, values in ranges.items():
        if len(values) != 4 or not values[1] <= values[0] <= values[2] or not values[3] > 0:
            raise ValueError(f"{name} = {values}: expected (first value, least, largest, step > 0)")
    return Explorer(draw, {name: _slider(name, *values) for name, values in ranges.items()})


class Explorer(ipywidgets.VBox):
    """Sliders and the figure of their values, as `explore` makes them.

    What `draw` raises for a value is shown, and kept in `last_error`; the old figure stays. The output has the figure
    itself too, of which scripts/add_pictures.py makes a picture for pages that run no widgets; without it they show
    the figure's alternative text, which is also folded away under the figure.
    """

    last_error = traitlets.Unicode("")

    def __init__(self, draw: Callable[..., Figure], sliders: dict[str, ipywidgets.Widget]) -> None:
        self._make, self._sliders = draw, sliders
        figure = self._current()
        self.chart, self._words, self._alert = Chart(figure), ipywidgets.HTML(figure.words), ipywidgets.HTML()
        for slider in sliders.values():
            slider.observe(self._moved, "value")
        super().__init__([*sliders.values(), self.chart, self._words, self._alert])

    def __repr__(self) -> str:
        return f"Figure with sliders for {', '.join(self._sliders)}: {self.chart.figure.layout.meta['alt']}"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The widget, the figure, and the whole text (ipywidgets would cut it)."""
        more = {PLOTLY: plotly_json(self.chart.figure), "text/plain": repr(self)}
        return bundle_with(super()._repr_mimebundle_(**kwargs), more)

    def _current(self) -> Figure:
        return self._make(**{name: slider.value for name, slider in self._sliders.items()})

    def _moved(self, change: dict[str, Any]) -> None:
        try:
            figure = self._current()
            self.chart.draw(figure)
            self._words.value = figure.words
            self.last_error = ""
        except Exception as error:  # a slider has no caller that could see it
            self.last_error = f"{type(error).__name__}: {error}"
            raise_in_tests(error)
        finally:
            self._alert.value = alert_html(self.last_error)


def _slider(name: str, value: float, least: float, largest: float, step: float) -> ipywidgets.Widget:
    whole = all(isinstance(v, int) for v in (value, least, largest, step))
    kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    return kind(value=value, min=least, max=largest, step=step, description=name, continuous_update=False)
