"""Colours, radii and the bond rule of the viewer, and a ball-and-stick picture drawn in NumPy.

The picture is what a notebook shows where no widget can run (GitHub, nbviewer, nbconvert). Spheres and cylinders are
intersected with one ray per pixel (orthographic), so it needs no graphics library; Pillow, which RDKit needs anyway,
writes the PNG. Lengths are in Angstrom.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from ase.data import chemical_symbols, covalent_radii
from ase.data.colors import jmol_colors
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont
from scipy.ndimage import uniform_filter

BOND_TOLERANCE = 1.3  # atoms closer than this times the sum of their covalent radii are drawn bonded
OVERLAP = 0.4  # and closer than this times the sum they overlap: a stick would be hidden
STICK_RADIUS = 0.12
LIGHT = np.array([-0.42, 0.58, 0.70]) / np.linalg.norm([-0.42, 0.58, 0.70])  # from the upper left; x right, y up
_HALF = (LIGHT + np.array([0, 0, 1])) / np.linalg.norm(LIGHT + np.array([0, 0, 1]))
GHOST = np.array([47, 158, 143]) / 255  # a reference that is laid over
_RING = 5  # width in pixels of a ring around a marked atom
_TEXT = (128, 136, 146, 255)  # legible on a white and on a black page
# Jmol's colours, with the commonest elements a little calmer
_CALM = {1: "#f1f3f6", 6: "#6d7480", 7: "#3d6bf2", 8: "#ea3f3f", 9: "#8fdc57", 16: "#f3c52e", 17: "#35c24f"}
# five stops of the viridis scale (Smith and van der Walt, matplotlib 2015): even lightness, safe for colour blindness
VIRIDIS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]) / 255

FloatArray = NDArray[np.floating]


def _element_colors() -> FloatArray:
    colors = np.array(jmol_colors, dtype=float)
    missing = np.full((len(chemical_symbols) - len(colors), 3), 0.9)  # Jmol stops at meitnerium
    colors = np.concatenate([colors, missing])
    for number, code in _CALM.items():
        colors[number] = [int(code[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    return colors


ELEMENT_COLORS = _element_colors()
RADII = np.nan_to_num(np.asarray(covalent_radii), nan=1.5)
BALL_RADII = 0.17 + 0.31 * RADII


def palette() -> dict[str, list]:
    """The tables that the browser needs: symbols, colours ('#rrggbb') and covalent radii, by atomic number."""
    codes = ["#" + "".join(f"{round(255 * c):02x}" for c in color) for color in ELEMENT_COLORS]
    return {"symbols": list(chemical_symbols), "colors": codes, "radii": [round(float(r), 3) for r in RADII]}


def bonds(numbers: NDArray[np.integer], positions: FloatArray) -> NDArray[np.integer]:
    """Pairs of atoms nearer than 1.3 times the sum of their covalent radii: (n,), (n, 3) -> (bonds, 2)."""
    distance = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    reach = RADII[numbers][:, None] + RADII[numbers][None]
    return np.argwhere(np.triu((distance < BOND_TOLERANCE * reach) & (distance > OVERLAP * reach), k=1))


def orientation(positions: FloatArray) -> FloatArray:
    """Rotation (3, 3) that turns the flattest side of a molecule to the viewer: rows are the x, y, z of the screen."""
    x = positions[np.isfinite(positions).all(-1)]
    if len(x) < 2:
        return np.eye(3)
    _, _, axes = np.linalg.svd(x - x.mean(0), full_matrices=True)
    # singular vectors have no sign: point each to where its coordinates are skewed, so that a redraw looks the same
    skew = ((x - x.mean(0)) @ axes.T[:, :2]) ** 3
    axes[:2] *= np.where(skew.sum(0) < 0, -1.0, 1.0)[:, None]
    axes[2] = np.cross(axes[0], axes[1])
    tilt = np.deg2rad([-24.0, 16.0])  # a planar molecule seen a little from the side looks solid
    about_x = np.array([[1, 0, 0], [0, np.cos(tilt[0]), -np.sin(tilt[0])], [0, np.sin(tilt[0]), np.cos(tilt[0])]])
    about_y = np.array([[np.cos(tilt[1]), 0, np.sin(tilt[1])], [0, 1, 0], [-np.sin(tilt[1]), 0, np.cos(tilt[1])]])
    return about_x @ about_y @ axes


def force_scale(values: FloatArray) -> FloatArray:
    """Colours (..., 3) of the viridis scale at values from 0 to 1 (clipped; not-a-number is the top)."""
    values = np.clip(np.nan_to_num(values, nan=1.0), 0, 1)
    stops = np.linspace(0, 1, len(VIRIDIS))
    return np.stack([np.interp(values, stops, channel) for channel in VIRIDIS.T], axis=-1)


@dataclass(frozen=True)
class Drawing:
    """One molecule of a picture: atomic numbers (n,), positions (n, 3), colours (n, 3) from 0 to 1, and a caption.

    rotation (3, 3) turns it to the viewer; `sticks` (bonds, 2) replaces the distance rule; `reference` (atomic numbers,
    positions) is laid over it, translucent; `marks` has the atoms with a ring, by the colour of the ring.
    """

    numbers: NDArray[np.integer]
    positions: FloatArray
    colors: FloatArray
    rotation: FloatArray
    caption: str = ""
    sticks: NDArray[np.integer] | None = None
    reference: tuple[NDArray[np.integer], FloatArray] | None = None
    marks: Mapping[str, Sequence[int]] = field(default_factory=dict)


def render_png(drawings: Sequence[Drawing], *, width: int, height: int, columns: int) -> bytes:
    """A PNG of molecules in a grid, transparent background; width and height in CSS pixels, 2 pixels to each."""
    rows = -(-len(drawings) // columns)
    cell = (2 * width // columns, 2 * height // rows)
    sheet = Image.new("RGBA", (cell[0] * columns, cell[1] * rows))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=24)
    for k, drawing in enumerate(drawings):
        left, top = cell[0] * (k % columns), cell[1] * (k // columns)
        caption = 44 if drawing.caption else 0
        image = _render(drawing, cell[0], cell[1] - caption)
        sheet.paste(image, (left, top))
        if caption:
            pen.text((left + cell[0] / 2, top + cell[1] - 28), drawing.caption, fill=_TEXT, font=font, anchor="mm")
    out = io.BytesIO()
    # 256 colours are enough for a picture of this kind, and make a notebook five times smaller
    sheet.quantize(256, method=Image.Quantize.FASTOCTREE).save(out, "PNG")
    return out.getvalue()


def _render(drawing: Drawing, width: int, height: int) -> Image.Image:
    """One molecule and what is laid over it, fitted to width x height; atoms that are not finite are left out."""
    finite = np.isfinite(drawing.positions).all(-1)
    if not finite.any():
        return Image.new("RGBA", (width, height))
    center = drawing.positions[finite].mean(0, dtype=float)
    x = (drawing.positions - center) @ drawing.rotation.T
    reach = _reach(drawing.numbers, x)
    if drawing.reference is not None:
        numbers, positions = drawing.reference
        laid = (positions - center) @ drawing.rotation.T
        reach = np.maximum(reach, _reach(numbers, laid))
    scale = min(width / (2 * reach[0]), height / (2 * reach[1]), 110.0)
    canvas = _Canvas(width, height, scale)
    canvas.molecule(drawing.numbers, x, drawing.colors, drawing.sticks)
    image = canvas.image()
    if drawing.reference is not None:
        layer = _Canvas(width, height, scale)
        layer.molecule(numbers, laid, np.tile(GHOST, (len(numbers), 1)), None)
        ghost = layer.image()
        behind, hint = _faded(ghost, 0.6), _faded(ghost, 0.14)  # clear behind the molecule, a hint in front
        behind.alpha_composite(image)
        behind.alpha_composite(hint)
        image = behind
    for color, atoms in drawing.marks.items():
        for i in atoms:
            if i < len(x) and np.isfinite(x[i]).all():
                image.alpha_composite(
                    _ring(image.size, scale * x[i, :2], scale * BALL_RADII[drawing.numbers[i]], color)
                )
    return image


def _reach(numbers: NDArray[np.integer], x: FloatArray) -> FloatArray:
    """Half width and half height (2,) that show the finite atoms; x (n, 3) is turned to the viewer already."""
    finite = np.isfinite(x).all(-1)
    edges = np.abs(x[finite, :2]) + BALL_RADII[numbers[finite], None]
    return np.max(edges, axis=0, initial=1.2) * 1.06


def _ring(size: tuple[int, int], middle: FloatArray, radius: float, color: str) -> Image.Image:
    """A ring around a ball, as the live view has it; middle (x, y) from the centre of the picture, in pixels, y up."""
    rows, columns = np.ogrid[: size[1], : size[0]]
    distance = np.hypot(columns + 0.5 - size[0] / 2 - middle[0], rows + 0.5 - size[1] / 2 + middle[1])
    cover = np.clip(0.5 * _RING + 0.5 - np.abs(distance - radius - _RING), 0, 1)
    image = Image.new("RGBA", size, ImageColor.getrgb(color))
    image.putalpha(Image.fromarray((255 * cover).astype(np.uint8)))
    return image


def _faded(image: Image.Image, opacity: float) -> Image.Image:
    image = image.copy()
    image.putalpha(image.getchannel("A").point(lambda alpha: int(opacity * alpha)))
    return image


class _Canvas:
    """Depth, normal and base colour of every pixel; shaded at the end."""

    def __init__(self, width: int, height: int, scale: float) -> None:
        self.scale = scale
        self.across = (np.arange(width) + 0.5 - width / 2) / scale
        self.down = (height / 2 - np.arange(height) - 0.5) / scale
        self.depth = np.full((height, width), -np.inf)
        self.normal = np.zeros((height, width, 3))
        self.color = np.zeros((height, width, 3))

    def molecule(
        self, numbers: NDArray[np.integer], x: FloatArray, colors: FloatArray, sticks: NDArray[np.integer] | None
    ) -> None:
        """Balls and sticks of the atoms that are finite; x (n, 3) is turned to the viewer already."""
        finite = np.asarray(np.isfinite(x).all(-1))
        pairs = bonds(numbers, x) if sticks is None else np.asarray(sticks, dtype=int).reshape(-1, 2)
        for i in np.flatnonzero(finite):
            self.sphere(x[i], BALL_RADII[numbers[i]], colors[i])
        for i, j in pairs[finite[pairs].all(-1)]:
            middle = (x[i] + x[j]) / 2
            self.cylinder(x[i], middle, colors[i])
            self.cylinder(x[j], middle, colors[j])

    def _box(self, low: FloatArray, high: FloatArray) -> tuple[slice, slice, FloatArray, FloatArray]:
        columns = slice(*np.searchsorted(self.across, [low[0], high[0]]))
        rows = slice(*np.searchsorted(-self.down, [-high[1], -low[1]]))
        return rows, columns, self.across[columns][None, :], self.down[rows][:, None]

    def _put(
        self, rows: slice, columns: slice, hit: NDArray[np.bool_], z: FloatArray, normal: FloatArray, color
    ) -> None:
        hit = hit & (z > self.depth[rows, columns])
        self.depth[rows, columns][hit] = z[hit]
        self.normal[rows, columns][hit] = normal[hit]
        self.color[rows, columns][hit] = color

    def sphere(self, center: FloatArray, radius: float, color: FloatArray) -> None:
        rows, columns, px, py = self._box(center[:2] - radius, center[:2] + radius)
        dx, dy = np.broadcast_arrays(px - center[0], py - center[1])
        under = radius**2 - dx**2 - dy**2
        dz = np.sqrt(np.maximum(under, 0))
        self._put(rows, columns, under > 0, center[2] + dz, np.stack([dx, dy, dz], -1) / radius, color)

    def cylinder(self, start: FloatArray, end: FloatArray, color: FloatArray) -> None:
        length = float(np.linalg.norm(end - start))
        u = (end - start) / length
        steep = 1 - u[2] ** 2
        if steep < 1e-6:  # seen end-on it is behind its own ball
            return
        ends = np.stack([start[:2], end[:2]])
        rows, columns, px, py = self._box(ends.min(0) - STICK_RADIUS, ends.max(0) + STICK_RADIUS)
        dx, dy = np.broadcast_arrays(px - start[0], py - start[1])
        # the ray (dx, dy, s) is at distance STICK_RADIUS of the axis: a quadratic in s, larger root in front
        along = dx * u[0] + dy * u[1]
        under = (along * u[2]) ** 2 - steep * (dx**2 + dy**2 - along**2 - STICK_RADIUS**2)
        s = (along * u[2] + np.sqrt(np.maximum(under, 0))) / steep
        t = along + s * u[2]
        normal = (np.stack([dx, dy, s], -1) - t[..., None] * u) / STICK_RADIUS
        self._put(rows, columns, (under > 0) & (t >= 0) & (t <= length), start[2] + s, normal, color)

    def image(self) -> Image.Image:
        drawn = np.isfinite(self.depth)
        if not drawn.any():
            return Image.fromarray(np.zeros((*drawn.shape, 4), dtype=np.uint8), "RGBA")
        depth, normal = self.depth[drawn], self.normal[drawn]
        near, far = depth.max(), depth.min()
        # crevices: pixels that lie below the mean of their surroundings get less light
        surface = np.where(drawn, self.depth, far).astype(np.float32)
        mean = uniform_filter(surface, max(3, int(0.9 * self.scale) | 1))[drawn]
        crevice = np.clip(mean - depth, 0, 0.8)
        diffuse = 0.40 + 0.62 * np.clip(normal @ LIGHT, 0, 1)
        gloss = 0.42 * np.clip(normal @ _HALF, 0, 1) ** 42
        rim = np.clip(0.55 + 1.6 * normal[:, 2], 0, 1)
        light = diffuse * rim * (1 - 0.45 * crevice)
        rgb = self.color[drawn] * light[:, None] + gloss[:, None]
        fog = 0.28 * (near - depth[:, None]) / max(near - far, 2.0)
        pixels = np.zeros((*drawn.shape, 4), dtype=np.uint8)
        pixels[drawn, :3] = (255 * np.clip(rgb * (1 - fog) + 0.72 * fog, 0, 1)).round()
        pixels[drawn, 3] = 255
        return Image.fromarray(pixels, "RGBA")
