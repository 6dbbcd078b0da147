"""What every training run shares: exact resume, atomic checkpoints, logs, learning-rate schedules, processes.

Random numbers of step k are a function of (seed, k) alone, and not of how many steps ran before in this process: so a
killed run resumes to the same numbers, and any number of processes draws the same ones.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from elign_lab.muon import MuonAdamW

# fields of a configuration that do not change the numbers of a step
_LENGTH_AND_LOGGING = ("steps", "decay", "log_every", "validate_every", "checkpoint_every", "root", "workers")


def step_generator(seed: int, *index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream depends on (seed, index...) only; neighbouring seeds give independent streams."""
    state = np.random.SeedSequence([seed, *index]).generate_state(2, np.uint32)
    return torch.Generator(device).manual_seed(int(state[0]) << 32 | int(state[1]))


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """torch.save, atomically: a kill leaves the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def load_state(path: str | Path) -> dict[str, Any]:
    """torch.load without code execution."""
    return torch.load(path, map_location="cpu", weights_only=True)


def require_same_run(path: str | Path, saved: dict[str, Any], config: Any, free: Collection[str]) -> None:
    """Raise ValueError when a checkpoint's configuration differs from `config` (a dataclass) in a field not in `free`.

    A field that the checkpoint does not know was added later; the run had its default (with_defaults).
    """
    before = with_defaults(saved, asdict(type(config)()))
    for key, value in asdict(config).items():
        if key not in free and before[key] != value:
            raise ValueError(f"{path} was made with {key} = {before[key]!r}, not {value!r}: use another folder")


def with_defaults(saved: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings with what they lack from `defaults`, in nested dictionaries too."""
    nested = {k: with_defaults(saved[k], v) for k, v in defaults.items() if isinstance(v, dict) and k in saved}
    return {**defaults, **saved, **nested}


class Optimizer(Protocol):
    """What the training loops need of an optimiser: torch.optim.Optimizer has it, and so has `muon.MuonAdamW`."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameters with their settings, the learning rate among them."""

    def zero_grad(self) -> None:
        """Forget the gradients."""

    def step(self) -> Any:
        """Change the parameters once."""

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""


OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter], float, float], Optimizer]] = {
    "adam": lambda parameters, rate, decay: torch.optim.Adam(parameters, lr=rate, weight_decay=decay),
    # EDM's choice
    "adamw": lambda parameters, rate, decay: torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, amsgrad=True),
    "muon": MuonAdamW,
}


def check_optimizer(name: str) -> None:
    """Raise ValueError for an unknown optimiser."""
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}")


def make_optimizer(
    name: str, parameters: list[torch.nn.Parameter], learning_rate: float, weight_decay: float = 0.0
) -> Optimizer:
    """An optimiser by its name in OPTIMIZERS; 'muon' steps biases, inputs and outputs by AdamW (muon.MuonAdamW)."""
    check_optimizer(name)
    return OPTIMIZERS[name](parameters, learning_rate, weight_decay)


def save_run(
    path: str | Path,
    config: Any,
    step: int,
    seconds: float,
    model: torch.nn.Module,
    optimizer: Optimizer,
    ema: ExponentialMovingAverage,
    **more: Any,
) -> None:
    """Checkpoint of a training: its configuration (a dataclass), progress, weights, optimiser and average."""
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
    save_state(path, {"config": asdict(config), **more, "step": step, "seconds": seconds, **parts})


def restore_run(
    state: dict[str, Any],
    model: torch.nn.Module,
    optimizer: Optimizer,
    ema: ExponentialMovingAverage,
) -> tuple[int, float]:
    """Put what `save_run` wrote back in place; returns the steps done and the seconds that they took."""
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    ema.load_state_dict(state["ema"])
    return state["step"], state["seconds"]


def resume_run(
    path: str | Path,
    config: Any,
    model: torch.nn.Module,
    optimizer: Optimizer,
    ema: ExponentialMovingAverage,
    free: Collection[str] = (),
) -> tuple[int, float]:
    """`restore_run` from a file, if the run had the same settings, but for its length, logging and fields in `free`."""
    state = load_state(path)
    require_same_run(path, state["config"], config, {*_LENGTH_AND_LOGGING, *free})
    return restore_run(state, model, optimizer, ema)


