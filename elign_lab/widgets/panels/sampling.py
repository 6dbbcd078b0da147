"""The sampling panel: molecules form live, and get their badges at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ipywidgets
import torch
from torch import Tensor

from elign_lab.denoiser import Denoiser
from elign_lab.evaluation import smiles, stability
from elign_lab.molecules import MoleculeBatch
from elign_lab.sampling import (
    SAMPLERS,
    StepRecord,
    check_temperature,
    decode_record,
    draw_sizes,
    get_sampler,
    mask_of_sizes,
    noise_stream,
)
from elign_lab.widgets.live import Live
from elign_lab.widgets.panels.base import Panel, badge, escape, figures_row
from elign_lab.widgets.viewer import MoleculeViewer

MAX_SHOWN = 12


# ---------------------------------------------------------------------- pure functions
@dataclass(frozen=True)
class SamplingSettings:
    """What one run of the panel does: a model by name, n molecules, their sizes (None: drawn), steps, and so on."""

    model: str
    n: int
    sizes: tuple[int, ...] | None
    steps: int
    seed: int
    sampler: str
    temperature: float = 1.0


def read_sizes(text: str, n: int) -> tuple[int, ...] | None:
    """Numbers of atoms from a text: "" (drawn by the model, None), "15" (all alike) or "9, 12, 15" (one each)."""
    words = text.replace(",", " ").split()
    if not words:
        return None
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise ValueError(f"sizes is {text!r}: expected nothing, one number of atoms, or {n} of them")
    sizes = tuple(int(word) for word in words)
    if len(sizes) not in (1, n):
        raise ValueError(f"sizes is {text!r}, {len(sizes)} numbers for {n} molecules: give one, or one for each")
    return sizes * n if len(sizes) == 1 else sizes


def check_settings(settings: SamplingSettings, model: Denoiser) -> None:
    """Raise ValueError for settings that the panel or the model cannot follow."""
    if not 1 <= settings.n <= MAX_SHOWN:
        raise ValueError(f"n is {settings.n}, expected 1 to {MAX_SHOWN} molecules; `elign_lab.sample` makes more")
    get_sampler(settings.sampler)
    check_temperature(settings.temperature, settings.sampler)
    model.schedule.grid(settings.steps)  # checks the number of steps
    limit = model.config.max_atoms
    if settings.sizes is not None and limit is not None and max(settings.sizes) > limit:
        raise ValueError(f"{max(settings.sizes)} atoms are over the model's limit of {limit}")


def sampling_run(model: Denoiser, settings: SamplingSettings) -> tuple[Tensor, Iterator[StepRecord]]:
    """The sizes in the order of the batch, and the records of the run: the molecules of `elign_lab.sample`.

    Equal to `sample` with the same arguments, whose batches are sorted by size: molecule i of the panel is
    `order.argsort()[i]` of the records.
    """
    drawn = draw_sizes(model, settings.n, settings.seed) if settings.sizes is None else torch.tensor(settings.sizes)
    order = torch.argsort(drawn, stable=True)
    mask = mask_of_sizes(drawn[order]).to(model.device)
    draws = torch.Generator(model.device).manual_seed(settings.seed)
    noise = noise_stream(model, mask, draws, settings.temperature)
    return order, get_sampler(settings.sampler)(model, mask, steps=settings.steps, noise=noise)


def molecule_cards(molecules: MoleculeBatch) -> str:
    """One card a molecule: formula, stable atoms, stability and validity; and the shares of all."""
    found, names = stability(molecules), smiles(molecules)
    cards = []
    for i, name in enumerate(names):
        atoms, stable = int(molecules.sizes[i]), int(found.atoms[i].sum())
        whole = bool(found.molecule[i])
        badges = badge(f"{stable} of {atoms} atoms stable", "good" if whole else "bad")
        badges += badge("valid" if name else "not valid", "good" if name else "bad")
        cards.append(
            f"<div class='elp-card'><b>{i}: {molecules.formula(i)}</b><br>{badges}"
            f"<div class='elp-note'>{escape(name or 'RDKit cannot sanitise it')}</div></div>"
        )
    valid = sum(name is not None for name in names)
    atoms_stable = float(found.atoms.sum()) / float(molecules.sizes.sum())
    figures = figures_row(
        {
            "atoms stable": f"{100 * atoms_stable:.0f} %",
            "molecules stable": f"{int(found.molecule.sum())} of {len(names)}",
            "molecules valid": f"{valid} of {len(names)}",
            "different SMILES": str(len({name for name in names if name})),
        }
    )
    return f"{figures}<div class='elp-cards' style='margin-top:10px'>{''.join(cards)}</div>"


# ---------------------------------------------------------------------- the panel
class SamplingPanel(Panel):
    """Sample molecules and watch the clean estimates form; stability and validity at the end.

    models: a mapping from a name to a model. Settings are read at Start and fixed during a run; a setting that the
    model cannot follow gives a message and goes back to what it was. `molecules` is the last finished batch (None
    before); it is what `elign_lab.sample` gives for the same arguments. every: steps between two frames.
    """

    def __init__(self, models: Mapping[str, Denoiser], *, n: int = 4, steps: int = 100, every: int = 2) -> None:
        if not models:
            raise ValueError(
                "models is empty: expected a mapping from a name to a model, for example {'edm-mini': model}"
            )
        self._models, self._every = dict(models), every
        self.molecules: MoleculeBatch | None = None
        names = list(self._models)
        self.settings = SamplingSettings(names[0], n, None, steps, 0, "ancestral")
        wide = {"layout": {"width": "200px"}, "style": {"description_width": "64px"}}
        self.controls: dict[str, ipywidgets.Widget] = {
            "model": ipywidgets.Dropdown(options=names, description="model", **wide),
            "n": ipywidgets.BoundedIntText(value=n, min=1, max=MAX_SHOWN, description="number", **wide),
            "sizes": ipywidgets.Text(
                value="", description="atoms", placeholder="drawn by the model", continuous_update=False, **wide
            ),
            "steps": ipywidgets.BoundedIntText(value=steps, min=1, max=10_000, description="steps", **wide),
            "seed": ipywidgets.BoundedIntText(value=0, min=0, max=2**31 - 1, description="seed", **wide),
            "sampler": ipywidgets.Dropdown(options=list(SAMPLERS), description="sampler", **wide),
            "temperature": ipywidgets.BoundedFloatText(
                value=1.0, min=0.0, max=2.0, step=0.1, description="temperature", layout={"width": "200px"}
            ),
        }
        self._result = ipywidgets.HTML()
        self._stage, self._row = ipywidgets.VBox(), ipywidgets.VBox()
        super().__init__(
            "Sampling",
            "Each view shows the clean estimate x̂<sub>0</sub>(z<sub>t</sub>): what the model expects at that step.",
            [
                ipywidgets.HBox(list(self.controls.values()), layout={"flex_flow": "row wrap"}),
                self._row,
                self._stage,
                self._result,
            ],
        )
        self._prepare()
        for control in self.controls.values():
            control.observe(self._changed, "value")

    def set(self, **values: Any) -> None:
        """Change the settings that `controls` names; sizes is a text. A ValueError changes nothing."""
        unknown = set(values) - set(self.controls)
        if unknown:
            raise ValueError(f"unknown setting {', '.join(sorted(unknown))}: expected {', '.join(self.controls)}")
        self._accept({name: control.value for name, control in self.controls.items()} | values)

    def start(self) -> Live[StepRecord]:
        """Start a run with the present settings, as the button does; `.wait()` on what it returns."""
        return self.live.start()

    def summary_html(self) -> str:
        """The molecules of the last batch and their cards; before it, what Start will show."""
        if self._result.value:
            return f"{self.viewer.picture_html()}{self._result.value}"
        s = self.settings
        return (
            f"<span class='elp-note'>No molecule yet: Start samples {s.n} by {escape(s.model)} in {s.steps} steps, and "
            "shows the clean estimate of each step, at the end stability and validity.</span>"
        )

    def __repr__(self) -> str:
        s = self.settings
        warm = "" if s.temperature == 1 else f", temperature {s.temperature:g}"
        return f"SamplingPanel({s.model!r}, {s.n} molecules, {s.steps} steps, {s.sampler}, seed {s.seed}{warm})"

    # ------------------------------------------------------------------ wiring
    def _changed(self, change: dict[str, Any]) -> None:
        with self._shown():
            try:
                self._accept({name: control.value for name, control in self.controls.items()})
            except ValueError:
                self._write_controls(self._valid)
                raise

    def _accept(self, values: dict[str, Any]) -> None:
        if self.live.running:
            raise ValueError("a run is going on: stop it before you change the settings")
        settings = SamplingSettings(**{**values, "sizes": read_sizes(values["sizes"], values["n"])})
        if settings.model not in self._models:
            raise ValueError(f"unknown model {settings.model!r}: expected one of {', '.join(self._models)}")
        check_settings(settings, self._models[settings.model])
        self.settings = settings
        self._write_controls(values)
        self._prepare()

    def _write_controls(self, values: dict[str, Any]) -> None:
        for name, control in self.controls.items():
            control.unobserve(self._changed, "value")
            control.value = values[name]
            control.observe(self._changed, "value")

    def _prepare(self) -> None:
        """A new row of buttons, whose progress bar knows the number of steps."""
        self._valid = {name: control.value for name, control in self.controls.items()}
        model = self._models[self.settings.model]
        self.live: Live[StepRecord] = Live(self._run, self._show, total=len(model.schedule.grid(self.settings.steps)))
        self.live.observe(self._status_changed, "status")
        self._row.children = [self.live]

    def _run(self) -> Iterator[StepRecord]:
        order, records = sampling_run(self._models[self.settings.model], self.settings)
        self._place = torch.argsort(order).tolist()
        names: dict[str, list[MoleculeBatch]] = {f"{i}": [] for i in range(self.settings.n)}
        self.viewer = MoleculeViewer(names, height=380 if len(names) == 1 else 230, shared_orientation=False)
        self._stage.children = [self.viewer]
        self._result.value = ""
        yield from records

    def _show(self, record: StepRecord) -> None:
        model = self._models[self.settings.model]
        last = record.s == -1
        if last or record.evaluations % self._every == 1 or self._every == 1:
            batch = decode_record(model, record) if last else model.decode(record.clean, record.clean, record.mask)
            batch = batch.to("cpu")
            for i, place in enumerate(self._place):
                self.viewer.push(batch[place], label=f"t = {record.t}" if not last else "result", panel=i)
        if last:
            self.molecules = batch[torch.tensor(self._place)]
            self._result.value = molecule_cards(self.molecules)

    def _status_changed(self, change: dict[str, Any]) -> None:
        for control in self.controls.values():
            control.disabled = change["new"] in ("running", "paused")
