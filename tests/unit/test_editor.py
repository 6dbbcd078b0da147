"""The molecular editor without a browser: bonds, states, runs, measures, and the panel's callbacks."""

from __future__ import annotations

import math
import threading
import time
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from rdkit import Chem

from elign_lab.checkpoints import ASSETS
from elign_lab.gpff import SAMPLERS, GPFFConfig, PseudoForceField, load_force_field
from elign_lab.gpff import editing_bonds as bonds
from elign_lab.gpff import editing_state as editing
from elign_lab.gpff.constraints import Sphere, depth_inside
from elign_lab.gpff.editing_run import Measures, RunSettings, accept, latency, measure, regenerate
from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles import load_oracle
from elign_lab.painn import PaiNNConfig
from elign_lab.widgets import MoleculeEditor, MoleculeViewer
from elign_lab.widgets.panels import editor as panels

CONFIG = GPFFConfig(network=PaiNNConfig(features=8, vectors=4, channels=4, layers=1, basis=4))


def canonical(smiles: str) -> str:
    return Chem.MolToSmiles(Chem.MolFromSmiles(smiles), isomericSmiles=False)


def opened(smiles: str, *picked: int) -> editing.EditorState:
    return editing.pick_only(editing.open_molecule(smiles, CONFIG), picked)


@pytest.fixture(scope="module")
def untrained() -> PseudoForceField:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PseudoForceField(CONFIG).eval()


@pytest.fixture(scope="module")
def oracle():
    return load_oracle("learned")


# ---------------------------------------------------------------------- bonds
@pytest.mark.parametrize("smiles", ["CCO", "c1ccccc1O", "CC(=O)N", "C#CC=O", "FC(F)F", "O=C=O", "C1CC1N"])
def test_bonds_are_read_from_the_geometry(smiles):
    state = editing.open_molecule(smiles, CONFIG)
    assert state.structure.smiles == canonical(smiles)
    again = editing.open_molecule(state.structure.molecule, CONFIG)
    assert again.structure.smiles == canonical(smiles)
    assert torch.equal(again.structure.molecule.positions, state.structure.molecule.positions)


@pytest.mark.parametrize(
    ("smiles", "message"),
    [
        ("CS", "has S"),
        ("C" * 13, "41 atoms, over the model's limit of 40"),
        ("[NH4+]", "not one neutral molecule"),
        ("C[N+](=O)[O-]", "formal charges, which nitro groups and azides have"),
        ("C.C", "not one neutral molecule"),
        ("nonsense", "not a valid SMILES"),
    ],
)
def test_what_cannot_be_opened(smiles, message):
    with pytest.raises(ValueError, match=message):
        editing.open_molecule(smiles, CONFIG)


def test_a_distorted_molecule_and_an_empty_batch_are_refused():
    ethanol = MoleculeBatch.from_smiles("CCO")
    with pytest.raises(ValueError, match="relax it first"):
        editing.open_molecule(ethanol.with_positions(3 * ethanol.positions), CONFIG)
    with pytest.raises(ValueError, match="empty"):
        editing.open_molecule(ethanol[:0], CONFIG)


# ---------------------------------------------------------------------- edits: what becomes of the molecule
@pytest.mark.parametrize(
    ("smiles", "picked", "edit", "argument", "result"),
    [
        ("CCO", [0], editing.add_group, "methyl", "CCCO"),
        ("CCO", [3], editing.add_group, "amino", "NCCO"),  # a hydrogen of atom 0
        ("c1ccccc1", [2], editing.add_group, "carboxyl", "OC(=O)c1ccccc1"),
        ("CC", [1], editing.add_group, "*C(C)(C)C", "CCC(C)(C)C"),
        ("CCO", [2], editing.swap_group, "phenyl", "CCc1ccccc1"),
        ("CC(=O)OC", [3, 4], editing.swap_group, "amino", "CC(N)=O"),
        ("CCO", [0], editing.swap_group, "fluoro", "OCF"),
        ("CCO", [3], editing.swap_group, "cyano", "N#CCCO"),
        ("c1ccccc1", [0], editing.replace_element, "N", "c1ccncc1"),
        ("CCO", [2], editing.replace_element, "N", "CCN"),
        ("CCO", [0], editing.replace_element, "F", "OCF"),
        ("CCO", [3], editing.replace_element, "C", "CCCO"),
        ("CN", [1], editing.replace_element, "C", "CC"),
        ("CCO", [0], editing.replace_element, "H", "CO"),
        ("C=O", [1], editing.replace_element, "C", "C=C"),
    ],
)
def test_edits(smiles, picked, edit, argument, result):
    before = opened(smiles, *picked)
    after = edit(before, argument)
    assert after.structure.smiles == canonical(result)
    assert not any(atom.GetNumRadicalElectrons() for atom in after.structure.mol.GetAtoms())
    _check_what_was_kept(before, after)
    assert before.structure.smiles == canonical(smiles)


