"""Use a GPU for a fixed time: train edm-mini, edm-full and gpff-mini side by side, align, and sample for judging.

    python gpu/session.py check --out runs/gpu-check                                    each job for a few steps
    python gpu/session.py run --out runs/gpu --minutes 9 --root runs/qm9_xtb_large

A job is a process of its own that writes OUT/JOB/ and OUT/JOB.log; in the same OUT a training is continued. How many
steps fit is measured on the way: a training runs in pieces, and each piece plans the rest of the schedule anew from the
speed of the one before. Samples are written as .npz; oracles that a GPU machine may not have judge them afterwards.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from elign_lab.alignment import AlignConfig, Trainer, cpu_mini_fine
from elign_lab.checkpoints import load_model, save_model
from elign_lab.denoiser.pretrain import edm_full, edm_mini, pretrain
from elign_lab.gpff.train import gpff_mini, train
from elign_lab.oracles.learned import LearnedOracle
from elign_lab.sampling import sample
from elign_lab.training import load_state, read_json_lines

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ENDLESS = 10**8  # steps of a run whose end is not planned yet
PIECES = (0.15, 0.4, 0.6, 0.8, 0.92, 1.0)  # shares of the time at which the rest is planned again
HOLD = 0.4  # share of the time with the full learning rate


@dataclass(frozen=True)
class Budget:
    """Until when (seconds since the epoch) a job may run, and whether it only proves that it runs."""

    end: float
    check: bool
    root: str | None

    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.time()


def train_until(run: Callable[..., Any], config: Any, out: Path, budget: Budget, share: float = 1.0) -> None:
    """Train for this share of the time that is left, with a decay that ends with it."""
    if budget.check:
        quick = {"steps": 6, "decay": 2, "log_every": 2, "validate_every": 4, "checkpoint_every": 3}
        run(replace(config, batch_size=64, **quick), out, progress=False)
        return
    began, total = time.time(), budget.left() * share
    config, hold, brake = replace(config, log_every=20, checkpoint_every=ENDLESS), HOLD, 1
    for piece in PIECES:
        steps, decay = ENDLESS, 1
        rows = rows_of(out)
        if len(rows) > 20:
            first, last = rows[len(rows) // 2], rows[-1]
            rate = (last["step"] - first["step"]) / (last["seconds"] - first["seconds"])
            rest = max(int(rate * (began + total - time.time()) * 0.97), 1)
            if piece > hold:
                # the learning rate goes on from where it is, or from a part of it
                steps, decay, brake = last["step"] + 1 + rest, int(brake * rest / last["lr_factor"]), 1
        elif piece > hold:
            print(f"{len(rows)} rows in the log: too few to plan the decay", flush=True)
        seconds = max(began + piece * total - time.time(), 1.0)
        try:
            run(replace(config, steps=steps, decay=decay), out, max_seconds=seconds, progress=False)
        except FloatingPointError as error:  # the loss blew up: go on from the piece before, at half the rate
            if not (out / "checkpoint.pt").exists():
                raise
            print(error, flush=True)
            hold, brake = 0.0, 2


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The log of a run up to its checkpoint."""
    if not (out / "checkpoint.pt").exists():
        return []
    done = load_state(out / "checkpoint.pt")["step"]
    return [row for row in read_json_lines(out / "log.jsonl") if row["step"] < done]


def samples(path: Path, out: Path, budget: Budget, *, n: int, **options: Any) -> None:
    """Sample a model on the GPU and write OUT (.npz: numbers, positions, mask)."""
    model = load_model(path, device=DEVICE)
    began, n = time.time(), 32 if budget.check else n
    steps = {"steps": 4} if budget.check else {}
    molecules = sample(model, n, batch_size=2000, **{**options, **steps})
    molecules.to_npz(out)
    print(f"{out.name}: {n} molecules in {time.time() - began:.1f} s", flush=True)


def align_until(model: Path, out: Path, config: AlignConfig, budget: Budget, keep: float) -> None:
    """Align until `keep` seconds before the end."""
    oracle = LearnedOracle(device=DEVICE, batch_size=1024)
    if budget.check:
        quick = {"steps": 12, "skip_prefix": 6, "evaluate_n": 8, "evaluate_every": 1, "max_failure_share": 1.0}
        config = replace(config, groups=4, pairs_per_call=64, **quick)
    trainer = Trainer(load_model(model, device=DEVICE), oracle, config, out=out)
    longest = 0.0
    while budget.left() - longest > keep and trainer.iteration < (1 if budget.check else config.iterations):
        began = time.time()
        metrics = trainer.step().metrics
        longest = max(longest, time.time() - began)
        shown = ("reward_force", "reward_energy", "kl", "clip_fraction", "log_ratio_rms", "failed", "eval_force")
        print(trainer.iteration, {k: round(metrics[k], 4) for k in shown if k in metrics}, flush=True)
        print({k: v for k, v in metrics.items() if k.startswith("seconds")}, flush=True)
    trainer.save()


