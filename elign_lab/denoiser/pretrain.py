"""Pretraining of the denoiser by denoising score matching (EDM's l2 loss): resumable, in one process or several."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from elign_lab.checkpoints import save_model
from elign_lab.datasets import BatchSampler, MoleculeDataset, load_dataset
from elign_lab.denoiser.diffusion import Denoiser, DenoiserConfig
from elign_lab.denoiser.egnn import EGNN
from elign_lab.denoiser.layout import Layout
from elign_lab.molecules import MoleculeBatch, to_device
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

EARLY = 0.3  # of the steps: where samples are won or lost (docs/runs.md, 2026-11-21)


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of a pretraining run. EDM's own: batch 64, learning rate 1e-4, EMA 0.9999, 3000 epochs of QM9."""

    model: DenoiserConfig = field(default_factory=DenoiserConfig)
    dataset: str = "bundled"
    geometry: str | None = None  # of the bundled set: 'xtb' (default) or 'mmff94'
    root: str | None = None  # folder of QM9 or GEOM-Drugs
    steps: int = 100_000
    batch_size: int = 64  # over all processes
    optimizer: str = "adamw"  # a name in training.OPTIMIZERS
    early_share: float = 0.0  # of the molecules: their time is drawn from the first 30 % of the steps, not from all
    learning_rate: float = 1e-3
    warmup: int = 500
    decay: int = 5_000  # steps of the linear decay at the end
    weight_decay: float = 1e-12
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9995
    normalize: str = "molecule"  # see Denoiser.training_loss
    bfloat16: bool = False  # precision of the large matrix products; weights and sums stay float32
    compile: bool = False  # torch.compile of the edge network, for a GPU
    seed: int = 0
    log_every: int = 50
    validate_every: int = 1_000
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        check_optimizer(self.optimizer)
        if not 0 <= self.early_share <= 1:
            raise ValueError(f"early_share must lie between 0 and 1, got {self.early_share}")


def edm_mini() -> PretrainConfig:
    """The small model that comes with the package."""
    return PretrainConfig(
        model=DenoiserConfig(features=96, layers=6),
        steps=6_600,
        decay=3_500,
        learning_rate=2e-3,
        optimizer="muon",
        early_share=0.7,
    )


def edm_full() -> PretrainConfig:
    """EDM's full size (256 features, 9 layers) on the bundled set, for a GPU."""
    return PretrainConfig(
        steps=400_000, batch_size=256, learning_rate=4e-4, ema_decay=0.9999, decay=40_000, bfloat16=True
    )


def edm_qm9() -> PretrainConfig:
    """EDM of the paper (table 6): 256 features, 9 layers, 3000 epochs of 100,000 molecules; needs root=, real QM9."""
    return PretrainConfig(
        dataset="qm9", learning_rate=1e-4, ema_decay=0.9999, warmup=1, steps=4_690_000, normalize="padded"
    )


PRESETS: dict[str, Callable[[], PretrainConfig]] = {"edm_mini": edm_mini, "edm_full": edm_full, "edm_qm9": edm_qm9}


