"""The library on a Dask cluster: the same bits as in threads, and a cluster that cannot do it is refused by name."""

import os
import re
import shutil
import sys
import time
from pathlib import Path

import psutil
import pytest
from distributed import Client, LocalCluster
from prefect import flow, task
from safetensors.torch import load_file, save

from flows.build_library import build_library, train_variants
from flows.submit import side_by_side
from flows.task_runners import dask_cluster
from puzzle_core.errors import PuzzleError
from puzzle_core.model.checkpoint import SINGLE
from tasks.runtime import opened_parent, software
from tasks.runtime.context import RunContext
from tasks.store.store import Store
from tests.sockets import listening
from tests.workflow import SCORED, TRAINED, Recorded, artifacts, edges, of_stage, plan_of


@pytest.fixture(scope="module")
def address():
    """A running cluster of two processes."""
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, memory_limit=0, dashboard_address="127.0.0.1:0"
    ) as started:
        yield started.scheduler_address


def on_dask(again, address=None):
    return again(runtime={"task_runner": "dask", "dask_address": address})


def remove(spec, *keys):
    for key in keys:
        shutil.rmtree(Path(spec.runtime.store) / key)


def contents(store, scratch):
    """Every artifact without its times: its record, and the digests of its files."""
    opened = Store(str(store), scratch)
    manifests = {key: opened.manifest(key) for key in artifacts(store)}
    return {
        key: ({k: v for k, v in found.record.items() if k != "seconds"}, found.files)
        for key, found in manifests.items()
    }


def opened_parents():
    return os.getpid(), len(opened_parent._held)


def test_a_cluster_of_processes_makes_the_same_bits(finished, again, address, prefect_server, tmp_path):
    spec = on_dask(again, address)
    before = artifacts(spec.runtime.store)
    remade = {key for stage in ("importance", "bld", "score") for key in of_stage(before, stage)}
    remove(spec, *remade)
    recorded = Recorded()
    build_library(spec)
    assert contents(spec.runtime.store, tmp_path) == contents(finished.content["runtime"]["store"], tmp_path)
    after = artifacts(spec.runtime.store)
    assert {key for key in after if after[key] != before[key]} == remade
    names = recorded.computed(at_least=TRAINED + SCORED)
    assert len([name for name in names if name.startswith("bld layer ")]) == TRAINED
    assert len([name for name in names if name.startswith("score layer ")]) == SCORED
    found = edges(recorded.task_runs())
    assert {name.split(" (")[0] for name in found["bld layer 3 ffn:i24"]} == {
        "capture layer 3",
        "tokens bld",
        "importance",
    }
    assert "bld layer 3 ffn:i24" in found["score layer 3 attn:kv4+ffn:i24"]
    with Client(address, set_as_default=False) as client:
        worked = client.run(opened_parents)
    assert len({pid for pid, _ in worked.values()} - {os.getpid()}) == 2
    assert all(parents for _, parents in worked.values())
    assert not list(Path(spec.runtime.scratch).glob("activations/*/*"))


def test_a_cluster_of_its_own_listens_on_loopback_alone(spec_of):
    """The scheduler is in this process, in which other tests may have left sockets open."""
    context = RunContext.of(spec_of(runtime={"task_runner": "dask", "workers": 2}))
    here = psutil.Process()
    before, children = listening([here]), {child.pid for child in here.children(recursive=True)}
    with dask_cluster.ClusterTaskRunner.of(context) as runner:
        runner.client.wait_for_workers(2)
        started = [child for child in here.children(recursive=True) if child.pid not in children]
        opened = (listening([here]) - before) | listening(started)
    assert len(opened) >= 3, "a scheduler and two workers"
    assert {address.ip for address in opened} == {"127.0.0.1"}


def overwrite(directory, factor):
    """Other weights of the same size, written in place."""
    changed = load_file(directory / SINGLE)
    for tensor in changed.values():
        tensor.mul_(factor)
    (directory / SINGLE).write_bytes(save(changed, metadata={"format": "pt"}))


@pytest.mark.fault(
    "weights change under a long-lived worker ({runner})", "model.safetensors written in place between and during runs"
)
@pytest.mark.parametrize("runner", [pytest.param("threads", marks=pytest.mark.long), "dask"])
def test_nothing_is_made_from_weights_that_a_process_has_still_open(
    runner, spec_of, copy_of, address, prefect_server, tmp_path, outcome
):
    directory = copy_of("llama")
    where = {"task_runner": runner} | ({"dask_address": address} if runner == "dask" else {})
    spec = spec_of(parent={"path": str(directory)}, runtime=where)
    build_library(spec)
    old = artifacts(spec.runtime.store)
    overwrite(directory, 1.5)
    build_library(spec)
    new = artifacts(spec.runtime.store).keys() - old.keys()
    assert (len(of_stage(new, "bld")), len(of_stage(new, "score"))) == (TRAINED, SCORED)
    fresh = shutil.copytree(directory, tmp_path / "fresh")
    apart = {name: str(tmp_path / "apart" / name) for name in ("store", "scratch")}
    build_library(spec_of(parent={"path": str(fresh)}, runtime=apart))
    found, wanted = contents(spec.runtime.store, tmp_path), contents(apart["store"], tmp_path)
    assert {key: found[key] for key in wanted} == wanted
    assert new <= wanted.keys()
    plan, context = plan_of(spec)
    remove(spec, *of_stage(new, "bld"))
    overwrite(directory, 0.5)
    before = artifacts(spec.runtime.store)
    with pytest.raises(PuzzleError, match=f"its digest was {plan.inputs.parent} when the run started, and is "):
        side_by_side(train_variants, context)(plan, context)
    assert artifacts(spec.runtime.store) == before
    outcome(
        run="the next one opens the parent anew and ends right; one that has begun is refused",
        store=f"{TRAINED} trainings and {SCORED} scores, bitwise those of a new process; none from other weights",
    )


