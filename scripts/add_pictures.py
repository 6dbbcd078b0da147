"""Store a PNG beside every plotly figure in the notebooks' outputs: GitHub and nbviewer show it, and not the figure.

The figure's alternative text becomes that of the PNG. The figure of a widget (sliders, a panel) is replaced by a
smaller PNG: with a kernel the widget draws it. Where the widget has HTML as well, which such pages prefer, the PNG goes
into that. `make notebooks` runs this after the notebooks. It needs Chrome or Chromium, which draws the figures
(kaleido). A picture that stands beside its figure is drawn again.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
from pathlib import Path

import kaleido
import nbformat
import plotly.graph_objects as go
from PIL import Image
from tqdm.auto import tqdm

PLOTLY, PNG, HTML = "application/vnd.plotly.v1+json", "image/png", "text/html"
WIDGET = "application/vnd.jupyter.widget-view+json"
WIDTH, SCALE, WIDGET_SCALE = 720, 1.5, 1.0
COLORS = 48  # of the palette: a chart stays under 40 kB, and a notebook under 400


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path, help="notebook files, changed in place")
    paths = parser.parse_args().notebooks
    kaleido.start_sync_server(silence_warnings=True)
    try:
        for path in tqdm(paths, desc="pictures"):
            add_pictures(path)
    finally:
        kaleido.stop_sync_server(silence_warnings=True)


def add_pictures(path: Path) -> None:
    """Draw the figures of one notebook."""
    notebook = nbformat.read(path, as_version=4)
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    figures = [out for out in outputs if PLOTLY in out.get("data", {})]
    for output in figures:
        store_picture(output)
    if figures:
        nbformat.write(notebook, path)


def store_picture(output: nbformat.NotebookNode) -> None:
    """Draw the figure of one output, into the output."""
    data = output.data
    figure, alt = data[PLOTLY], data[PLOTLY]["layout"]["meta"]["alt"]
    if WIDGET not in data:
        data[PNG], output.metadata[PNG] = encoded(draw(figure)), {"alt": alt}
        return
    picture = encoded(draw(figure, WIDGET_SCALE))
    del data[PLOTLY]
    if HTML in data:
        image = f"<img src='data:image/png;base64,{picture}' alt='{html.escape(alt)}'>"
        data[HTML] = f"{image}<br>{''.join(data[HTML])}"
    else:
        data[PNG], output.metadata[PNG] = picture, {"alt": alt}


def encoded(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def draw(figure: dict[str, object], scale: float = SCALE) -> bytes:
    """PNG of a figure in plotly's JSON form, with a small palette."""
    chart = go.Figure(data=figure["data"], layout=figure["layout"])
    options = {"format": "png", "width": chart.layout.width or WIDTH, "height": chart.layout.height or 450}
    image = Image.open(io.BytesIO(kaleido.calc_fig_sync(chart, opts={**options, "scale": scale})))
    file = io.BytesIO()
    page = Image.new("RGBA", image.size, "white")  # a figure of a panel is transparent
    page.alpha_composite(image.convert("RGBA"))
    page.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    main()
