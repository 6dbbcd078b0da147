"""The command line `elign-lab`: each command parses, calls one function of the package, and prints.

Results go to standard output, progress and messages to standard error; with --json standard output is JSON only. Exit
status: 0 done, 1 something is broken (doctor), 2 wrong input, 130 interrupted. torch is imported inside the commands,
so that --help is fast.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elign_lab.overrides import override

if TYPE_CHECKING:
    from elign_lab.evaluation.candidates import Candidate, Sampling
    from elign_lab.molecules import MoleculeBatch
    from elign_lab.oracles import Oracle

Command = Callable[[argparse.Namespace], int]

ERROR, INTERRUPTED = 2, 130
MOLECULES, HTML, JSON = (".xyz", ".sdf", ".npz"), (".html",), (".json",)

_SAMPLE_RESUME = "only the batches that were finished, if any, were written"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a sign that the terminal's encoding lacks must not lose a result
    arguments = _parser().parse_args(argv)
    arguments.command_line = shlex.join(["elign-lab", *(sys.argv[1:] if argv is None else argv)])
    interrupts: list[int] = []
    restore = _on_interrupt(interrupts)
    try:
        status = arguments.run(arguments)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if arguments.debug:
            raise
        print(f"elign-lab: error: {' '.join(str(error).split())}", file=sys.stderr)
        return ERROR
    finally:
        restore()
    # training loops catch the interrupt, write a checkpoint and return
    if interrupts or status == INTERRUPTED:
        print(f"elign-lab: interrupted; {arguments.resume}", file=sys.stderr)
        return INTERRUPTED
    return status


def _on_interrupt(seen: list[int]) -> Callable[[], object]:
    """Note each Ctrl-C in `seen` before it becomes KeyboardInterrupt; returns what undoes it."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None

    def handler(number: int, _: object) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    return lambda: signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------------- arguments
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="elign-lab", description="Align molecular diffusion models to physics (Elign, FED-GRPO)."
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.set_defaults(run=_version_or_help(parser), debug=False, resume="run the same command again")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    _add_inspection(commands)
    _add_training(commands)
    _add_judging(commands)
    _add_gpff(commands)
    return parser


def _command(commands: Any, name: str, run: Command, text: str, resume: str = "") -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run, resume=resume or "nothing was kept: run the same command again")
    return parser


def _add_inspection(commands: Any) -> None:
    p = _command(commands, "doctor", _doctor, "say what is installed, what works, and what to do about each problem")
    _add_json(p)
    p = _command(commands, "models", _models, "list the bundled models and data, with their figures")
    _add_json(p)
    p = _command(commands, "start", _start, "copy the notebooks to a folder of your own; existing files are kept")
    p.add_argument("folder", type=Path, metavar="DIR")
    p.add_argument("--assignments", action="store_true", help="also the assignments, without their solutions")
    p = _command(
        commands,
        "demo",
        _demo,
        "sample, align, sample again with the same seeds, and write a report",
        resume="run `elign-lab demo` again: the alignment continues, and finished iterations are not repeated",
    )
    p.add_argument("--model", default="edm-mini", help="the base model (default: %(default)s)")
    p.add_argument("--oracle", default="learned", help="oracle of the rewards (default: %(default)s)")
    _add_out(p, "folder of the report", Path("demo"))
    p = _command(commands, "bench", _bench, "measure the speed of the denoiser, or of the oracles, on this machine")
    p.add_argument("subject", choices=["denoiser", "oracles"])
    p.add_argument(
        "--repeats", type=_positive, help="repetitions of each measurement (default: 7 for denoiser, 3 for oracles)"
    )
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="denoiser: where (default: %(default)s)")
    p.add_argument("--limit", type=float, default=120.0, help="oracles: seconds for a molecule (default: %(default)g)")
    p.add_argument("--ani-weights", type=Path, help="oracles: folder or file of the ANI-2x weights")
    p.add_argument("--out", type=Path, help="also write the result to this JSON file")
    _add_json(p)


