"""Batches of molecules, the zero-centre-of-mass subspace, and conversion to and from other packages.

Units: Angstrom. Padding: atomic number 0 and position 0, `mask` False; real atoms come first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from ase.data import atomic_numbers, chemical_symbols
from numpy.typing import ArrayLike
from torch import Tensor

from elign_lab.archives import read_archive

if TYPE_CHECKING:
    from ase import Atoms
    from rdkit.Chem import Mol

MAX_ATOMIC_NUMBER = 118
_QM9_COMMENT_WORDS = 17  # "gdb", the number of the molecule, 15 properties


def symbol(number: int) -> str:
    """Chemical symbol of an atomic number (1 to 118)."""
    if not 1 <= number <= MAX_ATOMIC_NUMBER:
        raise ValueError(f"atomic number {number} is not an element: expected 1 to {MAX_ATOMIC_NUMBER}")
    return chemical_symbols[number]


def atomic_number(element: str | int) -> int:
    """Atomic number of a chemical symbol (or of a number, which is checked)."""
    if isinstance(element, str) and not element.isdigit():
        number = atomic_numbers.get(element.capitalize(), 0)
        if number == 0:  # ASE has X, for no element, as number 0
            raise ValueError(f"unknown element {element!r}: expected a chemical symbol such as 'C' or 'Cl'")
        return number
    number = int(element)
    symbol(number)
    return number


def to_device(value: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on `device`; from the host to a GPU without waiting for what the GPU is doing."""
    device = torch.device(device)
    if value.device.type == "cpu" and device.type == "cuda":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def zero_com(x: Tensor, mask: Tensor) -> Tensor:
    """Project positions onto the zero-centre-of-mass subspace, per molecule (paper section 2).

    x (..., N, 3), mask (..., N) -> (..., N, 3) with zero (unweighted) mean over the real atoms and zeros on padding.
    """
    weight = mask.to(x.dtype).unsqueeze(-1)
    mean = (x * weight).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True).clamp(min=1)
    return (x - mean) * weight