@pytest.mark.parametrize(
    ("smiles", "picked", "result"),
    [
        ("CCO", [0], "CO"),
        ("CCO", [3, 6], "C=CO"),  # a hydrogen of each carbon: a double bond
        ("CCO", [6, 8], "CC=O"),
        ("C=C", [2, 4], "C#C"),
        ("c1ccccc1", [0], "C=CC=CC"),  # the ring opens
        ("CC(=O)O", [0], "OC=O"),
    ],
)
def test_deleting(smiles, picked, result):
    before = opened(smiles, *picked)
    after = editing.delete(before)
    assert after.structure.smiles == canonical(result)
    _check_what_was_kept(before, after)


def _check_what_was_kept(before: editing.EditorState, after: editing.EditorState) -> None:
    """Kept atoms are where they were to the last bit, new ones are picked and do not sit on others."""
    was = bonds.origins(after.structure.mol)
    old, new = before.structure.molecule.positions[0], after.structure.molecule.positions[0]
    kept = [k for k, i in enumerate(was) if i is not None]
    assert kept
    assert torch.equal(new[kept], old[[was[k] for k in kept]])
    assert after.structure.picked == {k for k, i in enumerate(was) if i is None}
    assert float(torch.pdist(new).min()) > 0.4
    assert after.past == (before.structure,)


@pytest.mark.parametrize("group", bonds.GROUPS)
@pytest.mark.parametrize("smiles", ["CC", "c1ccccc1"])
def test_the_first_guess_of_a_group_has_the_bonds_that_were_asked_for(smiles, group):
    after = editing.add_group(opened(smiles, 0), group).structure
    found = bonds.perceive(*after.molecule.arrays()[0])
    assert found is not None
    assert Chem.MolToSmiles(Chem.RemoveHs(found), isomericSmiles=False) == after.smiles


@pytest.mark.parametrize(
    ("smiles", "picked", "edit", "message"),
    [
        ("CCO", [], editing.delete, "no atom is picked"),
        ("CCO", range(9), editing.delete, "would leave no molecule"),
        ("CCO", [1], editing.delete, "2 pieces, CH4 and H2O"),
        ("CCO", [3], editing.delete, "without the hydrogen C 0 has an open valence"),
        ("CCO", [0, 1], lambda s: editing.replace_element(s, "N"), "2 atoms are picked"),
        ("CCO", [1], lambda s: editing.replace_element(s, "F"), "total order 2 .* and F can have 1"),
        ("CCO", [0], lambda s: editing.replace_element(s, "S"), "not trained on"),
        ("CCO", [0], lambda s: editing.replace_element(s, "Xx"), "unknown element"),
        ("CCO", [0], lambda s: editing.replace_element(s, "C"), "is C already"),
        ("FC(F)(F)F", [1], lambda s: editing.add_group(s, "methyl"), "no hydrogen to replace"),
        ("CCO", [0], lambda s: editing.add_group(s, "no group"), "neither a group"),
        ("CCO", [0], lambda s: editing.add_group(s, "CC"), "0 attachment points"),
        ("CCO", [0], lambda s: editing.add_group(s, "*=O"), "a single bond"),
        ("CCO", [0], lambda s: editing.add_group(s, "*[N+](=O)[O-]"), "charge or an open valence"),
        ("CCO", [0], lambda s: editing.add_group(s, "*CCCCCCCCCCCC"), "over the model's limit of 40"),
        ("CCO", [1], lambda s: editing.swap_group(s, "methyl"), "total order 2"),
        ("CC=O", [2], lambda s: editing.swap_group(s, "methyl"), "total order 2"),
        ("CCO", range(9), lambda s: editing.swap_group(s, "methyl"), "whole molecule"),
        ("CCO", range(9), editing.freeze, "nothing left to generate"),
        ("CCO", [], editing.freeze, "no atom is picked"),
        ("CCO", [], editing.freeze_rest, "no atom is picked"),
        ("CCO", [], editing.undo, "nothing to undo"),
        ("CCO", [], editing.redo, "nothing to redo"),
        ("CCO", [], lambda s: editing.pick(s, 9), "no atom 9"),
    ],
)
def test_edits_that_cannot_be_are_refused(smiles, picked, edit, message):
    state = opened(smiles, *picked)
    positions = state.structure.molecule.positions
    with pytest.raises(ValueError, match=message):
        edit(state)
    assert state.structure.smiles == canonical(smiles)
    assert torch.equal(state.structure.molecule.positions, positions)


