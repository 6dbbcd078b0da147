"""A real JupyterLab on 127.0.0.1, driven by Chromium; every request to another host is recorded and refused.

Screenshots go to the folder that ELIGN_LAB_SCREENSHOTS names, or to a temporary one.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or "/usr/bin/chromium"
MISSING = [
    name
    for name, found in (
        (CHROMIUM, Path(CHROMIUM).exists()),
        ("playwright", importlib.util.find_spec("playwright")),
        ("jupyterlab", importlib.util.find_spec("jupyterlab")),
    )
    if not found
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
TIMEOUT_MS = 60_000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)
            if MISSING:
                item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(MISSING)}"))


@dataclass
class Lab:
    """The address of the server, its token and the folder of its notebooks."""

    address: str
    token: str
    root: Path


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    home = tmp_path_factory.mktemp("lab")
    root = home / "notebooks"
    root.mkdir()
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    names += ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    environment = {**os.environ, **{name: str(home / name.lower()) for name in names}, "OMP_NUM_THREADS": "1"}
    news = home / "jupyterlab_settings_dir" / "@jupyterlab" / "apputils-extension"
    news.mkdir(parents=True)
    (news / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    port, token = _free_port(), secrets.token_hex(8)
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    options += [f"--ServerApp.root_dir={root}", f"--IdentityProvider.token={token}"]
    options += ["--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"]
    address = f"http://127.0.0.1:{port}"
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            _wait_until_up(f"{address}/api/status?token={token}", server, home / "server.log")
            yield Lab(address, token, root)
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait_until_up(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@dataclass
class Notebook:
    """An open notebook: run it, look at it, ask its kernel."""

    page: Any
    url: str
    screenshots: Path
    refused: list[str] = field(default_factory=list)

    def open(self) -> None:
        """Load the page and wait until the kernel is idle."""
        self.page.goto(self.url, timeout=TIMEOUT_MS)
        self.page.wait_for_function(
            "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'",
            timeout=TIMEOUT_MS,
        )

    def run_all(self) -> None:
        """Start all cells; does not wait for their end."""
        self.page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells') }")

    def ask(self, code: str) -> str:
        """Run code in the kernel, outside the notebook; returns what it prints, without the last line break."""
        return self.page.evaluate(
            """async (code) => {
                const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
                const future = kernel.requestExecute({ code, store_history: false });
                let text = "";
                future.onIOPub = (m) => {
                    if (m.header.msg_type === "stream") text += m.content.text;
                    if (m.header.msg_type === "error") text += m.content.ename + ": " + m.content.evalue;
                };
                await future.done;
                return text;
            }""",
            code,
        ).rstrip("\n")

    def expect(self, code: str, answer: str) -> None:
        """Wait until the kernel prints the answer: what the browser changes reaches it a little later."""
        deadline = time.monotonic() + 20
        while (found := self.ask(code)) != answer:
            assert time.monotonic() < deadline, f"{code} printed {found!r}, expected {answer!r}"
            time.sleep(0.05)

    def wait_for(self, script: str) -> None:
        """Wait until a JavaScript expression is true."""
        self.page.wait_for_function(f"() => {script}", timeout=TIMEOUT_MS)

    def data(self, name: str, k: int = 0) -> str:
        """The data attribute of viewer k: frame, frames or error."""
        return self.page.locator(".elv").nth(k).get_attribute(f"data-{name}")

    def shades(self, k: int = 0) -> int:
        """How many different colours canvas k shows."""
        return self.page.evaluate(
            """(k) => {
                const canvas = document.querySelectorAll(".elv canvas")[k];
                const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
                return new Set(new Uint32Array(pixels.buffer)).size;
            }""",
            k,
        )

    def image(self, k: int = 0) -> np.ndarray:
        """Canvas k, once it has stayed the same for three animation frames: (height, width, 4), from 0 to 255."""
        url = self.page.evaluate(
            """async (k) => {
                const canvas = document.querySelectorAll(".elv canvas")[k];
                let last = null, same = 0;
                while (same < 3) {
                    await new Promise(requestAnimationFrame);
                    const now = canvas.toDataURL();
                    same = now === last ? same + 1 : 0;
                    last = now;
                }
                return last;
            }""",
            k,
        )
        png = base64.b64decode(url.split(",")[1])
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).astype(int)

    def oxygen(self) -> tuple[float, float]:
        """Where on the page the first canvas shows the only oxygen: the middle of what is red."""
        x, y = self.page.evaluate(
            """() => {
                const canvas = document.querySelector(".elp .elv canvas"), ratio = canvas.width / canvas.clientWidth;
                const { data, width, height } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                const reds = [];
                for (let y = 0; y < height; y += 2) for (let x = 0; x < width; x += 2) {
                    const at = 4 * (y * width + x), red = data[at] - Math.max(data[at + 1], data[at + 2]);
                    if (data[at + 3] === 255) reds.push([x / ratio, y / ratio, red]);
                }
                const top = Math.max(...reds.map((r) => r[2])), best = reds.filter((r) => r[2] > 0.7 * top);
                const box = canvas.getBoundingClientRect();
                return [box.left, box.top].map((o, c) => o + best.reduce((sum, r) => sum + r[c], 0) / best.length);
            }"""
        )
        return x, y

    def theme(self, dark: bool) -> None:
        """Change to JupyterLab's dark or light theme, and wait until the veil that it draws meanwhile is gone."""
        name = "JupyterLab Dark" if dark else "JupyterLab Light"
        self.page.evaluate("(theme) => jupyterapp.commands.execute('apputils:change-theme', { theme })", name)
        self.wait_for(f"document.body.dataset.jpThemeLight === '{'false' if dark else 'true'}'")
        self.wait_for("!document.querySelector('#jupyterlab-splash')")

    def picture(self, name: str) -> None:
        """A screenshot of the page."""
        self.page.screenshot(path=str(self.screenshots / f"{name}.png"))


@pytest.fixture
def notebook(lab: Lab, browser: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable]:
    """notebook(cell, cell, ...) -> an open Notebook with these code cells; no request may leave 127.0.0.1."""
    folder = Path(os.environ.get("ELIGN_LAB_SCREENSHOTS") or tmp_path / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    context = browser.new_context(viewport={"width": 1280, "height": 900}, device_scale_factor=2)
    made: list[Notebook] = []

    def make(*cells: str) -> Notebook:
        name = f"{request.node.name}_{len(made)}.ipynb"
        (lab.root / name).write_text(json.dumps(as_notebook(cells)))
        page = context.new_page()
        opened = Notebook(page, f"{lab.address}/lab/tree/{name}?reset&token={lab.token}", folder)

        def guard(route: Any) -> None:
            url = route.request.url
            if url.startswith((lab.address, "data:", "blob:")):
                route.continue_()
            else:
                opened.refused.append(url)
                route.abort()

        page.route("**/*", guard)
        opened.open()
        made.append(opened)
        return opened

    yield make
    for opened in made:
        opened.picture(f"{request.node.name}_end")
        opened.page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    context.close()
    assert [url for opened in made for url in opened.refused] == []


def as_notebook(cells: tuple[str, ...]) -> dict[str, Any]:
    """A notebook (format 4.5) with code cells."""
    code = [
        {"cell_type": "code", "id": f"c{k}", "metadata": {}, "execution_count": None, "outputs": [], "source": source}
        for k, source in enumerate(cells)
    ]
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": spec, "cells": code}
