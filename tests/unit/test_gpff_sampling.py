"""Samplers, priors, constraints and edits, on an exact pseudo-force field and on an untrained network."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from elign_lab.checkpoints import load_model
from elign_lab.cli import main
from elign_lab.datasets import load_dataset
from elign_lab.evaluation.intervals import difference, wilson
from elign_lab.gpff import (
    SAMPLERS,
    Constraints,
    GPFFConfig,
    PseudoForceField,
    SamplingTask,
    Sphere,
    calibrate,
    denoiser_table,
    generate,
    get_sampler,
    judge,
    load_force_field,
    nearest_image,
    parse_formula,
    pocket,
    quality_figure,
    quality_from_json,
    quality_json,
    quality_table,
    quality_text,
    replace_group,
    save_force_field,
    start_positions,
)
from elign_lab.gpff.compositions import composition_counts, draw_compositions, formula_of
from elign_lab.gpff.levels import karras_decrement, karras_levels, next_level
from elign_lab.gpff.quality import VARIANTS, Quality, valid_smiles, validity_gain
from elign_lab.molecules import MoleculeBatch, zero_com
from elign_lab.oracles import load_oracle
from elign_lab.painn import PaiNNConfig
from elign_lab.sampling import sample

SMALL = PaiNNConfig(features=16, vectors=8, channels=8, layers=2, basis=8, shortest=0.1, reach=12.0, cutoff=False)


class ExactField(nn.Module):
    """The pseudo-force field of a single molecule: F = 2 (nearest image of the reference - x)."""

    def __init__(self, reference: MoleculeBatch) -> None:
        super().__init__()
        self.reference = reference
        self.config = GPFFConfig(compositions=((reference.formula(0), 1),))
        self.device, self.dtype = torch.device("cpu"), torch.float64
        self.check = PseudoForceField.check.__get__(self)

    def forward(self, numbers: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        x = zero_com(positions.double(), mask)
        copies = self.reference[[0] * len(x)]
        return 2 * (nearest_image(copies, x, exchange=torch.zeros(len(x), dtype=torch.bool)) - x)


@pytest.fixture(scope="module")
def ethanol() -> MoleculeBatch:
    return MoleculeBatch.from_smiles("CCO").to(dtype=torch.float64).centered()


@pytest.fixture(scope="module")
def untrained() -> PseudoForceField:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PseudoForceField(GPFFConfig(network=SMALL, compositions=(("C2H6O", 2), ("CH4", 1))))
    return model.eval()


def task_of(model, molecule: MoleculeBatch, copies: int = 4, constraints: Constraints | None = None) -> SamplingTask:
    batch = molecule[[0] * copies]
    return SamplingTask(
        model, batch.numbers, batch.mask, constraints=constraints, generator=torch.Generator().manual_seed(7)
    )


def distances(x: Tensor) -> Tensor:
    return torch.stack([torch.pdist(structure) for structure in x])


# ---------------------------------------------------------------------- levels
def test_karras_levels():
    grid = karras_levels(5, 10.0, 0.02)
    assert grid[0] == pytest.approx(10)
    assert grid[-2] == pytest.approx(0.02)
    assert grid[-1] == 0
    roots = np.array(grid[:-1]) ** (1 / 7)
    assert np.allclose(np.diff(roots), np.diff(roots)[0])
    assert karras_levels(1, 10.0, 0.02) == [10.0, 0.0]
    decrement = karras_decrement(5, 10.0, 0.02)
    walked = [torch.tensor(10.0, dtype=torch.float64)]
    while walked[-1] > 0:
        walked.append(next_level(walked[-1], decrement, 0.02))
    assert np.allclose(torch.stack(walked), grid)  # an exact sigma_hat walks down the grid
    with pytest.raises(ValueError, match="at least one step"):
        karras_levels(0, 1.0, 0.1)
    with pytest.raises(ValueError, match="sigma_min"):
        karras_levels(4, 0.01, 0.1)


# ---------------------------------------------------------------------- samplers
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_finds_the_only_molecule(ethanol, name):
    model = ExactField(ethanol)
    found = generate(model, 3, compositions="C2H6O", sampler=name, evaluations=24, seed=1)
    # heavy atoms come first in a composition, as in the SMILES
    assert torch.equal(found.numbers[0], ethanol.numbers[0])
    torch.testing.assert_close(
        distances(found.positions), distances(ethanol.positions).expand(3, -1), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("evaluations", [1, 2, 7, 16])
def test_records_are_consistent_and_calls_are_counted(untrained, ethanol, name, evaluations):
    calls = []
    hook = untrained.register_forward_hook(lambda *_: calls.append(1))
    task = task_of(untrained, ethanol)
    x = start_positions(task, 10.0)
    records = list(get_sampler(name)(task, x, evaluations=evaluations, sigma=10.0, sigma_min=0.02))
    hook.remove()
    assert len(calls) == records[-1].evaluations == task.evaluations <= evaluations
    assert int(task.spent.max()) <= evaluations
    assert [records[-1].t, records[-1].s] == [0, -1]
    assert torch.equal(records[0].z_t, x)
    for record, following in itertools.pairwise(records):
        assert torch.equal(record.z_s, following.z_t)
        assert following.t < record.t == record.s + 1
    for record in records:
        moved = record.active
        expected = zero_com(record.mean + record.sigma * record.noise, record.mask)
        torch.testing.assert_close(record.z_s[moved], expected[moved], rtol=1e-5, atol=1e-5)
        spread = (record.noise.square().sum((1, 2)) / task.degrees).sqrt()  # of 24 numbers: within a factor
        assert bool(((spread > 0.5 * record.amplitude) | (record.amplitude == 0)).all())
        assert bool((spread <= 1.8 * record.amplitude).all())
    assert torch.equal(records[-1].molecules("clean").positions, records[-1].clean)
    with pytest.raises(ValueError, match="expected one of result"):
        records[0].molecules("other")


@pytest.mark.parametrize("level", ["grid", "force"])
def test_ancestral_sampling_keeps_the_noise_level_of_the_grid(ethanol, level):
    """With one molecule the forward process is known: at every step x - x_ref has the level of the grid."""
    task = task_of(ExactField(ethanol), ethanol, copies=64)
    run = SAMPLERS["ancestral"](
        task, start_positions(task, 10.0), evaluations=9, sigma=10.0, sigma_min=0.02, level=level
    )
    for record, sigma in zip(run, karras_levels(9, 10.0, 0.02), strict=False):
        assert float(record.sigma_hat.square().mean().sqrt()) == pytest.approx(sigma, rel=0.1)


def test_adaptive_samplers_stop_early_from_a_good_start(ethanol):
    model = ExactField(ethanol)
    for name in ("adaptive_ancestral", "adaptive_heun"):
        spent = []
        for sigma in (0.05, 10.0):
            task = task_of(model, ethanol)
            start = start_positions(task, sigma, ethanol[[0] * 4].positions)
            *_, last = SAMPLERS[name](task, start, evaluations=32, sigma_min=0.02)
            assert last.s == -1
            spent.append(task.evaluations)
        assert spent[0] < spent[1] / 3
        assert spent[1] <= 32


def test_a_molecule_that_stopped_is_left_alone(ethanol):
    model = ExactField(ethanol)
    task = task_of(model, ethanol, copies=2)
    x = ethanol[[0, 0]].positions.clone()
    x[1] = x[1] + 3.0 * task.noise()[1]
    records = list(SAMPLERS["adaptive_ancestral"](task, x, evaluations=32, sigma_min=0.02))
    assert task.spent.tolist() == [1, task.evaluations]
    assert task.evaluations > 5
    assert records[1].active.tolist() == [False, True]
    assert all(torch.equal(r.z_s[0], records[0].z_s[0]) for r in records)


def test_momentum_goes_on_where_the_last_two_estimates_point():
    numbers = torch.tensor([[6, 8, 1, 1]])
    task = SamplingTask(load_force_field(), numbers, numbers > 0, generator=torch.Generator().manual_seed(0))
    start = start_positions(task, 1.42)
    first, second, third = SAMPLERS["direct"](task, start, evaluations=3, sigma_min=0.02, strength=0.0, momentum=0.5)
    torch.testing.assert_close(first.z_s, first.clean)
    torch.testing.assert_close(second.z_s, second.clean + 0.5 * (second.clean - first.clean))
    torch.testing.assert_close(third.z_s, third.clean + 0.5 * (third.clean - second.clean))
    assert not torch.allclose(third.z_s, third.clean)


def test_same_seed_same_structures_and_equivariance_of_relaxation(untrained, ethanol):
    first, again, other = (generate(untrained, 2, evaluations=4, seed=s).positions for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)
    model = PseudoForceField(untrained.config).double()
    model.load_state_dict(untrained.state_dict())
    turn = torch.from_numpy(Rotation.random(rng=3).as_matrix())
    options = {"sampler": "direct", "evaluations": 3, "strength": 0.0}
    plain = generate(model, start=ethanol, **options).positions
    turned = generate(model, start=ethanol.with_positions(ethanol.positions @ turn.T), **options).positions
    torch.testing.assert_close(turned, plain @ turn.T, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be at least 1"),
        ({"sampler": "other"}, "unknown sampler"),
        ({"evaluations": 0}, "evaluations must be"),
        ({"sigma": 11.0}, "outside the model's range"),
        ({"compositions": "C2H5O"}, "odd number"),
        ({"compositions": "CH6"}, "7 atoms with 5 bonds among them at most, and one molecule needs 6"),
        ({"compositions": [[1, 1, 1, 1]]}, "take out hydrogen"),
        ({"compositions": [6, 1, 1, 1, 1]}, "a list of atomic numbers for each"),
        ({"compositions": "C2H6S"}, "not trained on"),
        ({"compositions": "Xx2"}, "unknown element"),
        ({"compositions": "H"}, "2 or more"),
        ({"compositions": "c2h6"}, "not a formula"),
        ({"compositions": ""}, "not a formula"),
        ({"compositions": "C30H62"}, "over the model's limit"),
        ({"compositions": []}, "empty"),
        ({"compositions": "C0H2"}, "counts of 1 or more"),
        ({"compositions": 5}, "compositions are 5: expected formulas"),
        ({"compositions": [[6.5, 1.2, 1, 1, 1]]}, r"composition \[6.5, .* whole atomic numbers"),
        ({"compositions": [["C", "O"]]}, "whole atomic numbers"),
        ({"compositions": "CH4", "sigma": 0.0, "sampler": "direct", "strength": 0.0}, "all atoms at one place"),
        ({"compositions": "CH4", "sigma": 0.01}, "a sigma over 0.02"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"compositions": ["CH4", "H2O"], "n": 3}, "one for all"),
        ({"sampler": "ancestral", "level": "other"}, "unknown level"),
        ({"sampler": "direct", "strength": -1.0}, "strength"),
        ({"sampler": "direct", "momentum": 1.0}, "momentum must be at least 0 and less than 1"),
    ],
)
def test_wrong_requests_are_refused(untrained, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(untrained, **arguments)


def test_wrong_starts_are_refused(untrained, ethanol):
    with pytest.raises(ValueError, match="adaptive"):
        generate(untrained, start=ethanol, sampler="heun")
    grown = replace_group(MoleculeBatch.from_smiles("C"), [1], ["O", "H"])
    with pytest.raises(ValueError, match="molecule 0 of the start has two atoms at one place"):
        generate(untrained, start=grown.start, constraints=grown.constraints, sampler="adaptive_heun")
    with pytest.raises(ValueError, match="the start says"):
        generate(untrained, start=ethanol, compositions="CH4")
    with pytest.raises(ValueError, match="need a start"):
        generate(untrained, 1, constraints=Constraints(ethanol.positions[0], frozen=(0,)))
    methane = MoleculeBatch.from_smiles("C")
    radical = MoleculeBatch(methane.numbers[:, :4], methane.positions[:, :4], methane.mask[:, :4])
    with pytest.raises(ValueError, match="molecule 1 of the start, CH3, has 9 electrons, an odd number"):
        generate(untrained, start=MoleculeBatch.cat([methane, radical]), sampler="direct", sigma=1.0)
    hydrogen = MoleculeBatch(torch.ones_like(radical.numbers), radical.positions, radical.mask)
    with pytest.raises(ValueError, match="molecule 0 of the start, H4, has 4 atoms with 2 bonds"):
        generate(untrained, start=hydrogen, sampler="direct", sigma=1.0)


# ---------------------------------------------------------------------- compositions
def test_formulas():
    assert parse_formula("C2H6O") == (6, 6, 8, 1, 1, 1, 1, 1, 1)
    assert formula_of(parse_formula("CH3F")) == "CH3F"
    for formula in ("H2", "CO", "O3", "HNO3", "CH4O", "SF6"):  # charges within a molecule do not matter
        assert len(parse_formula(formula)) >= 2
    data = load_dataset("bundled", split="validation")
    counts = composition_counts(data)
    assert sum(count for _, count in counts) == len(data)
    assert counts[0][1] == max(count for _, count in counts)
    drawn = draw_compositions(counts, 200, torch.Generator().manual_seed(0))
    assert {formula_of(numbers) for numbers in drawn} <= {formula for formula, _ in counts}
    share = sum(map(len, drawn)) / 200
    assert share == pytest.approx(float(np.mean(data.sizes)), abs=0.8)
    with pytest.raises(ValueError, match="no compositions"):
        draw_compositions((), 1)


# ---------------------------------------------------------------------- constraints
@pytest.mark.parametrize("name", SAMPLERS)
def test_frozen_atoms_stay_to_float_precision(untrained, name):
    start = MoleculeBatch.from_smiles("CCO")
    frozen = (0, 1, 3, 4)
    limits = Constraints(start.positions[0], frozen=frozen)
    task = task_of(untrained, start, constraints=limits)
    x = start_positions(task, 2.0, start[[0] * 4].positions)
    for record in SAMPLERS[name](task, x, evaluations=6, sigma=2.0, sigma_min=0.02):
        for state in (record.z_t, record.z_s, record.clean):
            assert torch.equal(state[:, list(frozen)], start.positions[:, list(frozen)].expand(4, -1, -1).float())
    assert float((record.z_s[:, 2] - start.positions[:, 2]).norm(dim=-1).min()) > 1e-3
    assert float((record.z_s[0, 2] - record.z_s[1, 2]).norm()) > 1e-3 or name == "direct"


def test_an_exact_field_completes_a_frozen_fragment(ethanol):
    """Frozen: C, C, O and two hydrogens in any place and orientation; the other atoms find their only place."""
    turn = torch.from_numpy(Rotation.random(rng=2).as_matrix())
    moved = ethanol.with_positions(ethanol.positions @ turn.T + torch.tensor([3.0, -2.0, 5.0]))
    frozen = (0, 1, 2, 3, 5)
    limits = Constraints(moved.positions[0], frozen=frozen)
    found = generate(
        ExactField(ethanol), 4, start=moved, sigma=0.4, constraints=limits, sampler="adaptive_heun", evaluations=40
    )
    torch.testing.assert_close(found.positions, moved.positions.expand(4, -1, -1), rtol=0, atol=0.02)


def test_what_is_free_turns_with_the_frozen_atoms(untrained, ethanol):
    model = PseudoForceField(untrained.config).double()
    model.load_state_dict(untrained.state_dict())
    turn = torch.from_numpy(Rotation.random(rng=4).as_matrix())
    shift = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    centre = (2.0, 0.5, 0.1)
    results = []
    for q, t in ((torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)), (turn, shift)):
        x = ethanol.positions @ q.T + t
        place = (torch.tensor(centre, dtype=torch.float64) @ q.T + t).tolist()
        limits = Constraints(x[0], frozen=(0, 1, 3), distances=((1, 2, 1.5),), forbidden=(Sphere(tuple(place), 0.4),))
        options = {"constraints": limits, "sampler": "direct", "evaluations": 3, "strength": 0.0}
        results.append(generate(model, start=ethanol.with_positions(x), **options).positions)
    torch.testing.assert_close(results[1], results[0] @ turn.T + shift, rtol=1e-6, atol=1e-6)


def test_distances_and_regions_hold(untrained):
    start = MoleculeBatch.from_smiles("CCO").centered()
    x = start.positions[0]
    limits = Constraints.keep_distances(x, [(0, 1), (1, 2)])
    found = generate(untrained, 5, start=start, sigma=1.0, constraints=limits, evaluations=5)
    assert limits.violation(found.positions) < 2e-4
    assert float(found.positions.mean(1).abs().max()) < 1e-4  # nothing anchors the molecule
    wall = Constraints(x, frozen=(0,), forbidden=pocket([6], x[2:3] + 2.0))
    found = generate(untrained, 5, start=start, sigma=3.0, constraints=wall, evaluations=5)
    assert wall.violation(found.positions) < 2e-4
    outside = (found.positions[:, 1:] - (x[2] + 2.0)).norm(dim=-1)
    assert float(outside.min()) > 1.7 - 1e-3  # van der Waals radius of carbon


def test_an_atom_at_the_centre_of_a_region_is_pushed_out(ethanol):
    x = ethanol.positions[0]
    wall = Constraints(x, forbidden=(Sphere(tuple(x[4].tolist()), 1.5),))
    assert wall.violation(wall.project(x.unsqueeze(0))) < 2e-4


def test_distances_between_atoms_at_one_place_can_be_restored():
    """New atoms of `replace_group` are all at one place; here a methyl group with all its distances."""
    apart = tuple((0, k, 1.09) for k in (1, 2, 3)) + tuple((i, j, 1.78) for i, j in ((1, 2), (1, 3), (2, 3)))
    limits = Constraints(torch.zeros(4, 3), distances=apart)
    assert limits.violation(limits.project(torch.zeros(1, 4, 3))) < 2e-4


def test_a_distant_region_does_not_change_the_noise_level(ethanol):
    model, far = ExactField(ethanol), Sphere((100.0, 0.0, 0.0), 1.0)
    x = ethanol.positions + 0.1 * torch.randn(4, 9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    free = task_of(model, ethanol).estimate(x).sigma_hat
    bounded = task_of(model, ethanol, constraints=Constraints(ethanol.positions[0], forbidden=(far,))).estimate(x)
    torch.testing.assert_close(bounded.sigma_hat, free)


def test_a_molecule_stays_where_it_is_beside_a_region(untrained, ethanol):
    """A force has no mean: what noise moved as a whole, nothing would bring back to the region."""
    far = Sphere((100.0, 0.0, 0.0), 1.0)
    start = ethanol.with_positions(ethanol.positions + 2.0)
    limits = Constraints(start.positions[0], forbidden=(far,))
    found = generate(untrained, 4, start=start, sigma=10.0, constraints=limits, evaluations=4)
    torch.testing.assert_close(found.positions.mean(1), torch.full((4, 3), 2.0), rtol=0, atol=1e-4)


def test_constraints_that_a_run_could_not_keep_are_told(untrained, ethanol, monkeypatch):
    limits = Constraints.keep_distances(ethanol.positions[0], [(0, 1), (1, 2), (0, 2)])
    options = {"start": ethanol, "sigma": 5.0, "constraints": limits, "evaluations": 2}
    monkeypatch.setattr("elign_lab.gpff.constraints.SWEEPS", 1)
    with pytest.warns(UserWarning, match="3 of 3 structures break a constraint, by up to"):
        generate(untrained, 3, **options)


@pytest.mark.parametrize("radius", [1.2, 1.5, 3.0])
@pytest.mark.parametrize("axis", [(1.0, 0.0, 0.0), (0.48, 0.6, 0.64)])
def test_an_atom_between_two_regions_is_let_out(axis, radius):
    """On the line of the centres each region pushes it into the other: carbon of CO2 between its oxygens."""
    x = torch.tensor([0.0, -1.16, 1.16], dtype=torch.float64).unsqueeze(1) * torch.tensor(axis, dtype=torch.float64)
    wall = Constraints(x, forbidden=tuple(Sphere(tuple(place), radius) for place in x[1:].tolist()))
    assert wall.violation(wall.project(x.unsqueeze(0))) < 2e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frozen": tuple(range(9))}, "all 9 atoms are frozen"),
        ({"frozen": (9,)}, "atom 9"),
        ({"frozen": (0.5,)}, "frozen has 0.5 for an atom: expected its index"),
        ({"frozen": 0}, "frozen is 0: expected a tuple"),
        ({"distances": ((0, 1),)}, r"distances has the entry \(0, 1\): expected \(i, j, length"),
        ({"distances": (0, 1, 1.5)}, "distances has the entry 0"),
        ({"distances": ((0.0, 1, 1.5),)}, "distances has 0.0 for an atom"),
        ({"distances": ((0, 1, "far"),)}, "'far'.*: expected"),
        ({"forbidden": (((0.0, 0.0, 0.0), 1.0),)}, "expected Sphere"),
        ({"forbidden": Sphere((0.0, 0.0, 0.0), 1.0)}, "forbidden is Sphere.*: expected a tuple"),
        ({"distances": ((0, 1, -1.0),)}, "positive length"),
        ({"distances": ((0, 1, float("inf")),)}, "positive length, finite"),
        ({"distances": ((0, 0, 1.0),)}, "two different atoms"),
        ({"distances": ((0, 1, 1.5), (1, 0, 1.4))}, "two distances"),
        ({"distances": ((0, 1, 1.0), (1, 2, 1.0), (0, 2, 3.0))}, "contradict"),
        ({"frozen": (0, 1), "distances": ((0, 1, 3.0),)}, "frozen 1.5"),
        ({"frozen": (0,), "distances": ((0, 1, 1.0),), "forbidden": "around frozen"}, "contradict"),
        ({"frozen": (0,), "forbidden": "on frozen"}, "lies in the forbidden"),
    ],
)
def test_contradictory_constraints_are_refused(ethanol, arguments, message):
    x = ethanol.positions[0]
    if arguments.get("forbidden") == "on frozen":
        arguments = {**arguments, "forbidden": (Sphere(tuple(x[0].tolist()), 1.0),)}
    if arguments.get("forbidden") == "around frozen":  # every place at 1 Angstrom from atom 0 is inside one of these
        ways = torch.cat([torch.eye(3), -torch.eye(3)]).double() * 2.5
        arguments = {**arguments, "forbidden": tuple(Sphere(tuple((x[0] + w).tolist()), 2.4) for w in ways)}
    with pytest.raises(ValueError, match=message):
        Constraints(x, **arguments)


def test_constraints_of_another_molecule_are_refused(untrained, ethanol):
    limits = Constraints(ethanol.positions[0], frozen=(0,))
    with pytest.raises(ValueError, match="molecule of 9 atoms"):
        generate(untrained, start=MoleculeBatch.from_smiles("C"), sigma=1.0, constraints=limits)
    pair = MoleculeBatch.cat([MoleculeBatch.from_smiles(smiles) for smiles in ("CCO", "COC")])
    with pytest.raises(ValueError, match="different atoms"):
        generate(untrained, start=pair, sigma=1.0, constraints=limits)
    with pytest.raises(ValueError, match="not finite"):
        Constraints(ethanol.positions[0] * torch.nan, frozen=(0,))
    for radius in (0.0, "1"):
        with pytest.raises(ValueError, match="radius"):
            Sphere((0.0, 0.0, 0.0), radius)
    with pytest.raises(ValueError, match=r"three finite numbers, got 5\.0"):
        Sphere(5.0, 1.0)
    for pair in (0, (0, 1, 2), (0, 1.0), (0, 9)):
        with pytest.raises(ValueError, match=r"pairs has|atom 9"):
            Constraints.keep_distances(ethanol.positions[0], [pair])


# ---------------------------------------------------------------------- edits
def test_a_group_takes_the_place_of_a_hydrogen(untrained):
    benzene = MoleculeBatch.from_smiles("c1ccccc1")
    edit = replace_group(benzene, [6], ["O", "H"])
    assert edit.start.formula(0) == "C6H6O"
    kept = [i for i in range(12) if i != 6]
    assert torch.equal(edit.start.positions[0, :11], benzene.positions[0, kept])
    carbon = (benzene.positions[0, :6] - benzene.positions[0, 6]).norm(dim=-1).argmin()
    assert 1.0 < float((edit.start.positions[0, 11] - benzene.positions[0, carbon]).norm()) < 2.0
    found = generate(untrained, 2, start=edit.start, sigma=1.0, constraints=edit.constraints, evaluations=4)
    assert torch.equal(found.positions[:, :11], edit.start.positions[:, :11].expand(2, -1, -1).float())
    loose = replace_group(benzene, [6], ["F"], release=[0, 1])
    assert loose.constraints.frozen == tuple(range(2, 11))


@pytest.mark.parametrize(
    ("atoms", "group", "message"),
    [
        ([6], ["O"], "odd number"),
        ([12], ["F"], "atom 12"),
        ([], ["F"], "at least one, and not all"),
        (range(12), ["C"], "not all"),
        ([6, 7], [], "all 10 atoms are frozen"),
        ([6], ["Q"], "unknown element"),
    ],
)
def test_impossible_edits_are_refused(atoms, group, message):
    with pytest.raises(ValueError, match=message):
        replace_group(MoleculeBatch.from_smiles("c1ccccc1"), atoms, group)
    with pytest.raises(ValueError, match="one molecule"):
        replace_group(MoleculeBatch.from_smiles(["C", "O"]), [1], ["F"])


# ---------------------------------------------------------------------- figures
def test_figures_of_real_and_broken_molecules():
    data = load_dataset("bundled", split="validation").batch(range(24))
    real = judge(data)
    assert real["validity"] == real["uniqueness"] == 1
    assert np.isnan(real["f_rms"])
    assert 0.8 < real["edm_validity"] <= 1
    far = judge(data.with_positions(data.positions * 3))
    assert far["validity"] == far["edm_validity"] == far["stability"] == far["uniqueness"] == 0


def test_what_is_valid():
    ethanol = MoleculeBatch.from_smiles("CCO")
    radical = MoleculeBatch(ethanol.numbers[:, :8], ethanol.positions[:, :8], ethanol.mask[:, :8])
    point = MoleculeBatch.from_arrays([(np.r_[6, [1] * 4], np.zeros((5, 3)))])
    lost = ethanol.positions.clone()
    lost[0, 0] = torch.nan
    two = np.concatenate([ethanol.arrays()[0][1], ethanol.arrays()[0][1] + 20])
    pair = MoleculeBatch.from_arrays([(np.tile(ethanol.arrays()[0][0], 2), two)])
    assert valid_smiles(ethanol) == ["[H]OC([H])([H])C([H])([H])[H]"]
    assert valid_smiles(radical) == [None]  # a hydrogen is missing: EDM's route adds it
    assert valid_smiles(pair) == valid_smiles(ethanol.with_positions(lost)) == [None]
    assert valid_smiles(point) == [None]


def test_quality_of_an_exact_field(ethanol):
    model = ExactField(ethanol)
    rows = quality_table(model, 3, budgets=(4, 9), seed=1)
    assert {row.evaluations for row in rows} == {4, 9}
    assert all(row.validity == row.stability == 1 for row in rows if row.evaluations == 9)
    assert quality_text(rows).count("\n") == len(rows)
    content = json.loads(json.dumps(quality_json(rows), allow_nan=False))
    assert content[0]["f_rms"] is None
    assert content[0]["sampler"] == "ancestral"
    again = quality_from_json(content)
    assert quality_text(again) == quality_text(rows)
    assert [row.valid for row in again] == [row.valid for row in rows]
    some = [replace(row, n=128, validity=0.125, uniqueness=0.75) for row in again if row.sampler == "direct"][:1]
    ((above,), (below,)) = (quality_figure(some, "uniqueness").data[0].error_y[k] for k in ("array", "arrayminus"))
    expected = wilson(12, 16)  # uniqueness counts the valid ones only
    assert (above, below) == pytest.approx((100 * (expected.high - 0.75), 100 * (0.75 - expected.low)))
    figure = quality_figure(again)
    assert {trace.name for trace in figure.data} == {row.sampler for row in rows}
    assert max(y for trace in figure.data for y in trace.y) == pytest.approx(100)


def test_intervals_of_the_rows():
    data = load_dataset("bundled", split="validation").batch(range(20))
    x = data.positions.clone()
    x[3:5] *= 3
    with load_oracle("learned") as oracle:
        figures = judge(data.with_positions(x), oracle)
    assert figures["valid"] == "11100" + 15 * "1"
    assert 0 < figures["f_rms_low"] < figures["f_rms"] < figures["f_rms_high"]
    row = Quality("direct", 8, 20, **figures, seconds=0.01)
    expected = wilson(18, 20)
    assert f"90.0 ({100 * expected.low:.1f}-{100 * expected.high:.1f})" in quality_text([row])
    assert f"{row.f_rms:.2f} ({row.f_rms_low:.2f}-{row.f_rms_high:.2f})" in quality_text([row])
    (content,) = quality_json([row])
    assert (content["validity_low"], content["validity_high"]) == (expected.low, expected.high)
    assert quality_from_json([content]) == [row]
    new = ("f_rms_low", "f_rms_high", "valid", "validity_low", "validity_high")
    (old,) = quality_from_json([{key: value for key, value in content.items() if key not in new}])
    assert old.validity_interval == expected
    assert quality_json([old])[0]["f_rms_low"] is None
    assert f"{row.f_rms:.2f} (" not in quality_text([old])


def test_gain_in_validity_is_that_of_pairs():
    options = {"edm_validity": 1.0, "stability": 1.0, "uniqueness": 1.0, "f_rms": 1.0, "failures": 0, "seconds": 0.0}
    first, second = (
        Quality("direct", 8, 40, **options, validity=valid.count("1") / 40, valid=valid)
        for valid in ("1" * 20 + "0" * 20, "1" * 25 + "0" * 15)
    )
    gain = validity_gain(first, second)
    unpaired = difference(first.validity_interval, second.validity_interval)
    assert gain.value == pytest.approx(5 / 40)
    assert unpaired.low < 0 < gain.low < gain.value < gain.high < unpaired.high
    with pytest.raises(ValueError, match="does not say which of its 40 structures"):
        validity_gain(first, replace(second, valid=""))
    with pytest.raises(ValueError, match="cannot pair 40 structures with 20"):
        validity_gain(first, replace(second, n=20, valid=second.valid[:20]))


def test_a_denoiser_has_more_steps_near_the_end():
    model = load_model("edm-mini")
    times = []
    answer = model.eps
    model.eps = lambda z, t, *a, **kw: times.append(float(t.flatten()[0])) or answer(z, t, *a, **kw)
    sample(model, 2, steps=7, spacing=2.0, seed=3)
    expected = list(times)
    times.clear()
    denoiser_table(model, 2, budgets=(8,), samplers=("ancestral",), seed=3)
    assert times == expected
    gaps = -np.diff(times)
    assert gaps[0] > 2 * gaps[-2] > 0


def test_quality_of_a_denoiser_counts_its_decoding():
    model = load_model("edm-mini")
    calls = []
    answer = model.eps
    model.eps = lambda *a, **kw: calls.append(1) or answer(*a, **kw)
    rows = denoiser_table(model, 2, budgets=(1, 5), samplers=("ancestral",))
    assert [(row.sampler, row.evaluations) for row in rows] == [("EDM ancestral", 5)]  # one call cannot sample
    assert len(calls) == 5


def test_calibration(ethanol):
    data = load_dataset("bundled", split="validation")
    water = data.subset(np.flatnonzero(data.sizes == data.sizes.min())[:1])
    exact = ExactField(water.batch([0]).to(dtype=torch.float64))
    levels = (0.05, 0.2)
    found = calibrate(exact, water, 1, levels=levels)
    assert found.sigma == levels
    assert len(found.by_size) == 1
    # turning the reference onto the structure takes some of the noise away
    assert all(0.3 < hat / sigma < 1.3 for hat, sigma in zip(found.sigma_hat, levels, strict=True))
    back = found.sigma_of(torch.tensor(found.sigma_hat))
    torch.testing.assert_close(back, torch.tensor(levels), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="increasing"):
        calibrate(exact, water, 1, levels=(1.0, 0.5))
    with pytest.raises(ValueError, match="no molecules"):
        calibrate(exact, water, 0)


# ---------------------------------------------------------------------- command line
def test_command_line(untrained, tmp_path, capsys):
    path = str(save_force_field(untrained, tmp_path / "model.safetensors"))
    out = tmp_path / "molecules.xyz"
    arguments = ["gpff", "sample", "--model", path, "--composition", "C2H6O", "--n", "3", "--evaluations", "2"]
    assert main([*arguments, "--sampler", "direct", "--out", str(out)]) == 0
    assert MoleculeBatch.from_xyz(out).formula(2) == "C2H6O"
    assert main([*arguments, "--sampler", "nothing"]) == 2
    assert "unknown sampler" in capsys.readouterr().err
    arguments = ["gpff", "evaluate", "--model", path, "--n", "2", "--evaluations", "3", "--oracle", "learned", "--json"]
    table = tmp_path / "table.json"
    assert main([*arguments, "--denoiser", "edm-mini", "--out", str(table)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["rows"]) == len(VARIANTS) + 2
    assert json.loads(table.read_text()) == printed
    assert main([*arguments, "--sampler", "relaxation", "--sampler", "direct, 0.3"]) == 0
    assert [row["sampler"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["relaxation", "direct, 0.3"]
    assert main([*arguments, "--sampler", "nothing"]) == 2
    assert "'nothing': expected one of 'ancestral'" in capsys.readouterr().err