# ---------------------------------------------------------------------- picks, frozen atoms, history
def test_picks_are_toggled_and_are_no_history():
    state = editing.pick(editing.pick(opened("CCO"), 2), 0)
    assert state.structure.picked == {0, 2}
    assert editing.pick(state, 2).structure.picked == {0}
    assert editing.pick(state, None).structure.picked == frozenset()
    assert state.past == ()


def test_frozen_atoms_keep_their_mark_through_edits():
    state = editing.freeze(opened("CCO", 0, 2))
    assert state.structure.frozen == {0, 2}
    shorter = editing.delete(editing.pick_only(state, [0]))  # atoms 1 and 2 become 0 and 1
    assert shorter.structure.frozen == {1}
    assert shorter.structure.mol.GetAtomWithIdx(1).GetSymbol() == "O"
    replaced = editing.replace_element(editing.pick_only(state, [2]), "N")
    assert replaced.structure.frozen == {0}  # the new atom is free
    rest = editing.freeze_rest(editing.pick_only(state, [1, 2]))
    assert rest.structure.frozen == frozenset(range(9)) - {1, 2}
    assert editing.free(editing.pick_only(rest, [0])).structure.frozen == frozenset(range(9)) - {0, 1, 2}
    assert editing.free(editing.pick_only(rest, [])).structure.frozen == frozenset()


# ---------------------------------------------------------------------- forbidden regions
def test_regions_around_picked_atoms_and_at_a_place():
    state = opened("CCO", 0, 2)
    x = state.structure.molecule.positions[0]
    around = editing.forbid(state, 1.5)
    assert around.structure.forbidden == tuple(Sphere(tuple(x[i].tolist()), 1.5) for i in (0, 2))
    both = editing.forbid(around, 0.7, (4, 0.0, -1.0))
    assert both.structure.forbidden[2] == Sphere((4.0, 0.0, -1.0), 0.7)
    assert (around.structure.label, both.structure.label) == ("forbid 2 regions", "forbid 1 region")
    assert torch.equal(both.structure.molecule.positions[0], x)
    assert editing.allow(both, 1).structure.forbidden == (both.structure.forbidden[0], both.structure.forbidden[2])
    assert editing.allow(both).structure.forbidden == ()


def test_regions_are_history_and_stay_through_edits():
    first = opened("CCO", 0)
    second = editing.forbid(first, 1.0, (3.0, 0.0, 0.0))
    third = editing.allow(second, 0)
    back = editing.undo(third)
    assert [s.structure.forbidden for s in (third, back, editing.undo(back))] == [(), second.structure.forbidden, ()]
    assert editing.redo(back).structure is third.structure
    grown = editing.add_group(second, "methyl")
    for state in (grown, editing.freeze(editing.pick_only(grown, [0])), editing.pick_only(grown, [])):
        assert state.structure.forbidden == second.structure.forbidden


@pytest.mark.parametrize(
    ("picked", "edit", "message"),
    [
        ([], lambda s: editing.forbid(s, 1.0), "no atom is picked"),
        ([1], lambda s: editing.forbid(s, 0.0), "must be positive and finite, got 0.0"),
        ([1], lambda s: editing.forbid(s, -1.0), "must be positive and finite, got -1.0"),
        ([1], lambda s: editing.forbid(s, math.inf), "must be positive and finite, got inf"),
        ([1], lambda s: editing.forbid(s, math.nan), "must be positive and finite, got nan"),
        ([], lambda s: editing.forbid(s, 1.0, (0.0, math.nan, 0.0)), "three finite numbers"),
        ([], lambda s: editing.forbid(s, 1.0, (0.0, 0.0)), "three finite numbers"),
        (
            [],
            lambda s: editing.forbid(s, 1.0, (9.0, 0.0, 0.0)),
            r"sphere of 1 Angstrom at \(9.00, 0.00, 0.00\) is forbidden al",
        ),
        ([0], lambda s: editing.forbid(s, 1.0), "frozen atom 0 lies in the forbidden sphere of 1 Angstrom at"),
        ([4], lambda s: editing.forbid(s, 1.2), "frozen atom 0 lies in the forbidden sphere"),  # a hydrogen of atom 0
        ([], lambda s: editing.allow(s, 1), "no region 1 to allow: there are regions 0 to 0"),
        ([], lambda s: editing.allow(editing.allow(s)), "no region is forbidden"),
    ],
)
def test_regions_that_cannot_be_are_refused(picked, edit, message):
    frozen = editing.freeze(opened("CCO", 0))
    state = editing.pick_only(editing.forbid(frozen, 1.0, (9.0, 0.0, 0.0)), picked)
    before = state.structure
    with pytest.raises(ValueError, match=message):
        edit(state)
    assert state.structure is before
    assert state.past == (*frozen.past, frozen.structure)


