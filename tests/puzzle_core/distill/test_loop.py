"""The training loop: schedule, micro-batches, divergence, and resuming bitwise where it stopped."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from safetensors import SafetensorError

from puzzle_core.distill import training_checkpoint
from puzzle_core.distill.held_back import Watch, best
from puzzle_core.distill.loop import learning_rate, micro_batches, train
from puzzle_core.distill.training_checkpoint import Checkpoints, Past
from puzzle_core.errors import BudgetError, NonFiniteError, StorageError
from puzzle_core.spec import OptimizerSpec

STEPS = 10
SPEC = OptimizerSpec(learning_rate=0.1)


def fresh():
    """A matrix and a vector that the loss reaches, and a matrix that it does not."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (3, 3), "vector": (3,), "unreached": (2, 2)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def loss_of(parameters, inputs):
    return {"loss": (inputs @ parameters["matrix"] + parameters["vector"] - 1).square().mean()}


def batch(step):
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(step % 1000))


def run(parameters, spec=SPEC, **options):
    return train("toy", parameters, lambda step: [partial(loss_of, parameters, batch(step))], STEPS, spec, **options)


def test_learning_rate_rises_to_its_peak_and_falls_to_nothing():
    rates = [learning_rate(step, 100, OptimizerSpec(learning_rate=1.0, warmup_share=0.1)) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0)


def test_loss_goes_down():
    curve = run(fresh()).curve
    assert len(curve) == STEPS
    assert curve[-1]["loss"] < curve[0]["loss"]


@pytest.mark.parametrize("stopped_at", [2, 7])
def test_resumed_is_bitwise_the_uninterrupted(tmp_path, stopped_at):
    def stop(progress):
        if progress.step == stopped_at:
            raise KeyboardInterrupt

    uninterrupted, resumed = fresh(), fresh()
    past = run(uninterrupted)
    checkpoints = Checkpoints(tmp_path / "checkpoint", least_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        run(resumed, checkpoints=checkpoints, report=stop)
    seen = []
    resumed = fresh()
    assert run(resumed, checkpoints=checkpoints, report=seen.append) == past
    assert seen[0].step == stopped_at
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)


def test_a_training_that_is_told_to_stop_leaves_a_checkpoint_and_goes_on_bitwise(tmp_path):
    uninterrupted, stopped, asked = fresh(), fresh(), []
    past = run(uninterrupted)
    checkpoints = Checkpoints(tmp_path / "checkpoint", 1e9, lambda: asked.append(1) or len(asked) == 4)
    with pytest.raises(BudgetError, match=r"raise runtime.budget.hours"):
        run(stopped, checkpoints=checkpoints)
    seen, resumed = [], fresh()
    assert run(resumed, checkpoints=Checkpoints(tmp_path / "checkpoint", 1e9), report=seen.append) == past
    assert seen[0].step == 5
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)


def test_checkpoints_keep_their_distance_in_time(tmp_path):
    run(fresh(), checkpoints=Checkpoints(tmp_path / "checkpoint", least_seconds=3600))
    assert not (tmp_path / "checkpoint").exists()


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoint").write_bytes(b"not safetensors")
    with pytest.raises(StorageError, match=r"checkpoint is not readable.*delete it"):
        run(fresh(), checkpoints=Checkpoints(tmp_path / "checkpoint", least_seconds=0))


def test_a_checkpoint_that_finds_no_room_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_, file, **__):
        file.write_bytes(b"a part")
        raise SafetensorError("no space left on device")

    monkeypatch.setattr(training_checkpoint, "save_file", full)
    with pytest.raises(StorageError, match=r"cannot write the checkpoint .*no space left.*runtime\.scratch"):
        run(fresh(), checkpoints=Checkpoints(tmp_path / "checkpoint", least_seconds=0))
    assert list(tmp_path.iterdir()) == []


def test_weights_decay_in_matrices_alone_and_only_where_a_loss_reaches():
    parameters = fresh()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def flat(step):
        return [lambda: {"loss": 0 * (parameters["matrix"].sum() + parameters["vector"].sum())}]

    train("toy", parameters, flat, STEPS, OptimizerSpec(learning_rate=0.1, weight_decay=0.5))
    assert parameters["matrix"].norm() < 0.9 * before["matrix"].norm()
    assert torch.equal(parameters["vector"], before["vector"])
    assert torch.equal(parameters["unreached"], before["unreached"])


@pytest.mark.parametrize("threads", [1, 2])
def test_micro_batches_add_up_to_a_batch(threads):
    whole, in_parts = fresh(), fresh()

    def parts(step):
        return [lambda rows=rows: {"loss": loss_of(in_parts, batch(step)[rows])["loss"] / 4} for rows in range(4)]

    curve, alone = train("toy", in_parts, parts, STEPS, SPEC, threads=threads).curve, run(whole).curve
    assert [term["loss"] for term in curve] == pytest.approx([term["loss"] for term in alone], rel=1e-4)
    for name in whole:
        torch.testing.assert_close(in_parts[name], whole[name], rtol=1e-4, atol=1e-5)


