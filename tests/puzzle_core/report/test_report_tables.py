"""Tables: ratios the right way up, units that are said, and no row that goes missing."""

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from puzzle_core.report import derived, report_tables
from puzzle_core.report.report_inputs import ModelResult, ReportInputs
from puzzle_core.work import MultipleChoiceResult, Timing

Make = Callable[..., ReportInputs]


def changed(inputs: ReportInputs, name: str, **fields: Any) -> ReportInputs:
    """The inputs with other fields in the model of this name; its evaluation may be changed by field, too."""

    def change(model: ModelResult) -> ModelResult:
        own = {k: v for k, v in fields.items() if k in ModelResult.model_fields}
        of_evaluation = {k: v for k, v in fields.items() if k not in ModelResult.model_fields}
        return model.model_copy(update={"evaluation": model.evaluation.model_copy(update=of_evaluation), **own})

    return inputs.model_copy(update={"models": tuple(change(m) if m.name == name else m for m in inputs.models)})


def timing(prefill_ms: float, decode_ms: float) -> Timing:
    return Timing(prefill_ms=prefill_ms, decode_ms=decode_ms, prefill_spread=0.01, decode_spread=0.01)


@pytest.fixture
def plain(inputs: ReportInputs) -> ReportInputs:
    """A parent and a child with round numbers: batch 4, 128 prompt and 64 generated tokens."""
    quality = {"perplexity": 10.0, "top1_accuracy": 0.5, "kl_nats_per_token": 0.0, "top1_agreement": 1.0}
    own = {"timing": timing(100, 900), "parameters": 2_000_000, "memory_bytes": 64 * 2**20}
    inputs = changed(inputs, "parent", **own, **quality)
    quality = {"perplexity": 11.0, "top1_accuracy": 0.489, "kl_nats_per_token": 0.0312, "top1_agreement": 0.91}
    own = {"timing": timing(50, 600), "parameters": 1_500_000, "memory_bytes": 32 * 2**20}
    return changed(inputs, "child after GKD", **own, **quality)


def rows_of(table: report_tables.Table) -> dict[str, tuple[str, ...]]:
    return {row[0]: row[1:] for row in table.rows}


def test_final_table_has_ratios_to_the_parent(plain: ReportInputs) -> None:
    table = report_tables.final_table(plain)
    assert table.columns == ("", "parent", "child after assembly", "to the parent", "child after GKD", "to the parent")
    last = {name: (row[0], row[3], row[4]) for name, row in rows_of(table).items()}
    assert last == {
        "parameters": ("2.00 M", "1.50 M", "75.0 %"),
        "memory": ("64.0 MiB", "32.0 MiB", "50.0 %"),
        "prefill": ("100 ms", "50.0 ms", "2.00x as fast"),
        "prefill rate": ("5,120 tok/s", "10,240 tok/s", "2.00x"),
        "decode": ("900 ms", "600 ms", "1.50x as fast"),
        "decode rate": ("280 tok/s", "420 tok/s", "1.50x"),
        "end to end": ("1.00 s", "650 ms", "1.54x as fast"),
        "end-to-end rate": ("256 tok/s", "394 tok/s", "1.54x"),
        "KL, nats per token": ("0", "0.0312", ""),
        "perplexity": ("10.0", "11.0", "1.10x"),
        "top-1 accuracy": ("50.0 %", "48.9 %", "kept 97.8 %"),
        "top-1 agreement": ("100.0 %", "91.0 %", ""),
    }


def test_final_table_is_aligned_text(plain: ReportInputs) -> None:
    title, header, rule, *rows = report_tables.format_final_table(plain).splitlines()
    assert title == "The child beside its parent"
    end = header.index("child after GKD") + len("child after GKD")
    assert set(rule) == {"-", " "}
    assert rows[0][:end].endswith("  1.50 M")
    assert rows[2][:end].endswith("  50.0 ms")
    assert len({len(row) for row in rows[:8]}) == 1


def test_final_table_without_gkd_and_without_times(make_inputs: Make) -> None:
    inputs = make_inputs(layers=2, gkd=False)
    inputs = changed(inputs, "child after assembly", timing=None)
    table = report_tables.final_table(inputs)
    assert table.columns == ("", "parent", "child after assembly", "to the parent")
    assert rows_of(table)["end to end"][1:] == ("–", "")


