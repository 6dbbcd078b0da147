"""Speed of the denoiser against the matrix products of the same machine, and of the oracles against each other."""

from elign_lab.benchmarks.denoiser import bench_denoiser, denoiser_text, forward_flops
from elign_lab.benchmarks.denoiser_cuda import bench_denoiser_cuda, denoiser_cuda_text
from elign_lab.benchmarks.oracles import bench_oracles, oracle_makers, oracles_figure, oracles_text
from elign_lab.benchmarks.padded_egnn import padded_eps

__all__ = [
    "bench_denoiser",
    "bench_denoiser_cuda",
    "bench_oracles",
    "denoiser_cuda_text",
    "denoiser_text",
    "forward_flops",
    "oracle_makers",
    "oracles_figure",
    "oracles_text",
    "padded_eps",
]
