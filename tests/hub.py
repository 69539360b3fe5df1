"""A hub of models on loopback, which speaks as much of Hugging Face's protocol as its client asks for.

A pytest plugin (named in conftest.py).
"""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

MODEL = "pico/llama"


class Hub:
    """One model: a directory per commit, the commit of its branch `main`, and how often each file was downloaded."""

    def __init__(self) -> None:
        self.commits: dict[str, Path] = {}
        self.main = ""
        self.downloads: Counter[str] = Counter()

    def push(self, directory: Path) -> str:
        """Make a directory the newest commit, and return its id; the directory is served as it is."""
        self.main = hashlib.sha1(str(len(self.commits)).encode()).hexdigest()
        self.commits[self.main] = directory
        return self.main

    def answer(self, path: str, method: str) -> tuple[bytes, str] | None:
        """The body and the commit that answer a request; none where there is no such thing."""
        for revision, commit in {"main": self.main, **{commit: commit for commit in self.commits}}.items():
            directory = self.commits[commit]
            if path == f"/api/models/{MODEL}/revision/{revision}":
                return json.dumps({"id": MODEL, "sha": commit, "siblings": []}).encode(), commit
            if path == f"/api/models/{MODEL}/tree/{revision}":
                names = [(file.name, file.stat().st_size) for file in directory.iterdir()]
                files = [{"type": "file", "path": name, "size": size, "oid": ""} for name, size in names]
                return json.dumps(files).encode(), commit
            if path.startswith(f"/{MODEL}/resolve/{revision}/") and (file := directory / Path(path).name).is_file():
                self.downloads[file.name] += method == "GET"
                return file.read_bytes(), commit
        return None


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with no commit yet, set as the hub of this process, with a cache of its own."""
    from huggingface_hub import constants

    served = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = served.answer(self.path.split("?")[0], self.command)
            if found is None:
                self.send_error(404)
                return
            body, commit = found
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD: Callable[..., None] = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        "HUGGINGFACE_CO_URL_TEMPLATE": constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint),
        "ENDPOINT": endpoint,
    }.items():  # read from the environment (HF_ENDPOINT) on import
        monkeypatch.setattr(constants, name, value)
    yield served
    server.shutdown()
    server.server_close()
    thread.join()
