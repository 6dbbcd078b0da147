"""Store a PNG beside every plotly figure in the notebooks' outputs: GitHub and nbviewer show it, and not the figure.

The figure's alternative text becomes that of the PNG. `make notebooks` runs it after the notebooks. It needs Chrome or
Chromium, which draws the figures (kaleido). A picture that is already there is drawn again.
"""

from __future__ import annotations

import argparse
import base64
import io
from pathlib import Path

import kaleido
import nbformat
import plotly.graph_objects as go
from PIL import Image
from tqdm.auto import tqdm

PLOTLY, PNG = "application/vnd.plotly.v1+json", "image/png"
WIDTH, SCALE = 720, 1.5
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
        figure = output.data[PLOTLY]
        output.data[PNG] = base64.b64encode(draw(figure)).decode()
        output.metadata[PNG] = {"alt": figure["layout"]["meta"]["alt"]}
    if figures:
        nbformat.write(notebook, path)


def draw(figure: dict[str, object]) -> bytes:
    """PNG of a figure in plotly's JSON form, with a small palette."""
    chart = go.Figure(data=figure["data"], layout=figure["layout"])
    options = {"format": "png", "width": chart.layout.width or WIDTH, "height": chart.layout.height or 450}
    image = Image.open(io.BytesIO(kaleido.calc_fig_sync(chart, opts={**options, "scale": SCALE})))
    file = io.BytesIO()
    page = Image.new("RGBA", image.size, "white")  # a figure of a panel is transparent
    page.alpha_composite(image.convert("RGBA"))
    page.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    main()