def aligned_folder(base: Path) -> Path:
    """Where the alignment of a run's model goes: another one for each state of the run."""
    return base.with_name(f"{base.name}-aligned-{load_state(base / 'checkpoint.pt')['step']}")


def fine(groups: int = 64) -> AlignConfig:
    """cpu_mini_fine with the many groups that a GPU rolls out as fast as a few, in one stage from t = T / 4 on."""
    return replace(
        cpu_mini_fine(),
        groups=groups,
        skip_prefix=50,
        pairs_per_iteration=None,
        pairs_per_call=4096,
        updates=4,
        learning_rate=4e-5,
        total_updates=600,
        iterations=400,
        checkpoint_every=10,
    )


def job_edm_mini(out: Path, budget: Budget) -> None:
    """edm-mini: training, samples, alignment of the result, samples."""
    base = out / "edm-mini"
    # a step costs its launches, so that molecules are nearly free (gpu/RESULTS.md)
    train_until(pretrain, replace(edm_mini(), batch_size=1024), base, budget, share=0.42)
    model, aligned = base / "model.safetensors", aligned_folder(base)
    samples(model, out / "edm-mini-T1000.npz", budget, n=2000, seed=0)
    samples(model, out / "edm-mini-100.npz", budget, n=2000, seed=0, steps=100, spacing=2.0)
    align_until(model, aligned, fine(), budget, keep=45)
    model = aligned / "model.safetensors"
    samples(model, out / "edm-mini-aligned-100.npz", budget, n=2000, seed=0, steps=100, spacing=2.0)
    samples(model, out / "edm-mini-aligned-T1000.npz", budget, n=2000, seed=0)


def job_edm_full(out: Path, budget: Budget) -> None:
    """edm-full: training on the largest set that there is, samples."""
    base = out / "edm-full"
    config = replace(edm_full(), optimizer="muon", early_share=0.7, learning_rate=1e-3, ema_decay=0.999)
    config = replace(config, bfloat16=DEVICE == "cuda", root=budget.root)
    train_until(pretrain, config, base, budget, share=0.92)
    save_model(load_model(base / "model.safetensors"), out / "edm-full-half.safetensors", dtype=torch.float16)
    samples(base / "model.safetensors", out / "edm-full-100.npz", budget, n=500, seed=0, steps=100, spacing=2.0)


def job_gpff_mini(out: Path, budget: Budget) -> None:
    """gpff-mini with Muon."""
    config = replace(gpff_mini(), batch_size=256, optimizer="muon", workers=4)
    train_until(train, config, out / "gpff-mini", budget, share=0.97)


def job_edm_full_aligned(out: Path, budget: Budget) -> None:
    """Alignment of edm-full, with what time is left, and samples of all T steps before and after."""
    base, aligned = out / "edm-full" / "model.safetensors", aligned_folder(out / "edm-full") / "model.safetensors"
    align_until(base, aligned.parent, fine(groups=16), budget, keep=45)
    save_model(load_model(aligned), out / "edm-full-aligned-half.safetensors", dtype=torch.float16)
    samples(aligned, out / "edm-full-aligned-100.npz", budget, n=500, seed=0, steps=100, spacing=2.0)
    samples(base, out / "edm-full-T1000.npz", budget, n=256, seed=0)


JOBS = {
    "edm_mini": job_edm_mini,
    "edm_full": job_edm_full,
    "gpff_mini": job_gpff_mini,
    "edm_full_aligned": job_edm_full_aligned,
}


def run_jobs(names: list[str], arguments: argparse.Namespace, end: float, check: bool) -> list[int]:
    """Run jobs side by side until `end`; returns their exit codes."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    processes = []
    for name in names:
        command = [sys.executable, __file__, "job", "--out", str(arguments.out), "--name", name, "--end", str(end)]
        command += ["--quick"] * check
        command += ["--root", arguments.root] * (arguments.root is not None)
        with (arguments.out / f"{name}.log").open("a") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "2"}  # jobs share the cores, and waiting threads spin
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True))
    try:
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(end + 5 - time.time(), 1))
    finally:  # also after Ctrl-C: a job is not of this session, and would go on
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return [process.wait() for process in processes]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["check", "run", "job"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1.5, help="time of all jobs (default: %(default)s)")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=["edm_mini", "edm_full", "gpff_mini"])
    parser.add_argument("--root", help="folder of a larger bundled set, for edm-full")
    parser.add_argument("--name", choices=JOBS, help="of one job")
    parser.add_argument("--end", type=float, help="of one job, seconds since the epoch")
    parser.add_argument("--quick", action="store_true", help="of one job: a few steps, to see that it runs")
    arguments = parser.parse_args()
    if arguments.command == "job":
        JOBS[arguments.name](arguments.out, Budget(arguments.end, arguments.quick, arguments.root))
        return
    end = time.time() + 60 * arguments.minutes
    check = arguments.command == "check"
    codes = run_jobs(arguments.jobs, arguments, end, check)
    print(dict(zip(arguments.jobs, codes, strict=True)))
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    main()
