"""Noise and denoise: what is decided late stays, what is decided early is drawn anew, and bad times are refused."""

import pytest
import torch

from elign_lab import load_dataset, load_model
from elign_lab.evaluation import evaluate, stability
from elign_lab.evaluation.restarts import restart


@pytest.fixture(scope="module")
def model():
    return load_model("edm-mini")


@pytest.fixture(scope="module")
def reference():
    return load_dataset("bundled", split="validation").batch(torch.arange(6))


def test_t_0_is_the_decoding(model, reference):
    out = restart(model, reference, 0)
    assert torch.equal(out.numbers, reference.numbers)
    assert (out.positions - reference.positions)[reference.mask].abs().max() < 0.1
    assert stability(reference).atoms.sum() - stability(out).atoms.sum() <= 4


def test_the_further_up_the_further_away(model, reference):
    near, far = (restart(model, reference, t, seed=1) for t in (20, 100))
    moved = [(out.positions - reference.positions)[reference.mask].norm(dim=-1).mean() for out in (near, far)]
    assert moved[0] < moved[1]
    assert torch.equal(near.numbers, reference.numbers)


def test_it_is_seeded(model, reference):
    first, second = (evaluate(restart(model, reference, 5, seed=3)) for _ in range(2))
    assert first.molecules.smiles == second.molecules.smiles
    assert first.n == len(reference)


@pytest.mark.parametrize("t", [-1, 1001])
def test_times_outside_the_grid_are_refused(model, reference, t):
    with pytest.raises(ValueError, match="between 0 and 1000"):
        restart(model, reference, t)
