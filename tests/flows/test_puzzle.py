"""The whole flow on a pico parent: what it makes, what a second run leaves alone, and what a change sets off."""

import json
import platform
import shutil
from pathlib import Path
from uuid import UUID

import pytest
from mlflow import MlflowClient

from flows.build_library import build_library
from flows.cli.main import main
from flows.puzzle import puzzle
from flows.search_architecture import search_architecture
from flows.train_child import train_child
from puzzle_core.device import default_device, device_name
from puzzle_core.errors import DataError, InfeasibleError
from puzzle_core.report.report_inputs import ReportInputs
from puzzle_core.report.report_tables import format_final_table
from puzzle_core.report.usage_table import total
from puzzle_core.search.search_record import SearchRecord
from tasks.runtime.context import RunContext
from tasks.runtime.software import software
from tasks.store.provenance import stored_provenance
from tasks.store.store import Store
from tests.workflow import SCORED, TRAINED, Recorded, artifacts, changed, check_whole, of_stage, plan_of, publish_costs

CHILD_STAGES = ("search", "child", "gkd", "evaluation", "timing", "report")


def stages_of(keys):
    return {key.split("/")[0] for key in keys}


def chosen(spec):
    plan, context = plan_of(spec)
    return SearchRecord.model_validate(context.store().manifest(plan.search().key).record).best


def test_a_whole_run_ends_with_the_final_table(finished):
    context = RunContext.model_validate({"parent": finished.content["parent"], "runtime": finished.content["runtime"]})
    report = context.store().fetch(finished.report)
    table = format_final_table(ReportInputs.read(report / "report.json"))
    for wanted in ("parent", "child after assembly", "child after GKD", "top-1 accuracy", "perplexity", "prefill"):
        assert wanted in table
    assert (report / "report.html").stat().st_size > 10_000
    assert "child after GKD" in (report / "report.md").read_text()


