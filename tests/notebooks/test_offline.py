"""The plugin of the notebooks, proven on notebooks made here: what it blocks, fails and tells, and what still works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from elign_lab.widgets.errors import VARIABLE
from tests.notebooks import plugin

ROOT = Path(__file__).parents[2]
ELSEWHERE = "192.0.2.1"  # RFC 5737: an address that nobody has

QUIET = [  # what a well-behaved notebook does: its own machine, and Unix sockets
    """
import socket
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname(), timeout=20)
server.accept()[0].sendall(b"hello")
assert client.recv(5) == b"hello"
""",
    """
a, b = socket.socketpair()
a.sendall(b"hello")
assert b.recv(5) == b"hello"
""",
]
LEAKY = {
    "caught": f"""
import socket
try:
    socket.create_connection(("{ELSEWHERE}", 80), timeout=1)
except OSError:
    pass  # a library that falls back to something else
""",
    "look-up": 'import socket; socket.getaddrinfo("example.org", 443)',
    "datagram": f'socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("{ELSEWHERE}", 9))',
    "child": f"""
import subprocess, sys
code = "import socket; socket.socket().connect(('{ELSEWHERE}', 80))"
message = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
assert "the network is blocked" in message, message
""",
}
CALLBACKS = [  # the second and the third cell make a callback raise
    """
from elign_lab.widgets import Live
from elign_lab.widgets.panels.base import Panel
class Moved(Panel):
    def __init__(self):
        super().__init__("moved", "", [])
        self.observe(self._closed, "box_style")
    def _closed(self, change):
        with self._shown():
            1 / 0
panel, live = Moved(), Live(iter([1]))
live.start().wait(10)
""",
    "panel.box_style = 'info'",
    "live.children[0].children[0].click()",
    "assert 'ZeroDivisionError' in panel.last_error and 'run once' in live.last_error",
]
LIMIT = 900_000_000  # bytes: under the real limit, so that the test is quick, and over what importing torch takes
LARGE = ["1", f"large = b'x' * {LIMIT}", "del large"]


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> str:
    """What pytest prints about good and bad notebooks."""
    folder = tmp_path_factory.mktemp("notebooks")
    (folder / "conftest.py").write_text(f"from tests.notebooks import plugin\nplugin.MEMORY_LIMIT = {LIMIT}\n")
    made = {"quiet": QUIET, "leaky": LEAKY.values(), "callbacks": CALLBACKS, "large": LARGE}
    for name, cells in made.items():
        notebook = new_notebook(cells=[new_code_cell(source.strip()) for source in cells])
        nbformat.write(notebook, folder / f"{name}.ipynb")
    options = ["-p", "tests.notebooks.plugin", "--nbval-lax", "--nbval-current-env", "-p", "no:cacheprovider", "-rA"]
    options += ["-n", "2", "--dist", "loadfile"]
    command = [sys.executable, "-m", "pytest", *options, "--rootdir", str(folder), str(folder)]
    whole = {**os.environ, "CI": "1"}  # pytest then does not shorten its lines
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=whole)
    assert run.returncode == 1, run.stdout + run.stderr
    return run.stdout


def test_a_notebook_without_network_passes(output):
    assert len(re.findall(r"PASSED .*quiet\.ipynb", output)) == len(QUIET)


def test_every_attempt_fails_its_cell(output):
    failed = re.findall(r"FAILED .*leaky\.ipynb::Cell (\d)", output)
    assert failed == [str(k) for k in range(len(LEAKY))]
    for event, host in (("connect", ELSEWHERE), ("getaddrinfo", "example.org"), ("sendto", ELSEWHERE)):
        assert f"the notebook tried the network: socket.{event} {host}" in output


def test_an_error_of_a_callback_is_shown_and_fails_its_cell(output):
    assert re.findall(r"FAILED .*callbacks\.ipynb::Cell (\d)", output) == ["1", "2"]
    assert re.findall(r"PASSED .*callbacks\.ipynb::Cell (\d)", output) == ["0", "3"]
    assert plugin.RAISE == VARIABLE


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_the_cell_that_takes_too_much_memory_fails(output):
    assert re.findall(r"FAILED .*large\.ipynb::Cell (\d)", output) == ["1"]
    [peak] = set(re.findall(r"the notebook's peak memory is (\d+) MB, the limit is 900 MB", output))
    assert 900 < int(peak) < 1100
    assert plugin.MEMORY_LIMIT == 1.5e9


def test_the_table_names_size_time_and_memory(output):
    table = output[output.index("notebooks: size, time, memory") :]
    for name in ("quiet", "leaky", "callbacks", "large"):
        row = re.search(rf"{name} +(\d+) +(\d+\.\d) +(\d+|-)$", table, re.MULTILINE)
        assert row, table
        assert row[3] == "-" or int(row[3]) > 10  # MB: a kernel


def test_the_block_is_that_of_the_makefile():
    line = next(row for row in (ROOT / "Makefile").read_text().splitlines() if "--nbval-lax" in row)
    assert "-p tests.notebooks.plugin" in line
    assert "$(SIDE_BY_SIDE)" in line
