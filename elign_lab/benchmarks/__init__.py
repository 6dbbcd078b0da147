"""Speed of the denoiser, measured against the matrix products of the same machine in the same run."""

from elign_lab.benchmarks.denoiser import bench_denoiser, denoiser_text, forward_flops
from elign_lab.benchmarks.padded_egnn import padded_eps

__all__ = ["bench_denoiser", "denoiser_text", "forward_flops", "padded_eps"]