def zero_com_noise(mask: Tensor, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Standard Gaussian noise on the zero-centre-of-mass subspace. mask (..., N) -> (..., N, 3)."""
    noise = torch.randn(*mask.shape, 3, generator=generator, device=mask.device, dtype=dtype)
    return zero_com(noise, mask)


@dataclass(frozen=True)
class MoleculeBatch:
    """A dense, padded batch of molecules.

    numbers (B, N) int64 atomic numbers, positions (B, N, 3) float in Angstrom, mask (B, N) bool.
    Raises ValueError that names the molecule and the reason. `check=False` skips the checks of the content (not of
    the shapes); samplers use it, because what a model generates may be non-finite and is then reported, not refused.
    """

    numbers: Tensor
    positions: Tensor
    mask: Tensor
    check: InitVar[bool] = True

    def __post_init__(self, check: bool) -> None:
        numbers = torch.as_tensor(self.numbers)
        positions = torch.as_tensor(self.positions)
        mask = torch.as_tensor(self.mask)
        if numbers.dim() != 2 or tuple(positions.shape) != (*numbers.shape, 3) or mask.shape != numbers.shape:
            raise ValueError(
                "mismatched shapes: expected numbers (B, N), positions (B, N, 3) and mask (B, N), got "
                f"{tuple(numbers.shape)}, {tuple(positions.shape)} and {tuple(mask.shape)}"
            )
        if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
            raise ValueError(f"numbers must be integers (atomic numbers), got dtype {numbers.dtype}")
        if not positions.is_floating_point():
            positions = positions.to(torch.get_default_dtype())
        mask = mask.bool()
        if check:
            _check_content(numbers, positions, mask)
        # where, not multiplication: padding may hold NaN
        object.__setattr__(self, "numbers", torch.where(mask, numbers.long(), 0))
        object.__setattr__(self, "positions", torch.where(mask.unsqueeze(-1), positions, torch.zeros_like(positions)))
        object.__setattr__(self, "mask", mask)

    # ------------------------------------------------------------------ shape
    def __len__(self) -> int:
        return self.numbers.shape[0]

    def __iter__(self) -> Iterator[MoleculeBatch]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> MoleculeBatch:
        """Molecules by index, slice, list or mask, padded to the largest of them."""
        if isinstance(index, (int, np.integer)):
            if not -len(self) <= index < len(self):
                raise IndexError(f"molecule {index} of a batch of {len(self)}")
            index = [index]
        if not isinstance(index, slice):
            index = torch.as_tensor(index, device=self.mask.device)
            index = index.unsqueeze(0) if index.dim() == 0 else index
            if index.numel() == 0:
                index = index.long()  # torch reads an empty list as floats
        mask = self.mask[index]
        n = int(mask.sum(1).max()) if len(mask) else 0
        return MoleculeBatch(self.numbers[index][:, :n], self.positions[index][:, :n], mask[:, :n], check=False)

    def __repr__(self) -> str:
        shown = ", ".join(self.formula(i) for i in range(min(len(self), 4)))
        more = ", ..." if len(self) > 4 else ""
        return f"MoleculeBatch({len(self)} molecules, up to {self.numbers.shape[1]} atoms: {shown}{more})"

    @property
    def sizes(self) -> Tensor:
        """Number of atoms of each molecule, (B,) int64."""
        return self.mask.sum(1)

    def formula(self, i: int) -> str:
        """Molecular formula of molecule i in Hill order, for example 'C2H6O'."""
        counts = Counter(chemical_symbols[z] for z in self.numbers[i][self.mask[i]].tolist())
        order = [s for s in ("C", "H") if s in counts] if "C" in counts else []
        order += sorted(s for s in counts if s not in order)
        return "".join(s + (str(counts[s]) if counts[s] > 1 else "") for s in order)

    def centered(self) -> MoleculeBatch:
        """The same molecules with their (unweighted) centre of mass at the origin."""
        return self.with_positions(zero_com(self.positions, self.mask))

    def with_positions(self, positions: Tensor) -> MoleculeBatch:
        """The same atoms at other positions (B, N, 3)."""
        return MoleculeBatch(self.numbers, positions, self.mask, check=False)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MoleculeBatch:
        """Move to a device and change the dtype of the positions."""
        positions = self.positions.to(dtype=dtype)
        if device is None:
            return MoleculeBatch(self.numbers, positions, self.mask, check=False)
        return MoleculeBatch(
            to_device(self.numbers, device), to_device(positions, device), to_device(self.mask, device), check=False
        )

    def validate(self, *, max_atoms: int | None = None, elements: Iterable[int] | None = None) -> MoleculeBatch:
        """Check the content and a model's limits; returns self, or raises ValueError that names the molecule."""
        _check_content(self.numbers, self.positions, self.mask)
        if max_atoms is not None and bool((self.sizes > max_atoms).any()):
            i = int((self.sizes > max_atoms).nonzero()[0])
            raise ValueError(f"molecule {i} has {int(self.sizes[i])} atoms, over the limit of {max_atoms}")
        if elements is not None:
            allowed = torch.tensor(sorted(elements), device=self.numbers.device)
            bad = self.mask & ~torch.isin(self.numbers, allowed)
            if bool(bad.any()):
                i, a = (int(k) for k in bad.nonzero()[0])
                names = ", ".join(chemical_symbols[z] for z in allowed.tolist())
                raise ValueError(
                    f"molecule {i}, atom {a} is {chemical_symbols[int(self.numbers[i, a])]}, "
                    f"outside the supported elements {names}"
                )
        return self

    # ------------------------------------------------------------------ building
    @classmethod
    def from_arrays(cls, molecules: Iterable[tuple[ArrayLike, ArrayLike]], check: bool = True) -> MoleculeBatch:
        """Pad (atomic numbers (n,), positions (n, 3)) pairs to one batch; float64 if any position is, else float32."""
        pairs = [_tensors(i, z, x) for i, (z, x) in enumerate(molecules)]
        n = max((len(z) for z, _ in pairs), default=0)
        dtype = torch.float64 if any(x.dtype == torch.float64 for _, x in pairs) else torch.float32
        numbers = torch.zeros(len(pairs), n, dtype=torch.long)
        positions = torch.zeros(len(pairs), n, 3, dtype=dtype)
        mask = torch.zeros(len(pairs), n, dtype=torch.bool)
        for i, (z, x) in enumerate(pairs):
            numbers[i, : len(z)], positions[i, : len(z)], mask[i, : len(z)] = z, x.to(dtype), True
        return cls(numbers, positions, mask, check=check)

    @classmethod
    def cat(cls, batches: Iterable[MoleculeBatch]) -> MoleculeBatch:
        """Concatenate batches, padded to the largest molecule."""
        batches = list(batches)
        if not batches:
            raise ValueError("cannot concatenate an empty list of batches")
        n = max(b.numbers.shape[1] for b in batches)

        def pad(t: Tensor) -> Tensor:
            out = t.new_zeros(t.shape[0], n, *t.shape[2:])
            out[:, : t.shape[1]] = t
            return out

        return cls(
            torch.cat([pad(b.numbers) for b in batches]),
            torch.cat([pad(b.positions) for b in batches]),
            torch.cat([pad(b.mask) for b in batches]),
            check=False,
        )

    def arrays(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The molecules without padding: a list of (atomic numbers (n,), positions (n, 3)) as NumPy arrays."""
        numbers, positions = self.numbers.cpu().numpy(), self.positions.detach().cpu().numpy()
        return [(numbers[i, m], positions[i, m]) for i, m in enumerate(self.mask.cpu().numpy())]

    # ------------------------------------------------------------------ files and other packages
    @classmethod
    def from_npz(cls, path: str | Path, check: bool = True) -> MoleculeBatch:
        """Read the NumPy archive that `to_npz` writes; ValueError for another file."""
        arrays = read_archive(path, ("numbers", "positions", "mask"), "no archive of molecules")
        return cls(**{name: torch.from_numpy(array) for name, array in arrays.items()}, check=check)

    def to_npz(self, path: str | Path) -> None:
        """Write numbers, positions and mask as one NumPy archive, every digit kept."""
        arrays = {name: getattr(self, name).detach().cpu().numpy() for name in ("numbers", "positions", "mask")}
        np.savez_compressed(path, **arrays)

    @classmethod
    def from_ase(cls, atoms: Atoms | Iterable[Atoms]) -> MoleculeBatch:
        """From one ASE Atoms object or several (cell and periodicity are dropped)."""
        from ase import Atoms

        items = [atoms] if isinstance(atoms, Atoms) else list(atoms)
        return cls.from_arrays((a.get_atomic_numbers(), a.get_positions()) for a in items)

    def to_ase(self) -> list[Atoms]:
        """One ASE Atoms object per molecule."""
        from ase import Atoms

        return [Atoms(numbers=z, positions=x) for z, x in self.arrays()]

    @classmethod
    def from_rdkit(cls, mols: Mol | Iterable[Mol]) -> MoleculeBatch:
        """From RDKit molecules; each needs a 3D conformer, and hydrogens are what the molecule has explicitly."""
        from rdkit.Chem import Mol

        items = [mols] if isinstance(mols, Mol) else list(mols)
        for i, mol in enumerate(items):
            if mol is None:
                raise ValueError(f"molecule {i} is None: RDKit could not read it")
            if mol.GetNumConformers() == 0:
                raise ValueError(f"molecule {i} has no conformer: embed it first, for example with from_smiles")
        return cls.from_arrays(
            ([a.GetAtomicNum() for a in m.GetAtoms()], m.GetConformer().GetPositions()) for m in items
        )

    @classmethod
    def from_smiles(cls, smiles: str | Iterable[str], seed: int = 1) -> MoleculeBatch:
        """Embed SMILES with RDKit (ETKDG, then MMFF94), hydrogens added."""
        from rdkit import Chem
        from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

        mols = []
        for i, text in enumerate([smiles] if isinstance(smiles, str) else smiles):
            mol = Chem.MolFromSmiles(text)
            if mol is None or mol.GetNumAtoms() == 0:
                raise ValueError(f"molecule {i}: {text!r} is not a valid SMILES string")
            mol = Chem.AddHs(mol)
            if rdDistGeom.EmbedMolecule(mol, randomSeed=seed) != 0:
                raise ValueError(f"molecule {i}: RDKit could not embed {text!r}")
            if rdForceFieldHelpers.MMFFHasAllMoleculeParams(mol):
                rdForceFieldHelpers.MMFFOptimizeMolecule(mol, maxIters=2000)
            mols.append(mol)
        return cls.from_rdkit(mols)

    def to_rdkit(self) -> list[Mol]:
        """RDKit molecules with EDM's distance-table bonds and a conformer, not sanitised."""
        from elign_lab.evaluation.validity import rdkit_mols

        return rdkit_mols(self)

    @classmethod
    def from_xyz(cls, source: str | Path) -> MoleculeBatch:
        """Read an xyz file (path), or xyz text, with one frame or several; extended-xyz columns are ignored."""
        text = _read_text(source, marker="\n")
        lines, at = text.splitlines(), 0
        molecules: list[tuple[list[int], np.ndarray]] = []
        while at < len(lines):
            if not lines[at].strip():
                at += 1
                continue
            where = f"xyz molecule {len(molecules)} (line {at + 1})"
            try:
                n = int(lines[at].split()[0])
            except ValueError:
                raise ValueError(f"{where}: expected the number of atoms, got {lines[at]!r}") from None
            rows = [line.split() for line in lines[at + 2 : at + 2 + n]]
            if n < 1:
                raise ValueError(f"{where}: expected at least one atom, got {n}")
            if len(rows) < n:
                raise ValueError(f"{where}: {n} atoms announced, {len(rows)} lines found: the file is truncated")
            try:
                # QM9's files write exponents as 1.2*^-6
                x = [[float(v.replace("*^", "e")) for v in row[1:4]] for row in rows]
                if short := [k for k, v in enumerate(x) if len(v) < 3]:
                    raise ValueError(f"atom {short[0]} has fewer than three coordinates: {' '.join(rows[short[0]])!r}")
                molecules.append(([atomic_number(row[0]) for row in rows], np.array(x)))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            comment = lines[at + 1].split()
            at += n + 2
            if comment[:1] == ["gdb"] and len(comment) == _QM9_COMMENT_WORDS:
                at += 3  # QM9's files go on with frequencies, SMILES and InChI
        if not molecules:
            raise ValueError(f"no molecule in xyz input {_name(source)}")
        return cls.from_arrays(molecules)

    def to_xyz(self, path: str | Path | None = None, comments: Sequence[str] | None = None) -> str:
        """xyz text of all molecules (one frame each); written to `path` when given."""
        frames = []
        for i, (z, x) in enumerate(self.arrays()):
            comment = comments[i] if comments is not None else self.formula(i)
            rows = [
                f"{chemical_symbols[a]:2s} {p[0]:16.9f} {p[1]:16.9f} {p[2]:16.9f}" for a, p in zip(z, x, strict=True)
            ]
            frames.append("\n".join([str(len(z)), comment, *rows]) + "\n")
        text = "".join(frames)
        if path is not None:
            Path(path).write_text(text)
        return text

    @classmethod
    def from_sdf(cls, source: str | Path) -> MoleculeBatch:
        """Read an SDF or mol file (path), or SDF text; bonds are not kept."""
        from rdkit import Chem

        text = _read_text(source, marker="\n")
        if not text.strip():
            raise ValueError(f"no molecule in SDF input {_name(source)}")
        supplier = Chem.SDMolSupplier()
        supplier.SetData(text, sanitize=False, removeHs=False)
        return cls.from_rdkit(list(supplier))

    def to_sdf(self, path: str | Path | None = None) -> str:
        """SDF text with EDM's distance-table bonds; written to `path` when given."""
        from rdkit import Chem

        text = "".join(Chem.MolToMolBlock(m, kekulize=False) + "$$$$\n" for m in self.to_rdkit())
        if path is not None:
            Path(path).write_text(text)
        return text


def _tensors(i: int, numbers: ArrayLike, positions: ArrayLike) -> tuple[Tensor, Tensor]:
    """Molecule i as atomic numbers (n,) int64 and positions (n, 3), float64 if they were, else float32; copies."""
    given = (a.detach().cpu() if isinstance(a, Tensor) else a for a in (numbers, positions))
    try:
        z, x = (np.asarray(a) for a in given)
        double = x.dtype.kind == "f" and x.dtype.itemsize >= 8
        # torch refuses some of NumPy's types, byte orders and strides; the cast refuses text and complex numbers
        z = z.astype(np.float64, casting="same_kind").reshape(-1)
        x = x.astype(np.float64 if double else np.float32, order="C", casting="same_kind")
    except (TypeError, ValueError) as error:
        raise ValueError(f"molecule {i}: expected atomic numbers (n,) and positions (n, 3): {error}") from None
    if x.shape != (len(z), 3):
        raise ValueError(f"molecule {i}: {len(z)} atomic numbers but positions of shape {x.shape}")
    if not (np.isfinite(z) & (z == np.rint(z))).all():
        raise ValueError(f"molecule {i}: expected whole atomic numbers, got {z.tolist()}")
    return torch.from_numpy(z).long(), torch.from_numpy(x)


def _check_content(numbers: Tensor, positions: Tensor, mask: Tensor) -> None:
    """Raise ValueError for the first molecule that is empty, or has padding before an atom, a bad element or place."""
    empty = ~mask.any(1)
    if bool(empty.any()):
        raise ValueError(f"molecule {int(empty.nonzero()[0])} is empty: its mask has no real atom")
    split = mask[:, 1:] & ~mask[:, :-1]
    if bool(split.any()):
        i, a = (int(k) for k in split.nonzero()[0])
        raise ValueError(f"molecule {i}: padding before atom {a + 1}, expected the real atoms first")
    unknown = mask & ((numbers < 1) | (numbers > MAX_ATOMIC_NUMBER))
    if bool(unknown.any()):
        i, a = (int(k) for k in unknown.nonzero()[0])
        raise ValueError(
            f"molecule {i}, atom {a}: unknown element {int(numbers[i, a])}, expected 1 to {MAX_ATOMIC_NUMBER}"
        )
    bad = mask & ~torch.isfinite(positions).all(-1)
    if bool(bad.any()):
        i, a = (int(k) for k in bad.nonzero()[0])
        raise ValueError(f"molecule {i}, atom {a}: position is {positions[i, a].tolist()}, expected finite numbers")


def _read_text(source: str | Path, marker: str) -> str:
    if isinstance(source, str) and marker in source:
        return source
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    return path.read_text()


def _name(source: str | Path) -> str:
    return "text" if isinstance(source, str) and "\n" in source else str(source)