def test_one_generated_token_has_no_decode(make_inputs: Make) -> None:
    scenario = {"prompt_tokens": 16, "generated_tokens": 1, "batch_sizes": [4], "limits": {"throughput": "110%"}}
    inputs = make_inputs(layers=2, scenario=scenario)
    for name in ("parent", "child after GKD"):
        inputs = changed(inputs, name, timing=timing(10, 0))
    rows = rows_of(report_tables.final_table(inputs))
    assert (rows["decode"][0], rows["decode rate"][3:]) == ("–", ("–", ""))
    assert "speedup_decode" not in derived.headline(inputs)


def test_headline_has_ratios(plain: ReportInputs) -> None:
    headline = derived.headline(plain)
    assert headline["speedup_prefill"] == 2
    assert headline["speedup_decode"] == 1.5
    assert headline["speedup_end_to_end"] == pytest.approx(1000 / 650)
    assert headline["top1_kept"] == pytest.approx(0.978)
    assert headline["perplexity_ratio"] == pytest.approx(1.1)
    assert headline["kl_nats_per_token"] == 0.0312
    assert (headline["parameters_ratio"], headline["memory_ratio"]) == (0.75, 0.5)


def test_limits_in_the_words_of_the_limit(inputs: ReportInputs) -> None:
    rows = rows_of(report_tables.limits_table(inputs))
    assert rows["memory"][:2] == ("chatbot", "75%")
    assert rows["memory"][2] == "≤ 30.0 MiB"
    uses = {use.name: use for use in inputs.search.best.limits}
    assert rows["throughput"][2].startswith("≥ ")
    assert rows["throughput"][3] == f"{uses['throughput'].usage:.0f} tok/s"
    assert rows["time to first token"][1:3] == ("900ms", "≤ 900 ms")


def test_slack_of_throughput_is_what_is_above_the_limit(inputs: ReportInputs) -> None:
    chosen = inputs.search.best
    use = next(use for use in chosen.limits if use.name == "throughput").model_copy(
        update={"threshold": 256.0, "usage": 320.0}
    )
    search = inputs.search.model_copy(update={"solutions": (chosen.model_copy(update={"limits": (use,)}),)})
    (row,) = report_tables.limits_table(inputs.model_copy(update={"search": search})).rows
    assert row[3:6] == ("≥ 256 tok/s", "320 tok/s", "64.0 tok/s (25.0 %)")


def test_layers_sum_up_to_what_was_predicted(inputs: ReportInputs) -> None:
    layers = derived.layer_facts(inputs)
    chosen, parent = inputs.search.best, inputs.search.parent
    assert sum(fact.score for fact in layers) == pytest.approx(chosen.score)
    assert sum(f.saved_ms for f in layers) == pytest.approx(parent.total_ms - chosen.prediction.total_ms)
    table = report_tables.layers_table(inputs)
    assert len(table.rows) == inputs.shape.layers + 1
    assert table.rows[0] == ("0", "attn:kv4", "ffn:i1024", "0", "0 ms", "0.0 %")
    assert table.rows[4][1:3] == ("attn:no_op", "ffn:linear")
    assert table.rows[-1][1] == "3 × kv4, 3 × kv2, 1 × linear, 1 × no_op"


def test_layer_scores_of_single_subblocks_add_up(make_inputs: Make) -> None:
    inputs = make_inputs(layers=2)
    own = inputs.shape.largest_block
    spec = inputs.spec.model_copy(
        update={"scoring": inputs.spec.scoring.model_copy(update={"composition": "subblocks"})}
    )
    halves = [s for s in inputs.scores if own.attention == s.block.attention or own.ffn == s.block.ffn]
    inputs = inputs.model_copy(update={"spec": spec, "scores": tuple(halves)})
    kl = {(s.layer, s.block): s.kl_nats_per_token for s in halves}
    for fact in derived.layer_facts(inputs):
        alone = [
            own.model_copy(update={"attention": fact.block.attention}),
            own.model_copy(update={"ffn": fact.block.ffn}),
        ]
        assert fact.score == pytest.approx(sum(kl.get((fact.layer, half), 0.0) for half in alone))


def test_baselines_beside_the_chosen(inputs: ReportInputs) -> None:
    table = report_tables.baselines_table(inputs)
    methods = ["MIP (chosen)", "greedy", "uniform", "random", "maximise parameters"]
    assert [row[0] for row in table.rows] == methods
    outside = 96.0
    share = (inputs.search.best.prediction.total_ms - outside) / (inputs.search.parent.total_ms - outside)
    assert table.rows[0][-1] == f"{share:.1%}".replace("%", " %")
    assembled = inputs.children[0].evaluation
    assert table.rows[0][2] == f"{assembled.kl_nats_per_token:.3f}"


