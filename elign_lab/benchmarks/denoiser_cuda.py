"""`elign-lab bench denoiser --device cuda`: forward pass and training step on a GPU, against its GEMM rate.

Each model is measured in float32, in float32 through the tensor cores (TF32) and with bfloat16 products, with and
without torch.compile of the edge network. The rate counts the operations of one factorised pass without padding
(`forward_flops`), three times for a training step, although its backward pass also recomputes the forward one; the
bound is a large matrix product in the same precision, measured in the same run. Times are medians.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from elign_lab.benchmarks.denoiser import MODELS, denoiser_problem, forward, forward_flops, machine, training_step
from elign_lab.denoiser import Layout
from elign_lab.denoiser.egnn import EGNN
from elign_lab.training import tensor_cores

GEMM = 8192  # side of the square matrices of the bound
MOLECULES = 512


@dataclass(frozen=True)
class Precision:
    """How the large products are computed: dtype of the edge network, and whether float32 may use the tensor cores."""

    name: str
    dtype: torch.dtype | None = None
    tf32: bool = False

    def on(self, device: torch.device) -> AbstractContextManager[None]:
        """A block in which products on `device` are computed so."""
        return tensor_cores(device) if self.tf32 else nullcontext()


PRECISIONS = (
    Precision("float32"),
    Precision("tf32", tf32=True),
    Precision("bfloat16", dtype=torch.bfloat16, tf32=True),
)


def bench_denoiser_cuda(
    repeats: int = 7,
    models: Sequence[tuple[int, int]] = MODELS,
    molecules: int = MOLECULES,
    seed: int = 0,
    device: torch.device | str = "cuda",
    compiled: Sequence[bool] = (False, True),
) -> dict[str, Any]:
    """Measure each model (features, layers); times in seconds, rates in TFLOP/s, speed in molecules a second."""
    device = torch.device(device)
    rows = []
    for precision in PRECISIONS:
        gemm = _gemm_rate(precision, device, repeats)
        for (features, layers), how in itertools.product(models, compiled):
            row = _measure(features, layers, precision, how, molecules, seed, device, repeats)
            row["gemm_tflops"] = gemm / 1e12
            for job in ("forward", "training"):
                row[f"{job}_share"] = row[f"{job}_flop"] / row[f"{job}_s"] / gemm
            rows.append(row)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {**machine(), "device": name},
        "molecules": molecules,
        "seed": seed,
        "gemm": f"{GEMM} x {GEMM} x {GEMM}",
        "rows": rows,
    }


def denoiser_cuda_text(result: dict[str, Any]) -> str:
    """The result for a terminal."""
    lines = ["features layers precision  compile   forward mol/s   share   training mol/s   share   GEMM TFLOP/s"]
    lines += [
        f"{row['features']:8d} {row['layers']:6d} {row['precision']:10s} {row['compiled']!s:7s} "
        f"{result['molecules'] / row['forward_s']:15.0f} {row['forward_share']:7.1%} "
        f"{result['molecules'] / row['training_s']:16.0f} {row['training_share']:7.1%} {row['gemm_tflops']:14.0f}"
        for row in result["rows"]
    ]
    return "\n".join([*lines, f"{result['molecules']} molecules, {result['machine']['device']}"])


def _measure(
    features: int,
    layers: int,
    precision: Precision,
    compiled: bool,
    molecules: int,
    seed: int,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    model, z, t, mask = denoiser_problem(features, layers, molecules, seed)
    flops = forward_flops(model.config, mask.sum(1))
    reference = forward(model, z[:8], t[:8], mask[:8])
    model, z, t, layout = model.to(device), z.to(device), t.to(device), Layout(mask, device=device)
    assert isinstance(model.network, EGNN)
    model.network.dtype, model.network.compiled = precision.dtype, compiled
    problem = (model, z, t, layout.mask, layout)
    with precision.on(device):
        difference = forward(model, z[:8], t[:8], layout.mask[:8]).cpu() - reference
        forward_s = _seconds(lambda: forward(*problem), device, repeats)
        training_s = _seconds(lambda: training_step(*problem), device, repeats)
    return {
        "features": features,
        "layers": layers,
        "precision": precision.name,
        "compiled": compiled,
        "forward_s": forward_s,
        "training_s": training_s,
        "forward_flop": flops,
        "training_flop": 3 * flops,
        "difference_from_cpu": float(difference.norm() / reference.norm()),
    }


def _gemm_rate(precision: Precision, device: torch.device, repeats: int) -> float:
    side = GEMM if device.type == "cuda" else 256
    generator = torch.Generator(device).manual_seed(0)  # random: on zeros a GPU is faster
    dtype = precision.dtype or torch.float32
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    with precision.on(device):
        return 2.0 * side**3 / _seconds(lambda: a @ b, device, repeats)


def _seconds(job: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a job after three runs to warm up."""
    for _ in range(3):
        job()
    times = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        job()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