def _add_training(commands: Any) -> None:
    again = "run the same command again to continue from the last checkpoint"
    p = _command(commands, "pretrain", _pretrain, "train a base model, or continue its training", again)
    p.add_argument("--preset", default="edm_mini", help="edm_mini, edm_full or edm_qm9 (default: %(default)s)")
    _add_run_on_data(p)
    _add_set(p, "PretrainConfig, for example model.features=32")

    p = _command(commands, "align", _align, "align a model with an oracle by FED-GRPO, or continue", again)
    _add_model(p)
    p.add_argument(
        "--preset", default="cpu_mini", help="cpu_mini, cpu_mini_fine, qm9_paper or geom_paper (default: %(default)s)"
    )
    _add_alignment(p)
    _add_set(p, "AlignConfig, for example kl_weight=0.01")

    p = _command(commands, "fit-oracle", _fit_oracle, "train a learned oracle from the labels of another one", again)
    _add_oracle(p)
    p.add_argument(
        "--model", action="append", default=[], help="label its samples and clean estimates too; may be repeated"
    )
    p.add_argument("--improve", metavar="FILE", help="a learned oracle whose way downhill is labelled too")
    p.add_argument("--start", metavar="FILE", help="a learned oracle whose weights the training begins with")
    _add_out(p, "folder of the run and of the labels; an existing run is continued")
    p.add_argument("--steps", type=_positive, help="optimiser steps of the whole run")
    p.add_argument("--max-minutes", type=_minutes, help="stop the training with a checkpoint after this time")
    p.add_argument(
        "--plan",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of LabelPlan, for example thermal=500",
    )
    _add_set(p, "FitConfig, for example network.features=32")


def _add_judging(commands: Any) -> None:
    p = _command(commands, "sample", _sample, "generate molecules", _SAMPLE_RESUME)
    _add_model(p)
    _add_sampling(p)
    p.add_argument("--sizes", type=_integers, help="atoms of each molecule: one number for all, or n, as in 9,12")
    p.add_argument("--sampler", default="ancestral", help="name of the sampler (default: %(default)s)")
    p.add_argument("--out", type=Path, help="file.xyz, file.sdf or file.npz (default: xyz to standard output)")

    p = _command(commands, "evaluate", _evaluate, "sample molecules and judge them")
    _add_model(p, "a denoiser or a pseudo-force field: ")
    _add_sampling(p)
    _add_variant(p)
    _add_oracle(p)
    _add_json(p)

    p = _command(commands, "report", _report, "compare two models on the same seeds in one self-contained HTML file")
    p.add_argument("base", help="the model before alignment")
    p.add_argument("aligned", help="the model after alignment")
    _add_sampling(p)
    _add_variant(p)
    _add_oracle(p)
    p.add_argument("--history", type=Path, help="log.jsonl of the alignment, for the learning curves")
    _add_out(p, "the HTML file", Path("report.html"))


