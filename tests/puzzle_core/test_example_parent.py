"""The example parent's training, two steps of it: what it leaves is a parent with its record."""

import json

import psutil
import torch

from puzzle_core import example_parent
from puzzle_core.example_parent import PretrainSpec, pretrain
from puzzle_core.model.parent import Parent
from puzzle_core.spec import ParentSpec
from puzzle_core.text_files import Document
from tests.sockets import listening


def test_a_few_steps_leave_a_parent_and_a_record(tmp_path, monkeypatch):
    source = "\n".join(f"def function_{number}(x): return x + {number * 7919}" for number in range(20))
    documents = [Document(f"{number}.py", f"# {number}\n{source}") for number in range(8)]
    evaluate = example_parent._evaluate
    here, opened = psutil.Process(), set()
    before = listening([here])

    def read(**_):
        opened.update(listening([here]) - before)
        return documents

    monkeypatch.setattr(example_parent, "stdlib_documents", read)
    monkeypatch.setattr(example_parent, "_evaluate", lambda *args: evaluate(*args, tokens=512))
    monkeypatch.setattr(torch.multiprocessing, "spawn", lambda process, args, _: process(0, *args))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    record = pretrain(tmp_path, PretrainSpec(steps=2, batch_tokens=512, warmup_steps=1), processes=1)
    assert record == json.loads((tmp_path / "training_record.json").read_text())
    assert (record["trained_tokens"], record["corpus"]["documents"], record["held_out"]["tokens"]) == (1024, 8, 512)
    assert record["held_out"]["perplexity"] < 1.5 * example_parent.VOCABULARY
    assert {address.ip for address in opened} == {"127.0.0.1"}, "processes meet on loopback"
    parent = Parent(ParentSpec(path=str(tmp_path)))
    parent.check_finite()
    assert parent.tokenizer().decode(parent.tokenizer()(source)["input_ids"]) == source
