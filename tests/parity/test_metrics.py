"""Stability and validity equal the numbers of the public EDM code, molecule by molecule (tests/golden/README.md)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rdkit import Chem

from elign_lab.evaluation import (
    bond_orders,
    novelty,
    rdkit_mols,
    smiles,
    stability,
    uniqueness,
    valid_and_unique,
    validity,
)
from elign_lab.molecules import MoleculeBatch

GOLDEN = Path(__file__).parents[1] / "golden"
ELEMENTS = torch.tensor([1, 6, 7, 8, 9, 0])  # type -1 is padding


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN / "metrics.npz"))


@pytest.fixture(scope="module")
def aggregate():
    return json.loads((GOLDEN / "metrics.json").read_text())


@pytest.fixture(scope="module")
def batch(golden):
    types = torch.from_numpy(golden["atom_types"])
    mask = types >= 0
    assert mask.sum(1).tolist() == golden["n_atoms"].tolist()
    return MoleculeBatch(ELEMENTS[types], torch.from_numpy(golden["positions"]), mask)


@pytest.fixture(scope="module")
def ours(batch):
    return smiles(batch)


def canonical(text):
    """The same SMILES as this RDKit version writes it."""
    params = Chem.SmilesParserParams()
    params.removeHs = False
    return Chem.MolToSmiles(Chem.MolFromSmiles(text, params))


def test_bond_orders(batch, golden):
    np.testing.assert_array_equal(bond_orders(batch).numpy(), golden["bond_order"])
    assert golden["bond_order"].max() == 3  # the comparison covers triple bonds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stability_of_each_molecule(batch, golden, dtype):
    result = stability(batch.to(dtype=dtype))
    np.testing.assert_array_equal(result.atoms.sum(1).numpy(), golden["atoms_stable"])
    np.testing.assert_array_equal(result.molecule.numpy(), golden["mol_stable"])
    assert not result.atoms[~batch.mask].any()


def test_stability_aggregate(batch, aggregate):
    result = stability(batch)
    assert float(result.atoms.sum() / batch.mask.sum()) == pytest.approx(aggregate["aggregate"]["atm_stable"], rel=1e-6)
    assert float(result.molecule.float().mean()) == pytest.approx(aggregate["aggregate"]["mol_stable"], rel=1e-6)


def test_padding_and_order_of_the_batch_change_nothing(batch, golden):
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    small = order[golden["n_atoms"][order] <= 15]
    result = stability(batch[small])
    assert result.atoms.shape[1] < batch.numbers.shape[1]
    np.testing.assert_array_equal(result.molecule.numpy(), golden["mol_stable"][small])
    alone = [bool(stability(batch[i]).molecule) for i in range(140, 170)]
    assert alone == golden["mol_stable"][140:170].tolist()


def test_smiles_of_each_molecule(golden, ours):
    expected = [canonical(s) if s else None for s in golden["smiles_largest_fragment"].tolist()]
    assert ours == expected
    assert sum(s is None for s in ours) == int((~golden["valid"]).sum()) > 0


def test_whole_molecule_smiles_and_conformer(batch, golden):
    """The RDKit molecules carry EDM's bonds and the positions; sanitised, they give EDM's SMILES of all fragments."""
    mols = rdkit_mols(batch)
    for i in range(len(batch)):
        n = golden["n_atoms"][i]
        np.testing.assert_array_equal(mols[i].GetConformer().GetPositions(), golden["positions"][i, :n].astype(float))
        bonds = np.zeros((n, n))
        for bond in mols[i].GetBonds():
            bonds[bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()] = bond.GetBondTypeAsDouble()
        np.testing.assert_array_equal(bonds, golden["rdkit_bond_order"][i, :n, :n])
        if golden["valid"][i]:
            Chem.SanitizeMol(mols[i])
            assert Chem.MolToSmiles(mols[i]) == canonical(golden["smiles"][i])


def test_connected_is_stricter(batch, aggregate, ours):
    fragments = [m["n_fragments"] for m in aggregate["molecules"]]
    strict = smiles(batch, connected=True)
    assert strict == [s if n == 1 else None for s, n in zip(ours, fragments, strict=True)]
    assert strict != ours


def test_aggregates(aggregate, ours):
    expected = aggregate["aggregate"]
    reference = [canonical(s) for s in aggregate["novelty_reference_smiles"]]
    assert validity(ours) == pytest.approx(expected["validity"], rel=1e-12)
    assert uniqueness(ours) == pytest.approx(expected["uniqueness"], rel=1e-12)
    assert valid_and_unique(ours) == pytest.approx(expected["n_unique"] / expected["n"], rel=1e-12)
    assert novelty(ours, reference) == pytest.approx(expected["novelty"], rel=1e-12)
