"""Warnings: silent on a sound run, and each suspicious thing planted makes its own sentence."""

from typing import Any

import pytest

from puzzle_core.architecture import Architecture, BlockVariant
from puzzle_core.report.report_inputs import ModelResult, ReportInputs
from puzzle_core.report.report_warnings import report_warnings
from puzzle_core.work import Timing


def with_model(inputs: ReportInputs, name: str, **fields: Any) -> ReportInputs:
    models = tuple(m.model_copy(update=fields) if m.name == name else m for m in inputs.models)
    return inputs.model_copy(update={"models": models})


def slower(model: ModelResult, factor: float) -> Timing:
    assert model.timing
    return model.timing.model_copy(
        update={"prefill_ms": model.timing.prefill_ms * factor, "decode_ms": model.timing.decode_ms * factor}
    )


def with_kl(model: ModelResult, kl: float) -> dict[str, Any]:
    return {"evaluation": model.evaluation.model_copy(update={"kl_nats_per_token": kl})}


def test_a_sound_run_has_none(inputs: ReportInputs) -> None:
    assert report_warnings(inputs) == []


def test_scores_that_are_estimates(inputs: ReportInputs) -> None:
    scoring = inputs.spec.scoring.model_copy(update={"method": "fisher"})
    (warning,) = report_warnings(
        inputs.model_copy(update={"spec": inputs.spec.model_copy(update={"scoring": scoring})})
    )
    assert warning.startswith("Scores are estimates from gradients of the parent")


def test_child_not_faster_and_limit_not_met(inputs: ReportInputs) -> None:
    found = report_warnings(with_model(inputs, "child after GKD", timing=slower(inputs.child, 2)))
    assert found[0].startswith("The child is not faster than its parent")
    assert any(
        warning.startswith("The limit on throughput holds as predicted, and not as measured") for warning in found
    )


def test_relative_limits_are_held_against_the_measured_parent(inputs: ReportInputs) -> None:
    for name, model in (("parent", inputs.parent), ("child after GKD", inputs.child)):
        inputs = with_model(inputs, name, timing=slower(model, 1.14))
    assert not any("limit" in warning for warning in report_warnings(inputs))


def test_predictions_off(inputs: ReportInputs) -> None:
    (warning,) = report_warnings(with_model(inputs, "child after assembly", timing=slower(inputs.children[0], 0.8)))
    assert "decode of child after assembly +28.9 %" in warning
    assert "child after GKD" not in warning


def test_gkd_made_it_worse(inputs: ReportInputs) -> None:
    (warning,) = report_warnings(with_model(inputs, "child after GKD", **with_kl(inputs.child, 1.5)))
    assert "from 0.177 to 1.50 nats per token" in warning


def test_a_better_baseline(inputs: ReportInputs) -> None:
    (warning,) = report_warnings(with_model(inputs, "greedy", **with_kl(inputs.child, 0.01)))
    assert warning.startswith("The baseline greedy has a lower measured KL (0.0100)")


@pytest.mark.parametrize(("empty", "warned"), [(4, False), (5, True)])
def test_most_layers_empty(inputs: ReportInputs, empty: int, warned: bool) -> None:
    nothing = BlockVariant.parse("attn:no_op+ffn:no_op")
    layers = (nothing,) * empty + (inputs.shape.largest_block,) * (8 - empty)
    best = inputs.search.best.model_copy(update={"architecture": Architecture(layers=layers)})
    search = inputs.search.model_copy(update={"solutions": (best,)})
    found = report_warnings(inputs.model_copy(update={"search": search}))
    assert any(warning.startswith(f"{empty} of 8 layers are empty") for warning in found) == warned


def test_noise_idle_training_and_stopped_search(inputs: ReportInputs) -> None:
    assert inputs.child.timing
    noisy = inputs.child.timing.model_copy(update={"decode_spread": 0.4})
    record = inputs.bld[0].model_copy(update={"final_loss": inputs.bld[0].initial_loss})
    chosen = inputs.search.best.model_copy(update={"optimal": False, "gap": 0.02})
    search = inputs.search.model_copy(update={"solutions": (chosen,), "omissions": {"batch size 8": "too much memory"}})
    inputs = with_model(inputs, "child after GKD", timing=noisy)
    inputs = inputs.model_copy(update={"bld": (record, *inputs.bld[1:]), "search": search})
    noise, idle, stopped, left_out = report_warnings(inputs)
    assert "decode of child after GKD 40.0 %" in noise
    assert "1 of 56 variants on held-back windows (layer 0 attn:kv2)" in idle
    assert "a gap of 2.0 %" in stopped
    assert left_out == "Left out: batch size 8. too much memory"


@pytest.mark.parametrize(("prefill_ms", "warned"), [(899, False), (990, True)])
def test_absolute_limits_are_held_against_the_measured_child(
    inputs: ReportInputs, prefill_ms: float, warned: bool
) -> None:
    assert inputs.child.timing
    late = inputs.child.timing.model_copy(update={"prefill_ms": prefill_ms})
    wanted = "The limit on time to first token holds as predicted, and not as measured: the child takes 10.0 % more"
    assert (
        any(
            warning.startswith(wanted)
            for warning in report_warnings(with_model(inputs, "child after GKD", timing=late))
        )
        == warned
    )
