"""The pseudo-force field and its targets: symmetries, gradients, nearest images, files."""

from __future__ import annotations

import pytest
import torch
from scipy.spatial.transform import Rotation

from elign_lab.checkpoints import ASSETS
from elign_lab.datasets import load_dataset
from elign_lab.gpff import GPFFConfig, PseudoForceField, load_force_field, nearest_image, perturb, save_force_field
from elign_lab.gpff.model import VARIANTS
from elign_lab.gpff.pseudo_forces import draw_sigma, partial_noise
from elign_lab.molecules import MoleculeBatch, zero_com
from elign_lab.painn import PaiNNConfig

SMALL = PaiNNConfig(features=16, vectors=8, channels=8, layers=3, basis=8, shortest=0.1, reach=12.0, cutoff=False)


def small_model(variant: str = "direct") -> PseudoForceField:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PseudoForceField(GPFFConfig(variant=variant, network=SMALL)).double().eval()


@pytest.fixture(scope="module")
def batch() -> MoleculeBatch:
    return MoleculeBatch.from_smiles(["CCO", "NC=O", "c1ccccc1F", "O"]).to(dtype=torch.float64)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sigma", [0.05, 1.0, 8.0])
@pytest.mark.parametrize("inversion", [1.0, -1.0])
def test_forces_turn_with_the_structure(batch, variant, sigma, inversion):
    model = small_model(variant)
    x = perturb(batch, torch.full((4,), sigma), torch.Generator().manual_seed(1))
    turn = torch.from_numpy(inversion * Rotation.random(rng=3).as_matrix())
    with torch.no_grad():
        force = model(batch.numbers, x, batch.mask)
        turned = model(batch.numbers, x @ turn.T + 5.0, batch.mask)
    assert float(force.abs().max()) > 1e-3
    torch.testing.assert_close(turned, force @ turn.T, rtol=1e-9, atol=1e-9)
    assert float(force.sum(1).abs().max()) < 1e-9
    assert float(force[~batch.mask].abs().sum()) == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_and_order_of_atoms_do_not_matter(batch, variant):
    model = small_model(variant)
    with torch.no_grad():
        together = model(batch.numbers, batch.positions, batch.mask)
        for i, molecule in enumerate(batch):
            n = int(molecule.sizes)
            order = torch.randperm(n, generator=torch.Generator().manual_seed(i))
            alone = model(molecule.numbers[:, order], molecule.positions[:, order], molecule.mask)
            torch.testing.assert_close(alone[0], together[i, :n][order], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spread", [0.9, 1.0, 4.0])
def test_conservative_force_is_minus_the_gradient_of_the_energy(batch, spread):
    model = small_model("conservative")
    x = zero_com(batch.positions * spread, batch.mask)
    force = model(batch.numbers, x, batch.mask)
    direction = zero_com(torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype), batch.mask)
    step = 1e-5
    up, down = (model.energy(batch.numbers, x + s * direction, batch.mask) for s in (step, -step))
    slope = -(up - down) / (2 * step)
    torch.testing.assert_close((force * direction).sum((1, 2)), slope, rtol=1e-6, atol=1e-6)


def test_direct_model_has_no_energy(batch):
    with pytest.raises(ValueError, match="conservative"):
        small_model().energy(batch.numbers, batch.positions, batch.mask)


@pytest.mark.parametrize("variant", VARIANTS)
def test_clean_estimate_of_a_huge_cloud_is_molecule_sized(batch, variant):
    """The scaling: at 10 and at 100 Angstrom an untrained network already answers with a small structure."""
    model = small_model(variant)
    for sigma in (10.0, 100.0):
        x = perturb(batch, torch.full((4,), sigma), torch.Generator().manual_seed(2))
        with torch.no_grad():
            clean = x + 0.5 * model(batch.numbers, x, batch.mask)
        spread = (clean.square().sum((1, 2)) / (3 * (batch.sizes - 1))).sqrt()
        assert float(spread.max()) < 3


def test_a_wrong_configuration_is_refused():
    with pytest.raises(ValueError, match="unknown variant"):
        GPFFConfig(variant="other")
    with pytest.raises(ValueError, match="sigma_min"):
        GPFFConfig(sigma_min=3.0, sigma_max=1.0)
    with pytest.raises(ValueError, match="spread"):
        GPFFConfig(spread=5.0)