@pytest.mark.long
def test_a_cluster_of_our_own_lasts_as_long_as_the_flow(finished, again, prefect_server, tmp_path):
    spec, recorded = again(runtime={"task_runner": "dask", "workers": 1}), Recorded()
    plan, context = plan_of(spec)
    gone = [work.key for work in plan.all_bld() if work.layer == 0]
    remove(spec, *gone)
    before = _children()
    side_by_side(train_variants, context)(plan, context)
    assert contents(spec.runtime.store, tmp_path) == contents(finished.content["runtime"]["store"], tmp_path)
    assert _children() <= before
    assert len([name for name in recorded.computed(at_least=4) if name.startswith("bld layer 0 ")]) == len(gone) == 2


def _children():
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


@task
def sleep_for_ever(started, stopped):
    Path(started).touch()
    try:
        while True:
            time.sleep(0.1)
    finally:
        Path(stopped).touch()


def test_a_flow_that_ends_early_stops_its_tasks(again, address, prefect_server, tmp_path):
    started, stopped = tmp_path / "started", tmp_path / "stopped"

    @flow
    def ends_early():
        sleep_for_ever.submit(str(started), str(stopped))
        while not started.exists():
            time.sleep(0.05)
        raise KeyError("early")

    with pytest.raises(KeyError):
        side_by_side(ends_early, RunContext.of(on_dask(again, address)))()
    deadline = time.monotonic() + 120
    while not stopped.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert stopped.exists()


def test_a_worker_that_sees_another_directory_is_named(spec_of, address, prefect_server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = spec_of(runtime={"task_runner": "dask", "dask_address": address, "scratch": "here"})
    with Client(address, set_as_default=False) as client:
        where = client.run(os.getcwd)
        wrong, digest = next(iter(where)), plan_of(spec)[0].inputs.parent
        try:
            client.run(os.chdir, str(tmp_path))
            dask_cluster.check_workers(RunContext.of(spec), address, digest)
            client.run(os.chdir, "/", workers=[wrong])
            with pytest.raises(
                PuzzleError, match=r"1 of 2 Dask workers .*\n.*runtime.scratch is /here on this worker"
            ) as told:
                build_library(spec)
        finally:
            for worker, directory in where.items():
                client.run(os.chdir, directory, workers=[worker])
    assert wrong in str(told.value)
    assert of_stage(artifacts(spec.runtime.store), "tokens") == set()
    assert not list((tmp_path / "here").glob(".seen*"))


def pretend(name, version):
    software.software().versions[name] = version


def test_a_worker_with_other_packages_other_code_or_another_parent_is_named(spec_of, address, prefect_server):
    context = plan_of(spec_of())[1]
    digest = context.open_parent().digest
    with Client(address, set_as_default=False) as client:
        wrong = next(iter(client.run(os.getpid)))
        own = software.software().versions["torch"]
        try:
            client.run(pretend, "torch", "1.0", workers=[wrong])
            with pytest.raises(
                PuzzleError, match=rf"1 of 2 .*\n{wrong}: it has torch 1\.0 instead of {re.escape(own)}: install"
            ):
                dask_cluster.check_workers(context, address, digest)
        finally:
            client.run(pretend, "torch", own, workers=[wrong])
        dask_cluster.check_workers(context, address, digest)
    with pytest.raises(PuzzleError, match=rf"2 of 2 .*\n.*its digest was another when .* and is {digest} here"):
        dask_cluster.check_workers(context, address, "another")


def test_a_cluster_that_is_not_there_is_refused_before_any_work(spec_of, prefect_server, monkeypatch):
    monkeypatch.setattr(dask_cluster, "CONNECT_SECONDS", 1)
    spec = spec_of(runtime={"task_runner": "dask", "dask_address": "tcp://127.0.0.1:9"})
    with pytest.raises(PuzzleError, match=r"no Dask scheduler responds at tcp://127.0.0.1:9 .*runtime.dask_address"):
        build_library(spec)
    assert artifacts(spec.runtime.store) == {}


def test_a_cluster_without_workers_is_refused(spec_of):
    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as empty:
        spec = spec_of(runtime={"task_runner": "dask", "dask_address": empty.scheduler_address})
        with pytest.raises(PuzzleError, match=r"has no workers: start some with `dask worker tcp://127.0.0.1"):
            dask_cluster.check_workers(RunContext.of(spec), empty.scheduler_address, "parent")


def test_without_dask_the_run_says_what_to_install(spec_of, prefect_server, monkeypatch):
    monkeypatch.setitem(sys.modules, "prefect_dask", None)
    spec = spec_of(runtime={"task_runner": "dask"}, parent={"path": "/nowhere"})
    with pytest.raises(PuzzleError, match=r"runtime.task_runner is dask, which is not installed .*'\.\[dask\]'"):
        build_library(spec)
