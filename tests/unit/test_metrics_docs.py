"""docs/metrics.md explains exactly the keys that real runs log."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from elign_lab.alignment import Trainer, cpu_mini
from elign_lab.alignment.rewards import TerminalChannel
from elign_lab.datasets import load_dataset
from elign_lab.denoiser import Denoiser, DenoiserConfig
from elign_lab.denoiser.pretrain import PretrainConfig, pretrain
from elign_lab.oracles.fit import FitConfig, fit_oracle
from elign_lab.oracles.labels import LabelSet
from elign_lab.oracles.learned import EnergyConfig, EnergyModel, LearnedOracle
from elign_lab.painn import PaiNNConfig
from elign_lab.training import read_json_lines

TEXT = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
SMALL = PaiNNConfig(features=8, vectors=4, channels=4, layers=1)


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its two heading lines."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def keys(heading: str) -> set[str]:
    return {row[0].strip("`") for row in rows(heading)}


@pytest.mark.parametrize("heading", ["Alignment", "Pretraining", "Fitting an oracle"])
def test_every_row_has_a_formula(heading):
    for row in rows(heading):
        assert len(row) == 4, row
        assert row[1], f"{row[0]} has no formula"


def test_alignment_log(tmp_path):
    torch.manual_seed(0)
    model = Denoiser(DenoiserConfig(features=16, layers=1, size_histogram=((5, 1),)))
    oracle = LearnedOracle(EnergyModel(EnergyConfig(network=SMALL)))
    config = replace(
        cpu_mini(), groups=2, members=2, steps=6, skip_prefix=4, evaluate_every=1, evaluate_n=2, max_failure_share=1.0
    )
    channel = TerminalChannel("NAME", 0.1, lambda molecules: molecules.sizes.float())
    Trainer(model, oracle, config, out=tmp_path, channels=[channel]).run(1, progress=False)
    (row,) = read_json_lines(tmp_path / "log.jsonl")
    assert set(row) == keys("Alignment")


def test_pretraining_log(tmp_path):
    config = PretrainConfig(
        model=DenoiserConfig(features=8, layers=1), steps=1, batch_size=4, log_every=1, validate_every=1
    )
    pretrain(config, tmp_path, progress=False)
    (row,) = read_json_lines(tmp_path / "log.jsonl")
    assert set(row) == keys("Pretraining")


def test_fit_log(tmp_path):
    data = load_dataset("bundled", split="test")
    numbers, positions = zip(*data.batch(torch.arange(8)).arrays(), strict=True)
    sizes = [len(z) for z in numbers]
    labels = LabelSet(
        np.concatenate(numbers),
        np.concatenate(positions),
        np.random.default_rng(0).normal(size=(sum(sizes), 3)),
        np.array(sizes),
        np.zeros(8),
        np.array(["minimum"] * 8),
    )
    config = FitConfig(network=SMALL, steps=1, batch_size=4, log_every=1, validate_every=1)
    energies = dict.fromkeys(config.elements, 0.0)
    fit_oracle(config, labels, tmp_path, atom_energies=energies, validation=labels, progress=False)
    (row,) = read_json_lines(tmp_path / "log.jsonl")
    assert set(row) == keys("Fitting an oracle")
