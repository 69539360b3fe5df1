"""A run's budget: what its tasks compute is charged, and it stops with everything kept."""

import time

import pytest

from puzzle_core.compute_slots import ComputeSlot
from puzzle_core.errors import BudgetError, SpecError
from puzzle_core.spec import RuntimeSpec, parse_spec
from tasks.runtime.budget import metered, over_budget, spent_hours
from tasks.runtime.produce import produce
from tests.tasks.store.test_store import PlainRecord, PlainWork
from tests.workflow import merged

BUDGET = {"hours": 0.05 / 3600}


def limited(context_of, **runtime):
    context = context_of(budget=BUDGET, **runtime)
    return context.model_copy(update={"account": "a run"})


def compute(seconds):
    def act(_):
        time.sleep(seconds)
        return PlainRecord()

    return act


@pytest.fixture(autouse=True)
def _new_accounts(monkeypatch):
    """Accounts of this test alone."""
    from tasks.runtime import budget

    monkeypatch.setattr(budget, "_spent_s", budget._spent_s.__class__(float))


def test_a_run_stops_once_its_budget_is_used_up_and_keeps_what_it_made(context_of):
    context = limited(context_of)
    first, second = PlainWork(number=1), PlainWork(number=2)
    assert produce(first, context, compute(0.06)) == first.key
    assert spent_hours("a run") * 3600 >= 0.06
    with pytest.raises(BudgetError, match=r"Finished work is in the store"):
        produce(second, context, lambda _: pytest.fail("computed"))
    assert context.store().keys() == {first.key}
    assert produce(first, context, lambda _: pytest.fail("computed")) == first.key
    assert produce(second, context.model_copy(update={"account": "another run"}), compute(0)) == second.key


def test_a_training_is_charged_while_it_runs_and_asked_to_stop(context_of):
    context = limited(context_of)
    assert not over_budget()  # outside of any computation
    with metered(2, context.account, context.runtime.budget) as meter:
        assert not context.checkpoints(PlainWork()).stop()
        time.sleep(0.03)
        assert context.checkpoints(PlainWork()).stop()
        assert meter.device_seconds >= 2 * 0.03
    assert context_of().checkpoints(PlainWork()).stop is None


def test_who_takes_turns_is_charged_for_its_turns_alone(context_of):
    store = context_of().store()
    slot = ComputeSlot("a device of this test", 1)

    def act(_):
        time.sleep(0.05)
        with slot:
            time.sleep(0.01)
        return PlainRecord()

    key = produce(PlainWork(number=3), context_of(), act, devices=4)
    usage = store.manifest(key).origin.usage
    assert usage.kind == "core"
    assert usage.device_seconds == pytest.approx(4 * slot.held_s)
    assert usage.seconds >= 0.06


def test_workers_of_a_cluster_keep_no_account(content):
    with pytest.raises(SpecError, match=r"budget is given, but task_runner is dask"):
        parse_spec(merged(content, {"runtime": {"budget": BUDGET, "task_runner": "dask"}}), "test")
    assert RuntimeSpec().model_dump().get("budget") is None
