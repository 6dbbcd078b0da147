"""Training of pseudo-force fields on equilibria that are perturbed on the fly: resumable, in one process or several.

Loss of a molecule with N atoms at noise level sigma, for the force F^ that the network predicts (hat: prediction):

    w(sigma) |F^ - F|^2 / (4 * 3 (N - 1)),        w(sigma) = 1 / (sigma^2 + floor^2) + 1 / sigma_d^2

|F^ - F| / 2 is the error of x0_hat. If molecules were Gaussian clouds of spread sigma_d, the best possible error of
x0_hat per degree of freedom would be sigma^2 sigma_d^2 / (sigma^2 + sigma_d^2), of which w is the inverse at floor = 0:
with this weight every noise level has the same loss, 1, before anything but the spread is known, and sigma log-uniform
gives every decade the same share of the gradient. (Without a weight the largest decade would have 10^4 times the loss
of the smallest.) The floor is the accuracy beyond which nothing is gained, below the length of the zero-point motion;
without it, the levels under the accuracy of the network would drown the others.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm.auto import tqdm

from elign_lab.datasets import BatchSampler, MoleculeDataset, load_dataset
from elign_lab.gpff.compositions import composition_counts
from elign_lab.gpff.model import GPFFConfig, PseudoForceField, save_force_field
from elign_lab.gpff.pseudo_forces import EXCHANGE_FROM, draw_sigma, nearest_image, partial_noise, perturb
from elign_lab.molecules import MoleculeBatch
from elign_lab.training import (
    ExponentialMovingAverage,
    JsonLines,
    LossWatch,
    Optimizer,
    StopRequest,
    any_process,
    average_gradients,
    check_optimizer,
    clip_gradients,
    make_accelerator,
    make_optimizer,
    resume_run,
    save_run,
    step_generator,
    tensor_cores,
    warmup_hold_decay,
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run. Lengths in Angstrom.

    floor: see the module; partial: share of the molecules in which a part of the atoms stays in place, as in growing a
    group; rotate, exchange: whether the target is the nearest image of the reference under rotation and under exchange
    of identical atoms, or the copy that the noise was added to.
    """

    model: GPFFConfig = field(default_factory=GPFFConfig)
    dataset: str = "bundled"
    geometry: str | None = None  # of the bundled set: 'xtb' (default) or 'mmff94'
    root: str | None = None  # folder of QM9 or GEOM-Drugs
    steps: int = 60_000
    batch_size: int = 64  # over all processes
    optimizer: str = "adam"  # a name in training.OPTIMIZERS
    learning_rate: float = 2e-3
    warmup: int = 500
    decay: int = 15_000  # steps of the linear decay at the end
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    floor: float = 0.03
    partial: float = 0.2
    rotate: bool = True
    exchange: bool = True
    workers: int = 0  # processes that make batches ahead, which a GPU needs; the numbers do not depend on it
    seed: int = 0
    log_every: int = 100
    validate_every: int = 1_000
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        check_optimizer(self.optimizer)
        if self.workers < 0:
            raise ValueError(f"workers must be 0 (this process) or more, got {self.workers}")


def gpff_mini() -> TrainConfig:
    """The size of the model that comes with the package, whose passport has the settings of its own run."""
    return TrainConfig()