def test_an_atom_in_a_region_cannot_be_frozen():
    state = editing.pick_only(editing.forbid(opened("CCO", 2), 1.2), [8])  # the hydrogen on oxygen
    with pytest.raises(ValueError, match="frozen atom 8 lies in the forbidden sphere"):
        editing.freeze(state)
    with pytest.raises(ValueError, match="lies in the forbidden sphere"):
        editing.freeze_rest(editing.pick_only(state, [0]))
    assert editing.freeze(editing.pick_only(state, [0])).structure.frozen == {0}


# ---------------------------------------------------------------------- history
def test_undo_and_redo():
    first = opened("CC", 0)
    second = editing.add_group(first, "hydroxyl")
    third = editing.delete(editing.pick_only(second, [1]))
    back = editing.undo(editing.undo(third))
    assert [s.smiles for s in (third.structure, back.structure)] == ["CO", "CC"]
    forward = editing.redo(editing.redo(back))
    assert forward.structure is third.structure
    branch = editing.add_group(editing.pick_only(back, [0]), "fluoro")
    assert branch.future == ()
    with pytest.raises(ValueError, match="nothing to redo"):
        editing.redo(branch)


def test_sdf_has_the_bonds_of_the_editor():
    state = editing.add_group(opened("c1ccccc1", 0), "cyano")
    text = editing.to_sdf(state)
    mol = Chem.MolFromMolBlock(text, removeHs=False)
    assert Chem.MolToSmiles(Chem.RemoveHs(mol)) == canonical("N#Cc1ccccc1")
    assert np.allclose(mol.GetConformer().GetPositions(), state.structure.molecule.positions[0], atol=1e-4)
    assert torch.equal(MoleculeBatch.from_sdf(text).numbers, state.structure.molecule.numbers)


# ---------------------------------------------------------------------- runs
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_frozen_atoms_stay_to_the_last_bit(untrained, sampler):
    state = editing.freeze_rest(editing.add_group(opened("CC", 0), "methoxy"))
    settings = RunSettings(sampler, evaluations=6, sigma=0.5, seed=3)
    records = list(regenerate(untrained, state.structure, settings))
    assert records[-1].s == -1
    assert records[-1].evaluations <= 6
    after = accept(state, records[-1].molecules())
    kept, free = sorted(state.structure.frozen), sorted(state.structure.picked)
    old, new = state.structure.molecule.positions[0], after.structure.molecule.positions[0]
    assert torch.equal(old[kept], new[kept])
    assert not torch.isclose(old[free], new[free]).all(-1).any()
    assert after.structure.frozen == state.structure.frozen
    again = list(regenerate(untrained, state.structure, settings))[-1].z_s
    assert torch.equal(again, records[-1].z_s)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("frozen", [(), (0, 1)])
def test_a_run_keeps_out_of_forbidden_regions(untrained, sampler, frozen):
    state = opened("CCO", *frozen)
    state = editing.pick_only(editing.freeze(state) if frozen else state, [2])
    state = editing.pick_only(editing.forbid(state, 1.3), [8])
    state = editing.forbid(state, 0.5)
    assert panels.inside_regions(state.structure) == [2, 8]
    records = list(regenerate(untrained, state.structure, RunSettings(sampler, evaluations=6, sigma=0.5, seed=3)))
    for record in records:
        assert float(depth_inside(record.z_s, state.structure.forbidden).max()) < 2e-4
    after = accept(state, records[-1].molecules())
    assert after.structure.forbidden == state.structure.forbidden
    assert panels.inside_regions(after.structure) == []
    old, new = state.structure.molecule.positions[0], after.structure.molecule.positions[0]
    assert torch.equal(old[list(frozen)], new[list(frozen)])
    # what a run has left on the surface of a region may be frozen there
    on_surface = (new - torch.tensor(state.structure.forbidden[0].centre)).norm(dim=-1).argmin()
    assert editing.freeze(editing.pick_only(after, [int(on_surface)])).structure.frozen == {*frozen, int(on_surface)}


