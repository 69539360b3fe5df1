"""Tasks: named, keyed by content, retried where a retry can help and nowhere else."""

import pytest

from puzzle_core import data
from puzzle_core.errors import DataError, MeasurementError, NonFiniteError
from tasks import stages
from tests.workflow import plan_of

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture
def pack(spec_of, monkeypatch):
    """Pack the calibration tokens; the body fails with these errors, one after the other, and then passes."""
    spec = spec_of()
    plan, site = plan_of(spec)
    task, run = stages.pack_tokens.with_options(retry_delay_seconds=0, refresh_cache=True), data.run

    def packing(*errors):
        left = list(errors)

        def fail_first(*arguments):
            if left:
                raise left.pop(0)
            return run(*arguments)

        monkeypatch.setattr(data, "run", fail_first)
        return task(work=plan.tokens("calibration"), sources=spec.data.train_texts, site=site, return_state=True), left

    return packing


@pytest.mark.parametrize("error", [OSError("connection lost"), TimeoutError(), MeasurementError("too noisy")])
def test_what_may_pass_is_tried_again(pack, error):
    state, left = pack(error, error)
    assert state.is_completed()
    assert left == []


@pytest.mark.parametrize("error", [DataError("too few tokens"), NonFiniteError("NaN"), KeyError("our mistake")])
def test_what_will_not_pass_is_not_tried_again(pack, error):
    state, left = pack(error, error)
    assert state.is_failed()
    assert left == [error]
    with pytest.raises(type(error)):
        state.result()


def test_retries_come_to_an_end(pack):
    state, left = pack(*[OSError("connection lost")] * 10)
    assert state.is_failed()
    assert len(left) == 10 - 1 - stages.pack_tokens.retries