def test_what_the_model_cannot_evaluate_is_refused():
    model = small_model()
    with pytest.raises(ValueError, match="single atom"):
        model.check(MoleculeBatch.from_arrays([([8], [[0.0, 0, 0]])]))
    with pytest.raises(ValueError, match="is S"):
        model.check(MoleculeBatch.from_smiles("CS"))


# ---------------------------------------------------------------------- targets
def test_nearest_image_undoes_a_rotation_a_reflection_and_an_exchange(batch):
    turn = -torch.from_numpy(Rotation.random(rng=5).as_matrix())
    x = zero_com(batch.positions, batch.mask)
    image = nearest_image(batch.with_positions(x @ turn.T), x)
    torch.testing.assert_close(image, x, rtol=0, atol=1e-9)
    hydrogens = torch.arange(9)
    hydrogens[[3, 4]] = torch.tensor([4, 3])  # two hydrogens of the methyl group of ethanol
    assert batch.numbers[0, 3] == batch.numbers[0, 4] == 1
    ethanol = batch[0]
    swapped = ethanol.with_positions(ethanol.positions[:, hydrogens])
    x = zero_com(ethanol.positions, ethanol.mask)
    torch.testing.assert_close(nearest_image(swapped, x), x, rtol=0, atol=1e-9)
    kept = nearest_image(swapped, x, exchange=torch.tensor([False]))
    assert float((kept - x).norm()) > 0.5


def test_nearest_image_is_an_image_and_never_farther():
    data = load_dataset("bundled", split="validation").batch(range(32))
    sigma = torch.linspace(0.1, 10, 32)
    x = perturb(data, sigma, torch.Generator().manual_seed(0))
    given = (x - zero_com(data.positions, data.mask)).square().sum((1, 2))
    turned = (x - nearest_image(data, x, exchange=torch.zeros(32, dtype=torch.bool))).square().sum((1, 2))
    image = nearest_image(data, x)
    found = (x - image).square().sum((1, 2))
    assert bool((turned <= given * (1 + 1e-5) + 1e-5).all())
    assert bool((found <= turned * (1 + 1e-5) + 1e-5).all())
    assert float((found / given)[sigma > 1].mean()) < 0.99
    for i in range(32):
        m = data.mask[i]
        for z in data.numbers[i][m].unique():
            atoms = data.numbers[i] == z
            before = torch.pdist(data.positions[i][atoms]).sort().values
            torch.testing.assert_close(torch.pdist(image[i][atoms]).sort().values, before, rtol=1e-3, atol=1e-3)


def test_noise_levels_are_stratified():
    sigma = draw_sigma(64, 0.01, 10.0, torch.Generator().manual_seed(0))
    decade = sigma.log10().floor()
    assert all(20 <= int((decade == k).sum()) <= 22 for k in (-2, -1, 0))  # drawn freely they would differ by about 4
    assert float(sigma.min()) >= 0.01
    assert float(sigma.max()) <= 10


def test_partial_noise_keeps_a_part_in_place(batch):
    chosen = torch.tensor([True, False, True, True])
    free = partial_noise(batch, chosen, torch.Generator().manual_seed(3))
    assert bool((free[1] == batch.mask[1]).all())
    for i in (0, 2, 3):
        n = int(batch.sizes[i])
        assert 1 <= int(free[i].sum()) <= n - 1
    x = perturb(batch, torch.full((4,), 2.0), torch.Generator().manual_seed(4), free=free)
    kept = batch.mask[2] & ~free[2]
    torch.testing.assert_close(torch.pdist(x[2][kept]), torch.pdist(batch.positions[2][kept]), rtol=0, atol=1e-9)


def test_file_and_back(batch, tmp_path):
    model = small_model().float()
    model.config = GPFFConfig(network=SMALL, compositions=(("C2H6O", 3), ("CH4", 1)))
    path = save_force_field(model, tmp_path / "model.safetensors")
    again = load_force_field(path)
    assert again.config == model.config
    x = batch.positions.float()
    with torch.no_grad():
        assert torch.equal(again(batch.numbers, x, batch.mask), model(batch.numbers, x, batch.mask))


def test_foreign_files_are_refused():
    with pytest.raises(FileNotFoundError, match="gpff train"):
        load_force_field("no-such-model")
    with pytest.raises(ValueError, match="not a pseudo-force field"):
        load_force_field(ASSETS / "edm-mini.safetensors")