def test_results_that_are_not_molecules(untrained):
    state = opened("CCO", 0)
    molecule = state.structure.molecule
    flown = accept(state, molecule.with_positions(4 * molecule.positions))
    assert flown.structure.smiles == "CCO"  # the bonds that were asked for stay
    assert torch.equal(flown.structure.molecule.positions, 4 * molecule.positions)
    assert flown.structure.picked == {0}
    with pytest.raises(ValueError, match="diverged"):
        accept(state, molecule.with_positions(molecule.positions * math.nan))
    with pytest.raises(ValueError, match="other atoms"):
        accept(state, MoleculeBatch.from_smiles("CCN"))
    ether = MoleculeBatch.from_smiles("COC")[[0]]
    order = [0, 2, 1, *range(3, 9)]  # C C O H6, as in ethanol
    isomer = MoleculeBatch(ether.numbers[:, order], ether.positions[:, order], ether.mask)
    assert accept(state, isomer).structure.smiles == "COC"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "euler"}, "unknown sampler"),
        ({"evaluations": 0}, "at least 1"),
        ({"sigma": -0.1}, "0 or more"),
        ({"sampler": "heun", "sigma": 0.0}, "must be over 0.02"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        RunSettings(**options)


def test_a_run_that_cannot_be(untrained):
    state = opened("CCO")
    with pytest.raises(ValueError, match="over the model's range"):
        regenerate(untrained, state.structure, RunSettings(sigma=50.0))
    everything = editing.Structure(state.structure.mol, frozen=frozenset(range(9)))
    with pytest.raises(ValueError, match="all 9 atoms are frozen"):
        regenerate(untrained, everything, RunSettings())


def test_measures(untrained, oracle):
    ethanol = opened("CCO").structure.molecule
    found = measure(untrained, oracle, ethanol)
    assert found.smiles == "CCO"
    assert found.status == "ok"
    torn = ethanol.with_positions(ethanol.positions * torch.tensor([1.2, 1.0, 1.0]))
    assert measure(untrained, oracle, torn).f_rms > 3 * found.f_rms
    assert measure(untrained, oracle, torn).energy > found.energy
    with torch.no_grad():
        force = untrained(ethanol.numbers, ethanol.positions, ethanol.mask)
    assert found.sigma_hat == pytest.approx(float(force.norm()) / 2 / math.sqrt(24), rel=1e-4)
    gone = ethanol.with_positions(torch.zeros_like(ethanol.positions))
    assert math.isnan(measure(untrained, oracle, gone).energy)
    assert measure(untrained, oracle, gone).smiles is None


def test_latency_is_measured_for_each_number_of_evaluations(untrained):
    found = latency(untrained, "CO", evaluations=(2, 3), repeats=2)
    assert list(found) == [2, 3]
    assert all(0 < seconds < 60 for seconds in found.values())


def test_a_run_has_one_thread_and_leaves_the_others_as_they_were(untrained, oracle, monkeypatch):
    seen, forward = [], PseudoForceField.forward

    def noted(self, *arguments):
        seen.append(torch.get_num_threads())
        return forward(self, *arguments)

    monkeypatch.setattr(PseudoForceField, "forward", noted)
    ethanol = opened("CCO").structure
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        between = [torch.get_num_threads() for _ in regenerate(untrained, ethanol, RunSettings(evaluations=4))]
        measure(untrained, oracle, ethanol.molecule)
        assert torch.get_num_threads() == 3
        monkeypatch.setattr(PseudoForceField, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(regenerate(untrained, ethanol, RunSettings(evaluations=4)))
        assert torch.get_num_threads() == 3, "also when it fails"
    finally:
        torch.set_num_threads(before)
    assert seen == [1] * 5
    assert between == [3] * len(between)
    assert between


@pytest.mark.skipif(not (ASSETS / "gpff-mini.safetensors").is_file(), reason="gpff-mini is not bundled yet")
def test_a_new_structure_of_20_atoms_is_made_while_one_waits():
    model, hexane = load_force_field(), editing.open_molecule("CCCCCC", load_force_field().config).structure
    assert hexane.n_atoms == 20
    for evaluations in (8, 16):
        seconds = []
        for seed in range(3):
            started = time.thread_time()  # of computing: other programs of the machine do not count
            records = list(regenerate(model, hexane, RunSettings(evaluations=evaluations, seed=seed)))
            seconds.append(time.thread_time() - started)
            assert records[-1].evaluations == evaluations
        print(f"{evaluations} evaluations: {1000 * min(seconds):.0f} ms of computing")
        assert min(seconds) < 0.2  # some 50 ms on one core of 2.6 GHz


@pytest.mark.skipif(not (ASSETS / "gpff-mini.safetensors").is_file(), reason="gpff-mini is not bundled yet")
def test_a_trained_field_makes_the_group_that_was_asked_for():
    model = load_force_field()
    state = editing.freeze_rest(editing.add_group(opened("c1ccccc1", 0), "methoxy"))
    made = [
        accept(state, list(regenerate(model, state.structure, RunSettings(seed=seed)))[-1].molecules())
        for seed in range(5)
    ]
    numbers_and_positions = [s.structure.molecule.arrays()[0] for s in made]
    good = [bonds.perceive(*pair) is not None for pair in numbers_and_positions]
    asked = [s.structure.smiles == state.structure.smiles for s in made]
    assert sum(g and a for g, a in zip(good, asked, strict=True)) >= 3


# ---------------------------------------------------------------------- what the panel shows
@pytest.mark.parametrize(("text", "atoms"), [("", set()), ("0, 3 7", {0, 3, 7}), (" 2 ", {2})])
def test_atoms_are_read(text, atoms):
    assert panels.read_atoms(text) == atoms


@pytest.mark.parametrize("text", ["a", "1, -2", "1.5"])
def test_atoms_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="expected indices"):
        panels.read_atoms(text)


@pytest.mark.parametrize(
    ("text", "place"), [("", None), ("1.5, 0, -2", (1.5, 0.0, -2.0)), (" 1e-1 2 3", (0.1, 2.0, 3.0))]
)
def test_places_are_read(text, place):
    assert panels.read_place(text) == place


@pytest.mark.parametrize("text", ["1, 2", "1, 2, 3, 4", "a, b, c", "1; 2; 3"])
def test_places_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="expected x, y, z in Angstrom"):
        panels.read_place(text)


