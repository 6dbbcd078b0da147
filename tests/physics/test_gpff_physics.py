"""Pseudo-forces as physics: gradient of an invariant potential, score of a diffusion, and a field that was learned."""

from __future__ import annotations

import pytest
import torch

from elign_lab.checkpoints import ASSETS
from elign_lab.datasets import load_dataset
from elign_lab.gpff import (
    GPFFConfig,
    PseudoForceField,
    generate,
    load_force_field,
    nearest_image,
    perturb,
    quality_table,
)
from elign_lab.gpff.pseudo_forces import draw_sigma
from elign_lab.gpff.train import errors, loss_per_molecule
from elign_lab.molecules import MoleculeBatch, zero_com
from elign_lab.painn import PaiNNConfig

needs_model = pytest.mark.skipif(
    not (ASSETS / "gpff-mini.safetensors").exists(), reason="the bundled model gpff-mini is not there"
)


def pseudo_potential(batch: MoleculeBatch, x: torch.Tensor) -> torch.Tensor:
    """E(x), the squared distance to the nearest image, (B,) in Angstrom^2."""
    return (zero_com(x, batch.mask) - nearest_image(batch, x)).square().sum((1, 2))


@pytest.mark.parametrize("sigma", [0.1, 0.5, 3.0])
def test_pseudo_force_is_minus_the_gradient_of_the_nearest_image_potential(sigma):
    batch = load_dataset("bundled", split="test").batch(range(16)).to(dtype=torch.float64).centered()
    generator = torch.Generator().manual_seed(0)
    x = perturb(batch, torch.full((16,), sigma), generator)
    force = 2 * (nearest_image(batch, x) - x)
    direction = zero_com(torch.randn(x.shape, generator=generator, dtype=x.dtype), batch.mask)
    step = 1e-6
    up, down = (pseudo_potential(batch, x + s * direction) for s in (step, -step))
    torch.testing.assert_close((force * direction).sum((1, 2)), -(up - down) / (2 * step), rtol=1e-4, atol=1e-4)


def test_what_alignment_takes_out_of_the_target():
    """The share of the target's noise that is only a rotation or an exchange, by level."""
    batch = load_dataset("bundled", split="test").batch(range(64)).centered()
    left = {}
    for sigma in (0.1, 1.0, 10.0):
        x = perturb(batch, torch.full((64,), sigma), torch.Generator().manual_seed(1))
        given = (x - batch.positions).square().sum((1, 2))
        turned = nearest_image(batch, x, exchange=torch.zeros(64, dtype=torch.bool))
        both = nearest_image(batch, x)
        left[sigma] = [float(((x - image).square().sum((1, 2)) / given).mean()) for image in (turned, both)]
    assert left[0.1][0] == pytest.approx(1 - 3 / 51, abs=0.02)  # three rotations of 3 (N - 1) = 51 directions
    assert left[0.1][0] - left[0.1][1] < 1e-4  # small noise exchanges nothing
    assert left[1.0][1] < left[1.0][0] - 0.05  # at 1 Angstrom it does
    assert 0.7 < left[10.0][1] < left[10.0][0] < 1


@pytest.fixture(scope="module")
def water_field() -> tuple[PseudoForceField, MoleculeBatch]:
    """A small network that learned water alone, in about 5 seconds."""
    water = MoleculeBatch.from_smiles("O").centered()
    network = PaiNNConfig(
        features=24, vectors=12, channels=8, layers=2, basis=12, shortest=0.4, reach=12.0, cutoff=False
    )
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PseudoForceField(GPFFConfig(network=network))
    steps = 500
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    batch = water[[0] * 64]
    for _ in range(steps):
        sigma = draw_sigma(64, 0.02, 10.0, generator)
        x = perturb(batch, sigma, generator)
        loss = loss_per_molecule(model, batch, x, nearest_image(batch, x), sigma, 0.03).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval(), water


@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    [("ancestral", 32), ("heun", 32), ("adaptive_ancestral", 32), ("adaptive_heun", 32), ("direct", 16)],
)
def test_a_learned_field_makes_its_molecule_from_noise(water_field, sampler, evaluations):
    model, water = water_field
    found = generate(model, 16, compositions="H2O", sampler=sampler, evaluations=evaluations, seed=1)
    wanted = torch.pdist(water.positions[0]).sort().values
    got = torch.stack([torch.pdist(x).sort().values for x in found.positions])
    assert float((got - wanted).abs().max()) < 0.1  # Angstrom: two O-H bonds and the H-H distance


def test_a_learned_field_shows_the_noise_level(water_field):
    model, water = water_field
    batch = water[[0] * 128]
    for sigma in (0.1, 0.5, 5.0):
        x = perturb(batch, torch.full((128,), sigma), torch.Generator().manual_seed(2))
        true = (x - nearest_image(batch, x)).square().sum((1, 2)).mean().sqrt()
        with torch.no_grad():
            shown = (0.5 * model(batch.numbers, x, batch.mask)).square().sum((1, 2)).mean().sqrt()
        assert float(shown) == pytest.approx(float(true), rel=0.15)


# ---------------------------------------------------------------------- the bundled model
@needs_model
def test_bundled_model_denoises_unseen_molecules():
    model = load_force_field()
    found = errors(model, load_dataset("bundled", split="test"), 64)
    for sigma, rmse in zip(found["sigma"], found["rmse"], strict=True):
        assert rmse < 1.1 * sigma
    small = found["sigma"].index(0.1)
    assert found["rmse"][small] < 0.06  # Angstrom per degree of freedom


@needs_model
def test_bundled_model_makes_valid_molecules():
    (row,) = quality_table(
        load_force_field(), 32, budgets=(64,), variants={"ancestral": ("ancestral", {"level": "grid"})}
    )
    assert row.validity > 0.5
