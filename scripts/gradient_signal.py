"""How much of the policy gradient is signal: what do estimates from separate rollouts have in common?

python scripts/gradient_signal.py [--model gpff-mini] [--estimates 8] [--set field=value ...]

For the settings of `elign-lab gpff align` it makes the rollouts of several iterations with the weights unchanged, and
from each the gradient of the loss, for each trained step and in all. The share of signal is the mean scalar
product of two of them over their mean square: 1 without noise, 0 (a little above or below) when nothing is in common.
Below a tenth or so a run walks at random: more rollouts, fewer trained steps, or another sampler.
"""

import argparse
from collections import defaultdict

import torch
from torch import Tensor
from tqdm import tqdm

from elign_lab import load_oracle
from elign_lab.gpff import load_force_field
from elign_lab.gpff.alignment import ForceFieldTrainer, gpff_cpu_mini
from elign_lab.overrides import override


def gradients(trainer: ForceFieldTrainer, index: int) -> Tensor:
    """Mean gradient (S, weights) of the loss of each trained step, from the rollouts of iteration `index`."""
    rollouts = trainer.roll_out(index)
    advantages = trainer.advantages(rollouts, trainer.judge(rollouts))
    found = []
    for step in range(rollouts.steps):
        units = torch.arange(rollouts.groups) * rollouts.steps + step
        trainer.set_gradients(rollouts, advantages, units, 1 / len(rollouts.finite))
        found.append(torch.cat([p.grad.flatten() for p in trainer.parameters]).double())
    return torch.stack(found)


def signal(estimates: list[Tensor]) -> float:
    """Mean scalar product of two estimates over their mean square."""
    products = torch.stack(estimates) @ torch.stack(estimates).T
    n, square = len(estimates), products.diagonal().mean()
    return float((products.sum() - n * square) / (n * (n - 1)) / square)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpff-mini")
    parser.add_argument("--oracle", default="learned")
    parser.add_argument("--estimates", type=int, default=8)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    arguments = parser.parse_args()
    config = override(gpff_cpu_mini(), arguments.set)
    trainer = ForceFieldTrainer(load_force_field(arguments.model), load_oracle(arguments.oracle), config)
    of_step = defaultdict(list)
    for index in tqdm(range(arguments.estimates), desc="estimates"):
        for step, gradient in enumerate(gradients(trainer, index)):
            of_step[step].append(gradient)
    for step, estimates in of_step.items():
        print(f"step {step}: signal {signal(estimates):+.3f}")
    together = [torch.stack(same).mean(0) for same in zip(*of_step.values(), strict=True)]
    print(f"all steps: signal {signal(together):+.3f}")


if __name__ == "__main__":
    main()
