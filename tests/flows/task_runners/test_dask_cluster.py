"""The library on a Dask cluster: the same bits as in threads, and a cluster that cannot do it is refused by name."""

import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from distributed import Client, LocalCluster
from prefect import flow, task

from flows.build_library import build_library, train_variants
from flows.submit import side_by_side
from flows.task_runners import dask_cluster
from puzzle_core.errors import PuzzleError
from tasks.runtime.context import RunContext, _open_parent
from tasks.store.store import Store
from tests.workflow import SCORED, TRAINED, Recorded, artifacts, of_stage, plan_of


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
    return os.getpid(), _open_parent.cache_info().misses


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
    with Client(address, set_as_default=False) as client:
        worked = client.run(opened_parents)
    assert len({pid for pid, _ in worked.values()} - {os.getpid()}) == 2
    assert all(parents for _, parents in worked.values())
    assert not list(Path(spec.runtime.scratch).glob("activations/*/*"))


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
        wrong = next(iter(where))
        try:
            client.run(os.chdir, str(tmp_path))
            dask_cluster.check_workers(RunContext.of(spec), address)
            client.run(os.chdir, "/", workers=[wrong])
            with pytest.raises(PuzzleError, match=r"1 of 2 Dask workers .*\n.*runtime.scratch is /here on this worker") as told:
                build_library(spec)
        finally:
            for worker, directory in where.items():
                client.run(os.chdir, directory, workers=[worker])
    assert wrong in str(told.value)
    assert of_stage(artifacts(spec.runtime.store), "tokens") == set()
    assert not list((tmp_path / "here").glob(".seen*"))


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
            dask_cluster.check_workers(RunContext.of(spec), empty.scheduler_address)


def test_without_dask_the_run_says_what_to_install(spec_of, prefect_server, monkeypatch):
    monkeypatch.setitem(sys.modules, "prefect_dask", None)
    spec = spec_of(runtime={"task_runner": "dask"}, parent={"path": "/nowhere"})
    with pytest.raises(PuzzleError, match=r"runtime.task_runner is dask, which is not installed .*'\.\[dask\]'"):
        build_library(spec)