def _add_gpff(commands: Any) -> None:
    parser = commands.add_parser("gpff", help="generative pseudo-force fields: train one, generate with it, judge it")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", required=True)
    again = "run the same command again to continue from the last checkpoint"
    p = _command(commands, "train", _gpff_train, "train a pseudo-force field, or continue its training", again)
    p.add_argument("--preset", default="gpff_mini", help="gpff_mini or gpff_mini_conservative (default: %(default)s)")
    _add_run_on_data(p)
    _add_set(p, "TrainConfig, for example model.network.features=64")

    p = _command(commands, "align", _gpff_align, "align a pseudo-force field with an oracle by FED-GRPO", again)
    _add_gpff_model(p)
    p.add_argument("--preset", default="gpff_cpu_mini", help="gpff_cpu_mini (default: %(default)s)")
    _add_alignment(p)
    _add_set(p, "ForceAlignConfig, for example steps=16")

    p = _command(commands, "sample", _gpff_sample, "generate structures", _SAMPLE_RESUME)
    _add_gpff_model(p)
    p.add_argument("--n", type=_positive, help="number of structures (default: 64, or one for each composition)")
    p.add_argument(
        "--composition",
        action="append",
        metavar="FORMULA",
        help="such as C2H6O; may be repeated (default: drawn from the training set)",
    )
    p.add_argument("--sampler", default="direct", help="name of the sampler (default: %(default)s)")
    p.add_argument(
        "--evaluations", type=_positive, default=64, help="network evaluations for each (default: %(default)s)"
    )
    p.add_argument("--seed", type=_seed, default=0, help="seed of compositions and noise (default: %(default)s)")
    p.add_argument("--out", type=Path, help="file.xyz, file.sdf or file.npz (default: xyz to standard output)")

    p = _command(commands, "evaluate", _gpff_evaluate, "judge the structures of each sampler against evaluations")
    _add_gpff_model(p)
    _add_oracle(p)
    p.add_argument("--n", type=_positive, default=128, help="structures in each row (default: %(default)s)")
    p.add_argument(
        "--evaluations",
        type=_integers,
        help="network evaluations, separated by commas (default: 4,6,8,16,32,64,128,256)",
    )
    p.add_argument(
        "--sampler", action="append", metavar="NAME", help="a row of the table, such as 'direct, 0.3'; repeat"
    )
    p.add_argument("--denoiser", metavar="MODEL", help="a denoiser to compare with, such as edm-mini")
    p.add_argument("--seed", type=_seed, default=0, help="seed of compositions and noise (default: %(default)s)")
    p.add_argument("--out", type=Path, help="also write the table to this JSON file")
    _add_json(p)


def _add_alignment(p: argparse.ArgumentParser) -> None:
    _add_oracle(p)
    _add_out(p, "folder of the run; an existing run is continued")
    p.add_argument("--iterations", type=_positive, help="rollout and update iterations of the whole run")


def _add_run_on_data(p: argparse.ArgumentParser) -> None:
    _add_out(p, "folder of the run; an existing run is continued")
    p.add_argument("--steps", type=_positive, help="optimiser steps of the whole run")
    p.add_argument("--batch-size", type=_positive, help="molecules a step, over all processes")
    p.add_argument("--dataset", help="bundled, qm9 or geom")
    p.add_argument("--root", type=Path, help="folder with the files of qm9 or geom")
    p.add_argument("--max-minutes", type=_minutes, help="stop with a checkpoint after this time")


def _add_gpff_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="gpff-mini", help="a bundled model's name or a .safetensors file (default: %(default)s)"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON only")


def _add_model(parser: argparse.ArgumentParser, kinds: str = "") -> None:
    parser.add_argument(
        "--model",
        required=True,
        help=f"{kinds}a bundled model's name, a .safetensors file, or a folder in the public EDM format",
    )


def _add_oracle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--oracle", default="xtb", help="learned, xtb, dft, ani or uma (default: %(default)s)")
    parser.add_argument(
        "--oracle-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the oracle, for example method=GFN1-xTB, or cache=FILE to keep its answers; may be repeated",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=_positive, default=64, help="number of molecules (default: %(default)s)")
    parser.add_argument("--steps", type=_positive, help="reverse steps (default: all of the model's)")
    parser.add_argument("--spacing", type=float, help="of fewer steps: 1 is even, 2 has more near the end (default: 1)")
    parser.add_argument("--seed", type=_seed, default=0, help="seed of sizes and noise (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda when there is one)")
    parser.add_argument(
        "--batch-size",
        type=_positive,
        default=64,
        help="molecules at a time, which a GPU needs more of; the noise depends on it (default: %(default)s)",
    )


def _add_variant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="sampler of a pseudo-force field, such as 'relaxation, momentum' (default: 'direct, 0.3'); its --steps "
        "are network evaluations (default: 64)",
    )


def _add_out(parser: argparse.ArgumentParser, text: str, default: Path | None = None) -> None:
    shown = f"{text} (default: {default})" if default else text
    parser.add_argument("--out", type=Path, required=default is None, default=default, help=shown)


