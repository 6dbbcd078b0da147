"""The molecular editor in a real JupyterLab: pick, edit, regenerate, undo, and an edit that is refused."""

from __future__ import annotations

import re
from typing import Any

from elign_lab.checkpoints import ASSETS

# the mechanics need no training; with the bundled model the pictures are of molecules
MODEL = (
    "load_force_field()"
    if (ASSETS / "gpff-mini.safetensors").is_file()
    else "PseudoForceField(GPFFConfig(network=PaiNNConfig(features=16, vectors=8, channels=8, layers=1))).eval()"
)
SETUP = f"""
import torch
torch.set_num_threads(1)
torch.manual_seed(0)
from elign_lab import load_oracle
from elign_lab.gpff import GPFFConfig, PseudoForceField, load_force_field
from elign_lab.painn import PaiNNConfig
from elign_lab.gpff.editing_run import RunSettings
from elign_lab.widgets import MoleculeEditor
model, oracle = {MODEL}, load_oracle("learned")
editor = MoleculeEditor(model, oracle, "Cc1ccccc1O", settings=RunSettings("ancestral", 8))
editor
"""
SLOW_MS = 300_000
PICKED = "print([editor.state.structure.mol.GetAtomWithIdx(i).GetSymbol() for i in editor.state.structure.picked])"
# pixels of the view in the colour of what is laid over a molecule
GHOSTS = """
const canvas = document.querySelector(".elp .elv canvas");
const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
let ghosts = 0;
for (let at = 0; at < data.length; at += 4)
    ghosts += data[at + 3] > 0 && data[at + 1] - data[at] > 40 && data[at + 1] - data[at + 2] > 5;
"""
FORMULA = "print(editor.state.structure.molecule.formula(0))"


def _button(nb, name: str) -> Any:
    return nb.page.locator(".elp .jupyter-button").filter(has_text=re.compile(rf"^\s*{name}$"))


def _press(nb, name: str) -> None:
    _button(nb, name).click()


def _choose(nb, option: str) -> None:
    """Choose an option in the dropdown that has it."""
    nb.page.locator(f".elp select:has(option:text-is('{option}'))").select_option(label=option)


def _pick(nb, atoms: str) -> None:
    """Pick atoms by their indices, as a user of the keyboard does."""
    field = nb.page.get_by_placeholder("picked, e.g. 0, 3")
    field.fill(atoms)
    field.press("Enter")


def test_editor(notebook):
    nb = notebook(SETUP)
    nb.page.set_viewport_size({"width": 1280, "height": 1250})
    nb.run_all()
    nb.page.wait_for_function("() => document.querySelector('.elp .elv')?.dataset.frames === '1'", timeout=SLOW_MS)
    assert nb.shades() > 50
    nb.page.locator(".elp").scroll_into_view_if_needed()

    # a click picks an atom, the drawing shows it; a second click puts it back
    plain = nb.page.locator(".elp svg").last.inner_html()
    spot = nb.oxygen()
    nb.page.mouse.click(*spot)
    nb.wait_for("!document.querySelector('.elp .elv-label').hidden")
    nb.expect(PICKED, "['O']")
    drawn = "[...document.querySelectorAll('.elp svg')].at(-1).innerHTML"
    nb.page.wait_for_function(f"(plain) => {drawn} !== plain", arg=plain)
    nb.page.mouse.click(*spot)
    nb.expect(PICKED, "[]")

    # the methyl goes, and a carboxyl comes in the place of a hydrogen of the ring
    nb.expect(FORMULA, "C7H8O")
    _pick(nb, "0")
    _press(nb, "Delete")
    nb.expect(FORMULA, "C6H6O")
    _choose(nb, "carboxyl")
    _pick(nb, "0")
    _press(nb, "Add")
    nb.expect(FORMULA, "C7H6O3")
    _press(nb, "Freeze rest")
    nb.expect("print(len(editor.state.structure.frozen), len(editor.state.structure.picked))", "12 4")

    # a new structure: it forms in steps, and what is frozen stays
    nb.ask("before = editor.state.structure")
    _press(nb, "Start")
    nb.page.wait_for_function(
        "() => document.querySelector('.elp').innerText.includes('ms of computing')", timeout=SLOW_MS
    )
    nb.expect("print(editor.live.status, editor.state.structure.label)", "finished regenerate")
    nb.wait_for("Number(document.querySelector('.elp .elv').dataset.frames) === 9")
    nb.expect(
        "kept = sorted(before.frozen); after = editor.state.structure\n"
        "print(torch.equal(before.molecule.positions[0, kept], after.molecule.positions[0, kept]),"
        " torch.equal(before.molecule.positions, after.molecule.positions))",
        "True False",
    )
    assert "eV/atom" in nb.page.locator(".elp-figures").inner_text()
    nb.picture("editor_light")
    nb.theme(dark=True)
    nb.picture("editor_dark")
    nb.theme(dark=False)

    # undo and redo
    _press(nb, "Undo")
    nb.expect("print(editor.state.structure is before)", "True")
    _press(nb, "Redo")
    nb.expect("print(editor.state.structure.label)", "regenerate")

    # an edit that cannot be: its reason is seen, the structure stays
    nb.ask("old = editor.state")
    _pick(nb, "0")
    _choose(nb, "F")
    _press(nb, "Replace")
    nb.page.get_by_role("alert").filter(has_text="and F can have 1").wait_for()
    nb.expect(
        "print(editor.state.structure.mol is old.structure.mol, len(editor.state.past) == len(old.past))", "True True"
    )
    nb.picture("editor_refused")

    # a forbidden region: listed, drawn over the molecule, and allowed again
    assert nb.page.evaluate(f"() => {{ {GHOSTS} return ghosts; }}") < 100
    nb.page.get_by_placeholder("x, y, z, or picked atoms").fill("0, 0, 0")
    nb.page.get_by_label("radius (Å)").fill("-1")
    _press(nb, "Forbid")
    nb.page.get_by_role("alert").filter(has_text="must be positive and finite").wait_for()
    nb.page.get_by_placeholder("x, y, z, or picked atoms").fill("0, 0, 6")
    nb.page.get_by_label("radius (Å)").fill("1.2")
    _press(nb, "Forbid")
    nb.page.locator(".elp option", has_text="0: sphere of 1.2 Angstrom at (0.00, 0.00, 6.00)").wait_for(
        state="attached"
    )
    nb.page.wait_for_function(f"() => {{ {GHOSTS} return ghosts > 1000; }}")
    nb.picture("editor_region")
    _press(nb, "Allow")
    nb.page.locator(".elp option", has_text="no forbidden region").wait_for(state="attached")
    nb.page.wait_for_function(f"() => {{ {GHOSTS} return ghosts < 100; }}")
    nb.expect("print(len(editor.state.structure.forbidden), editor.state.structure.label)", "0 allow all regions")
