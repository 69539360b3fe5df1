"""A hub of models on loopback, which speaks as much of Hugging Face's protocol as its client asks for.

A pytest plugin (named in conftest.py).
"""

import base64
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
        self.endpoint, self.refuses = "", False
        self.pushed: dict[str, dict[str, bytes]] = {}
        self._large: dict[str, bytes] = {}

    def push(self, directory: Path) -> str:
        """Make a directory the newest commit, and return its id; the directory is served as it is."""
        self.main = hashlib.sha1(str(len(self.commits)).encode()).hexdigest()
        self.commits[self.main] = directory
        return self.main

    def answer(self, path: str, method: str) -> tuple[bytes, str] | None:
        """The body and the commit that answer a request; none where there is no such thing."""
        main = {"main": self.main} if self.main else {}
        for revision, commit in {**main, **{commit: commit for commit in self.commits}}.items():
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

    def take(self, path: str, body: bytes) -> object | None:
        """The answer to a request that sends something; none where it is refused.

        Files whose name ends with `.safetensors` are large: their content is sent apart, by its digest.
        """
        if self.refuses:
            return None
        if path.startswith("/large/"):
            self._large[Path(path).name] = body
            return {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked['organization']}/{asked['name']}"
            self.pushed.setdefault(repository, {})
            return {"url": f"{self.endpoint}/{repository}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith(".git/info/lfs/objects/batch"):
            return {"transfer": "basic", "objects": [
                entry | {"actions": {"upload": {"href": f"{self.endpoint}/large/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]}  # fmt: skip
        repository, action = "/".join(path.split("/")[3:5]), path.split("/")[5]
        if action == "preupload":
            names = [entry["path"] for entry in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            return {"files": [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes.items()]}
        lines = [json.loads(line) for line in body.splitlines()]
        for value in (line["value"] for line in lines if line["key"] == "file"):
            self.pushed[repository][value["path"]] = base64.b64decode(value["content"])
        for value in (line["value"] for line in lines if line["key"] == "lfsFile"):
            self.pushed[repository][value["path"]] = self._large[value["oid"]]
        commit = hashlib.sha1(body).hexdigest()
        return {"commitUrl": f"{self.endpoint}/{repository}/commit/{commit}", "commitOid": commit}


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

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            taken = served.take(self.path.split("?")[0], body)
            if taken is None:
                self.send_error(403)
                return
            answer = json.dumps(taken).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_PUT: Callable[..., None] = do_POST  # noqa: N815
        do_HEAD: Callable[..., None] = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    served.endpoint = endpoint = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        "HUGGINGFACE_CO_URL_TEMPLATE": constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint),
        "ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": True,  # large files go by LFS, the protocol that this hub speaks
    }.items():  # read from the environment (HF_ENDPOINT) on import
        monkeypatch.setattr(constants, name, value)
    yield served
    server.shutdown()
    server.server_close()
    thread.join()