def gpff_mini_conservative() -> TrainConfig:
    """The small model with an energy, whose gradient is the force; under twice the time of a step (docs/runs.md)."""
    return TrainConfig(model=GPFFConfig(variant="conservative"))


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "gpff_mini": gpff_mini,
    "gpff_mini_conservative": gpff_mini_conservative,
}


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    max_seconds: float | None = None,
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> PseudoForceField:
    """Train a pseudo-force field, or continue the run in folder `out`; returns the averaged (EMA) model.

    Writes out/checkpoint.pt (weights, optimiser, average, step), out/log.jsonl (with the loss of each decade of noise)
    and out/model.safetensors (the average). Stops after max_seconds or on Ctrl-C with a checkpoint, and resumes to the
    same numbers. On a GPU float32 products go through the tensor cores, as in `pretrain`. Raises ValueError when the
    run in `out` has other settings.
    """
    out = Path(out)
    accelerator = accelerator or make_accelerator()
    options = {"geometry": config.geometry} if config.geometry else {}
    with accelerator.main_process_first():  # a first use converts the files, for all processes
        data = load_dataset(config.dataset, split="train", root=config.root, **options)
        validation = load_dataset(config.dataset, split="validation", root=config.root, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # PyTorch's initialisers take no generator
        model = PseudoForceField(replace(config.model, compositions=composition_counts(data)))
    model = model.to(accelerator.device)
    parameters = list(model.parameters())
    optimizer = make_optimizer(config.optimizer, parameters, config.learning_rate)
    ema = ExponentialMovingAverage(parameters, config.ema_decay)
    step, seconds = 0, 0.0
    if (out / "checkpoint.pt").exists():
        step, seconds = resume_run(out / "checkpoint.pt", config, model, optimizer, ema)
    log = JsonLines(out / "log.jsonl", "step", step) if accelerator.is_main_process else None
    batches = _loader(data, config, accelerator, step)

    def checkpoint() -> None:
        if not accelerator.is_main_process:
            return
        save_run(out / "checkpoint.pt", config, step, seconds, model, optimizer, ema)
        ema.swap(parameters)
        save_force_field(model, out / "model.safetensors")
        ema.swap(parameters)

    hidden = not (progress and accelerator.is_main_process)
    bar = tqdm(total=config.steps, initial=step, desc="training", unit="step", disable=hidden)
    started, before = time.monotonic(), seconds
    curve, watch = DecadeMeans(config.model), LossWatch(out / "checkpoint.pt")
    with bar, StopRequest() as stop, tensor_cores(accelerator.device):
        while step < config.steps:
            factor = warmup_hold_decay(step, config.warmup, config.steps, config.decay)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor
            perturbed = next(batches)
            assert perturbed.step == step
            norm = _train_step(model, perturbed, config, accelerator, optimizer, parameters, curve)
            ema.update(parameters)
            step += 1
            seconds = before + time.monotonic() - started
            bar.update()
            if step % config.log_every == 0:
                row = {"step": step - 1, **curve.take(accelerator), "grad_norm": float(norm), "lr_factor": factor}
                watch.check(step, row["loss"])
                if step % config.validate_every == 0:
                    ema.swap(parameters)
                    row["validation"] = errors(model, validation)
                    ema.swap(parameters)
                if log is not None:
                    log.write({**row, "seconds": round(seconds, 1)})
                bar.set_postfix(loss=f"{row['loss']:.3f}")
            if step % config.checkpoint_every == 0:
                checkpoint()
            late = max_seconds is not None and time.monotonic() - started > max_seconds
            if any_process(accelerator, late or stop.requested):
                bar.write(f"stopped at step {step}: run the same command again to continue")
                break
    checkpoint()
    ema.swap(parameters)
    return model.eval()


class DecadeMeans:
    """Running means of the loss, in all and by decade of the noise level."""

    def __init__(self, config: GPFFConfig) -> None:
        self.first = math.floor(math.log10(config.sigma_min))
        self.names = decades(config)
        self.sums = torch.zeros(2, len(self.names))

    def add(self, sigma: Tensor, loss: Tensor) -> None:
        """Add the losses (B,) of molecules at noise levels (B,); does not wait for a GPU."""
        self.sums = self.sums.to(loss.device)
        decade = (sigma.log10().floor().long() - self.first).clamp(0, len(self.names) - 1)
        member = decade.unsqueeze(1) == torch.arange(len(self.names), device=loss.device)
        values = torch.stack([loss.detach(), torch.ones_like(loss)]).to(self.sums.dtype).unsqueeze(2)
        self.sums += torch.where(member, values, 0.0).sum(1)

    def take(self, accelerator: Accelerator) -> dict[str, Any]:
        """The means since the last call, over all processes."""
        total, count = accelerator.reduce(self.sums.to(accelerator.device), "sum").cpu()
        self.sums = torch.zeros_like(self.sums)
        means = (total / count).tolist()
        by_decade = {name: mean for name, mean, n in zip(self.names, means, count.tolist(), strict=True) if n}
        return {"loss": float(total.sum() / count.sum()), "decades": by_decade}


def decades(config: GPFFConfig) -> list[str]:
    """Names of the decades of noise between sigma_min and sigma_max, such as '0.1-1'."""
    first, last = math.floor(math.log10(config.sigma_min)), math.ceil(math.log10(config.sigma_max))
    return [f"{10.0**k:g}-{10.0 ** (k + 1):g}" for k in range(first, last)]


def weight(sigma: Tensor, spread: float, floor: float) -> Tensor:
    """Weight of the squared error of x0_hat, in 1/Angstrom^2: 1 / (sigma^2 + floor^2) + 1 / spread^2."""
    return 1 / (sigma.square() + floor**2) + 1 / spread**2


def loss_per_molecule(
    model: PseudoForceField, batch: MoleculeBatch, x: Tensor, image: Tensor, sigma: Tensor, floor: float
) -> Tensor:
    """Weighted squared error of the pseudo-force, (B,); see the module. x, image (B, N, 3), sigma (B,)."""
    error = 0.5 * model(batch.numbers, x, batch.mask) - (image - x)
    degrees = 3 * (batch.sizes - 1)
    return weight(sigma, model.config.spread, floor) * error.square().sum((1, 2)) / degrees


class Perturbed(NamedTuple):
    """What step `step` trains on: references, noisy structures x and nearest images (B, N, 3), noise levels (B,)."""

    step: int
    numbers: Tensor
    positions: Tensor
    mask: Tensor
    x: Tensor
    image: Tensor
    sigma: Tensor


class PerturbedBatches(IterableDataset[Perturbed]):
    """The batches of a run from step `first` on, this process's share of each; among workers they are dealt out."""

    def __init__(self, data: MoleculeDataset, config: TrainConfig, first: int, share: slice) -> None:
        self.data, self.config, self.first, self.share = data, config, first, share

    def __iter__(self) -> Iterator[Perturbed]:
        worker = get_worker_info()
        offset, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        chosen = BatchSampler(self.data.sizes, self.config.batch_size, self.config.seed).stream(self.first)
        for k, indices in enumerate(chosen):
            if k % stride == offset:
                yield self._make(self.data.batch(indices), self.first + k)

    def _make(self, batch: MoleculeBatch, step: int) -> Perturbed:
        c, generator = self.config, step_generator(self.config.seed, 1, step)
        # levels and noise of the whole batch are drawn in every process, then each takes its share
        sigma = draw_sigma(len(batch), c.model.sigma_min, c.model.sigma_max, generator)
        part = torch.rand(len(batch), generator=generator) < c.partial
        x = perturb(batch, sigma, generator, free=partial_noise(batch, part, generator))
        x, sigma = x[self.share], sigma[self.share]
        numbers, positions, mask = (v[self.share] for v in (batch.numbers, batch.positions, batch.mask))
        batch = MoleculeBatch(numbers, positions, mask, check=False)
        image = nearest_image(batch, x, exchange=(sigma > EXCHANGE_FROM) & c.exchange, rotate=c.rotate)
        return Perturbed(step, batch.numbers, batch.positions, batch.mask, x, image, sigma)


def _loader(data: MoleculeDataset, config: TrainConfig, accelerator: Accelerator, step: int) -> Iterator[Perturbed]:
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    batches = PerturbedBatches(data, config, step, share)
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=config.workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=_leave_interrupts_to_the_parent,
        generator=torch.Generator(),  # else it takes a number from the global one
    )
    return iter(loader)