def test_regions_are_drawn_as_dots_on_the_surface_of_all():
    assert panels.region_dots(()) is None
    one = Sphere((1.0, 2.0, 3.0), 1.5)
    dots = panels.region_dots([one]).positions[0]
    assert (dots - torch.tensor(one.centre)).norm(dim=-1).tolist() == pytest.approx([1.5] * len(dots))
    assert float(dots.mean(0).sub(torch.tensor(one.centre)).norm()) < 0.05  # all around
    assert float(torch.pdist(dots).min()) > 0.74  # under 0.73 Angstrom the viewer draws a bond
    other = Sphere((2.0, 2.0, 3.0), 1.2)
    both = panels.region_dots([one, other]).positions
    assert float(depth_inside(both, [one, other]).max()) < 1e-5
    assert len(panels.region_dots([Sphere((0.0, 0.0, 0.0), 50.0)]).positions[0]) == 400
    assert len(panels.region_dots([Sphere((0.0, 0.0, 0.0), 0.01)]).positions[0]) == 12


def test_the_drawing_shows_picked_and_frozen_atoms():
    namespace = "{http://www.w3.org/2000/svg}"

    def circles(state: editing.EditorState) -> list[str]:
        drawing = panels.depiction(state.structure)
        svg = drawing[drawing.index("<svg") : drawing.index("</svg>") + 6]
        found = ElementTree.fromstring(svg).iter(f"{namespace}ellipse")
        return [ellipse.get("style") for ellipse in found]

    def count(state: editing.EditorState, color: str) -> int:
        return sum(color.upper() in style.upper() for style in circles(state))

    plain = opened("CCO")
    assert circles(plain) == []
    frozen = editing.freeze(editing.pick_only(plain, [0, 1]))
    some = editing.pick_only(frozen, [1, 8])  # 8 is a hydrogen: drawn because it is picked
    assert (count(some, panels.FROZEN), count(some, panels.PICKED)) == (1, 2)
    closed = editing.forbid(frozen, 1.0, frozen.structure.molecule.positions[0, 2].tolist())  # around the oxygen
    assert (count(closed, panels.FORBIDDEN), count(closed, panels.PICKED)) == (1, 2)
    assert "2 atoms picked, 2 frozen" in panels.depiction(some.structure)
    assert "currentColor" in panels.depiction(plain.structure)


def test_the_verdict_names_another_molecule():
    good = Measures(-5.0, 0.5, "ok", 0.01, "CCO")
    assert "another molecule" not in panels.measures_html(good, "CCO")
    assert "another molecule than COC" in panels.measures_html(good, "COC")
    bad = panels.measures_html(Measures(math.nan, math.nan, "atoms too close", 0.4, None), "CCO")
    assert "not valid" in bad
    assert "atoms too close" in bad


# ---------------------------------------------------------------------- the viewer's part
def test_clicks_reach_python_and_their_errors_are_seen():
    viewer = MoleculeViewer(MoleculeBatch.from_smiles("CO"))
    clicked: list[int | None] = []
    viewer.on_pick(clicked.append)
    for atom in (1, 1, None):
        viewer._on_message(viewer, {"kind": "pick", "atom": atom}, [])
    assert clicked == [1, 1, None]
    viewer.on_pick(lambda atom: 1 / 0)
    viewer._on_message(viewer, {"kind": "pick", "atom": 0}, [])
    assert "ZeroDivisionError" in viewer.last_error


# ---------------------------------------------------------------------- the panel
@pytest.fixture
def editor(untrained, oracle) -> MoleculeEditor:
    return MoleculeEditor(untrained, oracle, "CCO", settings=RunSettings(evaluations=4))


def press(editor: MoleculeEditor, name: str) -> None:
    editor.buttons[name].click()


