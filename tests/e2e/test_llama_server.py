"""The way to a served child (docs/tutorial.md): export, llama.cpp's server in a process of its own, chat over HTTP."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from transformers import AutoTokenizer

from flows.cli.main import main
from puzzle_core.model.child import load_child
from tests.conftest import CPU, MIXED

for module in ("llama_cpp", "sse_starlette", "starlette_context"):
    pytest.importorskip(module, reason="llama-cpp-python[server] is not installed: make engines")

TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
SECONDS = 90


@pytest.fixture
def child(assemble):
    """A pico child with every kind of subblock, whose tokenizer knows how to chat."""
    directory = assemble("llama", MIXED)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def serve(tmp_path):
    """Start the server on a free port of loopback; its address, once it answers."""
    started = []

    def start(file):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "llama_cpp.server", "--model", str(file), "--port", str(port)]
        command += ["--n_ctx", "128", "--n_threads", "1", "--type_k", "0", "--type_v", "0"]
        with (tmp_path / "server.log").open("w") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        address, deadline = f"http://127.0.0.1:{port}/v1", time.monotonic() + SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"{address}/models", timeout=5) as answer:
                    assert answer.status == 200
                    return address
            except (urllib.error.URLError, ConnectionError):
                said = (tmp_path / "server.log").read_text()
                assert started[-1].poll() is None and time.monotonic() < deadline, said[-2000:]  # noqa: PT018
                time.sleep(0.2)

    yield start
    for server in started:
        server.terminate()
        server.wait()


def test_a_chat_over_http_says_what_the_child_says(child, serve, tmp_path):
    assert main(["export", str(child), "--format", "gguf", "--out", str(tmp_path / "otter")]) == 0
    address = serve(tmp_path / "otter" / "otter-f32.gguf")
    messages = [{"role": "user", "content": "for name in sorted(names):"}]
    wanted = {"messages": messages, "temperature": 0, "repeat_penalty": 1, "max_tokens": 12}
    request = urllib.request.Request(
        f"{address}/chat/completions", json.dumps(wanted).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        said = json.load(answer)

    tokenizer = AutoTokenizer.from_pretrained(child, trust_remote_code=True)
    prompt = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False)).input_ids
    assert said["usage"]["prompt_tokens"] == len(prompt)
    model = load_child(child, torch.float32, CPU).requires_grad_(False)
    ids = torch.tensor([prompt])
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(generated[0, len(prompt) :], skip_special_tokens=True)
    assert said["choices"][0]["message"]["content"] == expected
    assert len(expected) > 3
