"""`elign-lab bench denoiser`: forward pass, padded forward pass, GEMM rate and training step, interleaved in one run.

On a shared machine a single time says little. So each repetition measures every quantity once, one after the other, and
the ratios use the best time of each, which is the one that other processes disturbed least; medians are given too. The
same ratios by CPU time (of all threads) are what a busy machine would give when it is quiet; GOMP_SPINCOUNT=0 keeps
waiting threads from counting as working.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from elign_lab.benchmarks.padded_egnn import padded_eps
from elign_lab.datasets import qm9_size_histogram
from elign_lab.denoiser import Denoiser, DenoiserConfig, Layout
from elign_lab.sampling import mask_of_sizes

MOLECULES = 64
MODELS = ((256, 9), (96, 6))  # (features, layers): EDM's QM9 model and edm-mini
GEMMS = ((3072, 3072, 3072), (2048, 256, 256))  # a large product, and the shape of a block of the edge network
SMALL_GEMM_CALLS = 64
_CLEAR_PEAK = Path("/proc/self/clear_refs")  # Linux: writing 5 resets the peak resident memory (man 5 proc)
TARGETS = {"share_of_gemm": 0.70, "speedup_over_padded": 9.0, "training_extra_gb": 0.5}


def bench_denoiser(
    repeats: int = 7, models: Sequence[tuple[int, int]] = MODELS, molecules: int = MOLECULES, seed: int = 0
) -> dict[str, Any]:
    """Measure each model (features, layers) on molecules of QM9's sizes; times in seconds, rates in GFLOP/s."""
    results = [_bench_model(*model, repeats=repeats, molecules=molecules, seed=seed) for model in models]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "batch": {**_batch_figures(molecules, seed), "seed": seed},
        "targets": TARGETS,
        "operation_count": "layers * (pairs * (4 F^2 + 12 F) + atoms * 14 F^2), pairs = sum n (n - 1)",
        "models": results,
    }


def forward_flops(config: DenoiserConfig, sizes: Tensor) -> float:
    """Operations of one factorised forward pass without padding.

    For F features, a pair and layer: two edge networks of 2 F^2 (second linear layer) + 4 F (the two distances) + 2 F
    (head); an atom and layer: 8 F^2 (first linear layers, factorised) + 6 F^2 (node network). sizes (B,).
    """
    f, layers = config.features, config.layers
    pairs, atoms = int((sizes * (sizes - 1)).sum()), int(sizes.sum())
    return layers * (pairs * (4 * f**2 + 12 * f) + atoms * 14 * f**2)


def denoiser_text(result: dict[str, Any]) -> str:
    """The result for a terminal, ratios first."""
    machine, batch = result["machine"], result["batch"]
    lines = []
    for m in result["models"]:
        ratios = m["ratios"]
        cpu, extra = ratios["by_cpu_time"], ratios["training_extra_gb"]
        lines += [
            f"{m['features']} features, {m['layers']} layers",
            f"  share of the GEMM rate     {ratios['share_of_gemm']:8.1%}   by CPU time {cpu['share_of_gemm']:8.1%}   "
            "(target at 256 features: 70 %)",
            f"  speed-up over padded       {ratios['speedup_over_padded']:8.1f} x by CPU time "
            f"{cpu['speedup_over_padded']:8.1f} x (target at 256 features: 9 x)",
            f"  training step, extra       {'unknown' if extra is None else f'{extra:8.2f} GB'} (target: 0.5 GB)",
            f"  forward {m['forward_seconds']['best']:.3f} s, padded {m['padded_seconds']['best']:.3f} s, "
            f"training step {m['training_step_seconds']['best']:.3f} s, largest difference {m['difference']:.1e}",
            "  GEMM " + ", ".join(f"{shape}: {rate['best']:.0f} GFLOP/s" for shape, rate in m["gemm"].items()),
        ]
    lines.append(
        f"{batch['molecules']} molecules, {batch['atoms']} atoms, {batch['pairs']} pairs, "
        f"padded to {batch['largest']}; "
        f"{machine['processor']}, {machine['threads']} threads, load {machine['load']}, torch {machine['torch']}"
    )
    return "\n".join(lines)


