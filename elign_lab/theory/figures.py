"""Plotly figures of the theory notebooks. Every function is pure: numbers in, a figure out; sliders call them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
import torch
from numpy.typing import NDArray
from scipy.stats import chi2

from elign_lab.teaching.figure import COLORS, Figure
from elign_lab.theory import error_bound, force, score, shaping
from elign_lab.theory.alchemical import AlchemicalCosines, mean_by_time
from elign_lab.theory.points import GridLaws
from elign_lab.theory.tilt import DoubleWell, tilted

FloatArray = NDArray[np.floating]


def _line(
    figure: Figure, x: FloatArray, y: FloatArray, name: str, color: str, yaxis: str = "y", **options: object
) -> None:
    x, y = np.round(np.asarray(x, dtype=float), 4), np.asarray(y, dtype=float)
    line = {"color": color, **options}
    figure.add_trace(go.Scatter(x=x, y=[float(f"{v:.4g}") for v in y], name=name, line=line, yaxis=yaxis))


def _right_axis(figure: Figure, title: str, low: float, high: float) -> None:
    """Give the traces with yaxis="y2" an axis of their own on the right, from low to high."""
    axis = {"title": {"text": title}, "overlaying": "y", "side": "right", "tickmode": "auto", "showgrid": False}
    figure.update_layout(yaxis2=axis | {"range": [low, high]}, margin_r=60)


def tilt_figure(beta: float, slope: float = 0.5, right_weight: float = 0.7) -> Figure:
    """Base law and theorem 1's tilt on a double well, with the energy on an axis of its own, and one zero for both."""
    well = DoubleWell(slope=slope, right_weight=right_weight, points=201)
    step = well.grid[1] - well.grid[0]
    left = float(well.aligned(beta)[well.grid < 0].sum())
    title = f"beta = {beta:g}: {100 * left:.0f} % in the left well"
    figure = Figure(
        x="x (no unit)",
        y="density",
        title=title,
        alt=f"Double well, its base law, and its tilt at beta = {beta:g} with {100 * left:.0f} % on the left.",
    )
    base, tilt = well.base() / step, well.aligned(beta) / step
    energy = np.clip(well.energy(well.grid), None, 10)
    _line(figure, well.grid, energy, "energy (right axis)", COLORS["energy"], yaxis="y2", dash="dot")
    _line(figure, well.grid, base, "base q0", COLORS["base"])
    _line(figure, well.grid, tilt, "tilt q*", COLORS["tilt"])
    top = 1.1 * float(max(base.max(), tilt.max()))
    figure.update_layout(xaxis_range=[-2.5, 2.5], yaxis_range=[-top / 8, top])
    _right_axis(figure, "energy (eV)", -1, 8)
    return figure


def bound_figure(eps: float, beta_max: float = 10.0) -> Figure:
    """Bounds of theorem 2 against beta for one eps, and the total variation of a sine error on a double well."""
    betas = np.linspace(0.01, beta_max, 60)
    well = DoubleWell(points=801)
    wrong = well.energy(well.grid) - eps * np.sin(-1.5 * well.grid)
    actual = [error_bound.total_variation(well.aligned(b), tilted(well.base(), wrong, b)) for b in betas]
    figure = Figure(
        x="beta (1/eV)",
        y="total variation",
        title=f"eps = {eps:g} eV",
        alt="Total variation against beta: the double well's is below the best constant, that below theorem 2, and "
        "both below the straight line beta eps.",
    )
    _line(figure, betas, np.tanh(betas * eps), "theorem 2, tanh(beta eps)", COLORS["tilt"])
    _line(figure, betas, np.tanh(betas * eps / 2), "best constant, tanh(beta eps / 2)", COLORS["other"])
    _line(figure, betas, betas * eps, "linear, beta eps", COLORS["base"], dash="dot")
    _line(figure, betas, np.array(actual), "double well, sine error", COLORS["aligned"])
    figure.update_yaxes(range=[0, 1.05])
    return figure


