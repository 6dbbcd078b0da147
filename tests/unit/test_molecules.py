"""MoleculeBatch: content checks, indexing, the zero-centre-of-mass subspace, and other packages' formats."""

import numpy as np
import pytest
import torch
from ase.build import molecule as ase_molecule
from rdkit import Chem

from elign_lab.molecules import MoleculeBatch, atomic_number, symbol, zero_com, zero_com_noise

WATER = ([8, 1, 1], np.array([[0.0, 0, 0.119], [0, 0.763, -0.477], [0, -0.763, -0.477]]))
CARBON_MONOXIDE = ([6, 8], np.array([[0.0, 0, 0], [0, 0, 1.128]]))
QM9_XYZ = """3
gdb 3\t799.58812\t437.90386\t282.94545\t1.8511\t6.31\t-0.2928\t0.0687\t0.3615\t19.0002\t0.021375\t-76.404702\t-76.401867\t-76.400922\t-76.422349\t6.002\t
O\t-0.0343604951\t0.9775395708\t0.0076015923\t-0.589706
H\t0.0647664923\t0.0205721989\t1.5346341000*^-3\t0.294853
H\t0.8717903737\t1.3007924048\t6.9313360000e-04\t0.294853
1671.4222\t3803.6305\t3907.698
O\tO
InChI=1S/H2O/h1H2\tInChI=1S/H2O/h1H2
"""  # noqa: E501


@pytest.fixture
def batch():
    return MoleculeBatch.from_arrays([WATER, CARBON_MONOXIDE])


# ---------------------------------------------------------------------- elements
def test_symbols_and_numbers():
    assert [symbol(1), symbol(17), symbol(118)] == ["H", "Cl", "Og"]
    assert [atomic_number("cl"), atomic_number("C"), atomic_number(6), atomic_number("6")] == [17, 6, 6, 6]
    for wrong in (0, 119, -1):
        with pytest.raises(ValueError, match="expected 1 to 118"):
            symbol(wrong)
    for unknown in ("Xy", "X"):
        with pytest.raises(ValueError, match=f"'{unknown}'"):
            atomic_number(unknown)


# ---------------------------------------------------------------------- subspace
def test_zero_com_is_a_projection_that_leaves_padding_alone():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, 3, generator=generator, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([6, 4, 1, 2])[:, None]
    once = zero_com(x, mask)
    assert once.sum(1).abs().max() < 1e-14
    assert once[~mask].abs().max() == 0
    torch.testing.assert_close(zero_com(once, mask), once, atol=1e-15, rtol=0)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    torch.testing.assert_close(zero_com(x @ rotation, mask), once @ rotation)
    assert zero_com(x, torch.zeros(4, 6, dtype=torch.bool)).abs().max() == 0  # no atoms: no division by zero


def test_zero_com_noise_has_the_covariance_of_the_subspace():
    """Var = 1 - 1/n per coordinate and covariance -1/n between atoms: a standard Gaussian on 3(n - 1) dimensions."""
    mask = (torch.arange(5) < 4).expand(40_000, 5)
    noise = zero_com_noise(mask, torch.Generator().manual_seed(1), torch.float64)
    assert noise[:, 4].abs().max() == 0
    covariance = torch.cov(noise[:, :4, 0].T)
    torch.testing.assert_close(covariance, torch.eye(4, dtype=torch.float64) - 0.25, atol=0.02, rtol=0)
    again = zero_com_noise(mask, torch.Generator().manual_seed(1), torch.float64)
    assert torch.equal(noise, again)


# ---------------------------------------------------------------------- content
def test_padding_is_cleared_even_where_it_is_nan():
    positions = torch.full((1, 3, 3), torch.nan)
    positions[0, :2] = torch.tensor(CARBON_MONOXIDE[1])
    found = MoleculeBatch(torch.tensor([[6, 8, 99]]), positions, torch.tensor([[True, True, False]]))
    assert found.numbers.tolist() == [[6, 8, 0]]
    assert found.positions[0, 2].tolist() == [0, 0, 0]
    assert found.sizes.tolist() == [2]


