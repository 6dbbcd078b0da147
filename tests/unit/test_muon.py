"""Muon: the orthogonal factor, agreement with PyTorch's own, the split of a model's parameters, resume."""

import copy

import pytest
import torch

from elign_lab.denoiser import Denoiser, DenoiserConfig
from elign_lab.denoiser.pretrain import PretrainConfig
from elign_lab.gpff.train import TrainConfig
from elign_lab.muon import Muon, MuonAdamW, orthogonal_factor
from elign_lab.oracles.fit import FitConfig
from elign_lab.training import OPTIMIZERS


@pytest.mark.parametrize("shape", [(3, 40, 90), (90, 40), (64, 80)])
def test_singular_values_become_about_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    factor = orthogonal_factor(matrices)
    values = torch.linalg.svdvals(factor)
    assert values.min() > 0.3
    assert values.max() < 1.3
    cosine = (factor * (u @ vt)).sum((-2, -1)) / factor.norm(dim=(-2, -1)) / (u @ vt).norm(dim=(-2, -1))
    assert (cosine > 0.97).all()


def test_a_zero_gradient_gives_no_step():
    assert torch.equal(orthogonal_factor(torch.zeros(12, 20)), torch.zeros(12, 20))


def test_equal_to_pytorch_up_to_its_bfloat16():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(s)) for s in [(24, 50), (50, 24), (24, 24), (24, 50)]]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    optimizers = (
        Muon(ours, lr=0.1, weight_decay=0.02),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, before in zip(ours, theirs, start, strict=True):
        assert (p - q).norm() < 0.02 * (p - before).norm()


def test_inputs_and_outputs_of_the_denoiser_go_to_adamw():
    model = Denoiser(DenoiserConfig(features=16, layers=2))
    optimizer = MuonAdamW(model.parameters(), lr=1e-3)
    names = {id(p): name for name, p in model.named_parameters()}
    hidden, rest = ([names[id(p)] for p in part.param_groups[0]["params"]] for part in optimizer.parts)
    assert len(hidden) + len(rest) == len(names)
    assert all(name.endswith("weight") for name in hidden)
    assert {"network.embedding.weight", "network.embedding_out.weight"} <= set(rest)
    assert "network.blocks.0.messages.0.edge.second.weight" in hidden


def test_state_restores_the_next_step():
    def steps(model, optimizer, first, last):
        for k in range(first, last):
            generator = torch.Generator().manual_seed(k)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Linear(16, 16))
    optimizer = MuonAdamW(model.parameters(), lr=0.01)
    steps(model, optimizer, 0, 3)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state = copy.deepcopy(optimizer.state_dict())  # as a file would hold it
    again = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Linear(16, 16))
    again.load_state_dict(weights)
    other = MuonAdamW(again.parameters(), lr=0.01)
    other.load_state_dict(state)
    steps(model, optimizer, 3, 6)
    steps(again, other, 3, 6)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_bad_input():
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(4))], lr=0.1)
    with pytest.raises(ValueError, match="more than 8"):
        MuonAdamW([torch.nn.Parameter(torch.zeros(4, 40))], lr=0.1)


@pytest.mark.parametrize("config", [PretrainConfig, FitConfig, TrainConfig])
def test_every_training_knows_the_optimizers_by_name(config):
    for name in OPTIMIZERS:
        assert config(optimizer=name).optimizer == name
    with pytest.raises(ValueError, match="optimizer must be one of adam, adamw, muon, got 'sgd'"):
        config(optimizer="sgd")