def _add_set(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help=f"a field of {text}; may be repeated"
    )


def _positive(text: str) -> int:
    return _at_least(1, text)


def _seed(text: str) -> int:
    return _at_least(0, text)


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a number of minutes, 0 or more, got {text!r}")
    return value


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return value


def _integers(text: str) -> list[int]:
    return [_at_least(1, part) for part in text.split(",")]


# ---------------------------------------------------------------------- commands
def _version_or_help(parser: argparse.ArgumentParser) -> Command:
    def run(arguments: argparse.Namespace) -> int:
        if arguments.version:
            from elign_lab import __version__

            print(f"elign_lab {__version__}")
            return 0
        parser.print_help()
        return 0

    return run


def _doctor(arguments: argparse.Namespace) -> int:
    from elign_lab.doctor import examine

    report = examine()
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report.text())
    return 0 if report.ok else 1


def _models(arguments: argparse.Namespace) -> int:
    from elign_lab.catalogue import catalogue
    from elign_lab.checkpoints import bundled_assets

    passports = bundled_assets()
    print(json.dumps(passports, indent=2) if arguments.json else catalogue(passports))
    return 0


def _start(arguments: argparse.Namespace) -> int:
    from elign_lab.teaching.start import own_files

    for name, content in own_files(assignments=arguments.assignments):
        _give(arguments.folder / name, content)
    print(f"now run: jupyter lab {arguments.folder}")
    return 0


def _give(target: Path, content: bytes) -> None:
    """Write a file unless it exists: what a student has changed is never overwritten."""
    if target.exists():
        print(f"kept      {target}")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    print(f"copied    {target}")


def _demo(arguments: argparse.Namespace) -> int:
    from elign_lab.demo import DemoConfig, run_demo

    _check_folder(arguments.out)
    with _oracle_failures():
        result = run_demo(arguments.out, DemoConfig(model=arguments.model, preference=arguments.oracle))
    print(result.text())
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from elign_lab import benchmarks

    _check_file(arguments.out, JSON)
    if arguments.subject == "oracles" and arguments.device != "cpu":
        raise ValueError("--device is for the denoiser: the oracles are timed on the CPU")
    repeats = {} if arguments.repeats is None else {"repeats": arguments.repeats}
    text: Callable[[dict[str, Any]], str]
    if arguments.subject == "denoiser" and arguments.device == "cuda":
        _check_device("cuda")
        result, text = benchmarks.bench_denoiser_cuda(**repeats), benchmarks.denoiser_cuda_text
    elif arguments.subject == "denoiser":
        result, text = benchmarks.bench_denoiser(**repeats), benchmarks.denoiser_text
    else:
        makers = benchmarks.oracle_makers(arguments.ani_weights, arguments.limit)
        result, text = benchmarks.bench_oracles(makers, limit=arguments.limit, **repeats), benchmarks.oracles_text
    if arguments.out is not None:
        _write_json(arguments.out, result)
    print(json.dumps(result, indent=2) if arguments.json else text(result))
    return 0


def _pretrain(arguments: argparse.Namespace) -> int:
    from elign_lab.denoiser.pretrain import PRESETS, pretrain

    return _run_on_data(arguments, PRESETS, pretrain)


def _align(arguments: argparse.Namespace) -> int:
    from elign_lab.alignment import PRESETS, align

    return _run_alignment(arguments, PRESETS, align, lambda: _model(arguments.model, "cpu"))


