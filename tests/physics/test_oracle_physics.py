"""The oracles' numbers: forces against energies, the backends called directly, published values."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ase.calculators.emt import EMT

from elign_lab.datasets import load_dataset
from elign_lab.molecules import MoleculeBatch
from elign_lab.oracles import f_rms, load_oracle
from elign_lab.oracles.geometries import PERTURBATIONS, perturb

ANI_WEIGHTS = Path(__file__).parents[2].parent / "shared" / "data" / "ani-2x" / "ani-2x_8x"
needs_ani = pytest.mark.skipif(not ANI_WEIGHTS.is_dir(), reason="the ANI-2x weights are not part of the repository")

HARTREE, BOHR = 27.211386245981, 0.529177210544
WATER = ([8, 1, 1], [[0.0, 0.0, 0.119], [0.0, 0.763, -0.477], [0.0, -0.763, -0.477]])
HYDROGEN_FLUORIDE = ([9, 1], [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
METHYL = ([6, 1, 1, 1], [[0.0, 0.0, 0.0], [1.079, 0.0, 0.0], [-0.5395, 0.9344, 0.0], [-0.5395, -0.9344, 0.0]])

# The example in the documentation of tblite's Calculator (Bohr), with its GFN2-xTB energy (Hartree)
TBLITE_NUMBERS = [1, 1, 6, 5, 1, 15, 8, 17, 13, 15, 5, 1, 9, 15, 1, 15]
TBLITE_POSITIONS = [
    [+2.79274810283778, +3.82998228828316, -2.79287054959216],
    [-1.43447454186833, +0.43418729987882, +5.53854345129809],
    [-3.26268343665218, -2.50644032426151, -1.56631149351046],
    [+2.14548759959147, -0.88798018953965, -2.24592534506187],
    [-4.30233097423181, -3.93631518670031, -0.48930754109119],
    [+0.06107643564880, -3.82467931731366, -2.22333344469482],
    [+0.41168550401858, +0.58105573172764, +5.56854609916143],
    [+4.41363836635653, +3.92515871809283, +2.57961724984000],
    [+1.33707758998700, +1.40194471661647, +1.97530004949523],
    [+3.08342709834868, +1.72520024666801, -4.42666116106828],
    [-3.02346932078505, +0.04438199934191, -0.27636197425010],
    [+1.11508390868455, -0.97617412809198, +6.25462847718180],
    [+0.61938955433011, +2.17903547389232, -6.21279842416963],
    [-2.67491681346835, +3.00175899761859, +1.05038813614845],
    [-4.13181080289514, -2.34226739863660, -3.44356159392859],
    [+2.85007173009739, -2.64884892757600, +0.71010806424206],
]
TBLITE_ENERGY = -31.716159156026254


def distorted(molecule, seed=0) -> MoleculeBatch:
    """The molecule away from its minimum, where forces are of the order of 1 eV/Angstrom."""
    numbers, positions = molecule
    noise = 0.05 * np.random.default_rng(seed).normal(size=np.shape(positions))
    return MoleculeBatch.from_arrays([(numbers, np.array(positions) + noise)])


def numerical_forces(oracle, molecule: MoleculeBatch, step: float) -> torch.Tensor:
    """-dE/dx by central differences, all displaced geometries in one batch."""
    n = int(molecule.sizes[0])
    shifts = step * torch.eye(3 * n, dtype=torch.float64).reshape(3 * n, n, 3)
    positions = molecule.positions.double() + torch.cat([shifts, -shifts])
    rows = MoleculeBatch(molecule.numbers.repeat(6 * n, 1), positions, molecule.mask.repeat(6 * n, 1))
    result = oracle(rows)
    assert result.ok.all(), result.status
    plus, minus = result.energy.split(3 * n)
    return -((plus - minus) / (2 * step)).reshape(n, 3)


# name: options, molecule, step (Angstrom), tolerance (eV/Angstrom) and where it comes from
CASES = {
    "xtb closed shell": ("xtb", {"accuracy": 1e-3, "workers": 1}, WATER, 1e-3, 1e-4),  # SCF convergence
    "xtb radical": ("xtb", {"accuracy": 1e-3, "workers": 1}, METHYL, 1e-3, 1e-4),
    "xtb GFN1": ("xtb", {"method": "GFN1-xTB", "accuracy": 1e-3, "workers": 1}, WATER, 1e-3, 1e-4),
    "dft": (
        "dft",
        {"workers": 1},
        HYDROGEN_FLUORIDE,
        2e-3,
        1e-2,
    ),  # PySCF's gradient leaves out the response of the grid
    "ani": ("ani", {"weights": ANI_WEIGHTS, "dtype": torch.float64}, METHYL, 2e-4, 2e-5),  # differences: step^2
    "ase": ("ase", {"calculator": EMT}, WATER, 1e-4, 1e-5),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=needs_ani if c == "ani" else ()) for c in CASES])
def test_forces_are_minus_the_gradient_of_the_energy(case):
    name, options, source, step, tolerance = CASES[case]
    molecule = distorted(source).to(dtype=torch.float64)
    with load_oracle(name, **options) as oracle:
        result = oracle(molecule)
        expected = numerical_forces(oracle, molecule, step)
    assert f_rms(result.forces, molecule.mask) > 0.5
    torch.testing.assert_close(result.forces[0], expected, atol=tolerance, rtol=0)


# ---------------------------------------------------------------------- xTB
def test_xtb_published_energy():
    molecule = MoleculeBatch.from_arrays([(TBLITE_NUMBERS, BOHR * np.array(TBLITE_POSITIONS))])
    with load_oracle("xtb", workers=1) as xtb:
        energy = xtb(molecule).energy.item() / HARTREE
    assert energy == pytest.approx(TBLITE_ENERGY, abs=1e-6)


@pytest.mark.parametrize("method", ["GFN2-xTB", "GFN1-xTB"])
def test_xtb_equals_tblite_called_directly(method):
    from tblite.interface import Calculator

    molecule = distorted(METHYL).to(dtype=torch.float64)
    numbers, positions = molecule.arrays()[0]
    calculator = Calculator(method, numbers, positions / BOHR, uhf=1)
    calculator.set("verbosity", 0)
    direct = calculator.singlepoint()
    with load_oracle("xtb", method=method, workers=1) as xtb:
        result = xtb(molecule)
    assert result.energy.item() == pytest.approx(direct.get("energy") * HARTREE, abs=1e-6)
    np.testing.assert_allclose(result.forces[0], -direct.get("gradient") * HARTREE / BOHR, atol=1e-5)


def test_xtb_atoms_have_the_spins_of_their_ground_states():
    from tblite.interface import Calculator

    with load_oracle("xtb") as xtb:
        for number, unpaired in {1: 1, 6: 2, 7: 3, 8: 2, 9: 1, 16: 2}.items():
            calculator = Calculator("GFN2-xTB", np.array([number]), np.zeros((1, 3)), uhf=unpaired)
            calculator.set("verbosity", 0)
            energy = calculator.singlepoint().get("energy") * HARTREE
            assert xtb.atom_energies[number] == pytest.approx(energy, abs=1e-6)
        with pytest.raises(ValueError, match="no parameters for U"):
            xtb.atom_energies[92]


def test_xtb_ranks_a_relaxed_molecule_above_a_distorted_one():
    relaxed = MoleculeBatch.from_smiles("CCO")
    both = MoleculeBatch.cat([relaxed, distorted(relaxed.arrays()[0]).to(dtype=relaxed.positions.dtype)])
    with load_oracle("xtb", workers=1) as xtb:
        result = xtb(both)
    formation = xtb.formation_energy_per_atom(result.energy, both.numbers, both.mask)
    rms = f_rms(result.forces, both.mask)
    assert formation[0] < formation[1] < 0
    assert rms[0] < rms[1]


def test_xtb_unconverged_bond_breaking_is_a_status():
    stretched = MoleculeBatch.from_arrays([([6, 8], [[0.0, 0.0, 0.0], [0.0, 0.0, 100.0]]), WATER])
    with load_oracle("xtb", workers=1) as xtb:
        result = xtb(stretched)
    assert result.status == ("tblite: SCF not converged in 250 cycles", "ok")
    assert torch.isnan(result.energy).tolist() == [True, False]


# ---------------------------------------------------------------------- DFT
def test_dft_hydrogen_atom_is_the_published_one_and_tells_the_b3lyp_variant():
    # QM9's table of atomic references (Gaussian's B3LYP, VWN-RPA); for H, its basis and 6-31G(d) have the same s part
    with load_oracle("dft") as dft, load_oracle("dft", xc="b3lyp5") as vwn5:
        assert dft.atom_energies[1] / HARTREE == pytest.approx(-0.500273, abs=1e-6)
        assert abs(vwn5.atom_energies[1] - dft.atom_energies[1]) > 0.02


def test_dft_equals_pyscf_called_directly():
    from pyscf import dft as pyscf_dft
    from pyscf import gto, lib

    numbers, positions = METHYL
    mole = gto.M(atom=list(zip(numbers, positions, strict=True)), basis="6-31g(d)", spin=1, verbose=0)
    field = pyscf_dft.UKS(mole, xc="b3lyp")
    field.conv_tol = 1e-9
    with lib.with_omp_threads(1):
        expected = field.kernel() * HARTREE
    with load_oracle("dft", workers=1) as dft:
        batch = MoleculeBatch.from_arrays([METHYL]).to(dtype=torch.float64)
        result = dft(batch)
        formation = dft.formation_energy_per_atom(result.energy, batch.numbers, batch.mask)
        by_hand = (expected - dft.atom_energies[6] - 3 * dft.atom_energies[1]) / 4
    assert result.energy.item() == pytest.approx(expected, abs=1e-5)
    assert formation.item() == pytest.approx(by_hand, abs=1e-5)
    # atomisation of CH3: 307 kcal/mol = 13.3 eV without zero-point energy (ATcT), so 3.3 eV per atom
    assert formation.item() == pytest.approx(-3.33, abs=0.1)


def test_dft_second_order_solver_rescues_the_scf():
    options = {"basis": "sto-3g", "grid_level": 1, "workers": 1}
    batch = MoleculeBatch.from_arrays([WATER])
    with (
        load_oracle("dft", **options) as full,
        load_oracle("dft", **options, max_cycle=5) as short,
        load_oracle("dft", **options, max_cycle=1) as hopeless,
    ):
        converged, rescued, failed = full(batch), short(batch), hopeless(batch)
    assert rescued.ok.all(), rescued.status
    assert rescued.energy.item() == pytest.approx(converged.energy.item(), abs=1e-5)
    assert failed.status == ("PySCF: SCF not converged in 1 cycles, nor by second order",)


def test_dft_density_fitting_changes_little():
    batch = MoleculeBatch.from_arrays([WATER])
    with load_oracle("dft", workers=1) as exact, load_oracle("dft", workers=1, density_fit=True) as fitted:
        a, b = exact(batch), fitted(batch)
    assert 0 < abs(a.energy.item() - b.energy.item()) < 5e-3
    torch.testing.assert_close(a.forces, b.forces, atol=5e-3, rtol=0)


def test_dft_valence_basis_sets_bring_their_core_potentials():
    """Without them PySCF would put all 18 electrons of HCl into valence orbitals: 2,400 eV off, and not an error."""
    from pyscf import dft as pyscf_dft
    from pyscf import gto

    chloride = ([17, 1], [[0.0, 0.0, 0.0], [0.0, 0.0, 1.28]])
    mole = gto.M(atom=list(zip(*chloride, strict=True)), basis="lanl2dz", ecp={"Cl": "lanl2dz"}, verbose=0)
    field = pyscf_dft.RKS(mole, xc="svwn")
    field.grids.level = 0
    expected = field.kernel() * HARTREE
    batch = MoleculeBatch.from_arrays([chloride]).to(dtype=torch.float64)
    with load_oracle("dft", xc="svwn", basis="lanl2dz", grid_level=0, workers=0) as dft:
        result = dft(batch)
        formation = dft.formation_energy_per_atom(result.energy, batch.numbers, batch.mask)
    assert result.energy.item() == pytest.approx(expected, abs=1e-5)
    assert formation.item() == pytest.approx(-2.3, abs=0.5)  # D_e is 4.6 eV


# ---------------------------------------------------------------------- ANI
@needs_ani
def test_ani_reads_the_folder_as_torchani_does():
    from torchani.neurochem import load_aev_computer_and_symbols, load_ensemble

    ani = load_oracle("ani", weights=ANI_WEIGHTS)
    potential = ani._model.potentials["nnp"]
    aev, symbols = load_aev_computer_and_symbols(ANI_WEIGHTS / "rHCNOSFCl-5.1R_16-3.5A_a8-4.params")
    networks = load_ensemble(symbols, ANI_WEIGHTS / "train", 8)
    for ours, theirs in ((potential.neural_networks, networks), (potential.aev_computer, aev)):
        expected = theirs.state_dict()
        assert ours.state_dict().keys() == expected.keys()
        for key, value in ours.state_dict().items():
            torch.testing.assert_close(value, expected[key], msg=key)


@needs_ani
def test_ani_equals_torchani_called_directly():
    from torchani.arch import ANI
    from torchani.neurochem import load_aev_computer_and_symbols, load_ensemble, load_sae

    aev, symbols = load_aev_computer_and_symbols(ANI_WEIGHTS / "rHCNOSFCl-5.1R_16-3.5A_a8-4.params")
    networks, energies = load_ensemble(symbols, ANI_WEIGHTS / "train", 8), load_sae(ANI_WEIGHTS / "sae_linfit.dat")
    reference = ANI(symbols, aev, networks, energies).double()
    batch = MoleculeBatch.from_arrays([distorted(m).arrays()[0] for m in (WATER, METHYL, HYDROGEN_FLUORIDE)])
    result = load_oracle("ani", weights=ANI_WEIGHTS, dtype=torch.float64)(batch)
    for i, (numbers, positions) in enumerate(batch.arrays()):
        x = torch.tensor(positions)[None].requires_grad_()
        energy = reference((torch.tensor(numbers)[None], x)).energies
        (gradient,) = torch.autograd.grad(energy.sum(), x)
        # torchani keeps its self energies, hundreds of eV, in single precision
        assert result.energy[i].item() == pytest.approx(energy.item() * HARTREE, abs=5e-4)
        torch.testing.assert_close(result.forces[i, : len(numbers)], -gradient[0] * HARTREE, atol=1e-5, rtol=0)


@needs_ani
@pytest.mark.parametrize("noise", [0.03, 0.1])
def test_ani_forces_follow_gfn2_xtb_on_distorted_molecules(noise):
    data, rng = load_dataset("bundled", split="test"), np.random.default_rng(2)
    molecules = perturb(data, 40, PERTURBATIONS["minimum"], rng)
    batch = MoleculeBatch.from_arrays([(z, x + noise * rng.normal(size=x.shape)) for z, x in molecules])
    with load_oracle("xtb", workers=0) as xtb:
        theirs = xtb(batch).forces
    ours = load_oracle("ani", weights=ANI_WEIGHTS)(batch).forces
    pairs = [(a[m].flatten(), b[m].flatten()) for a, b, m in zip(ours, theirs, batch.mask, strict=True)]
    # by molecule: in all atoms together one clash of 30 eV/Angstrom would count for more than the rest
    assert np.median([np.corrcoef(a, b)[0, 1] for a, b in pairs]) > 0.98


@needs_ani
def test_ani_reaction_energies_agree_with_experiment():
    """Self energies cancel. Experiment: heats of formation at 298 K, kcal/mol (NIST WebBook)."""
    smiles = ["C", "CO", "CCO", "CC", "CC(C)=O", "CCC=O", "[H][H]"]
    result = load_oracle("ani", weights=ANI_WEIGHTS)(MoleculeBatch.from_smiles(smiles))
    energy = dict(zip(smiles, result.energy.tolist(), strict=True))
    kcal = 0.0433641
    # C2H5OH + CH4 -> CH3OH + C2H6; acetone -> propanal
    exchange = energy["CO"] + energy["CC"] - energy["CCO"] - energy["C"]
    assert exchange == pytest.approx((-48.0 - 20.0 + 56.1 + 17.8) * kcal, abs=0.1)
    assert energy["CCC=O"] - energy["CC(C)=O"] == pytest.approx((-44.8 + 51.9) * kcal, abs=0.1)
    # H2 is outside ANI's training set, and the members disagree
    assert result.uncertainty[-1] > 1.0 > 0.05 > result.uncertainty[:-1].max()
