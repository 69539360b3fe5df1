"""S3-compatible servers that refuse the checksum headers of newer clients."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from puzzle_core.errors import StorageError
from tasks.store.bucket import Bucket

ANSWER = b"<Error><Code>InvalidArgument</Code><Message>Unsupported header 'x-amz-checksum'</Message></Error>"


@pytest.fixture
def written(monkeypatch):
    """The objects that a server took; it refuses requests with checksum headers."""
    taken = []

    class Server(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            refused = any(name.lower().startswith(("x-amz-sdk-checksum", "x-amz-checksum")) for name in self.headers)
            if not refused:
                taken.append(self.path)
            self.answer(400 if refused else 200, ANSWER if refused else b"")

        def do_HEAD(self):
            self.answer(200 if self.path in taken else 404, b"")

        def do_GET(self):
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

        def answer(self, status, body):
            self.send_response(status)
            self.send_header("ETag", '"0"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_):
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    values = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (values | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_REQUEST_CHECKSUM_CALCULATION", raising=False)
    yield taken
    server.shutdown()
    server.server_close()
    thread.join()


def test_objects_are_written_without_checksum_headers(written, tmp_path):
    (tmp_path / "file").write_text("x")
    Bucket("s3://bucket/p").put(tmp_path / "file", "a/b")
    assert Bucket("s3://bucket/p").put_new("a/c", b"y")
    assert written == ["/bucket/p/a/b", "/bucket/p/a/c"]


def test_the_environment_decides_and_the_error_names_its_variable(written, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="AWS_REQUEST_CHECKSUM_CALCULATION=when_required"):
        Bucket("s3://bucket/p").put(tmp_path / "file", "a/b")
    assert written == []
