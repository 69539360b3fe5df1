"""kill -9 of a real command in the middle of training: nothing half done is left, and the next run goes on."""

import logging
import os
import re
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from flows.refine_search import find_answer
from puzzle_core.distill import bld, gkd
from puzzle_core.model.surgery import WEIGHTS
from puzzle_core.spec import parse_spec
from tests.faults import kept_open, kill_when, shown_running, start
from tests.workflow import TRAINED, Recorded, artifacts, check_whole, merged, of_stage, plan_of, write_spec

TABLE = ("parent", "child after assembly", "child after GKD", "top-1 accuracy", "report: ")


def servers(home):
    """Processes of Prefect servers that keep their data in this directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"PREFECT_HOME={home}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def wait_until_gone(home):
    deadline = time.monotonic() + 120
    while servers(home) and time.monotonic() < deadline:
        time.sleep(0.1)
    return servers(home) == []


def checkpoints(scratch, stage):
    """The checkpoints of a stage; a run may remove a directory while this looks, which Path.rglob does not allow."""
    places = os.walk(scratch / "checkpoints" / stage)
    return [Path(place) / name for place, _, names in places for name in names if name == "checkpoint.safetensors"]


def check_uninterrupted(spec, key, place):
    """Train one variant once more, without a stop: the same weights and the same curve, bitwise."""
    plan, context = plan_of(spec)
    work = next(work for work in plan.all_bld() if work.key == key)
    store, activations = context.store(), context.activations(work.parent, work.tokens, work.spec.dtype)
    activations.capture_embedding()
    for layer in range(work.layer + 1):
        activations.capture_layer(layer)
    place.mkdir()
    record = bld.train_variant(
        work, activations, store.fetch(work.contributions) if work.contributions else None, place
    )
    assert store.manifest(key).record["curve"] == list(record.curve)
    expected, found = load_file(place / WEIGHTS), load_file(store.fetch(key) / WEIGHTS)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.fault("kill -9 during BLD", "SIGKILL to `puzzle run`, on a server of its own, once a checkpoint is there")
def test_after_a_kill_during_bld_the_next_run_goes_on_bitwise_and_no_server_is_left(content, tmp_path, outcome):
    """On the defaults: a server of the command's own, everything under .puzzle/, and costs that are measured."""
    variants = {"kv_heads": [2], "ffn_ratios": [0.5], "linear": False, "no_op": True}
    values = {name: part for name, part in content.items() if name != "runtime"} | {
        "variants": variants,
        "bld": {"tokens": 512, "batch_tokens": 128, "epochs": 8},
        "scenario": {"prompt_tokens": 32, "generated_tokens": 16, "batch_sizes": [4], "limits": {"parameters": "90%"}},
        "runtime": {"workers": 2, "checkpoint_seconds": 0},
    }
    spec = write_spec(values, tmp_path / "spec.yaml")
    store, scratch, home = (tmp_path / ".puzzle" / name for name in ("store", "scratch", "prefect"))
    running = start(tmp_path, "run", spec)
    kill_when(running, lambda: of_stage(artifacts(store), "bld") and checkpoints(scratch, "bld"), tmp_path)
    assert wait_until_gone(home)
    before = artifacts(store)
    assert 0 < len(of_stage(before, "bld")) < TRAINED
    check_whole(store, tmp_path / "unused")

    again = start(tmp_path, "run", spec)
    assert again.wait() == 0, (tmp_path / "stderr").read_text()
    assert wait_until_gone(home)
    said, shown = (tmp_path / "stderr").read_text(), (tmp_path / "stdout").read_text()
    resumed = re.findall(r"resuming at step \d+ from \S+/checkpoints/(\S+)/checkpoint.safetensors", said)
    assert resumed
    assert "Traceback" not in said
    assert not [wanted for wanted in TABLE if wanted not in shown]
    after = artifacts(store)
    assert {key: after[key] for key in before} == before
    assert len(of_stage(after, "bld")) == TRAINED
    check_whole(store, tmp_path / "unused")
    assert not [path for path in (scratch / "checkpoints").rglob("*") if path.is_file()]
    assert not list(store.rglob(".staging/*"))
    places = {"runtime": {"store": str(store), "scratch": str(tmp_path / "another-scratch")}}
    check_uninterrupted(parse_spec(merged(values, places), "test"), resumed[0], tmp_path / "uninterrupted")
    assert kept_open(tmp_path) == {"flow_run": 0, "task_run": 0, "runs": 0}
    outcome(
        run="the next one goes on from the checkpoint and ends right: weights and curve bitwise as without a stop",
        store=f"{len(before)} of {len(before)} finished artifacts kept and not made again; {len(after)} whole",
        shown="flow, task and MLflow runs of the dead one: none open",
    )


@pytest.mark.long
@pytest.mark.fault("kill -9 during GKD", "SIGKILL to `puzzle train-child` once a checkpoint is there")
def test_after_a_kill_during_gkd_the_next_run_gives_the_uninterrupted_child_bitwise(
    again, prefect_server, tmp_path, caplog, outcome, next_command
):
    """On the API that is given, which outlives the command that is killed."""
    store, scratch = tmp_path / "store", tmp_path / "scratch"
    runtime = {"checkpoint_seconds": 0, "mlflow_experiment": "gkd"}
    spec = again(name="killed-gkd", gkd={"epochs": 30}, runtime=runtime)
    file, before, recorded = write_spec(spec, tmp_path / "spec.yaml"), artifacts(store), Recorded()
    running = start(tmp_path, "train-child", file, PREFECT_API_URL=prefect_server)
    kill_when(running, lambda: checkpoints(scratch, "gkd"), tmp_path)
    assert artifacts(store) == before
    check_whole(store, tmp_path / "unused")
    assert not (tmp_path / ".puzzle").exists()

    with safe_open(checkpoints(scratch, "gkd")[0], framework="pt") as saved:
        done = saved.metadata()["curve"].count("loss")
    assert shown_running(spec, 0)
    with caplog.at_level(logging.INFO):
        next_command("train-child", file)
    assert shown_running(spec) == []
    assert 0 < done < 60
    assert f"resuming at step {done + 1} from" in caplog.text
    plan, context = plan_of(spec)
    work = plan.gkd(find_answer(plan, context).best.architecture)
    whole = tmp_path / "uninterrupted"
    whole.mkdir()
    record = gkd.distil(
        work, context.open_parent(), context.store().fetch(work.child), context.store().fetch(work.tokens), whole
    )
    resumed = context.store().fetch(work.key)
    assert context.store().manifest(work.key).record["curve"] == record.model_dump(mode="json")["curve"]
    files = sorted(file.name for file in whole.glob("*.safetensors"))
    assert files == sorted(file.name for file in resumed.glob("*.safetensors"))
    for name in files:
        expected, found = load_file(whole / name), load_file(resumed / name)
        assert expected.keys() == found.keys()
        assert [tensor for tensor in expected if not torch.equal(expected[tensor], found[tensor])] == []
    gkds = [run.state_name for run in recorded.task_runs(at_least=15) if run.name == "gkd"]
    assert sorted(gkds) == ["Completed", "Crashed"]
    outcome(
        run="the next one goes on from the checkpoint and ends right: the same child, bitwise, as without a stop",
        store=f"{len(before)} of {len(before)} finished artifacts kept; no child before it was whole",
        shown="Crashed and KILLED by the next command; none open",
    )