def test_buttons_edit_and_the_views_follow(editor):
    editor.atoms.value = "2"
    assert editor.viewer.marks[panels.PICKED] == [2]
    press(editor, "Delete")
    assert editor.state.structure.smiles == "CC"
    assert editor.viewer.molecules()[0].formula(0) == "C2H6"
    assert "delete: CCO → CC" in editor.summary_html()
    editor.atoms.value, editor.group.value = "0", "hydroxyl"
    press(editor, "Add")
    assert editor.state.structure.smiles == "CCO"
    editor.group.value = "fluoro"
    press(editor, "Swap")
    assert editor.state.structure.smiles == "CCF"
    editor.atoms.value, editor.element.value = "1", "N"
    press(editor, "Replace")
    assert editor.state.structure.smiles == "NCF"
    press(editor, "Freeze rest")
    assert editor.viewer.marks[panels.FROZEN] == sorted(editor.state.structure.frozen)
    editor.atoms.value = ""
    press(editor, "Free")
    assert not editor.state.structure.frozen
    press(editor, "Undo")
    assert editor.state.structure.frozen
    press(editor, "Redo")
    assert not editor.state.structure.frozen
    editor.atoms.value = "1"
    press(editor, "Freeze")
    assert editor.state.structure.frozen == {1}
    editor.smiles.value = "C1CC1"
    assert editor.state.structure.smiles == "C1CC1"
    press(editor, "Undo")
    assert editor.state.structure.smiles == "NCF"
    assert editor.last_error == ""


def test_regions_in_the_panel(editor):
    assert editor.regions.options == (("no forbidden region", None),)
    editor.atoms.value, editor.radius.value = "2", 1.3
    press(editor, "Forbid")
    assert [(s.radius, s.centre) for s in editor.state.structure.forbidden] == [
        (1.3, tuple(editor.state.structure.molecule.positions[0, 2].tolist()))
    ]
    assert editor.viewer.marks[panels.FORBIDDEN] == [2, 8]  # oxygen and its hydrogen
    assert "1 forbidden region, with atoms 2, 8 inside until Start" in editor.summary_html()
    editor.radius.value, editor.centre.value = 1.0, "0, 0, 6"
    press(editor, "Forbid")
    assert editor.state.structure.forbidden[1] == Sphere((0.0, 0.0, 6.0), 1.0)
    assert editor.centre.value == ""
    assert [value for _, value in editor.regions.options] == [None, 0, 1]
    assert editor.regions.options[2][0] == "1: sphere of 1 Angstrom at (0.00, 0.00, 6.00)"
    assert len(editor.viewer._reference.numbers) == len(panels.region_dots(editor.state.structure.forbidden).numbers[0])
    editor.start().wait(120)
    assert editor.viewer.marks[panels.FORBIDDEN] == []
    assert float(depth_inside(editor.state.structure.molecule.positions, editor.state.structure.forbidden).max()) < 2e-4
    editor.regions.value = 0
    press(editor, "Allow")
    assert editor.state.structure.forbidden == (Sphere((0.0, 0.0, 6.0), 1.0),)
    press(editor, "Undo")
    assert len(editor.regions.options) == 3
    press(editor, "Allow")  # all
    assert editor.regions.options == (("no forbidden region", None),)
    assert editor.viewer._reference is None
    press(editor, "Undo")
    assert len(editor.state.structure.forbidden) == 2
    press(editor, "Redo")
    assert editor.state.structure.forbidden == ()
    assert editor.last_error == ""


def test_another_molecule_has_no_regions_and_undo_brings_them_back(editor):
    editor.forbid(1.0, (0.0, 0.0, 5.0))
    editor.smiles.value = "C1CC1"
    assert editor.state.structure.forbidden == ()
    assert editor.viewer._reference is None
    press(editor, "Undo")
    assert editor.state.structure.forbidden == (Sphere((0.0, 0.0, 5.0), 1.0),)
    assert editor.viewer._reference is not None


def test_clicks_pick_and_put_back(editor):
    for atom, picked in ((1, {1}), (0, {0, 1}), (1, {0}), (None, set())):
        editor.viewer._on_message(editor.viewer, {"kind": "pick", "atom": atom}, [])
        assert editor.state.structure.picked == picked
        assert panels.read_atoms(editor.atoms.value) == picked


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda e: press(e, "Delete"), "no atom is picked"),
        (lambda e: press(e, "Redo"), "nothing to redo"),
        (lambda e: setattr(e.smiles, "value", "C(("), "not a valid SMILES"),
        (lambda e: setattr(e.atoms, "value", "99"), "no atom 99"),
        (lambda e: setattr(e.controls["sigma"], "value", 0.0), "must be over 0.02"),
        (lambda e: press(e, "Forbid"), "no atom is picked"),
        (lambda e: press(e, "Allow"), "no region is forbidden"),
        (lambda e: (setattr(e.centre, "value", "1, 2"), press(e, "Forbid")), "expected x, y, z"),
        (lambda e: (setattr(e.centre, "value", "1 2 3"), setattr(e.radius, "value", -1), press(e, "Forbid")), "got -1"),
    ],
)
def test_the_panel_shows_why_and_keeps_the_structure(editor, action, message):
    editor.set(sampler="ancestral")
    state, settings = editor.state, editor.settings
    action(editor)
    assert message in editor.last_error
    assert editor.state.structure is state.structure
    assert editor.settings == settings
    assert editor.controls["sigma"].value == settings.sigma
    assert editor.atoms.value == ""


