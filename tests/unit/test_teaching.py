"""The figure of the notebooks."""

from __future__ import annotations

import pytest
from IPython.utils.capture import capture_output

from elign_lab.teaching import Figure


def test_a_figure_shows_itself_with_its_alternative_text(monkeypatch):
    figure = Figure(x="t / T", y="energy (eV)", alt="A falling line.")
    figure.add_scatter(x=[0, 1], y=[2.0, 1.0], name="base")
    shown = []
    monkeypatch.setattr("elign_lab.teaching.figure.display", lambda bundle, raw: shown.append((bundle, raw)))
    figure._ipython_display_()
    [(bundle, raw)] = shown
    assert raw
    assert bundle["text/plain"] == "A falling line."
    content = bundle["application/vnd.plotly.v1+json"]
    assert content["layout"]["xaxis"]["title"]["text"] == "t / T"
    assert content["layout"]["yaxis"]["title"]["text"] == "energy (eV)"
    assert content["layout"]["meta"] == {"alt": "A falling line."}
    assert content["data"][0]["y"] == [2.0, 1.0]


def test_outside_a_notebook_display_does_not_fail():
    with capture_output():
        Figure(x="x", y="y", alt="Nothing.")._ipython_display_()


@pytest.mark.parametrize("name", ["x", "y", "alt"])
def test_a_figure_without_words_is_refused(name):
    words = {"x": "t", "y": "energy (eV)", "alt": "A line.", name: " "}
    with pytest.raises(ValueError, match=f"{name} is empty"):
        Figure(**words)