def test_side_by_side_is_bitwise_one_after_the_other():
    def trained(threads):
        parameters = fresh()

        def parts(step):
            return [partial(loss_of, parameters, batch(step)[rows]) for rows in ([0, 1], [2], [3])]

        train("toy", parameters, parts, STEPS, SPEC, threads=threads)
        return parameters

    one, three = trained(1), trained(3)
    assert all(torch.equal(one[name], three[name]) for name in one)


def test_micro_batches_cover_the_rows_once():
    assert list(micro_batches([4, 5, 0, 1, 2], 2)) == [[4, 5], [0, 1], [2]]


def test_a_loss_that_is_not_finite_names_the_training_and_the_step():
    parameters = fresh()

    def losses(step):
        return [lambda: {"loss": parameters["matrix"].sum() * (float("nan") if step == 3 else 1)}]

    with pytest.raises(NonFiniteError, match=r"toy diverged: its loss is nan at step 4 of 10; lower .*now 0\.1"):
        train("toy", parameters, losses, STEPS, SPEC)


RISING = OptimizerSpec(learning_rate=3.0, warmup_share=0.9)
"""Steps grow until the loss rises."""


@pytest.fixture
def watched(tmp_path):
    """Train with a watch on inputs of their own; the parameters, what was done, and what was measured by hand."""

    def train_watched(spec=RISING, checks=STEPS, patience=None, stop=None, parameters=None, **options):
        parameters, losses, seen = parameters or fresh(), [], []

        def measure():
            loss = loss_of(parameters, batch(-1))
            losses.append((loss["loss"].item(), {name: tensor.detach().clone() for name, tensor in parameters.items()}))
            return loss

        def report(progress):
            seen.append(progress)
            if progress.step == stop:
                raise KeyboardInterrupt

        watch = Watch([measure], checks, patience, tmp_path / "best")
        return parameters, run(parameters, spec, watch=watch, report=report, **options), losses, seen

    return train_watched


@pytest.mark.parametrize("spec", [SPEC, RISING], ids=["best at the end", "best before"])
def test_the_weights_with_the_lowest_loss_on_held_back_windows_are_kept(watched, spec):
    parameters, past, losses, _ = watched(spec)
    lowest, weights = min(losses, key=lambda pair: pair[0])
    assert past.held_back == [(done, pytest.approx(loss)) for done, (loss, _) in enumerate(losses)]
    assert (best(past.held_back)[0] < STEPS) == (spec is RISING)
    assert lowest < losses[0][0]
    assert all(torch.equal(parameters[name], weights[name]) for name in weights)


@pytest.mark.parametrize("checks", [1, 3, STEPS, 7 * STEPS])
def test_checks_are_spread_over_the_training_and_the_last_is_at_its_end(watched, checks):
    _, past, _, seen = watched(checks=checks)
    done = [step for step, _ in past.held_back]
    assert len(done) == 1 + min(checks, STEPS)
    assert (done[0], done[-1]) == (0, STEPS)
    gaps = [after - before for before, after in pairwise(done)]
    assert max(gaps) - min(gaps) <= 1
    assert [(p.step, p.held_back) for p in seen if p.held_back is not None] == past.held_back[1:]


@pytest.mark.parametrize("patience", [1, 2])
def test_patience_ends_a_training_that_gets_no_better(watched, patience):
    _, whole, *_ = watched()
    parameters, past, losses, seen = watched(patience=patience)
    done, _ = best(past.held_back)
    assert len(past.curve) == done + patience < STEPS
    assert past == Past(whole.curve[: done + patience], whole.held_back[: done + patience + 1])
    assert (seen[-1].step, seen[-1].steps) == (done + patience, done + patience)
    assert all(torch.equal(parameters[name], losses[done][1][name]) for name in parameters)


@pytest.mark.parametrize("stopped_at", [2, 6, STEPS])
@pytest.mark.parametrize("patience", [None, 3])
def test_a_resumed_watch_is_bitwise_the_uninterrupted(watched, tmp_path, stopped_at, patience):
    uninterrupted, past, *_ = watched(patience=patience)
    (tmp_path / "best").unlink()
    checkpoints = Checkpoints(tmp_path / "checkpoint", least_seconds=0)
    stopped_at = min(stopped_at, len(past.curve))
    with pytest.raises(KeyboardInterrupt):
        watched(patience=patience, stop=stopped_at, checkpoints=checkpoints)
    resumed, other, _, seen = watched(patience=patience, checkpoints=checkpoints)
    assert seen[0].step == stopped_at
    assert other == past
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)


def test_best_weights_that_are_gone_are_named_before_the_training_goes_on(watched, tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoint", least_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        watched(stop=5, checkpoints=checkpoints)
    (tmp_path / "best").unlink()
    with pytest.raises(StorageError, match=r"the best weights .*best of this training are missing: delete the check"):
        watched(checkpoints=checkpoints)


def test_a_held_back_loss_that_is_not_finite_names_the_training(watched):
    with pytest.raises(NonFiniteError, match="toy diverged: its loss on held-back windows is nan after 0 steps"):
        watched(parameters={name: torch.nn.Parameter(tensor * torch.nan) for name, tensor in fresh().items()})