def laws_figure(
    laws: GridLaws, samples: FloatArray | None = None, name: str = "aligned model", x: str = "x (no unit)"
) -> Figure:
    """Base law, theorem 1's tilt, the best Gaussian policy and FED-GRPO's fixed point, with a histogram of samples."""
    step = laws.x[1] - laws.x[0]
    thin = slice(None, None, 4)
    figure = Figure(
        x=x,
        y="density",
        alt="Base law, theorem 1's tilt, the best Gaussian policy and FED-GRPO's fixed point"
        + (f", with a histogram of the {name}." if samples is not None else "."),
    )
    if samples is not None:
        counts, edges = np.histogram(samples, bins=60, range=(-3, 3), density=True)
        centres = (edges[:-1] + edges[1:]) / 2
        figure.add_trace(go.Bar(x=centres.round(3), y=counts.round(3), name=name, marker_color="#b9d6e4"))
    for label, law, color, dash in (
        ("base", laws.base, COLORS["base"], "solid"),
        ("theorem 1", laws.tilt, COLORS["tilt"], "solid"),
        ("best Gaussian policy, path KL", laws.path_kl, COLORS["aligned"], "dash"),
        ("fixed point, KL of visited states", laws.state_kl, COLORS["other"], "dot"),
    ):
        _line(figure, laws.x[thin], law[thin] / step, label, color, dash=dash)
    figure.update_xaxes(range=[-3, 3])
    return figure


def densities_2d(clouds: Mapping[str, FloatArray], reach: float = 2.5, bins: int = 30) -> Figure:
    """Histograms of point clouds (n, 2), or of (points, weights) pairs, side by side on one scale."""
    figure = Figure(
        x="x1 (no unit)", y="x2 (no unit)", alt=f"Densities in the plane, side by side: {', '.join(clouds)}."
    )
    figure.set_subplots(cols=len(clouds), subplot_titles=list(clouds), shared_yaxes=True, horizontal_spacing=0.03)
    edges = np.linspace(-reach, reach, bins + 1)
    centres = ((edges[:-1] + edges[1:]) / 2).round(3)
    for k, cloud in enumerate(clouds.values(), start=1):
        points, weights = cloud if isinstance(cloud, tuple) else (cloud, None)
        density = np.histogram2d(points[:, 0], points[:, 1], bins=edges, weights=weights, density=True)[0]
        figure.add_trace(go.Heatmap(x=centres, y=centres, z=density.T.round(4), coloraxis="coloraxis"), 1, k)
        figure.update_xaxes(title_text="x1 (no unit)", row=1, col=k)
    figure.update_yaxes(title_text="x2 (no unit)", row=1, col=1)
    figure.update_layout(coloraxis={"colorscale": "Viridis", "cmin": 0, "colorbar": {"title": {"text": "density"}}})
    return figure


def diffusion_figure(time: float) -> Figure:
    """Exact marginal of the Ornstein-Uhlenbeck process at `time`, and its score."""
    x = np.linspace(-3.5, 3.5, 161)
    law = score.marginal(score.TWO_WELLS, time)
    at = torch.from_numpy(x).unsqueeze(1)
    figure = Figure(
        x="x (no unit)",
        y="density",
        title=f"t = {time:g}",
        alt=f"Density of the noised mixture at time {time:g}, its score, and the standard normal law it tends to.",
    )
    _line(figure, x, law.log_prob(at).exp().numpy(), "density p_t", COLORS["aligned"])
    _line(figure, x, law.score(at)[:, 0].numpy(), "score (right axis)", COLORS["tilt"], yaxis="y2")
    _line(figure, x, np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi), "N(0, 1)", COLORS["base"], dash="dot")
    figure.update_layout(yaxis_range=[-1.1, 1.1])
    _right_axis(figure, "score (no unit)", -5, 5)  # one zero for both axes
    return figure


