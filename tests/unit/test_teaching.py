"""The figure of the notebooks, and the sliders over it."""

from __future__ import annotations

import pytest
from IPython.utils.capture import capture_output

from elign_lab.teaching import Figure
from elign_lab.teaching.explore import explore
from elign_lab.teaching.figure import COLORS, PANEL, faded


def test_a_figure_shows_itself_with_its_alternative_text(monkeypatch):
    figure = Figure(x="t / T", y="energy (eV)", alt="A falling line.")
    figure.add_scatter(x=[0, 1], y=[2.0, 1.0], name="base")
    shown = []
    monkeypatch.setattr("elign_lab.teaching.figure.display", lambda bundle, raw: shown.append((bundle, raw)))
    figure._ipython_display_()
    (bundle, raw), (words, words_raw) = shown
    assert raw
    assert words_raw
    assert bundle["text/plain"] == "A falling line."
    assert words == {"text/html": "<details><summary>in words</summary>A falling line.</details>"}
    content = bundle["application/vnd.plotly.v1+json"]
    assert content["layout"]["xaxis"]["title"]["text"] == "t / T"
    assert content["layout"]["yaxis"]["title"]["text"] == "energy (eV)"
    assert content["layout"]["meta"] == {"alt": "A falling line."}
    assert content["data"][0]["y"] == [2.0, 1.0]


def test_the_look_is_that_of_the_template():
    figure = Figure(x="x", y="y", alt="a < b")
    look = figure.layout.template.layout
    assert look.colorway[0] == COLORS["aligned"]
    assert (figure.layout.margin.t, look.margin.t) == (None, 40)
    assert Figure(x="x", y="y", alt="a", title="t").layout.margin.t > look.margin.t, "a title needs room"
    assert "a &lt; b" in figure.words
    panel = Figure(x="x", y="y", alt="a", template=PANEL).layout.template.layout
    assert panel.colorway == look.colorway
    assert panel.paper_bgcolor == "rgba(0, 0, 0, 0)"
    assert panel.xaxis.gridcolor == faded("base", 0.25) == "rgba(138, 147, 163, 0.25)"


def test_outside_a_notebook_display_does_not_fail():
    with capture_output():
        Figure(x="x", y="y", alt="Nothing.")._ipython_display_()


@pytest.mark.parametrize("name", ["x", "y", "alt"])
def test_a_figure_without_words_is_refused(name):
    words = {"x": "t", "y": "energy (eV)", "alt": "A line.", name: " "}
    with pytest.raises(ValueError, match=f"{name} is empty"):
        Figure(**words)


def test_sliders_draw_the_figure_again_and_show_what_went_wrong(monkeypatch):
    def draw(power: int, scale: float) -> Figure:
        if scale == 2.0:
            raise ArithmeticError("no <figure> for 2")
        return Figure(x="x", y="y", alt=f"x to the {power}. " + "Words. " * 30).add_scatter(x=[2], y=[scale * 2**power])

    shown = explore(draw, power=(2, 1, 4, 1), scale=(1.0, 0.0, 2.0, 0.5))
    power, scale, *_ = shown.children
    assert shown.chart.figure.data[0].y == (4.0,)
    power.value = 3
    assert shown.chart.figure.data[0].y == (8.0,)
    assert "x to the 3." in shown.children[-2].value
    bundle = shown._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert data["text/plain"].startswith("Figure with sliders for power, scale: x to the 3. Words.")
    assert len(data["text/plain"]) > 200
    assert data["application/vnd.plotly.v1+json"]["data"][0]["y"] == [8.0]
    scale.value = 2.0
    assert shown.last_error == "ArithmeticError: no <figure> for 2"
    assert "no &lt;figure&gt; for 2" in shown.children[-1].value
    assert shown.chart.figure.data[0].y == (8.0,)
    scale.value = 0.5
    assert (shown.last_error, shown.children[-1].value, shown.chart.figure.data[0].y) == ("", "", (4.0,))
    monkeypatch.setenv("ELIGN_LAB_RAISE", "1")  # as in the tests of the notebooks: shown, and raised
    with pytest.raises(ArithmeticError, match="no <figure> for 2"):
        scale.value = 2.0
    assert shown.last_error == "ArithmeticError: no <figure> for 2"
    assert "no &lt;figure&gt; for 2" in shown.children[-1].value


@pytest.mark.parametrize("values", [(1, 2, 3, 1), (1, 0, 2, 0), (1, 0, 2)])
def test_a_range_that_is_none_is_refused(values):
    with pytest.raises(ValueError, match="expected \\(first value"):
        explore(lambda beta: None, beta=values)


def test_a_legend_stands_above_the_plot_or_beside_it():
    figure = Figure(x="t / T", y="energy (eV)", alt="A line.")
    above = figure.layout.template.layout.legend
    assert (above.orientation, above.yanchor) == ("h", "bottom")  # grows away from the plot
    beside = figure.legend_right().layout.legend
    assert (beside.orientation, beside.yanchor, beside.y) == ("v", "top", 1)  # and this one downwards
