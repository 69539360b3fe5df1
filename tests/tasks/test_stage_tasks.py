"""Tasks: named, keyed by content, retried where a retry can help and nowhere else."""

import errno
import json
import re
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from puzzle_core import data
from puzzle_core.architecture import Architecture
from puzzle_core.cost import latency, llama_engine
from puzzle_core.engines import ENGINES
from puzzle_core.errors import DataError, LostProcessError, MeasurementError, NonFiniteError, SolveLimitError, SpecError
from puzzle_core.search import highs
from puzzle_core.sizes import outside_parameters
from puzzle_core.spec import TargetSpec
from puzzle_core.work import ScoreRecord, TokensRecord
from tasks import stage_tasks
from tasks.task_policies import can_pass
from tests import toy_engine
from tests.workflow import plan_of, publish_costs

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def pack(spec_of, monkeypatch):
    """Pack the calibration tokens; the body fails with these errors, one after the other, and then passes."""
    spec = spec_of()
    plan, context = plan_of(spec)
    task, run = stage_tasks.pack_tokens.with_options(retry_delay_seconds=0, refresh_cache=True), data.pack_split

    def packing(*errors):
        left = list(errors)

        def fail_first(*arguments):
            if left:
                raise left.pop(0)
            return run(*arguments)

        monkeypatch.setattr(data, "pack_split", fail_first)
        return task(work=plan.tokens("calibration"), texts=spec.data.train, context=context, return_state=True), left

    return packing


def test_a_split_goes_on_from_the_stored_end_of_the_one_before_it(spec_of, monkeypatch):
    spec, places, run = spec_of(data={"document_mask": True}), [], data.pack_split
    plan, context = plan_of(spec)
    monkeypatch.setattr(data, "pack_split", lambda *arguments: places.append(arguments[-1]) or run(*arguments))
    packed = []
    for split in ("gkd", "bld", "gkd"):  # the first time the store lacks BLD's split
        key = stage_tasks.pack_tokens.fn(plan.tokens(split), spec.data.train, context)
        packed.append(load_file(context.store().fetch(key) / "tokens.safetensors"))
        if len(packed) == 1:
            context.store().delete(key)
    end = context.store().record(TokensRecord, plan.tokens("bld").key).end
    assert places == [None, None, data.Place(*end)]
    assert all(torch.equal(packed[0][name], packed[2][name]) for name in ("tokens", "documents"))
    states = context.activations(plan.inputs.parent, key, "float32")
    assert torch.equal(states.positions_NT, data.positions_in(packed[2]["documents"]))


@pytest.mark.parametrize("error", [ConnectionResetError("lost"), TimeoutError(), MeasurementError("too noisy")])
def test_what_may_pass_is_tried_again(pack, error):
    state, left = pack(error, error)
    assert state.is_completed()
    assert left == []


@pytest.mark.parametrize(
    "error",
    [
        DataError("too few tokens"),
        NonFiniteError("NaN"),
        KeyError("our mistake"),
        FileNotFoundError(errno.ENOENT, "no such file"),
        torch.OutOfMemoryError("no GPU whose memory another process holds"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(pack, error):
    state, left = pack(error, error)
    assert state.is_failed()
    assert left == [error]
    with pytest.raises(type(error)):
        state.result()


@pytest.mark.parametrize(
    ("code", "passes"),
    [
        ("ENOENT", False), ("EACCES", False), ("EPERM", False), ("ENOSPC", False), ("EROFS", False), ("EDQUOT", False),
        ("EISDIR", False), ("ENAMETOOLONG", False), ("EINVAL", False), ("EFBIG", False),
        ("ECONNRESET", True), ("ECONNREFUSED", True), ("EPIPE", True), ("ETIMEDOUT", True), ("ENETUNREACH", True),
        ("EIO", True), ("ESTALE", True), ("EAGAIN", True), ("EBUSY", True),
    ],
)  # fmt: skip
def test_an_error_of_the_system_counts_by_its_number(code, passes):
    assert can_pass(OSError(getattr(errno, code), "said by the system")) is passes


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError("a file that is no model"), False),
        (PermissionError(), False),
        (ConnectionError("lost"), True),
        (TimeoutError(), True),
        (LostProcessError("NCCL"), True),
    ],
)
def test_an_error_without_a_number_counts_by_its_kind(error, passes):
    assert can_pass(error) is passes


def test_a_missing_and_a_denied_file_are_what_the_system_says(tmp_path):
    for act in (tmp_path.joinpath("none").read_text, tmp_path.read_text, tmp_path.joinpath("none/none").touch):
        with pytest.raises(OSError, match=str(tmp_path)) as error:
            act()
        assert not can_pass(error.value)