def _fit_oracle(arguments: argparse.Namespace) -> int:
    from accelerate import PartialState

    from elign_lab.oracles import load_oracle
    from elign_lab.oracles.fit import FitConfig, fit_oracle
    from elign_lab.oracles.labels import LabelPlan, make_labels
    from elign_lab.oracles.learned import load_energy_model

    _check_folder(arguments.out)
    config = FitConfig() if arguments.steps is None else override(FitConfig(), [f"steps={arguments.steps}"])
    config = override(config, arguments.set)
    plan = override(LabelPlan(), arguments.plan)
    models = [_model(name, "cpu") for name in arguments.model]
    improve = None if arguments.improve is None else load_oracle("learned", model=arguments.improve)
    # the first of several processes makes the labels, the others read them
    with _oracle(arguments) as oracle, PartialState().main_process_first():
        labels = make_labels(oracle, arguments.out / "labels", plan=plan, models=models, improve=improve)
        atom_energies = {z: oracle.atom_energies[z] for z in config.elements}
    seconds = _seconds(arguments.max_minutes)
    start = None if arguments.start is None else load_energy_model(arguments.start)
    fit_oracle(config, labels, arguments.out, atom_energies=atom_energies, start=start, max_seconds=seconds)
    _print_run(arguments.out)
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    from elign_lab.sampling import sample

    _check_file(arguments.out, MOLECULES)
    n, sizes = arguments.n, arguments.sizes
    if sizes is not None and len(sizes) == 1:
        sizes = sizes * n
    molecules = sample(
        _model(arguments.model, arguments.device),
        n,
        sizes=sizes,
        steps=arguments.steps,
        spacing=1.0 if arguments.spacing is None else arguments.spacing,
        seed=arguments.seed,
        sampler=arguments.sampler,
        batch_size=arguments.batch_size,
        progress=True,
    )
    return _give_molecules(molecules, arguments.out)


def _evaluate(arguments: argparse.Namespace) -> int:
    from elign_lab.evaluation import evaluate
    from elign_lab.evaluation.candidates import make_molecules

    (candidate,), sampling = _candidates([arguments.model], arguments)
    with _oracle(arguments) as oracle:
        (molecules,) = make_molecules([candidate], sampling)
        evaluation = evaluate(molecules, oracle, seed=arguments.seed)
    if not arguments.json:
        print(evaluation.table())
        return 0
    made_with = {name: getattr(arguments, name) for name in ("seed", "model", "oracle", "batch_size")}
    print(json.dumps({**evaluation.to_dict(), **made_with, **candidate.settings(sampling)}, indent=2))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from elign_lab.evaluation import compare, evaluate, write_html
    from elign_lab.evaluation.candidates import make_molecules
    from elign_lab.training import read_json_lines

    _check_file(arguments.out, HTML)
    history = None if arguments.history is None else read_json_lines(arguments.history)
    if history == []:
        raise ValueError(f"--history {arguments.history} holds no iteration: expected the log.jsonl of an alignment")
    candidates, sampling = _candidates([arguments.base, arguments.aligned], arguments)
    paired = candidates[0].is_field == candidates[1].is_field
    if not paired:
        print(
            "elign-lab: not paired: a denoiser draws its own atoms, a pseudo-force field is given them", file=sys.stderr
        )
    with _oracle(arguments) as oracle:
        first, second = make_molecules(candidates, sampling)
        base, aligned = (evaluate(batch, oracle, seed=arguments.seed) for batch in (first, second))
    about = _about_report(candidates, sampling, arguments, paired)
    write_html(arguments.out, base, aligned, first, second, history, about=about, paired=paired)
    print(compare(base, aligned).table())
    print(f"report: {arguments.out}")
    return 0


def _about_report(
    candidates: Sequence[Candidate], sampling: Sampling, arguments: argparse.Namespace, paired: bool
) -> dict[str, str]:
    """What a report says of its making."""
    from elign_lab.evaluation.html_report import made_now
    from elign_lab.oracles import ORACLES

    options = "".join(f", {option}" for option in arguments.oracle_option)
    together = "same seed, sizes and noise for both models" if paired else "not paired: each model has its own atoms"
    if paired and candidates[0].is_field:
        together = "same seed, atoms and noise for both models"
    return {
        **{
            role: f"{c.name} (sha256 {c.sha256[:12]}), {c.kind}: {c.made_by(sampling)}"
            for role, c in zip(("base", "aligned"), candidates, strict=True)
        },
        "oracle": f"{arguments.oracle}{options}: {ORACLES[arguments.oracle].description}",
        "molecules": f"{sampling.n} of each, seed {sampling.seed}, {sampling.batch_size} at a time; {together}",
        "made": made_now(),
        "command": arguments.command_line,
    }