def _bench_model(features: int, layers: int, repeats: int, molecules: int, seed: int) -> dict[str, Any]:
    model, z, t, mask = denoiser_problem(features, layers, molecules, seed)
    jobs: dict[Any, Callable[[], object]] = {
        **{shape: _gemm(shape) for shape in GEMMS},
        "forward": lambda: forward(model, z, t, mask),
        "padded": lambda: _padded(model, z, t, mask),
        "training_step": lambda: training_step(model, z, t, mask),
    }
    difference = float((forward(model, z, t, mask) - _padded(model, z, t, mask)).abs().max())
    times: dict[Any, list[float]] = {name: [] for name in jobs}
    cpu_times: dict[Any, list[float]] = {name: [] for name in jobs}
    for _ in tqdm(range(repeats), desc=f"{features} features, {layers} layers"):
        for name, job in jobs.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            job()
            times[name].append(time.perf_counter() - start)
            cpu_times[name].append(time.process_time() - cpu_start)
    flops = forward_flops(model.config, mask.sum(1))
    gemm = {"x".join(map(str, shape)): _rates(_gemm_flops(shape), times[shape]) for shape in GEMMS}
    return {
        "features": features,
        "layers": layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "ratios": {
            **_ratios(flops, times),
            "training_extra_gb": _training_extra_gb(features, layers, molecules, seed),
            "by_cpu_time": _ratios(flops, cpu_times),
        },
        "gflop": flops / 1e9,
        "gemm": gemm,
        **{f"{name}_seconds": _spread(times[name]) for name in ("forward", "padded", "training_step")},
        "difference": difference,
    }


def _ratios(flops: float, times: dict[Any, list[float]]) -> dict[str, float]:
    """Rate of the forward pass over that of the faster GEMM shape, and padded over packed time; best times."""
    best = {name: min(values) for name, values in times.items()}
    gemm = max(_gemm_flops(shape) / best[shape] for shape in GEMMS)
    return {
        "share_of_gemm": flops / best["forward"] / gemm,
        "speedup_over_padded": best["padded"] / best["forward"],
    }


def denoiser_problem(features: int, layers: int, molecules: int, seed: int) -> tuple[Denoiser, Tensor, Tensor, Tensor]:
    """A model of this size, and a noisy batch with sizes from QM9's histogram."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # initial weights: PyTorch's initialisers take no generator
        model = Denoiser(DenoiserConfig(features=features, layers=layers))
    mask = mask_of_sizes(_sizes(molecules, seed))
    generator = torch.Generator().manual_seed(seed)
    z = model.noise(mask, generator)
    t = torch.randint(0, model.config.timesteps + 1, (molecules,), generator=generator)
    return model, z, t, mask


def _sizes(molecules: int, seed: int) -> Tensor:
    histogram = sorted(qm9_size_histogram().items())
    weights = torch.tensor([count for _, count in histogram], dtype=torch.float64)
    drawn = torch.multinomial(weights, molecules, replacement=True, generator=torch.Generator().manual_seed(seed))
    return torch.tensor([n for n, _ in histogram])[drawn]


@torch.no_grad()
def forward(model: Denoiser, z: Tensor, t: Tensor, mask: Tensor, layout: Layout | None = None) -> Tensor:
    """The forward pass that is measured."""
    return model.eps(z, t, mask, layout=layout)


@torch.no_grad()
def _padded(model: Denoiser, z: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    return padded_eps(model, z, t, mask)


def training_step(model: Denoiser, z: Tensor, t: Tensor, mask: Tensor, layout: Layout | None = None) -> None:
    """Forward and backward pass of a squared error."""
    model.zero_grad()
    model.eps(z, t, mask, layout=layout).square().sum().backward()


def _training_extra_gb(features: int, layers: int, molecules: int, seed: int) -> float | None:
    """Peak memory of a training step over the resident memory before it, in a fresh process; None but on Linux."""
    if not _CLEAR_PEAK.exists():
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure_extra_gb, features, layers, molecules, seed).result()


def _measure_extra_gb(features: int, layers: int, molecules: int, seed: int) -> float:
    model, z, t, mask = denoiser_problem(features, layers, molecules, seed)
    training_step(model, z[:1], t[:1], mask[:1])  # loads the libraries' own buffers
    _CLEAR_PEAK.write_text("5")  # importing took more memory than is in use now
    before = _status_gb("VmRSS")
    training_step(model, z, t, mask)
    return _status_gb("VmHWM") - before


def _status_gb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024 / 1e9


def _gemm(shape: tuple[int, int, int]) -> Callable[[], object]:
    m, k, n = shape
    a, b = torch.ones(m, k), torch.ones(k, n)
    return lambda: [a @ b for _ in range(_calls(shape))]


def _calls(shape: tuple[int, int, int]) -> int:
    return 1 if min(shape) > 1024 else SMALL_GEMM_CALLS


def _gemm_flops(shape: tuple[int, int, int]) -> float:
    m, k, n = shape
    return 2.0 * m * k * n * _calls(shape)


def _rates(flops: float, seconds: Sequence[float]) -> dict[str, float]:
    return {"best": flops / min(seconds) / 1e9, "median": flops / statistics.median(seconds) / 1e9}


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {"best": min(seconds), "median": statistics.median(seconds)}


def _batch_figures(molecules: int, seed: int) -> dict[str, int]:
    sizes = _sizes(molecules, seed)
    pairs = int((sizes * (sizes - 1)).sum())
    return {"molecules": molecules, "atoms": int(sizes.sum()), "pairs": pairs, "largest": int(sizes.max())}


def machine() -> dict[str, Any]:
    """What a result was measured on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