def return_figure(
    potential: FloatArray, terminal: FloatArray, gamma: float, groups: Sequence[int] | None = None
) -> Figure:
    """Shaped return-to-go of rollouts, gamma^t Phi(s_0) - Phi(s_t); potential (B, S), terminal (B,).

    groups (B,): the group of each rollout, which gives the line its colour; one group unless given.
    """
    returns = shaping.return_to_go(torch.as_tensor(potential), torch.as_tensor(terminal), gamma).numpy()
    labels = [0] * len(returns) if groups is None else [int(group) for group in groups]
    names = list(dict.fromkeys(labels))
    colored = f" in {len(names)} groups, a colour for each," if len(names) > 1 else ""
    figure = Figure(
        x="trained reverse step",
        y="return-to-go (eV/atom)",
        title=f"gamma = {gamma:g}",
        alt=f"Return-to-go of {len(returns)} rollouts{colored} against the reverse step, for gamma = {gamma:g}.",
    )
    colors = [COLORS[name] for name in ("aligned", "tilt", "other", "good", "base")]
    for k, (group, row) in enumerate(zip(labels, returns, strict=True)):
        color = colors[names.index(group) % len(colors)]
        _line(figure, np.arange(len(row), dtype=float), row, f"group {group}", color)
        # one entry of the legend for each group, which hides and shows all of it
        figure.data[-1].update(legendgroup=f"group {group}", showlegend=labels.index(group) == k)
    return figure.update_layout(showlegend=len(names) > 1)


def tilted_kernel_figure(sigma: float, beta: float, gamma: float, mu: float = 0.7) -> Figure:
    """A reverse kernel on a double well, its exponential tilt, and theorem 5's mean; the energy has the right axis."""
    x = np.linspace(-2, 2, 241)
    base = np.exp(-0.5 * ((x - mu) / sigma) ** 2)
    tilt = base * np.exp(beta * gamma * (force.smooth_potential(x) - force.smooth_potential(np.array(mu))))
    slope = -4 * mu * (mu**2 - 1)
    predicted = float(force.force_step(np.array(mu), np.array(slope), sigma, beta, gamma))
    exact = force.tilt_mean_1d(force.smooth_potential, mu, sigma, beta * gamma)
    title = f"mean of the tilt {exact:.3f}, theorem 5 {predicted:.3f}"
    figure = Figure(
        x="z' (no unit)",
        y="density / its maximum",
        title=title,
        alt="A Gaussian kernel on the slope of a double well and its tilt, which is moved downhill; a line marks "
        "the mean of theorem 5.",
    )
    energy = -force.smooth_potential(x)
    _line(figure, x, energy, "energy (right axis)", COLORS["energy"], yaxis="y2", dash="dot")
    _line(figure, x, base / base.max(), "base kernel", COLORS["base"])
    _line(figure, x, tilt / tilt.max(), "tilted kernel", COLORS["tilt"])
    figure.add_vline(x=predicted, line_color=COLORS["aligned"], annotation_text="mu + beta gamma sigma^2 grad Phi")
    figure.update_layout(yaxis_range=[0, 1.1])
    _right_axis(figure, "energy (no unit)", 0, 5.5)
    return figure


def order_figure(sigmas: Sequence[float], remainders: Mapping[str, FloatArray]) -> Figure:
    """Remainder of theorem 5 against sigma, both on logarithmic axes; the slope of each line is its order."""
    figure = Figure(
        x="sigma (no unit)",
        y="|mean - expansion| (no unit)",
        alt="Remainder of theorem 5 against sigma on logarithmic axes: straight lines whose slope is the order.",
    )
    colors = [COLORS["aligned"], COLORS["tilt"], COLORS["other"]]
    for (label, values), color in zip(remainders.items(), colors, strict=False):
        order = np.polyfit(np.log(sigmas), np.log(values), 1)[0]
        _line(figure, np.asarray(sigmas), values, f"{label}: slope {order:.2f}", color)
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log", exponentformat="power")
    return figure