def _leave_interrupts_to_the_parent(_: int) -> None:
    """Ctrl-C reaches every process of the terminal; the parent stops after a step that is whole."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _train_step(
    model: PseudoForceField,
    perturbed: Perturbed,
    config: TrainConfig,
    accelerator: Accelerator,
    optimizer: Optimizer,
    parameters: Sequence[Tensor],
    curve: DecadeMeans,
) -> Tensor:
    numbers, positions, mask, x, image, sigma = (v.to(accelerator.device, non_blocking=True) for v in perturbed[1:])
    batch = MoleculeBatch(numbers, positions, mask, check=False)
    losses = loss_per_molecule(model, batch, x, image, sigma, config.floor)
    optimizer.zero_grad()
    # divided by the intended share, so that uneven shares average to the mean over the batch
    (losses.sum() * accelerator.num_processes / config.batch_size).backward()
    average_gradients(accelerator, parameters)
    norm = clip_gradients(parameters, config.max_grad_norm)
    optimizer.step()
    curve.add(sigma, losses)
    return norm


@torch.no_grad()
def errors(
    model: PseudoForceField,
    data: MoleculeDataset,
    n: int = 256,
    levels: Sequence[float] = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
) -> dict[str, list[float]]:
    """Errors on the first n molecules at fixed noise levels, with fixed noise.

    Lists by level: sigma; rmse of x0_hat to the nearest image of the reference, in Angstrom per degree of freedom;
    sigma_hat, the mean of the level read off the force, in Angstrom.
    """
    rows = []
    order = np.argsort(data.sizes[:n], kind="stable")
    for k, level in enumerate(levels):
        generator, total = step_generator(0, 2, k), torch.zeros(2, dtype=torch.float64)
        for chunk in np.array_split(order, -(-len(order) // 64)):
            batch = data.batch(chunk)
            x = perturb(batch, torch.full((len(batch),), level), generator)
            image = nearest_image(batch, x, exchange=torch.full((len(batch),), level > EXCHANGE_FROM))
            moved = 0.5 * model(*(v.to(model.device) for v in (batch.numbers, x, batch.mask))).cpu()
            degrees = 3 * (batch.sizes - 1)
            total[0] += ((moved - (image - x)).square().sum((1, 2)) / degrees).sum()
            total[1] += (moved.square().sum((1, 2)) / degrees).sqrt().sum()
        mean = total / len(order)
        rows.append((level, float(mean[0].sqrt()), float(mean[1])))
    sigma, rmse, sigma_hat = (list(column) for column in zip(*rows, strict=True))
    return {"sigma": sigma, "rmse": rmse, "sigma_hat": sigma_hat}