@pytest.mark.parametrize(
    ("numbers", "positions", "mask", "message"),
    [
        (torch.ones(2, 3), torch.zeros(2, 3, 3), torch.ones(2, 3), "must be integers.*float32"),
        (torch.ones(2, 3).long(), torch.zeros(2, 4, 3), torch.ones(2, 3), r"mismatched shapes.*\(2, 4, 3\)"),
        (torch.ones(3).long(), torch.zeros(3, 3), torch.ones(3), "mismatched shapes"),
        (torch.ones(2, 3).long(), torch.zeros(2, 3, 3), torch.tensor([[1, 1, 1], [0, 0, 0]]), "molecule 1 is empty"),
        (torch.tensor([[1, 0]]), torch.zeros(1, 2, 3), torch.ones(1, 2), "atom 1: unknown element 0"),
        (
            torch.tensor([[6, 0, 8]]),
            torch.zeros(1, 3, 3),
            torch.tensor([[1, 0, 1]]),
            "molecule 0: padding before atom 2",
        ),
        (torch.tensor([[1, 119]]), torch.zeros(1, 2, 3), torch.ones(1, 2), "unknown element 119"),
        (torch.tensor([[1]]), torch.tensor([[[0.0, torch.inf, 0]]]), torch.ones(1, 1), "atom 0: position is .*inf"),
    ],
)
def test_bad_content_is_named(numbers, positions, mask, message):
    with pytest.raises(ValueError, match=message):
        MoleculeBatch(numbers, positions, mask)


def test_unchecked_batches_may_hold_non_finite_positions(batch):
    broken = batch.with_positions(torch.full_like(batch.positions, torch.nan))
    assert broken.positions[broken.mask].isnan().all()
    assert broken.positions[~broken.mask].abs().max() == 0
    with pytest.raises(ValueError, match="molecule 0, atom 0"):
        broken.validate()


def test_limits_of_a_model(batch):
    assert batch.validate(max_atoms=3, elements=[1, 6, 8]) is batch
    with pytest.raises(ValueError, match="molecule 0 has 3 atoms, over the limit of 2"):
        batch.validate(max_atoms=2)
    with pytest.raises(ValueError, match="molecule 1, atom 0 is C, outside the supported elements H, O"):
        batch.validate(elements=[8, 1])


def test_from_arrays_names_the_molecule():
    with pytest.raises(ValueError, match="molecule 1: 2 atomic numbers but positions of shape"):
        MoleculeBatch.from_arrays([WATER, ([6, 8], np.zeros((3, 3)))])
    with pytest.raises(ValueError, match="molecule 1: expected whole atomic numbers"):
        MoleculeBatch.from_arrays([WATER, ([6.7, 8.0], np.zeros((2, 3)))])


@pytest.mark.parametrize(
    ("numbers", "positions"),
    [
        (["C", "O"], CARBON_MONOXIDE[1]),
        ([6, None], CARBON_MONOXIDE[1]),
        ([6, np.inf], CARBON_MONOXIDE[1]),
        ([6, 8], None),
        ([6, 8], [[0.0, 0, 0], [0.0, 1.1]]),
        ([6, 8], CARBON_MONOXIDE[1] + 0j),
    ],
)
def test_what_is_not_a_molecule_is_named(numbers, positions):
    with pytest.raises(ValueError, match="molecule 1: "):
        MoleculeBatch.from_arrays([WATER, (numbers, positions)])


@pytest.mark.parametrize(
    ("numbers", "positions"),
    [
        (np.array([6, 8], np.uint16), CARBON_MONOXIDE[1]),
        (np.array([6, 8], ">i4"), CARBON_MONOXIDE[1].astype(">f8")),
        (np.array([8, 6])[::-1], CARBON_MONOXIDE[1][::-1][::-1]),
        (torch.tensor([6, 8]), torch.tensor(CARBON_MONOXIDE[1], requires_grad=True)),
    ],
    ids=["unsigned", "byte order", "strides", "gradient"],
)
def test_every_array_of_numbers_is_read(numbers, positions):
    found = MoleculeBatch.from_arrays([(numbers, positions)])
    assert_same(found, MoleculeBatch.from_arrays([CARBON_MONOXIDE]), 0)
    assert found.positions.dtype == torch.float64