def step_figure(step: force.TiltedStep, x: str) -> Figure:
    """Displacement of a tilted kernel over theorem 5's prediction, against sigma, with error bars of two errors."""
    figure = Figure(
        x=x,
        y="displacement / (beta gamma sigma^2 |f|)",
        alt="Displacement of the tilted kernel in units of theorem 5's prediction against sigma, with error bars; the "
        "dotted line is 1.",
    )
    for label, values, errors, color in (
        ("measured", step.measured, step.measured_error, COLORS["base"]),
        ("by Stein's identity", step.by_stein, step.by_stein_error, COLORS["aligned"]),
    ):
        bars = {"type": "data", "array": (2 * errors).round(4)}
        figure.add_trace(
            go.Scatter(x=step.sigmas, y=values.round(4), error_y=bars, name=label, mode="markers", marker_color=color)
        )
    figure.add_hline(y=1, line_dash="dot", annotation_text="theorem 5, sigma to 0")
    return figure


def cosine_figure(found: AlchemicalCosines) -> Figure:
    """Histogram of the cosines over states and molecules, with the random-direction control (paper Figure 10)."""
    figure = Figure(
        x="cos(f_alch, f)",
        y="share of the states",
        alt="Histograms of the cosine of the alchemical force, and of a random direction, with the oracle's force.",
    )
    for label, values, color in (
        ("alchemical force", found.cosine, COLORS["tilt"]),
        ("random direction", found.control, COLORS["base"]),
    ):
        kept = values[values.isfinite()].numpy()
        counts, edges = np.histogram(kept, bins=40, range=(-1, 1))
        centres = ((edges[:-1] + edges[1:]) / 2).round(3)
        figure.add_trace(go.Bar(x=centres, y=(counts / len(kept)).round(4), name=label, marker_color=color))
    figure.update_layout(barmode="overlay")
    figure.update_traces(opacity=0.75)
    return figure


def cosine_by_time_figure(found: AlchemicalCosines, trained: int | None = None) -> Figure:
    """Mean cosine and its control against t with two standard errors; `trained`: largest t that alignment trained.

    A time at which fewer than two molecules were judged has no error and is not shown.
    """
    figure = Figure(
        x="time t (steps of the schedule)",
        y="mean cosine",
        alt="Mean cosine of the alchemical force, and of random directions, with the oracle's force against the time "
        "t, with error bars of two standard errors; the trained times are shaded.",
    )
    for label, values, color in (
        ("alchemical force", found.cosine, COLORS["tilt"]),
        ("random direction", found.control, COLORS["base"]),
    ):
        mean, error = mean_by_time(values)
        known = error.isfinite()
        x, y, deviation = (v[known].numpy() for v in (found.times, mean, error))
        bars = {"type": "data", "array": (2 * deviation).round(4)}
        figure.add_scatter(x=x, y=y.round(4), error_y=bars, mode="markers", name=label, marker_color=color)
    if trained is not None:
        figure.add_vrect(x0=0, x1=trained, fillcolor=COLORS["aligned"], opacity=0.1, line_width=0)
    figure.update_yaxes(range=[-1, 1])
    return figure


def noise_norm_figure(atoms: int, n: int = 4000) -> Figure:
    """Squared norm of position noise, projected and not, with chi-square densities of 3(N - 1) and 3 N dimensions."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(n, atoms, 3, generator=generator)
    centred = raw - raw.mean(1, keepdim=True)
    figure = Figure(
        x="|xi|^2 (no unit)",
        y="density",
        title=f"{atoms} atoms",
        alt=f"Squared norm of noise for {atoms} atoms: projected it follows the chi-square law of {3 * (atoms - 1)} "
        f"dimensions, not projected that of {3 * atoms}.",
    )
    grid = np.linspace(0, 9 * atoms, 120)
    for label, noise, dims, color in (
        ("projected", centred, 3 * (atoms - 1), COLORS["aligned"]),
        ("not projected", raw, 3 * atoms, COLORS["base"]),
    ):
        counts, edges = np.histogram(noise.square().sum((1, 2)).numpy(), bins=50, range=(0, 9 * atoms), density=True)
        centres = ((edges[:-1] + edges[1:]) / 2).round(3)
        figure.add_trace(go.Bar(x=centres, y=counts.round(4), name=label, marker_color=color, opacity=0.5))
        _line(figure, grid, chi2.pdf(grid, dims), f"chi-square, {dims} dimensions", color)
    figure.update_layout(barmode="overlay")
    return figure