class JsonLines:
    """An append-only log, one JSON object a line. Opened again for step k, it forgets what came after."""

    def __init__(self, path: str | Path, key: str, resume_at: int) -> None:
        self.path, self.key = Path(path), key
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_json_lines(self.path) if row[key] < resume_at] if self.path.exists() else []
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(self.path)  # a kill leaves the old log or the new one

    def write(self, row: dict[str, Any]) -> None:
        """Append one row, which must have the log's key."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a log; a last line that a kill cut short is left out."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def make_accelerator() -> Accelerator:
    """The processes that torchrun or accelerate started, or this one alone; on the CPU when there is no GPU.

    Several processes leave their group when Python ends: one that goes without leaving can find itself aborted by the
    threads of its group (gloo: "terminate called without an active exception"), after all its work is done.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if accelerator.num_processes > 1:
        atexit.register(accelerator.end_training)
    return accelerator


def average_gradients(accelerator: Accelerator, parameters: Iterable[Tensor]) -> None:
    """Average the gradients over all processes, in one message (does nothing in a single process)."""
    if accelerator.num_processes == 1:
        return
    gradients = []
    for p in parameters:
        if p.grad is None:  # this process had no use for it, another may have had
            p.grad = torch.zeros_like(p)
        gradients.append(p.grad)
    flat = accelerator.reduce(torch.cat([g.reshape(-1) for g in gradients]), "mean")
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients so that their norm is at most `max_norm`; returns the norm before.

    Gradients with an infinite or undefined entry are set to zero, so that one bad batch does not undo a run.
    """
    parameters = list(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    for p in parameters:
        if p.grad is not None:
            # an infinite norm has made the rest 0 or undefined; a branch on it would wait for the device
            p.grad.nan_to_num_(0.0, 0.0, 0.0)
    return norm


@contextlib.contextmanager
def tensor_cores(device: torch.device) -> Iterator[None]:
    """Let the float32 matrix products of a GPU use its tensor cores (TF32, 10 bits), inside the block."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class LossWatch:
    """Ends a run whose loss has blown up while its last good checkpoint is still there.

    `check` takes the mean loss since the last look, in every process, and raises FloatingPointError when it is
    undefined or over 100 times the lowest seen so far.
    """

    LIMIT = 100.0

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint, self.lowest = checkpoint, math.inf

    def check(self, step: int, loss: float) -> None:
        """Look at the mean loss of the steps up to `step`."""
        if not loss <= self.LIMIT * self.lowest:  # also for a loss that is not a number
            kept = f"{self.checkpoint} is from before" if self.checkpoint.exists() else "no checkpoint was written yet"
            raise FloatingPointError(
                f"the loss is {loss:.3g} after {step} steps, the lowest before was {self.lowest:.3g}; the run was "
                f"ended, {kept}. Lower the learning rate: by a larger decay=, or by learning_rate= in another folder"
            )
        self.lowest = min(self.lowest, loss)


class StopRequest:
    """Ctrl-C as a request: `requested` becomes True, and the loop stops where its state is whole. A second one raises.

    Used as a context manager around a loop. The handler that was there before is called too, so that a caller that
    counts interrupts still does. In a thread other than the main one signals do not arrive, and nothing is changed.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if callable(self._before):
            with contextlib.suppress(KeyboardInterrupt):
                self._before(number, frame)


def any_process(accelerator: Accelerator, condition: bool) -> bool:
    """Whether the condition holds in any process: all of them must stop at the same step."""
    if accelerator.num_processes == 1:
        return condition
    flag = torch.tensor(float(condition), device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum") > 0)


def warmup_cosine(step: int, warmup: int, total: int, minimum: float) -> float:
    """Learning-rate factor at 0-based optimiser step: linear warm-up to 1 in `warmup` steps, then cosine to `minimum`.

    The first step has factor 1 / warmup (not 0), and past `total` the factor stays at the minimum.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return minimum + (1 - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_hold_decay(step: int, warmup: int, total: int, decay: int) -> float:
    """Learning-rate factor: linear warm-up, constant 1, then linear to 0 over the last `decay` of `total` steps.

    A held rate lets a run be extended without a restart of the schedule.
    """
    return min((step + 1) / max(warmup, 1), 1.0, max(total - step, 0) / max(decay, 1))


class ExponentialMovingAverage:
    """Running average of parameters, with the usual warm-up decay = min(decay, (1 + k) / (10 + k))."""

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor]) -> None:
        """Move the average towards the parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, [p.detach() for p in parameters], 1 - decay)

    @torch.no_grad()
    def swap(self, parameters: Iterable[Tensor]) -> None:
        """Exchange the average and the parameters; call it again to undo."""
        for value, p in zip(self.values, parameters, strict=True):
            held = p.detach().clone()
            p.copy_(value)
            value.copy_(held)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"updates": self.updates, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        self.updates = state["updates"]
        for value, saved in zip(self.values, state["values"], strict=True):
            value.copy_(saved)
