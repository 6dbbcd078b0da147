"""How much of the policy gradient is signal, and how far do the ratios go?

python scripts/gradient_signal.py [--model gpff-mini] [--preset gpff_cpu_mini] [--estimates 8] [--set field=value ...]
python scripts/gradient_signal.py --model edm-mini --preset cpu_mini ...

For the settings of an alignment it makes the rollouts of several iterations with the weights unchanged, and from each
the gradient of the loss, for each trained step and in all. The share of signal is the mean scalar product of two of
them over their mean square: 1 without noise, 0 (a little above or below) when nothing is in common. With a share s the
sum of 1/s estimates is half signal: a run of a few hundred updates needs a hundredth or so, or it walks at random.

Then some iterations are trained, and the log-ratios of the last one's rollouts after its updates are given: their root
mean square and the share outside the clip range, by trained step and by number of atoms.
"""

import argparse
from collections import defaultdict

import torch
from torch import Tensor
from tqdm import tqdm

from elign_lab import load_model, load_oracle
from elign_lab.alignment import PRESETS, Trainer
from elign_lab.alignment.objective import fed_grpo_terms
from elign_lab.alignment.trainer import PolicyTrainer
from elign_lab.gpff import load_force_field
from elign_lab.gpff.alignment import PRESETS as GPFF_PRESETS
from elign_lab.gpff.alignment import ForceFieldTrainer
from elign_lab.overrides import override


def gradients(trainer: PolicyTrainer, index: int) -> Tensor:
    """Mean gradient (S, weights) of the loss of each trained step, from the rollouts of iteration `index`."""
    rollouts = trainer.roll_out(index)
    advantages = trainer.advantages(rollouts, trainer.judge(rollouts))
    found = []
    for step in range(rollouts.steps):
        units = torch.arange(rollouts.groups) * rollouts.steps + step
        trainer.set_gradients(rollouts, advantages, units, 1 / len(rollouts.finite))
        found.append(torch.cat([p.grad.flatten() for p in trainer.parameters]))
    return torch.stack(found)


def signal(estimates: list[Tensor]) -> float:
    """Mean scalar product of two estimates over their mean square."""
    rows = torch.stack(estimates).double()
    products = rows @ rows.T
    n, square = len(estimates), products.diagonal().mean()
    return float((products.sum() - n * square) / (n * (n - 1)) / square)


def log_ratios(trainer: PolicyTrainer, iterations: int) -> tuple[Tensor, Tensor]:
    """Log-ratios (S, G K) of the last iteration's rollouts after its updates, and their numbers of atoms (G K,)."""
    rollouts = [trainer.step() for _ in tqdm(range(iterations), desc="iterations")][-1].rollouts
    rows, scale, found = torch.arange(len(rollouts.finite)), trainer.ratio_scale(rollouts), []
    for step in range(rollouts.steps):
        with torch.no_grad():
            new = trainer.prediction(trainer.policy, rollouts, torch.full_like(rows, step), rows)
        old, noise = rollouts.eps[step], rollouts.noise[step]
        found.append(fed_grpo_terms(noise, new, old, old, scale[step].expand(len(rows)), torch.ones(len(rows)), 1.0))
    return torch.stack([terms.log_ratio for terms in found]), rollouts.mask.sum(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpff-mini")
    parser.add_argument("--preset", default="gpff_cpu_mini", choices=[*PRESETS, *GPFF_PRESETS])
    parser.add_argument("--oracle", default="learned")
    parser.add_argument("--estimates", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    arguments = parser.parse_args()
    oracle = load_oracle(arguments.oracle)
    if arguments.preset in PRESETS:
        config = override(PRESETS[arguments.preset](), arguments.set)
        trainer: PolicyTrainer = Trainer(load_model(arguments.model), oracle, config)
    else:
        config = override(GPFF_PRESETS[arguments.preset](), arguments.set)
        trainer = ForceFieldTrainer(load_force_field(arguments.model), oracle, config)
    of_step = defaultdict(list)
    for index in tqdm(range(arguments.estimates), desc="estimates"):
        for step, gradient in enumerate(gradients(trainer, index)):
            of_step[step].append(gradient)
    for step, estimates in of_step.items():
        print(f"step {step}: signal {signal(estimates):+.3f}")
    together = [torch.stack(same).mean(0) for same in zip(*of_step.values(), strict=True)]
    print(f"all steps: signal {signal(together):+.3f}")

    ratios, sizes = log_ratios(trainer, arguments.iterations)
    by_step = {f"steps {part[0]} to {part[-1]}": ratios[part] for part in torch.arange(len(ratios)).tensor_split(5)}
    order = sizes.argsort()
    by_size = {f"{sizes[part[0]]} to {sizes[part[-1]]} atoms": ratios[:, part] for part in order.tensor_split(3)}
    for name, part in (by_step | by_size).items():
        outside = ((part.exp() - 1).abs() > config.clip_range).double().mean()
        print(f"log-ratios of {name}: RMS {part.square().mean().sqrt():.3f}, outside the clip range {outside:.1%}")


if __name__ == "__main__":
    main()
