"""The main job in one function: sample, align, sample again with the same seeds, judge both, write a report."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from elign_lab.alignment import AlignConfig, align, cpu_mini
from elign_lab.checkpoints import load_model
from elign_lab.denoiser import Denoiser
from elign_lab.evaluation import Comparison, Interval, compare, evaluate, write_html
from elign_lab.evaluation.html_report import made_now
from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles import load_oracle
from elign_lab.sampling import require_all, sample
from elign_lab.training import read_json_lines

NAMES = ("base", "aligned")


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demo: minutes on two cores.

    The preference model gives the rewards, and the judge, which is never trained on, the energies and forces of the
    table.
    """

    model: str = "edm-mini"
    preference: str = "learned"
    judge: str = "xtb"
    n: int = 128  # molecules of each set
    steps: int = 100  # reverse steps of a molecule
    seed: int = 1  # of both sets; the alignment has its own
    align: AlignConfig = field(default_factory=lambda: replace(cpu_mini(), iterations=15))


@dataclass(frozen=True)
class DemoResult:
    """The comparison of both sets, the sentence that sums it up, and where the report is."""

    comparison: Comparison
    verdict: str
    report: Path

    def text(self) -> str:
        """For a terminal."""
        return f"{self.comparison.table(NAMES)}\n\n{self.verdict}\nreport: {self.report}"


def run_demo(out: str | Path, config: DemoConfig | None = None) -> DemoResult:
    """Run the demo and write out/report.html, out/result.json, out/base.xyz and out/aligned.xyz.

    The same configuration gives the same numbers on the same machine. An interrupted alignment is continued by the next
    call. Raises KeyboardInterrupt when it was interrupted, ValueError or FileNotFoundError for a model or an oracle
    that cannot be loaded.
    """
    config, out = config or DemoConfig(), Path(out)
    base = load_model(config.model)
    with load_oracle(config.judge) as judge, load_oracle(config.preference) as preference:
        out.mkdir(parents=True, exist_ok=True)
        _say(f"1/4 sample {config.n} molecules from {config.model}")
        molecules = [_sample(base, config)]
        _say(f"2/4 align it with the {config.preference} oracle by FED-GRPO: {config.align.iterations} iterations")
        run = out / f"alignment-{_fingerprint(base, config)}"
        aligned, _ = align(base, preference, config.align, out=run)
        history = read_json_lines(run / "log.jsonl")
        if len(history) < config.align.iterations:  # Trainer.run stops quietly on Ctrl-C
            raise KeyboardInterrupt
        _say(f"3/4 sample {config.n} molecules from the aligned model, with the same seeds")
        molecules.append(_sample(aligned, config))
        _say(f"4/4 judge both sets with the {config.judge} oracle")
        evaluations = [evaluate(batch, judge, seed=config.seed) for batch in molecules]
    comparison = compare(*evaluations)
    verdict = describe(comparison)
    for name, batch in zip(NAMES, molecules, strict=True):
        batch.to_xyz(out / f"{name}.xyz")
    report = write_html(
        out / "report.html",
        evaluations[0],
        evaluations[1],
        molecules[0],
        molecules[1],
        history,
        names=NAMES,
        title=verdict,
        about=_about(config),
    )
    result = {
        "verdict": verdict,
        **{name: e.to_dict() for name, e in zip(NAMES, evaluations, strict=True)},
        "difference": {key: interval.to_dict() for key, interval in comparison.differences.items()},
    }
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return DemoResult(comparison, verdict, report)


def describe(comparison: Comparison) -> str:
    """One line: whether forces and energies are lower, higher, or not distinguishable after alignment (95 %)."""
    parts = []
    for key, name, unit in (("f_rms_median", "force RMS", "eV/Å"), ("energy_per_atom_median", "energy", "eV per atom")):
        change = comparison.differences[key]
        if not math.isfinite(change.value):
            parts.append(f"median {name} is unknown, the oracle judged no molecule of one of the sets")
            continue
        parts.append(f"median {name} {_direction(change)} ({change.value:+.2f} {unit})")
    return f"After alignment: {', '.join(parts)}"


def _direction(change: Interval) -> str:
    if change.high < 0:
        return "is lower"
    if change.low > 0:
        return "is HIGHER"
    return "does not differ beyond chance"


def _sample(model: Denoiser, config: DemoConfig) -> MoleculeBatch:
    molecules = sample(model, config.n, steps=config.steps, seed=config.seed, progress=True)
    return require_all(molecules, config.n)


def _about(config: DemoConfig) -> dict[str, str]:
    """What the report says of its making."""
    c = config.align
    return {
        "base": f"{config.model}, {config.steps} reverse steps",
        "aligned": f"from it by FED-GRPO with the {config.preference} oracle: {c.iterations} iterations of "
        f"{c.groups} x {c.members} rollouts, seed {c.seed}; as many steps",
        "oracle": config.judge,
        "molecules": f"{config.n} of each, seed {config.seed}; same sizes and noise for both models",
        "made": made_now(),
        "command": f"elign-lab demo --model {config.model} --oracle {config.preference}",
    }


def _fingerprint(model: Denoiser, config: DemoConfig) -> str:
    """Names the folder of the alignment, so that a run with other weights or settings is never continued."""
    digest = hashlib.sha256(repr((config.preference, config.align)).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


def _say(text: str) -> None:
    print(text, file=sys.stderr)