def test_arrays_are_copied_and_may_be_read_only(recwarn):
    z, x = np.array(CARBON_MONOXIDE[0]), CARBON_MONOXIDE[1].copy()
    x.setflags(write=False)
    MoleculeBatch.from_arrays([(z, x)]).positions.add_(1.0)
    np.testing.assert_array_equal(x, CARBON_MONOXIDE[1])
    assert not recwarn.list


def test_precision_is_kept():
    assert MoleculeBatch.from_arrays([WATER]).positions.dtype == torch.float64
    assert MoleculeBatch.from_arrays([(WATER[0], WATER[1].astype(np.float32))]).positions.dtype == torch.float32


# ---------------------------------------------------------------------- indexing
@pytest.mark.parametrize(
    "index", [1, -1, np.int64(1), [1], slice(1, 2), torch.tensor([1]), torch.tensor(1), np.array([False, True])]
)
def test_every_kind_of_index(batch, index):
    found = batch[index]
    assert len(found) == 1
    assert found.numbers.tolist() == [[6, 8]]  # padding that is not needed is cut


def test_iteration_empty_selection_and_bounds(batch):
    assert [len(m.numbers[0]) for m in batch] == [3, 2]
    assert [m.formula(0) for m in batch] == ["H2O", "CO"]
    for empty in (batch[[]], batch[:0]):
        assert len(empty) == 0
        assert empty.arrays() == []
    for index in (2, -3):
        with pytest.raises(IndexError, match="batch of 2"):
            batch[index]


def test_cat_is_the_inverse_of_splitting(batch):
    again = MoleculeBatch.cat(list(batch))
    assert torch.equal(again.numbers, batch.numbers)
    assert torch.equal(again.positions, batch.positions)
    assert torch.equal(again.mask, batch.mask)
    with pytest.raises(ValueError, match="empty list"):
        MoleculeBatch.cat([])


def test_formula_is_in_hill_order():
    found = MoleculeBatch.from_smiles(["CC(Cl)N", "N", "O=S(=O)(O)O"])
    assert [found.formula(i) for i in range(3)] == ["C2H6ClN", "H3N", "H2O4S"]
    assert repr(found).startswith("MoleculeBatch(3 molecules, up to 10 atoms: C2H6ClN")


def test_centered_and_to(batch):
    centered = batch.centered().to(dtype=torch.float32)
    assert centered.positions.dtype == torch.float32
    assert centered.positions.sum(1).abs().max() < 1e-6
    torch.testing.assert_close(
        torch.cdist(centered.positions, centered.positions)[0].double(),
        torch.cdist(batch.positions, batch.positions)[0],
    )


# ---------------------------------------------------------------------- other packages
def assert_same(found, expected, atol):
    assert torch.equal(found.numbers, expected.numbers)
    torch.testing.assert_close(found.positions.double(), expected.positions.double(), atol=atol, rtol=0)


def test_ase_round_trip(batch):
    assert_same(MoleculeBatch.from_ase(batch.to_ase()), batch, 0)
    benzene = MoleculeBatch.from_ase(ase_molecule("C6H6"))
    assert benzene.formula(0) == "C6H6"


def test_xyz_round_trip(batch, tmp_path):
    path = tmp_path / "two.xyz"
    text = batch.to_xyz(path, comments=["first", "second"])
    assert text.splitlines()[1] == "first"
    assert_same(MoleculeBatch.from_xyz(path), batch, 1e-9)
    assert_same(MoleculeBatch.from_xyz(text), batch, 1e-9)
    assert_same(MoleculeBatch.from_xyz("\n" + text + "\n\n"), batch, 1e-9)


