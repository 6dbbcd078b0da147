"""Sliders over the pure figure functions of the notebooks."""

from __future__ import annotations

from collections.abc import Callable

import ipywidgets

from elign_lab.teaching.figure import Figure
from elign_lab.widgets.panels.base import Chart

Range = tuple[float, float, float, float]
"""(first value, least, largest, step) of a slider."""


def explore(draw: Callable[..., Figure], **ranges: Range) -> ipywidgets.VBox:
    """One slider for each keyword of `draw`, and the figure that it makes of their values.

    `explore(figures.tilt_figure, beta=(1.0, 0.0, 6.0, 0.25))`. The figure follows when a slider is let go. Raises
    ValueError for a range that is no (first value, least, largest, step).
    """
    for name, values in ranges.items():
        if len(values) != 4 or not values[1] <= values[0] <= values[2] or not values[3] > 0:
            raise ValueError(f"{name} = {values}: expected (first value, least, largest, step > 0)")
    sliders = {name: _slider(name, *values) for name, values in ranges.items()}

    def current() -> Figure:
        return draw(**{name: slider.value for name, slider in sliders.items()})

    chart = Chart(current())
    for slider in sliders.values():
        slider.observe(lambda _: chart.draw(current()), "value")
    return ipywidgets.VBox([*sliders.values(), chart])


def _slider(name: str, value: float, least: float, largest: float, step: float) -> ipywidgets.Widget:
    whole = all(isinstance(v, int) for v in (value, least, largest, step))
    kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    return kind(value=value, min=least, max=largest, step=step, description=name, continuous_update=False)