def pretrain(
    config: PretrainConfig,
    out: str | Path,
    *,
    max_seconds: float | None = None,
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> Denoiser:
    """Train a denoiser, or continue the run in folder `out`; returns the averaged (EMA) model.

    Writes out/checkpoint.pt (weights, optimiser, average, step), out/log.jsonl and out/model.safetensors (the average).
    Stops after max_seconds or on Ctrl-C with a checkpoint, and resumes to the same numbers. On a GPU float32 products
    go through the tensor cores (TF32), whose rounding is far below the noise of the gradient.
    """
    out = Path(out)
    accelerator = accelerator or make_accelerator()
    options = {"geometry": config.geometry} if config.geometry else {}
    with accelerator.main_process_first():  # a first use converts the files, for all processes
        train = load_dataset(config.dataset, split="train", root=config.root, **options)
        validation = load_dataset(config.dataset, split="validation", root=config.root, **options)
    torch.manual_seed(config.seed)  # initial weights: PyTorch's initialisers take no generator
    model = Denoiser(config.model).with_size_histogram(train.size_histogram()).to(accelerator.device)
    if isinstance(model.network, EGNN):
        model.network.dtype = torch.bfloat16 if config.bfloat16 else None
        model.network.compiled = config.compile
    elif config.bfloat16 or config.compile:
        raise ValueError("bfloat16 and compile need the equivariant network, which this model does not have")
    parameters = list(model.parameters())
    optimizer = make_optimizer(config.optimizer, parameters, config.learning_rate, config.weight_decay)
    ema = ExponentialMovingAverage(parameters, config.ema_decay)
    step, seconds = 0, 0.0
    if (out / "checkpoint.pt").exists():
        # compilation changes the rounding only
        step, seconds = resume_run(out / "checkpoint.pt", config, model, optimizer, ema, free=("compile",))
    log = JsonLines(out / "log.jsonl", "step", step) if accelerator.is_main_process else None
    batches = BatchSampler(train.sizes, config.batch_size, config.seed, mode="mixed").stream(step)

    def checkpoint() -> None:
        if not accelerator.is_main_process:
            return
        save_run(out / "checkpoint.pt", config, step, seconds, model, optimizer, ema)
        ema.swap(parameters)
        save_model(model, out / "model.safetensors")
        ema.swap(parameters)

    bar = tqdm(
        total=config.steps, initial=step, desc="pretraining", disable=not (progress and accelerator.is_main_process)
    )
    started, before, since = time.monotonic(), seconds, 0
    total_loss: float | Tensor = 0.0
    watch = LossWatch(out / "checkpoint.pt")
    with bar, StopRequest() as stop, tensor_cores(accelerator.device):
        while step < config.steps:
            factor = warmup_hold_decay(step, config.warmup, config.steps, config.decay)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor
            loss, norm = _train_step(
                model, train.batch(next(batches)), step, config, accelerator, optimizer, parameters
            )
            ema.update(parameters)
            step, total_loss, since = step + 1, total_loss + loss, since + 1
            seconds = before + time.monotonic() - started
            bar.update()
            if step % config.log_every == 0:
                mean_loss = float(accelerator.reduce(total_loss, "mean")) / since
                total_loss, since = 0.0, 0
                watch.check(step, mean_loss)
                row = {"step": step - 1, "loss": mean_loss, "grad_norm": float(norm), "lr_factor": factor}
                if step % config.validate_every == 0:
                    ema.swap(parameters)
                    row["validation_loss"] = validation_loss(model, validation)
                    ema.swap(parameters)
                if log is not None:
                    log.write({**row, "seconds": round(seconds, 1)})
                bar.set_postfix(loss=f"{mean_loss:.4f}")
            if step % config.checkpoint_every == 0:
                checkpoint()
            late = max_seconds is not None and time.monotonic() - started > max_seconds
            if any_process(accelerator, late or stop.requested):
                bar.write(f"stopped at step {step}: run the same command again to continue")
                break
    checkpoint()
    ema.swap(parameters)
    return model.eval()


def _train_step(
    model: Denoiser,
    batch: MoleculeBatch,
    step: int,
    config: PretrainConfig,
    accelerator: Accelerator,
    optimizer: Optimizer,
    parameters: list[torch.nn.Parameter],
) -> tuple[torch.Tensor, torch.Tensor]:
    # nothing here waits for a GPU: the batch and its layout are made on the host while it works on the step before
    generator = step_generator(config.seed, 1, step, device=accelerator.device)
    share = torch.arange(len(batch))
    if accelerator.num_processes > 1:
        share = torch.argsort(batch.sizes, stable=True)[accelerator.process_index :: accelerator.num_processes]
    layout = Layout(batch.mask[share], device=accelerator.device)
    # times and noise of the whole batch are drawn in every process, then each takes its share
    t = _draw_times(len(batch), config, generator)
    z = model.encode(batch)
    noise = model.noise(to_device(batch.mask, accelerator.device), generator)
    share = to_device(share, accelerator.device)
    z, noise, t = z[share], noise[share], t[share]
    loss = model.training_loss(z, layout.mask, t, noise, normalize=config.normalize, layout=layout).loss.sum()
    loss = loss * accelerator.num_processes / len(batch)
    optimizer.zero_grad()
    loss.backward()
    average_gradients(accelerator, parameters)
    norm = clip_gradients(parameters, config.max_grad_norm)
    optimizer.step()
    return loss.detach(), norm


def _draw_times(n: int, config: PretrainConfig, generator: torch.Generator) -> Tensor:
    """Times of n molecules, (n,): uniform on 0..T, and a share `early_share` of them uniform on 0..0.3 T."""
    where = generator.device
    t = torch.randint(0, config.model.timesteps + 1, (n,), generator=generator, device=where)
    if config.early_share == 0:
        return t
    early = torch.randint(0, int(EARLY * config.model.timesteps) + 1, (n,), generator=generator, device=where)
    return torch.where(torch.rand(n, generator=generator, device=where) < config.early_share, early, t)


@torch.no_grad()
def validation_loss(model: Denoiser, data: MoleculeDataset, n: int = 512) -> float:
    """Mean training loss on the first n molecules, with fixed times and noise."""
    generator = step_generator(0, 2, device=model.device)
    total = 0.0
    chunks = torch.arange(min(n, len(data))).split(64)
    for chunk in chunks:
        batch = data.batch(chunk).to(model.device)
        t = torch.randint(0, model.config.timesteps + 1, (len(batch),), generator=generator, device=model.device)
        noise = model.noise(batch.mask, generator)
        total += float(model.training_loss(model.encode(batch), batch.mask, t, noise, normalize="molecule").loss.sum())
    return total / min(n, len(data))