def test_xyz_of_qm9_with_its_exponents_and_last_lines():
    found = MoleculeBatch.from_xyz(QM9_XYZ + QM9_XYZ)
    assert found.numbers.tolist() == [[8, 1, 1]] * 2
    assert found.positions[0, 1, 2].item() == pytest.approx(1.5346341e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("two\n\nO 0 0 0\n", "molecule 0 .line 1.: expected the number of atoms, got 'two'"),
        ("2\n\nO 0 0 0\n", "2 atoms announced, 1 lines found"),
        ("1\n\nXx 0 0 0\n", "unknown element 'Xx'"),
        ("1\n\nO 0 0 zero\n", "could not convert"),
        ("1\n\nO 0 0\n", "molecule 0 .line 1.: atom 0 has fewer than three coordinates: 'O 0 0'"),
        ("2\n\nO 0 0 0\nO 0 0\n", "atom 1 has fewer than three coordinates"),
        ("1\n\nO 0 0 nan\n", "position is"),
        ("\n\n", "no molecule"),
        ("-2\n\n", "at least one atom, got -2"),
    ],
)
def test_bad_xyz(text, message):
    with pytest.raises(ValueError, match=message):
        MoleculeBatch.from_xyz(text)


def test_missing_files_are_named(tmp_path):
    for read in (MoleculeBatch.from_xyz, MoleculeBatch.from_sdf):
        with pytest.raises(FileNotFoundError, match=r"absent\.file"):
            read(tmp_path / "absent.file")


def test_smiles_geometries_are_reproducible_and_bonded():
    one, two = (MoleculeBatch.from_smiles("CCO", seed=3) for _ in range(2))
    assert torch.equal(one.positions, two.positions)
    bonds = torch.pdist(one.positions[0])
    assert 0.9 < bonds.min() < 1.15  # O-H and C-H, Angstrom
    for wrong in ("C1CC", "", "not a molecule"):
        with pytest.raises(ValueError, match=r"molecule 0: .* is not a valid SMILES"):
            MoleculeBatch.from_smiles(wrong)


def test_rdkit_and_sdf_round_trip(tmp_path):
    batch = MoleculeBatch.from_smiles(["CC(=O)N", "C#N"])
    mols = batch.to_rdkit()
    assert [b.GetBondTypeAsDouble() for b in mols[1].GetBonds()] == [3.0, 1.0]
    assert_same(MoleculeBatch.from_rdkit(mols), batch, 0)
    path = tmp_path / "two.sdf"
    text = batch.to_sdf(path)
    assert_same(MoleculeBatch.from_sdf(path), batch, 1e-4)
    read = [Chem.MolToSmiles(m) for m in Chem.SDMolSupplier(str(path))]  # as any other program reads it
    assert read == ["CC(N)=O", "C#N"]
    assert text == path.read_text()


def test_rdkit_molecules_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match="molecule 1 is None"):
        MoleculeBatch.from_rdkit([*MoleculeBatch.from_smiles("C").to_rdkit(), None])
    with pytest.raises(ValueError, match="no conformer"):
        MoleculeBatch.from_rdkit(Chem.MolFromSmiles("C"))
    with pytest.raises(ValueError, match="molecule 0 is None"):
        MoleculeBatch.from_sdf("not\nan\nSDF\n")
    (tmp_path / "empty.sdf").touch()
    with pytest.raises(ValueError, match=r"no molecule in SDF.*empty\.sdf"):
        MoleculeBatch.from_sdf(tmp_path / "empty.sdf")


def test_npz_keeps_every_digit(tmp_path):
    batch = MoleculeBatch.from_smiles(["O", "CCO"]).to(dtype=torch.float64)
    batch.to_npz(tmp_path / "m.npz")
    read = MoleculeBatch.from_npz(tmp_path / "m.npz")
    for name in ("numbers", "positions", "mask"):
        assert torch.equal(getattr(read, name), getattr(batch, name))
    np.savez(tmp_path / "other.npz", numbers=np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("other.npz", "text.npz"):
        with pytest.raises(ValueError, match=rf"{name} is no archive of molecules"):
            MoleculeBatch.from_npz(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        MoleculeBatch.from_npz(tmp_path / "none.npz")