def test_python_callers_get_the_exception(editor):
    with pytest.raises(ValueError, match="no atom is picked"):
        editor.delete()
    with pytest.raises(ValueError, match="unknown setting steps"):
        editor.set(steps=4)
    with pytest.raises(ValueError, match=r"sigma is 0\.3, expected one of"):
        editor.set(sigma=0.3)


def test_a_run_in_the_panel(editor, tmp_path):
    editor.set(sampler="heun", evaluations=8, sigma=1.0, seed=5)
    assert editor.controls["evaluations"].value == 8
    editor.pick_only([2, 8])
    editor.freeze_rest()
    before = editor.state.structure
    editor.start().wait(120)
    after = editor.state.structure
    kept = sorted(before.frozen)
    assert torch.equal(before.molecule.positions[0, kept], after.molecule.positions[0, kept])
    assert not torch.equal(before.molecule.positions, after.molecule.positions)
    assert editor.viewer.n_frames == 5  # the start with noise, and four steps of two evaluations
    assert torch.equal(editor.viewer.molecules()[0].positions, after.molecule.positions)
    assert "NFE 7, " in editor.summary_html()
    editor.undo()
    assert editor.state.structure is before
    path = tmp_path / "molecule.sdf"
    assert editor.to_sdf(path) == path.read_text()


def test_at_once_every_change_regenerates(editor):
    editor.at_once.value = True
    editor.pick_only([0])
    editor.add("methyl")
    editor.live.wait(120)
    assert [s.label for s in editor.state.past] == ["open", "add methyl"]
    assert editor.state.structure.label == "regenerate"
    editor.controls["seed"].value = 1
    editor.live.wait(120)
    assert [s.label for s in editor.state.past] == ["open", "add methyl", "regenerate"]


def test_nothing_is_edited_during_a_run(editor, monkeypatch):
    go_on = threading.Event()

    def held(*arguments):
        assert go_on.wait(120)
        yield from regenerate(*arguments)

    monkeypatch.setattr(panels, "regenerate", held)
    structure = editor.state.structure
    editor.start()
    try:
        with pytest.raises(ValueError, match="is being made"):
            editor.pick(0)
        with pytest.raises(ValueError, match="is being made"):
            editor.open_molecule("C")
        press(editor, "Undo")
        assert "is being made" in editor.last_error
        assert editor.buttons["Delete"].disabled
        assert editor.radius.disabled
        assert editor.state.structure is structure
    finally:
        go_on.set()
        editor.live.wait(120)
    assert not editor.buttons["Delete"].disabled
    assert editor.state.structure.label == "regenerate"


def test_a_run_that_diverges_leaves_the_structure(editor, monkeypatch):
    def broken(model, structure, settings):
        for record in regenerate(model, structure, settings):
            record.z_s.fill_(math.nan)
            yield record

    monkeypatch.setattr(panels, "regenerate", broken)
    state = editor.state
    editor.start()
    with pytest.raises(ValueError, match="diverged"):
        editor.live.wait(120)
    assert editor.state is state
    assert "diverged" in editor.live.last_error
    assert torch.equal(editor.viewer.molecules()[0].positions, state.structure.molecule.positions)


def test_a_run_that_is_stopped_shows_the_structure_that_is_kept(editor, monkeypatch):
    shown = threading.Event()
    go_on = threading.Event()

    def held(*arguments):
        for k, record in enumerate(regenerate(*arguments)):
            if k == 1:
                shown.set()
                assert go_on.wait(120)
            yield record

    monkeypatch.setattr(panels, "regenerate", held)
    state, measured = editor.state, editor._measures.value
    editor.start()
    assert shown.wait(120)
    assert editor._measures.value != measured
    editor.live.stop()
    go_on.set()
    assert editor.live.wait(120).status == "stopped"
    assert editor.state is state
    assert torch.equal(editor.viewer.molecules()[0].positions, state.structure.molecule.positions)
    assert editor._measures.value == measured


def test_pages_without_widgets_show_the_drawing(editor):
    page = editor._repr_mimebundle_()
    data = page[0] if isinstance(page, tuple) else page
    assert "<svg" in data["text/html"]
    assert "E_f (eV/atom)" in data["text/html"]
    assert repr(editor) == "MoleculeEditor('CCO', 9 atoms, 0 frozen, 0 picked)"