def _gpff_train(arguments: argparse.Namespace) -> int:
    from elign_lab.gpff.train import PRESETS, train

    return _run_on_data(arguments, PRESETS, train)


def _gpff_align(arguments: argparse.Namespace) -> int:
    from elign_lab.gpff import load_force_field
    from elign_lab.gpff.alignment import PRESETS, align_force_field

    return _run_alignment(arguments, PRESETS, align_force_field, lambda: load_force_field(arguments.model))


def _gpff_sample(arguments: argparse.Namespace) -> int:
    from elign_lab.gpff import generate, load_force_field

    _check_file(arguments.out, MOLECULES)
    molecules = generate(
        load_force_field(arguments.model),
        arguments.n if arguments.n or arguments.composition else 64,
        compositions=arguments.composition,
        sampler=arguments.sampler,
        evaluations=arguments.evaluations,
        seed=arguments.seed,
        progress=True,
    )
    return _give_molecules(molecules, arguments.out)


def _gpff_evaluate(arguments: argparse.Namespace) -> int:
    from elign_lab.benchmarks.denoiser import machine
    from elign_lab.gpff import denoiser_table, load_force_field, quality_json, quality_table, quality_text
    from elign_lab.gpff.quality import BUDGETS, VARIANTS

    _check_file(arguments.out, JSON)
    n, budgets = arguments.n, arguments.evaluations or BUDGETS
    wanted = arguments.sampler or list(VARIANTS)
    if unknown := [name for name in wanted if name not in VARIANTS]:
        raise ValueError(f"--sampler {unknown[0]!r}: expected one of {', '.join(map(repr, VARIANTS))}")
    with _oracle(arguments) as oracle:
        options = {"budgets": budgets, "oracle": oracle, "seed": arguments.seed, "progress": True}
        variants = {name: VARIANTS[name] for name in wanted}
        rows = quality_table(load_force_field(arguments.model), n, variants=variants, **options)
        if arguments.denoiser:
            rows += denoiser_table(_model(arguments.denoiser, None), n, **options)
    result = {
        "model": arguments.model,
        "denoiser": arguments.denoiser,
        "oracle": arguments.oracle,
        "seed": arguments.seed,
        "machine": machine(),
        "rows": quality_json(rows),
    }
    if arguments.out is not None:
        _write_json(arguments.out, result)
    print(json.dumps(result, indent=2) if arguments.json else quality_text(rows))
    return 0


# ---------------------------------------------------------------------- helpers
def _run_on_data(
    arguments: argparse.Namespace, presets: dict[str, Callable[[], Any]], run: Callable[..., object]
) -> int:
    """Start or continue a training with the options of `_add_run_on_data`."""
    _check_folder(arguments.out)
    config = _preset(presets, arguments.preset)
    flags = {name: getattr(arguments, name) for name in ("steps", "batch_size", "dataset", "root")}
    config = override(config, [f"{name}={value}" for name, value in flags.items() if value is not None])
    config = override(config, arguments.set)
    run(config, arguments.out, max_seconds=_seconds(arguments.max_minutes))
    _print_run(arguments.out)
    return 0


def _run_alignment(
    arguments: argparse.Namespace,
    presets: Mapping[str, Callable[[], Any]],
    run: Callable[..., object],
    load: Callable[[], object],
) -> int:
    """Start or continue an alignment of the model that `load` reads, with the options of `_add_alignment`."""
    _check_folder(arguments.out)
    config = _preset(presets, arguments.preset)
    if arguments.iterations is not None:
        config = override(config, [f"iterations={arguments.iterations}"])
    config = override(config, arguments.set)
    with _oracle(arguments) as oracle, _oracle_failures():
        run(load(), oracle, config, out=arguments.out)
    _print_run(arguments.out)
    return 0


