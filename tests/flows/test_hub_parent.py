"""A hub id without a revision: the run names the commit that it found, and everything in it is of that commit."""

import shutil
import socket

import pytest
from prefect import flow

from flows.submit import ensure_tokens, plan_run
from puzzle_core.spec import RunSpec
from tests.hub import MODEL
from tests.pico import edit_tensors

NORM = "model.norm.weight"


@flow(persist_result=False)
def pack(spec: RunSpec):
    """The beginning of a run: its plan, its context, and the key of one artifact."""
    plan, context = plan_run(spec)
    ensure_tokens(plan, context, "calibration")
    return plan, context, plan.tokens("calibration").key


@pytest.fixture
def connected(monkeypatch):
    """The hosts that this process connects to."""
    hosts, connect = set(), socket.socket.connect

    def note(self, address):
        hosts.update(address[:1] if self.family in (socket.AF_INET, socket.AF_INET6) else ())
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", note)
    return hosts


def test_a_run_of_a_hub_parent_records_the_commit_and_keeps_it_as_the_branch_moves(
    hub, checkpoint_of, spec_of, tmp_path, prefect_server, connected
):
    changed = shutil.copytree(checkpoint_of("llama"), tmp_path / "changed")
    edit_tensors(changed, lambda tensors: tensors[NORM].add_(1))
    spec = spec_of(parent={"path": MODEL})
    first = hub.push(checkpoint_of("llama"))
    plan, context, key = pack(spec)
    assert plan.inputs.parent_commit == first
    origin = context.store().manifest(key).origin
    assert (origin.parent, origin.parent_commit) == (MODEL, first)

    second = hub.push(changed)
    assert context.open_parent().directory.name == first
    other, _, same = pack(spec)
    assert other.inputs.parent_commit == second
    assert same == key, "the tokenizer is the same, and so are the tokens"
    assert context.store().manifest(key).origin.parent_commit == first
    assert other.inputs.parent != plan.inputs.parent
    works = [[plan_.importance(), plan_.all_bld()[0], plan_.all_scores()[0]] for plan_ in (plan, other)]
    assert not {work.key for work in works[0]} & {work.key for work in works[1]}

    third = hub.push(checkpoint_of("llama"))
    again, _, _ = pack(spec)
    assert again.inputs.parent_commit == third
    assert again.importance().key == plan.importance().key, "a commit with the same content is the same parent"
    named, _, _ = pack(spec_of(parent={"path": MODEL, "revision": second}))
    assert named.inputs == other.inputs
    assert connected == {"127.0.0.1"}
