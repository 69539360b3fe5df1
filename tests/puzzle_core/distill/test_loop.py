"""The training loop: schedule, micro-batches, divergence, and resuming bitwise where it stopped."""

from functools import partial

import pytest
import torch
from safetensors import SafetensorError

from puzzle_core.distill import loop
from puzzle_core.distill.loop import Checkpoints, learning_rate, micro_batches, train
from puzzle_core.errors import NonFiniteError, StorageError
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
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(step))


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
    curve = run(fresh())
    assert len(curve) == STEPS
    assert curve[-1]["loss"] < curve[0]["loss"]


@pytest.mark.parametrize("stopped_at", [2, 7])
def test_resumed_is_bitwise_the_uninterrupted(tmp_path, stopped_at):
    def stop(progress):
        if progress.step == stopped_at:
            raise KeyboardInterrupt

    uninterrupted, resumed = fresh(), fresh()
    curve = run(uninterrupted)
    checkpoints = Checkpoints(tmp_path / "checkpoint", least_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        run(resumed, checkpoints=checkpoints, report=stop)
    seen = []
    resumed = fresh()
    assert run(resumed, checkpoints=checkpoints, report=seen.append) == curve
    assert seen[0].step == stopped_at
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

    monkeypatch.setattr(loop, "save_file", full)
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

    curve = train("toy", in_parts, parts, STEPS, SPEC, threads=threads)
    assert [term["loss"] for term in curve] == pytest.approx([term["loss"] for term in run(whole)], rel=1e-4)
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