def test_a_baseline_that_the_search_does_not_know_is_not_dropped(inputs: ReportInputs) -> None:
    own, odd = inputs.shape.largest_block, inputs.baselines[0].architecture
    stranger = inputs.baselines[0].model_copy(update={"name": "by hand", "architecture": odd.replace(4, own)})
    table = report_tables.baselines_table(inputs.model_copy(update={"models": (*inputs.models, stranger)}))
    assert table.rows[-1][:2] == ("by hand", "–")


def test_predicted_against_measured(plain: ReportInputs) -> None:
    predicted = plain.search.best.prediction
    rows = {row[:2]: row[2:] for row in report_tables.predicted_table(plain).rows}
    assert ("parent, with the costs", "prefill") in rows
    assert rows["child after GKD", "decode"][1:] == ("600 ms", f"{(predicted.decode_ms / 600 - 1) * 100:+.1f} %")


def test_bld_names_the_best_and_the_worst_layer(inputs: ReportInputs) -> None:
    rows = rows_of(report_tables.bld_table(inputs))
    assert list(rows) == ["attn:kv2", "attn:kv1", "attn:linear", "ffn:i768", "ffn:i512", "ffn:i256", "ffn:linear"]
    assert rows["attn:kv2"][0] == "8"
    assert rows["attn:kv2"][3].endswith("(layer 7)")
    assert rows["attn:kv2"][4].endswith("(layer 0)")


def result(name: str, accuracy: float, by_length: float) -> MultipleChoiceResult:
    errors = {"standard_error": 0.03, "standard_error_by_length": 0.04}
    return MultipleChoiceResult(name=name, items=200, accuracy=accuracy, accuracy_by_length=by_length, **errors)


def test_without_benchmarks_there_is_no_table(inputs: ReportInputs) -> None:
    assert report_tables.benchmarks_table(inputs).rows == ()


def test_benchmarks_show_what_is_kept_of_each_and_of_the_mean(inputs: ReportInputs) -> None:
    inputs = changed(inputs, "parent", tasks=(result("arc", 0.5, 0.4), result("piqa", 0.75, 0.0)))
    inputs = changed(inputs, "child after GKD", tasks=(result("arc", 0.4, 0.3), result("piqa", 0.6, 0.5)))
    table = report_tables.benchmarks_table(inputs)
    rows = {row[:2]: (row[2], row[3], *row[-2:]) for row in table.rows}
    assert table.columns[:4] == ("benchmark", "metric", "items", "parent")
    assert rows["arc", "accuracy"] == ("200", "0.5000 ± 0.0300", "0.4000 ± 0.0300", "80.0 %")
    assert rows["arc", "accuracy by length"] == ("200", "0.4000 ± 0.0400", "0.3000 ± 0.0400", "75.0 %")
    assert rows["piqa", "accuracy by length"] == ("200", "0.0000 ± 0.0400", "0.5000 ± 0.0400", "–")
    assert rows["mean of 2", "accuracy"] == ("400", "0.6250 ± 0.0212", "0.5000 ± 0.0212", "80.0 %")
    assert rows["mean of 2", "accuracy by length"][-1] == "200.0 %"
    assert [row[4] for row in table.rows if row[0] == "arc"] == ["–", "–"]
    assert derived.headline(inputs)["benchmarks_kept_accuracy"] == pytest.approx(0.8)


def test_tasks_of_the_harness_stand_beside_files_and_perplexity_is_not_kept(inputs: ReportInputs) -> None:
    parent = {"arc": {"acc,none": 0.5, "acc_stderr,none": 0.02}, "wiki": {"word_perplexity,none": 20.0}}
    child = {"arc": {"acc,none": 0.4813}, "wiki": {"word_perplexity,none": 30.0}}
    inputs = changed(changed(inputs, "parent", lm_eval=parent), "child after GKD", lm_eval=child)
    rows = {row[:2]: row[2:] for row in report_tables.benchmarks_table(inputs).rows}
    assert rows["arc", "acc,none"] == ("–", "0.5000 ± 0.0200", "–", "–", "0.4813", "96.3 %")
    assert rows["wiki", "word_perplexity,none"][-2:] == ("30.00", "–")
    assert not any(name.startswith("mean") for name, _ in rows)


def test_inputs_need_a_parent_and_a_child(inputs: ReportInputs) -> None:
    content = inputs.model_dump()
    with pytest.raises(ValidationError, match="at least one child"):
        ReportInputs.model_validate(content | {"models": content["models"][:1]})
