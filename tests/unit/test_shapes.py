"""Records at the end of a cell: what they hold in a few lines."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from elign_lab import load_dataset, load_oracle
from elign_lab.alignment import rollout
from elign_lab.denoiser import Denoiser, DenoiserConfig
from elign_lab.evaluation import stability
from elign_lab.evaluation.evidence import EVIDENCE, Evidence
from elign_lab.shapes import Shapes


@dataclass(frozen=True, repr=False)
class Inner(Shapes):
    x: torch.Tensor


@dataclass(frozen=True, repr=False)
class Outer(Inner):
    count: int = 3
    level: float = 1 / 3
    names: tuple[str, ...] = ("a", "b")
    many: tuple[str, ...] = tuple("abcdef")
    by_name: dict[str, np.ndarray] = field(default_factory=lambda: {"k": np.zeros(2)})
    inner: Inner = field(default_factory=lambda: Inner(torch.ones(30, 1, dtype=torch.bool)))


def test_arrays_are_shapes_and_long_sequences_lengths():
    assert repr(Inner(torch.zeros(2, 3))) == "Inner(x=(2, 3) float32)"
    lines = repr(Outer(torch.zeros(2, 3))).splitlines()
    assert [line.strip() for line in lines] == [
        "Outer(",
        "x=(2, 3) float32,",
        "count=3,",
        "level=0.3333,",
        "names=('a', 'b'),",
        "many=tuple of 6,",
        "by_name={'k': (2,) float64},",
        "inner=Inner(x=(30, 1) bool, 30 true),",
        ")",
    ]


@pytest.fixture(scope="module")
def model():
    return Denoiser(DenoiserConfig()).requires_grad_(False)


def test_the_records_of_a_course_are_short(model):
    molecules = load_dataset("bundled", split="test").batch([0, 1, 2])
    rollouts = rollout(model, [9, 9], 2, steps=4, skip_prefix=1)
    oracle = load_oracle("learned")
    for record in (rollouts, oracle(molecules), stability(molecules), Evidence.load(EVIDENCE)):
        text = repr(record)
        assert text.startswith(type(record).__name__ + "(")
        assert "tensor(" not in text
        assert len(text) < 700
    assert "states=(3, 4, 9, 9) float32" in repr(rollouts)
    assert repr(stability(molecules)).endswith("molecule=(3,) bool, 2 true)")