def test_retries_come_to_an_end(pack):
    state, left = pack(*[ConnectionResetError("connection lost")] * 10)
    assert state.is_failed()
    assert len(left) == 10 - 1 - stage_tasks.pack_tokens.retries


def test_a_target_in_llama_cpp_is_timed_there(spec_of, monkeypatch):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make engines")
    spec = spec_of()
    plan, context = plan_of(spec.model_copy(update={"target": TargetSpec(engine="llama.cpp", rounds=3)}))
    monkeypatch.setattr(latency, "time_architectures", None)
    work = plan.timing({"parent": Architecture.of_parent(plan.inputs.shape)}, 2)
    key = stage_tasks.time_models.fn(work, context)
    assert context.store().manifest(key).record["models"]["parent"]["decode_ms"] > 0


def test_an_engine_that_is_added_is_measured_by_its_module(spec_of, monkeypatch):
    monkeypatch.setitem(ENGINES, "toy", toy_engine.ROW)
    spec = spec_of()
    plan, context = plan_of(spec.model_copy(update={"target": TargetSpec(engine="toy", rounds=3)}))
    work = next(iter(plan.costs().values()))
    record = context.store().manifest(stage_tasks.find_costs.fn(work, context)).record
    assert record["engine"] == "Toy 1.0"
    assert record["outside"]["prefill_ms"] == outside_parameters(plan.inputs.shape) / 1e3
    timing = plan.timing({"parent": Architecture.of_parent(plan.inputs.shape)}, 2)
    models = context.store().manifest(stage_tasks.time_models.fn(timing, context)).record["models"]
    assert models["parent"]["prefill_ms"] == record["parent"]["prefill_ms"]


def test_an_engine_that_is_not_installed_is_refused_before_any_work(spec_of, monkeypatch):
    def missing(_):
        raise llama_engine.importlib.metadata.PackageNotFoundError

    plan, _ = plan_of(spec_of())
    monkeypatch.setattr(llama_engine.importlib.metadata, "version", missing)
    with pytest.raises(SpecError, match="llama-cpp-python is not installed: `make engines` builds it"):
        stage_tasks.for_target(plan.inputs, TargetSpec(engine="llama.cpp"))


@pytest.fixture
def searched(spec_of):
    """A function that runs the search stage with these settings, on made-up scores and costs: its key and its store."""

    def search(**settings):
        spec = spec_of(search=settings)
        publish_costs(spec)
        plan, context = plan_of(spec)
        store, random = context.store(), Random(0)
        for work in plan.all_scores():
            loss = 0.0 if work.block == plan.inputs.shape.largest_block else random.random()
            record = ScoreRecord(
                layer=work.layer, block=work.block, kl_nats_per_token=loss, lm_loss_increase_nats_per_token=loss,
                top1_agreement=1.0, tokens=1,
            )  # fmt: skip
            with store.staging() as staged:
                store.publish(work, record, staged, made_by="a test")
        work = plan.search()
        try:
            return stage_tasks.choose_architecture.fn(work, spec.target, context), work.key, store
        except SolveLimitError as error:
            return error, work.key, store

    return search


def test_an_answer_that_the_clock_cut_is_not_stored_as_that_of_the_request(searched, monkeypatch):
    """The clock stands still for the answer and jumps on for the baseline, so that this one has no seconds left."""

    class Clock:
        calls = 0

        def perf_counter(self):
            self.calls += 1
            return 0.0 if self.calls <= 2 else 1e3 * self.calls

    monkeypatch.setattr(highs, "time", Clock())
    cut, key, store = searched(time_limit_s=100.0, baselines=["maximise_parameters"])
    assert isinstance(cut, SolveLimitError)
    assert "met search.time_limit_s (100 s), so this answer (score" in str(cut)
    assert "search.node_limit (20,000)" in str(cut)
    assert not store.has(key)
    monkeypatch.undo()
    stored, key, store = searched(baselines=["maximise_parameters"])
    assert (stored, store.has(key)) == (key, True)


def test_two_searches_of_one_request_are_the_same_but_for_the_seconds(searched):
    def answer():
        _, key, store = searched(baselines=["maximise_parameters", "mip_no_op_only"], frontier_points=4)
        text = json.dumps(store.manifest(key).record)
        store.delete(key)
        return re.sub(r'"seconds": [^,}]*', "", text)

    assert answer() == answer()


def test_the_inputs_know_the_parents_type(spec_of, checkpoint_of):
    plan, _ = plan_of(spec_of(parent={"path": str(checkpoint_of("bfloat16"))}))
    assert plan.assemble(Architecture.of_parent(plan.inputs.shape)).dtype == "bfloat16"
