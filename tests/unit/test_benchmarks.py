"""The padded network equals the packed one, and the benchmark counts what it says."""

from __future__ import annotations

import pytest
import torch

from elign_lab.benchmarks import (
    bench_denoiser,
    bench_denoiser_cuda,
    denoiser_cuda_text,
    denoiser_text,
    forward_flops,
    padded_eps,
)
from elign_lab.denoiser import Denoiser, DenoiserConfig
from elign_lab.sampling import mask_of_sizes


def denoiser(**options) -> Denoiser:
    torch.manual_seed(3)
    model = Denoiser(DenoiserConfig(features=32, layers=3, **options))
    for block in model.network.blocks:  # EDM starts the coordinate head near zero, where an error would not show
        torch.nn.init.normal_(block.coordinates.out.weight, std=0.1)
    return model


@pytest.mark.parametrize(
    "options",
    [{}, {"sublayers": 2}, {"attention": False, "tanh": False}, {"normalization_factor": 7.0, "condition_time": False}],
    ids=["edm", "sublayers", "plain", "normalised"],
)
@torch.no_grad()
def test_padded_network_equals_the_packed_one(options):
    model = denoiser(**options)
    mask = mask_of_sizes([1, 2, 5, 17, 29])
    generator = torch.Generator().manual_seed(0)
    z = model.noise(mask, generator)
    t = torch.tensor([0, 10, 500, 900, 1000])
    expected, found = model.eps(z, t, mask), padded_eps(model, z, t, mask)
    assert float((expected - found).abs().max()) <= 1e-5 * float(expected.abs().max())
    # and the comparison can fail
    model.network.blocks[1].coordinates.out.weight.mul_(1.01)
    assert float((expected - padded_eps(model, z, t, mask)).abs().max()) > 1e-5 * float(expected.abs().max())


def test_padded_network_refuses_what_it_does_not_cover():
    model = Denoiser(DenoiserConfig(features=8, layers=1, sin_embedding=True))
    mask = mask_of_sizes([3])
    with pytest.raises(ValueError, match="sin_embedding"):
        padded_eps(model, model.noise(mask), torch.zeros(1, dtype=torch.long), mask)


def test_operation_count_against_a_profile():
    """The formula counts the matrix products that the profiler sees, within the small terms that it leaves out."""
    from torch.utils.flop_counter import FlopCounterMode

    model = Denoiser(DenoiserConfig(features=64, layers=2))
    sizes = torch.tensor([20] * 8)
    mask = mask_of_sizes(sizes)
    z = model.noise(mask)
    with FlopCounterMode(display=False) as counter:
        model.eps(z, torch.zeros(8, dtype=torch.long), mask)
    # the packed blocks hold the n self pairs as well; the counter sees no matrix-vector products
    seen, counted = counter.get_total_flops(), forward_flops(model.config, sizes)
    assert 0.95 <= seen / counted <= 1.15


def test_gpu_benchmark_measures_every_precision():
    result = bench_denoiser_cuda(repeats=1, models=((16, 1),), molecules=9, device="cpu", compiled=(False,))
    rows = {row["precision"]: row for row in result["rows"]}
    assert list(rows) == ["float32", "tf32", "bfloat16"]
    assert rows["float32"]["difference_from_cpu"] == 0
    assert 1e-5 < rows["bfloat16"]["difference_from_cpu"] < 0.1
    for row in rows.values():
        assert row["forward_share"] == pytest.approx(row["forward_flop"] / row["forward_s"] / row["gemm_tflops"] / 1e12)
        assert row["training_flop"] == 3 * row["forward_flop"]
    assert torch.get_float32_matmul_precision() == "highest"
    assert len(denoiser_cuda_text(result).splitlines()) == 5


def test_benchmark_has_every_figure():
    result = bench_denoiser(repeats=1, models=((16, 1),), molecules=4)
    (model,) = result["models"]
    assert result["batch"]["molecules"] == 4
    assert set(model["ratios"]) == {"share_of_gemm", "speedup_over_padded", "training_extra_gb", "by_cpu_time"}
    assert 0 < model["ratios"]["share_of_gemm"] < 1
    assert model["difference"] < 1e-5
    assert model["forward_seconds"]["best"] <= model["forward_seconds"]["median"]
    assert "16 features, 1 layers" in denoiser_text(result)
