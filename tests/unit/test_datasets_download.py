"""Downloads, from a server on this machine that can break off, refuse and lie."""

import functools
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from elign_lab.datasets import load_dataset, qm9
from elign_lab.datasets.download import RemoteFile, fetch

CONTENT = np.random.default_rng(0).bytes(700_001)


class Server(ThreadingHTTPServer):
    """Serves CONTENT; `cut` is the number of bytes after which it breaks each connection off, `requests` the log."""

    def __init__(self, cut=None, ranges=True, status=None):
        super().__init__(("127.0.0.1", 0), functools.partial(Handler))
        self.cut, self.ranges, self.status, self.requests = cut, ranges, status, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/file"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.requests.append(asked)
        if self.server.status:
            self.send_response(self.server.status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    running = []

    def start(**options):
        server = Server(**options)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def remote(server, **changes):
    good = {"name": "data.bin", "url": server.url, "size": len(CONTENT), "md5": hashlib.md5(CONTENT).hexdigest()}
    return RemoteFile(**{**good, **changes})


def test_download_once(serve, tmp_path):
    server = serve()
    path = fetch(remote(server), tmp_path / "new" / "folder")
    assert path.read_bytes() == CONTENT
    assert not list(path.parent.glob("*.part"))
    fetch(remote(server), path.parent)
    assert server.requests == [None], "a file that is there was downloaded again"


def test_broken_connection_is_resumed(serve, tmp_path):
    server = serve(cut=200_000)
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=200000-", "bytes=400000-", "bytes=600000-"]


def test_next_call_resumes(serve, tmp_path):
    server = serve(cut=100_000)
    with pytest.raises(ConnectionError, match=r"500000 of the 700001 bytes of data\.bin .*call again to resume"):
        fetch(remote(server), tmp_path)
    assert not (tmp_path / "data.bin").exists()
    server.cut = None
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT
    assert server.requests[-1] == "bytes=500000-"


def test_server_without_ranges_starts_again(serve, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(b"from an earlier call")
    assert fetch(remote(serve(ranges=False)), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("changes", [{"md5": "0" * 32}, {"size": 700_000}])
def test_wrong_content_is_deleted(serve, tmp_path, changes):
    with pytest.raises(ValueError, match=r"data\.bin\.part has .* expected .*try again"):
        fetch(remote(serve(), **changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_part_is_found(serve, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(bytes(1000))
    with pytest.raises(ValueError, match="MD5"):
        fetch(remote(serve()), tmp_path)
    assert fetch(remote(serve()), tmp_path).read_bytes() == CONTENT


def test_wrong_file_in_place_is_not_overwritten(serve, tmp_path):
    (tmp_path / "data.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"data\.bin has 4 bytes, expected 700001: delete"):
        fetch(remote(serve()), tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == b"mine"


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (202, 5), (503, 5)])
def test_refused(serve, tmp_path, status, requests):
    server = serve(status=status)
    with pytest.raises(ConnectionError, match=rf"0 of the 700001 bytes of data\.bin .*{status}.*browser"):
        fetch(remote(server), tmp_path)
    assert len(server.requests) == requests


def test_no_server(tmp_path):
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1"):
        fetch(RemoteFile("data.bin", "http://127.0.0.1:9/file", 10, "0" * 32), tmp_path)


def test_load_dataset_downloads_qm9(serve, tmp_path, monkeypatch):
    server = serve()
    monkeypatch.setattr(qm9, "UNCHARACTERIZED", remote(server, name="uncharacterized.txt"))
    monkeypatch.setattr(qm9, "TARBALL", remote(server, name="dsgdb9nsd.xyz.tar.bz2"))
    with pytest.raises(ValueError, match=r"uncharacterized\.txt lists"):  # random bytes are no list of molecules
        load_dataset("qm9", root=tmp_path, download=True)
    assert {path.name for path in tmp_path.iterdir()} == {"uncharacterized.txt", "dsgdb9nsd.xyz.tar.bz2"}
