"""Long loops that leave the notebook free: a worker thread with start, pause and stop buttons.

A callback of a widget runs while Python is busy only when the busy loop is on another thread. So the loop is an
iterable that a worker steps through: between two items it looks whether it should pause or stop.
"""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from typing import Any, Generic, TypeVar

import ipywidgets
import traitlets

from elign_lab.widgets.bundles import bundle_with
from elign_lab.widgets.errors import raise_in_tests

T = TypeVar("T")

_REFRESH_SECONDS = 0.1  # the progress bar is updated at most ten times a second


def alert_html(error: str) -> str:
    """An error message for the page; nothing for ""."""
    return f"<div role='alert' style='color:var(--jp-error-color1,#d32f2f)'>{html.escape(error)}</div>" if error else ""


class Live(ipywidgets.VBox, Generic[T]):
    """Step through an iterable on a worker thread, with a row of controls: start, pause, stop, progress, status.

    iterable: an iterable, or a function without arguments that returns one (a generator function, a sampler); a
        function can be started again. on_item(item) is called on the worker thread after each step.
    total: number of items, for the progress bar (default: `len`, where there is one).

    `status` is "ready", "running", "paused", "stopped", "finished" or "failed"; `n_done` counts the items. An exception
    of the iterable or of `on_item` ends the run, is shown in the row, kept in `last_error`, and raised by `wait`.
    """

    status = traitlets.Enum(("ready", "running", "paused", "stopped", "finished", "failed"), "ready")
    n_done = traitlets.Int(0)
    last_error = traitlets.Unicode("")

    def __init__(
        self,
        iterable: Iterable[T] | Callable[[], Iterable[T]],
        on_item: Callable[[T], object] | None = None,
        *,
        total: int | None = None,
        description: str = "",
    ) -> None:
        if not callable(iterable) and not hasattr(iterable, "__iter__"):
            raise ValueError(
                f"iterable is a {type(iterable).__name__}: expected an iterable, or a function that returns one"
            )
        self._source, self._name = iterable, description or "a loop"
        self._on_item = on_item
        self._total = len(iterable) if total is None and isinstance(iterable, Sized) else total
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stop_asked = threading.Event()
        self._go_on = threading.Event()
        self._last_refresh = 0.0
        self._buttons = {
            name: ipywidgets.Button(description=name, icon=icon, layout={"width": "92px"})
            for name, icon in (("Start", "play"), ("Pause", "pause"), ("Stop", "stop"))
        }
        for name, button in self._buttons.items():
            button.on_click(lambda _, name=name: self._clicked(name))
        self._progress = ipywidgets.IntProgress(max=self._total or 1, layout={"flex": "1 1 60px", "min_width": "60px"})
        self._text = ipywidgets.HTML()
        self._alert = ipywidgets.HTML()
        label = [ipywidgets.Label(description)] if description else []
        row = ipywidgets.HBox([*label, *self._buttons.values(), self._progress, self._text])
        row.layout.align_items = "center"
        super().__init__([row, self._alert])
        self._refresh()

    # ------------------------------------------------------------------ what a user does
    def start(self) -> Live[T]:
        """Start the run (or go on after a pause; after a stop, as soon as the item in hand is done); returns self."""
        if self.running and self.status in ("running", "paused") and not self._stop_asked.is_set():
            self._go_on.set()
            return self
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        if self.status != "ready" and not callable(self._source) and iter(self._source) is self._source:
            raise ValueError("an iterator can be run once: give Live a function that makes it, to start again")
        self._error, self.last_error, self.n_done = None, "", 0
        self._stop_asked.clear()
        self._go_on.set()
        self.status = "running"
        self._refresh()
        self._thread = threading.Thread(target=self._work, name="elign_lab.Live", daemon=True)
        self._thread.start()
        return self

    def pause(self) -> None:
        """Pause after the item in hand; `start` goes on."""
        if self.running:
            self._go_on.clear()

    def stop(self) -> None:
        """Stop after the item in hand, also out of a pause. A generator is closed, so its `finally` runs."""
        self._stop_asked.set()
        self._go_on.set()

    def wait(self, timeout: float | None = None) -> Live[T]:
        """Block until the run has ended; returns self.

        Raises what the run raised; TimeoutError when it has not ended after `timeout` seconds (it keeps running);
        ValueError when it was never started.
        """
        if self._thread is None:
            raise ValueError("nothing to wait for: call start() first")
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"still {self.status} after {timeout} s, {self.n_done} items done: stop() ends it")
        if self._error is not None:
            raise self._error
        return self

    @property
    def running(self) -> bool:
        """True from start until the end of the run, also while it is paused."""
        return self._thread is not None and self._thread.is_alive()

    def __repr__(self) -> str:
        return f"Live({self.status}, {self._count()} items)"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The widget, and a line about the run for pages that run no widgets."""
        text = html.escape(f"{self._name}: {self.status}, {self._count()} items done")
        return bundle_with(super()._repr_mimebundle_(**kwargs), {"text/html": text})

    def _count(self) -> str:
        return f"{self.n_done}" if self._total is None else f"{self.n_done} of {self._total}"

    # ------------------------------------------------------------------ the worker
    def _work(self) -> None:
        steps: Iterator[T] | None = None
        status = "failed"
        try:
            steps = iter(self._source() if callable(self._source) else self._source)
            status = self._step_through(steps)
        except BaseException as error:  # whatever it was: wait() raises it in the caller's thread
            self._fail(error)
        try:
            if isinstance(steps, Generator):
                steps.close()
        except BaseException as error:
            status = "failed"
            self._fail(error)
        self.status = status
        self._refresh()

    def _step_through(self, steps: Iterator[T]) -> str:
        while True:
            if not self._go_on.is_set():
                self.status = "paused"
                self._refresh()
                self._go_on.wait()
                self.status = "running"
                self._refresh()
            if self._stop_asked.is_set():
                return "stopped"
            try:
                item = next(steps)
            except StopIteration:
                return "finished"
            if self._on_item is not None:
                self._on_item(item)
            self.n_done += 1
            if time.monotonic() - self._last_refresh > _REFRESH_SECONDS:
                self._refresh()

    def _fail(self, error: BaseException) -> None:
        self._error = error
        self.last_error = f"{type(error).__name__}: {error}"

    # ------------------------------------------------------------------ the controls
    def _clicked(self, name: str) -> None:
        try:
            {"Start": self.start, "Pause": self.pause, "Stop": self.stop}[name]()
        except Exception as error:  # a button has no caller that could see it
            self._fail(error)
            self._refresh()
            raise_in_tests(error)

    def _refresh(self) -> None:
        self._last_refresh = time.monotonic()
        active = self.status in ("running", "paused")
        self._buttons["Start"].description = "Resume" if self.status == "paused" else "Start"
        self._buttons["Start"].disabled = self.status == "running"
        self._buttons["Pause"].disabled = self.status != "running"
        self._buttons["Stop"].disabled = not active
        if self._total is None:
            self._progress.value = int(self.status == "finished")
        else:
            self._progress.value = min(self.n_done, self._total)
        self._progress.bar_style = {"finished": "success", "failed": "danger", "stopped": "warning"}.get(
            self.status, ""
        )
        of = "" if self._total is None else f" / {self._total}"
        self._text.value = f"<span style='white-space:nowrap'>{self.status}, {self.n_done}{of}</span>"
        self._alert.value = alert_html(self.last_error)
