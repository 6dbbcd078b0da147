"""What every training run shares."""

from __future__ import annotations

import pytest
import torch

from elign_lab.training import clip_gradients


def parameters(*gradients: list[float]) -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.zeros(len(g))) for g in gradients]
    for p, g in zip(made, gradients, strict=True):
        p.grad = torch.tensor(g)
    return made


def test_gradients_are_clipped_by_their_common_norm():
    clipped = parameters([3.0, 0.0], [4.0])
    assert float(clip_gradients(iter(clipped), 1.0)) == pytest.approx(5.0)
    torch.testing.assert_close(torch.cat([p.grad for p in clipped]), torch.tensor([0.6, 0.0, 0.8]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_without_a_finite_gradient_moves_nothing(bad):
    spoilt = parameters([3.0, bad], [4.0])
    assert not clip_gradients(spoilt, 1.0).isfinite()
    assert all(float(p.grad.abs().max()) == 0 for p in spoilt)