def test_what_a_run_took_is_in_its_report_in_mlflow_and_on_the_command_line(finished, capsys):
    store = Store(finished.content["runtime"]["store"], Path("unused"))
    inputs = ReportInputs.read(store.fetch(finished.report) / "report.json")
    by_stage = {usage.stage: usage for usage in inputs.usages}
    assert (by_stage["bld"].artifacts, by_stage["score"].artifacts) == (TRAINED, SCORED)
    assert {usage.stage for usage in inputs.usages if usage.unknown} == {"cost"}  # published by the tests
    assert not any(usage.gpu_seconds for usage in inputs.usages)
    for stage in ("bld", "gkd", "score"):
        of_stage_keys = of_stage(artifacts(store.url), stage)
        usages = [store.manifest(key).origin.usage for key in of_stage_keys]
        assert by_stage[stage].core_seconds == pytest.approx(sum(usage.device_seconds for usage in usages))
        assert all(0 < usage.device_seconds <= usage.seconds * usage.devices for usage in usages)
    assert "## What it took" in (store.fetch(finished.report) / "report.md").read_text()
    assert main(["cost", "pico", "--store", store.url, "--price-per-hour", "3600"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("all ")]
    whole = total(inputs.usages)
    assert float(line.split()[-1]) >= float(f"{whole.core_seconds:.2g}") * 0.9
    client = MlflowClient(finished.content["runtime"]["mlflow_uri"])
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    (logged,) = [run.data.metrics for run in runs if "cost/bld/core_hours" in run.data.metrics]
    assert logged["cost/bld/core_hours"] == pytest.approx(by_stage["bld"].core_seconds / 3600)


def test_a_whole_run_leaves_one_artifact_per_work_and_nothing_else(finished):
    store = Path(finished.content["runtime"]["store"])
    found = artifacts(store)
    counts = {stage: len(of_stage(found, stage)) for stage in stages_of(found)}
    assert counts["bld"] == TRAINED
    assert counts["score"] == SCORED
    assert (counts["tokens"], counts["importance"], counts["cost"], counts["gkd"], counts["report"]) == (5, 1, 1, 1, 1)
    assert counts["child"] == 2
    assert counts["evaluation"] == 4  # the parent, the child before and after GKD, and the uniform child
    check_whole(store, store.parent / "scratch")
    assert not list(store.rglob(".staging/*"))
    assert not list((store.parent / "scratch").rglob("*.bin"))
    assert not list((store.parent / "scratch" / "checkpoints").glob("*/*/*"))


def test_every_artifact_says_what_made_it_and_mlflow_has_the_commit_in_its_own_tag(finished):
    context = RunContext.model_validate({"parent": finished.content["parent"], "runtime": finished.content["runtime"]})
    manifests = context.store().manifests(context.store().keys()).values()
    made = {manifest.key: manifest.origin for manifest in manifests if manifest.made_by != "a test"}
    assert len(made) >= TRAINED + SCORED
    tracking = MlflowClient(finished.content["runtime"]["mlflow_uri"])
    task_runs = {run.id: run for run in finished.recorded.task_runs()}
    for key, origin in made.items():
        assert origin.software == software()
        assert (origin.host, origin.device) == (platform.node(), device_name(default_device()))
        assert (origin.parent, origin.parent_commit) == (finished.content["parent"]["path"], None)
        task_run = task_runs[UUID(origin.prefect_task_run)]
        assert task_run.flow_run_id == UUID(origin.prefect_flow_run), key
        tags = tracking.get_run(origin.mlflow_run).data.tags
        assert tags["mlflow.source.git.commit"] == software().commit
        assert (tags["puzzle.dirty"], tags["puzzle.code"]) == (str(software().dirty).lower(), software().code)
    assert software().commit
    assert software().lock


def test_a_whole_run_opens_its_inputs_once(finished):
    assert finished.recorded.computed(at_least=50).count("open inputs") == 1


@pytest.mark.parametrize("flow", [build_library, search_architecture, train_child])
def test_a_flow_that_is_started_alone_opens_its_inputs_once(flow, again):
    spec, recorded = again(), Recorded()
    flow(spec)
    assert recorded.computed(at_least=2).count("open inputs") == 1


def test_a_new_scenario_searches_and_trains_a_new_child_and_leaves_the_library(again):
    spec = again(scenario={"name": "smaller", "limits": {"parameters": "70%"}})
    before, recorded = artifacts(spec.runtime.store), Recorded()
    puzzle(spec)
    made = changed(before, artifacts(spec.runtime.store))
    assert stages_of(made) == set(CHILD_STAGES)
    assert len(of_stage(made, "search")) == len(of_stage(made, "gkd")) == 1
    assert chosen(spec).architecture != chosen(again()).architecture
    computed = recorded.computed(at_least=15)
    assert {"search smaller on this-machine", "gkd", "report"} <= set(computed)
    assert not [name for name in computed if name.startswith(("bld ", "score ", "capture l", "tokens ", "importance"))]


def test_a_second_gkd_trains_the_first_ones_child_on_longer_windows(again):
    spec = again(gkd={"long": {"sequence_length": 64, "tokens": 128, "batch_tokens": 64}})
    before, recorded = artifacts(spec.runtime.store), Recorded()
    puzzle(spec)
    made = changed(before, artifacts(spec.runtime.store))
    assert sorted(key.split("/")[0] for key in made) == ["evaluation", "gkd", "report", "tokens"]
    assert {"tokens gkd-long", "gkd-long", "report"} <= set(recorded.computed(at_least=15))
    plan, context = plan_of(spec)
    first, second = plan.trainings(chosen(spec).architecture).values()
    assert {second.key, plan.tokens("gkd-long").key, plan.evaluate(second.key).key} < made
    assert first.key in before
    (report,) = of_stage(made, "report")
    inputs = ReportInputs.read(Path(spec.runtime.store) / report / "report.json")
    assert [record.tokens for record in inputs.trainings] == [256, 128]
    assert stored_provenance(context.store(), second.key).distilled_tokens == 256 + 128
    client = MlflowClient(spec.runtime.mlflow_uri)
    experiment = client.get_experiment_by_name(spec.runtime.mlflow_experiment)
    (run,) = client.search_runs([experiment.experiment_id], "metrics.`gkd-long/loss` > 0")
    assert run.data.metrics.keys() > {"gkd-long/loss", "gkd/loss"}
    assert sorted(tag.value for used in run.inputs.dataset_inputs for tag in used.tags) == [
        "evaluation",
        "gkd",
        "gkd-long",
    ]


def write_items(file: Path, right: int) -> dict[str, str | int]:
    """A benchmark of four items, the last of which has this answer; its entry in a specification, which takes all."""
    labels = (0, 1, 1, right)
    lines = [json.dumps({"query": "the width of", "choices": ["a head", "layers"], "label": label}) for label in labels]
    file.write_text("\n".join([*lines, "no item"]))
    return {"name": file.stem, "file": str(file), "limit": 4}


def test_benchmarks_are_answered_by_all_models_and_belong_to_evaluations_alone(again, tmp_path):
    tasks = [write_items(tmp_path / "heads.jsonl", 0), write_items(tmp_path / "widths.jsonl", 1)]
    spec = again(evaluation={"tasks": tasks})
    before = artifacts(spec.runtime.store)
    puzzle(spec)
    made = changed(before, artifacts(spec.runtime.store))
    assert stages_of(made) == {"evaluation", "report"}
    assert len(of_stage(made, "evaluation")) == 4
    (report,) = of_stage(made, "report")
    inputs = ReportInputs.read(Path(spec.runtime.store) / report / "report.json")
    assert [[task.items for task in model.evaluation.tasks] for model in inputs.models] == [[4, 4]] * 4
    assert str(tmp_path) not in inputs.spec.model_dump_json()
    client = MlflowClient(spec.runtime.mlflow_uri)
    experiment = client.get_experiment_by_name(spec.runtime.mlflow_experiment)
    (run,) = client.search_runs([experiment.experiment_id], "metrics.`heads/accuracy` >= 0")
    assert run.data.metrics["heads/accuracy"] == inputs.child.evaluation.tasks[0].accuracy


def test_a_benchmark_is_known_by_its_items_and_not_by_its_place(again, tmp_path):
    def key(folder: str, right: int) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        plan, _ = plan_of(again(evaluation={"tasks": [write_items(tmp_path / folder / "heads.jsonl", right)]}))
        return plan.evaluate(None).key

    assert key("here", 0) == key("there", 0) != key("there", 1)


def test_a_benchmark_file_with_a_bad_line_is_refused_before_any_work(spec_of, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{}\n")
    spec = spec_of(evaluation={"tasks": [{"name": "bad", "file": str(tmp_path / "bad.jsonl")}]})
    with pytest.raises(DataError, match=r"bad.jsonl, line 1 is no item"):
        puzzle(spec)
    assert not artifacts(spec.runtime.store)


def test_a_new_scenario_with_the_same_answer_trains_nothing(again):
    spec = again(scenario={"name": "renamed"})
    before = artifacts(spec.runtime.store)
    puzzle(spec)
    assert chosen(spec).architecture == chosen(again()).architecture
    assert stages_of(changed(before, artifacts(spec.runtime.store))) == {"search", "report"}


@pytest.mark.parametrize("stages", [("bld", "score", "child"), ("search", "gkd", "tokens", "importance")])
def test_what_is_deleted_is_made_again_and_nothing_that_came_of_it(again, stages):
    spec = again()
    before, (plan, _) = artifacts(spec.runtime.store), plan_of(spec)
    used = {
        "bld": plan.all_bld()[0].key,  # its scores stay, and so do the children that it is in
        "score": plan.all_scores()[-1].key,  # the search stays
        "child": plan.assemble(chosen(spec).architecture).key,  # what was distilled from it stays
        "search": plan.search().key,
        "gkd": plan.gkd(chosen(spec).architecture).key,  # its evaluation stays
        "tokens": plan.tokens("bld").key,  # what was trained on them stays
        "importance": plan.importance().key,  # the variants that were pruned by it stay
    }
    gone = {used[stage] for stage in stages}
    for key in gone:
        shutil.rmtree(Path(spec.runtime.store) / key)
    puzzle(spec)
    after = artifacts(spec.runtime.store)
    assert after.keys() == before.keys()
    assert changed(before, after) == gone


def test_limits_that_nothing_can_meet_are_refused_before_any_training(spec_of):
    spec = spec_of(scenario={"limits": {"parameters": "1%"}})
    publish_costs(spec)
    with pytest.raises(InfeasibleError, match=r"parameters was 1%, and at least \S+ params \(\d\S+%\) can be had"):
        puzzle(spec)
    assert not of_stage(artifacts(spec.runtime.store), "bld")
