"""What every training run shares."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from elign_lab.denoiser.pretrain import PretrainConfig
from elign_lab.training import average_gradients, clip_gradients, require_same_run


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


def test_a_gradient_that_only_another_process_has_arrives():
    """Two processes, of which the other has the gradient (4, 4): a parameter without one here gets its half."""
    others = torch.tensor([4.0, 4.0])
    accelerator = SimpleNamespace(num_processes=2, reduce=lambda mine, how: (mine + others) / 2)
    first, second = parameters([2.0], [0.0])
    second.grad = None
    average_gradients(accelerator, iter([first, second]))
    assert (float(first.grad), float(second.grad)) == (3.0, 2.0)


def test_a_setting_that_came_later_does_not_end_old_runs():
    saved = asdict(PretrainConfig())
    del saved["early_share"], saved["model"]["layers"]
    require_same_run("checkpoint.pt", saved, PretrainConfig(), free=())
    with pytest.raises(ValueError, match=r"checkpoint.pt was made with early_share = 0.0, not 0.5"):
        require_same_run("checkpoint.pt", saved, PretrainConfig(early_share=0.5), free=())
    saved["model"]["features"] = 8
    with pytest.raises(ValueError, match="made with model = "):
        require_same_run("checkpoint.pt", saved, PretrainConfig(), free=())
