"""Shares of a batch in threads of their own: the same numbers, and nothing left behind."""

import os

import pytest
import torch

from elign_lab.denoiser import Denoiser, DenoiserConfig, Layout, diffusion, threads
from elign_lab.sampling import mask_of_sizes, sample

SIZES = torch.tensor([5, 18, 1, 9, 23, 9, 2])


@pytest.fixture(params=[2, 3])
def with_threads(request, monkeypatch):
    """That many threads, and every batch large enough for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(diffusion, "MIN_WORK", 0.0)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("context", [0, 2])
def test_shares_give_what_the_whole_batch_gives(with_threads, monkeypatch, context):
    model = Denoiser(DenoiserConfig(features=16, layers=2, context=context)).double()
    generator = torch.Generator().manual_seed(0)
    mask = mask_of_sizes(SIZES)
    z = model.noise(mask, generator)
    t = torch.randint(0, 1001, (len(SIZES),), generator=generator)
    given = None
    if context:
        given = torch.randn(*mask.shape, context, generator=generator, dtype=torch.float64) * mask.unsqueeze(-1)
    calls = []
    monkeypatch.setattr(
        diffusion, "thread_map", lambda f, items: calls.append(len(items)) or threads.thread_map(f, items)
    )
    with torch.no_grad():
        shared = model.eps(z, t, mask, context=given)
    whole = model.eps(z, t, mask, context=given)  # with gradients: one piece
    assert calls == [with_threads]
    assert whole.requires_grad
    torch.testing.assert_close(shared, whole.detach(), rtol=1e-12, atol=1e-12)


def test_samples_are_made_in_shares(with_threads, monkeypatch):
    model = Denoiser(DenoiserConfig(features=16, layers=2)).double()
    calls = []
    monkeypatch.setattr(
        diffusion, "thread_map", lambda f, items: calls.append(len(items)) or threads.thread_map(f, items)
    )
    shared = sample(model, len(SIZES), sizes=SIZES.tolist(), steps=3, seed=1)
    assert calls == [with_threads] * 4  # three steps and the last call, which decodes
    monkeypatch.setattr(diffusion, "MIN_WORK", float("inf"))
    whole = sample(model, len(SIZES), sizes=SIZES.tolist(), steps=3, seed=1)
    torch.testing.assert_close(shared.positions, whole.positions, rtol=1e-9, atol=1e-9)


def test_every_molecule_is_in_one_share_and_the_shares_are_alike():
    layout = Layout(mask_of_sizes(SIZES))
    parts = [members for members, _ in layout.shares(3)]
    assert layout.shares(3) is layout.shares(3)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(SIZES)))
    assert [len(part) for part in parts] == [3, 2, 2]


def test_a_thread_has_one_thread_of_pytorch_and_no_gradient():
    before = torch.get_num_threads()
    found = threads.thread_map(lambda x: (torch.get_num_threads(), torch.is_grad_enabled()), [torch.ones(1)] * 2)
    assert found == [(1, False)] * 2
    assert torch.get_num_threads() == before
    assert torch.is_grad_enabled()


def test_an_error_in_a_thread_is_raised():
    def fail(x):
        raise FloatingPointError("as the function said")

    with pytest.raises(FloatingPointError, match="as the function said"):
        threads.thread_map(fail, [torch.ones(1)] * 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_process_starts_its_own_threads():
    assert threads.thread_map(lambda x: int(x), [torch.tensor(1), torch.tensor(2)]) == [1, 2]
    child = os.fork()
    if child == 0:
        os._exit(sum(threads.thread_map(lambda x: 1, [torch.ones(1)] * 2)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2


def test_small_work_and_one_thread_stay_in_one_piece(monkeypatch):
    model = Denoiser(DenoiserConfig(features=16, layers=1))
    mask = mask_of_sizes(torch.tensor([3, 4]))
    monkeypatch.setattr(diffusion, "thread_map", lambda *_: pytest.fail("threads for a small batch"))
    with torch.no_grad():
        model.eps(model.noise(mask), torch.tensor([1, 2]), mask)