@contextmanager
def _oracle_failures() -> Iterator[None]:
    """An oracle that fails too often stops an alignment: an error in one line, as for wrong input."""
    from elign_lab.alignment import OracleFailureError

    try:
        yield
    except OracleFailureError as error:
        raise ValueError(str(error)) from error


def _give_molecules(molecules: Any, path: Path | None) -> int:
    """Write molecules to a file, or as xyz to standard output."""
    if path is None:
        print(molecules.to_xyz(), end="")
    else:
        _write_molecules(molecules, path)
        print(f"{len(molecules)} molecules: {path}")
    return 0


def _preset(presets: Mapping[str, Callable[[], Any]], name: str) -> Any:
    if name not in presets:
        raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(presets)}")
    return presets[name]()


def _model(name: str, device: str | None) -> Any:
    from elign_lab.checkpoints import load_model

    return load_model(name, device=_device(device))


def _candidates(names: Sequence[str], arguments: argparse.Namespace) -> tuple[list[Candidate], Sampling]:
    """The models that are to be judged, of either kind, and how their molecules are made."""
    from elign_lab.evaluation.candidates import Sampling, check_sampling, load_candidate

    sampling = Sampling(
        arguments.n, arguments.steps, arguments.spacing, arguments.variant, arguments.seed, arguments.batch_size
    )
    device = _device(arguments.device)
    candidates = [load_candidate(name, device) for name in names]
    check_sampling(candidates, sampling)
    return candidates, sampling


def _device(name: str | None) -> str:
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(name)
    return name


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"--device {device} cannot be used: {error}") from error


@contextmanager
def _oracle(arguments: argparse.Namespace) -> Iterator[Oracle]:
    """The oracle that the options name; closed at the end, with a word on its cache where it has one."""
    import ast

    from elign_lab.oracles import CachedOracle, load_oracle

    options = {}
    for assignment in arguments.oracle_option:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise ValueError(f"--oracle-option {assignment!r}: expected KEY=VALUE")
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[key] = text
    with load_oracle(arguments.oracle, **options) as oracle:
        yield oracle
        if isinstance(oracle, CachedOracle):
            print(f"{oracle.path}: {oracle.hits} molecules answered from it, {oracle.misses} new", file=sys.stderr)


def _check_file(path: Path | None, suffixes: Sequence[str]) -> None:
    """Refuse a file --out that could not be written at the end, before anything is computed; nothing is made."""
    if path is None:
        return
    *others, last = suffixes
    expected = f"expected a file that ends in {', '.join(others)}{' or ' if others else ''}{last}"
    if path.is_dir():
        raise ValueError(f"--out {path} is a folder: {expected}; name a file in it")
    if path.suffix not in suffixes:
        raise ValueError(f"--out {path}: {expected}")
    _check_place(path, path if path.exists() else path.parent)


def _check_place(out: Path, folder: Path) -> None:
    """Refuse an --out whose folder could not be made, or in which nothing may be written."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if there != out and not there.is_dir():
        raise ValueError(f"--out {out}: {there} is a file, expected a folder; choose another place")
    if not os.access(there, os.W_OK):
        raise ValueError(f"--out {out}: no permission to write to {there}; choose another place")


def _check_folder(path: Path) -> None:
    """The same for the folder of a run."""
    if path.is_file():
        raise ValueError(f"--out {path} is a file: expected the folder of a run; choose another place")
    _check_place(path, path)


def _write_molecules(molecules: MoleculeBatch, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".xyz":
        molecules.to_xyz(path)
    elif path.suffix == ".sdf":
        molecules.to_sdf(path)
    else:
        molecules.to_npz(path)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _seconds(minutes: float | None) -> float | None:
    return None if minutes is None else 60 * minutes


def _print_run(folder: Path) -> None:
    """Say where a training run is, in the first of several processes only (torchrun and accelerate set RANK)."""
    if os.environ.get("RANK", "0") == "0":
        print(f"model: {folder / 'model.safetensors'}\nlog:   {folder / 'log.jsonl'}")
