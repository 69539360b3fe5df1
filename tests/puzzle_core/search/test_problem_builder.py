"""From tables and a request to problems: limits, units, shares, several scenarios, constraints, spanning blocks."""

from typing import Any

import pytest

from puzzle_core.architecture import EMPTY_BLOCK, Architecture, BlockVariant
from puzzle_core.errors import CoverageError, InfeasibleError, NonFiniteError, SpecError
from puzzle_core.report.report_warnings import search_warnings
from puzzle_core.report.search_text import answer_text, explanation_text
from puzzle_core.search.problem_builder import ProblemBuilder
from puzzle_core.search.run_search import check_feasible, find_architecture
from puzzle_core.search.tables import CostRow, CostTable, Option, ScoreTable
from puzzle_core.spec import SearchRequest

LAYERS = 4
OWN = BlockVariant.parse("attn:kv4+ffn:i512")
PARENT = Architecture(layers=(OWN,) * LAYERS)
HALVES = {
    # parameters, KV bytes per token, prefill and decode at batch size 1
    "attn:kv4": (100, 8, 2.0, 20.0),
    "attn:kv2": (80, 4, 1.5, 15.0),
    "attn:linear": (50, 0, 0.5, 5.0),
    "attn:no_op": (0, 0, 0.0, 0.0),
    "ffn:i512": (200, 0, 4.0, 30.0),
    "ffn:i256": (100, 0, 2.0, 16.0),
    "ffn:i96": (40, 0, 1.0, 8.0),
    "ffn:no_op": (0, 0, 0.0, 0.0),
}
LOST = {"attn:kv4": 0.0, "attn:kv2": 1.0, "attn:linear": 3.0, "attn:no_op": 4.0}
LOST |= {"ffn:i512": 0.0, "ffn:i256": 1.5, "ffn:i96": 3.5, "ffn:no_op": 9.0}


def scores(layers: int = LAYERS, scale: float = 1.0) -> ScoreTable:
    blocks = [BlockVariant.parse(f"{a}+{f}") for a in HALVES if a[0] == "a" for f in HALVES if f[0] == "f"]
    return ScoreTable(
        Architecture(layers=(OWN,) * layers),
        tuple(
            {Option(b): scale * (1 + layer) * (LOST[str(b.attention)] + LOST[str(b.ffn)]) for b in blocks}
            for layer in range(layers)
        ),
    )


def costs(extra: tuple[CostRow, ...] = (), batch_sizes: tuple[int, ...] = (1, 2)) -> CostTable:
    """Prefill grows with the batch, decode with its root: larger batches have more throughput."""
    rows = [CostRow("outside", {"parameters": 1000, "parameter_bytes": 4000})]
    rows += [
        CostRow(part, {"parameters": p, "parameter_bytes": 4 * p, "kv_bytes_per_token": kv})
        for part, (p, kv, *_) in HALVES.items()
    ]
    for batch in batch_sizes:
        outside = {"prefill_ms": 1.0 * batch, "decode_ms": 10.0}
        rows.append(CostRow("outside", outside, batch_size=batch))
        rows += [
            CostRow(part, {"prefill_ms": prefill * batch, "decode_ms": decode * batch**0.5}, batch_size=batch)
            for part, (_, _, prefill, decode) in HALVES.items()
        ]
    return CostTable((*rows, *extra))


def request(limits: dict[str, Any], **changes: Any) -> SearchRequest:
    scenario = {"name": "chat", "prompt_tokens": 10, "generated_tokens": 11, "limits": limits}
    scenario |= changes.pop("scenario", {})
    search = {"frontier_points": 2, "baselines": []} | changes.pop("search", {})
    return SearchRequest.model_validate({"scenario": scenario, "search": search, **changes})


def builder(limits: dict[str, Any], **changes: Any) -> ProblemBuilder:
    return ProblemBuilder(request(limits, **changes), scores(), costs())


def capacity(limits: dict[str, Any], **changes: Any) -> float:
    """Of the one limit, for the blocks alone, at batch size 2."""
    (limit,) = builder(limits, **changes).problem({"chat": 2}).limits
    return limit.capacity


PARENT_PREFILL, PARENT_DECODE = LAYERS * 12 + 2, LAYERS * 50 * 2**0.5 + 10


@pytest.mark.parametrize(
    ("limit", "text", "expected"),
    [
        ("memory", "9000B", 9000 - 4000),
        ("memory", "50%", 0.5 * (4000 + LAYERS * (1200 + 2 * 21 * 8)) - 4000),
        ("parameters", "1.5kparams", 500),
        ("active_parameters", "1.5kparams", 500),
        ("kv_bytes_per_token", "24B", 24),
        ("time_to_first_token", "30ms", 28),
        ("time_per_output_token", "20ms", 20 * 10 - 10),
        ("latency", "0.2s", 200 - 12),
        ("latency", "50%", 0.5 * (PARENT_PREFILL + PARENT_DECODE) - 12),
        ("throughput", "100 tok/s", 2 * 11 / 100 * 1e3 - 12),
        ("throughput", "200%", (PARENT_PREFILL + PARENT_DECODE) / 2 - 12),
        ("block_prefill_time", "50%", LAYERS * 6),
        ("block_decode_time", "50%", LAYERS * 25 * 2**0.5),
    ],
)
def test_limits_become_capacities_of_the_blocks(limit: str, text: str, expected: float) -> None:
    assert capacity({limit: text}) == pytest.approx(expected)


def test_throughput_may_count_the_prompt() -> None:
    assert capacity({"throughput": "100 tok/s"}, scenario={"throughput_counts": "total"}) == pytest.approx(
        2 * 21 / 100 * 1e3 - 12
    )


def test_limits_on_any_column_by_the_unit_its_name_ends_in() -> None:
    energy = tuple(CostRow(part, {"energy_mj": p}) for part, (p, *_) in HALVES.items())
    made = ProblemBuilder(request({"columns": {"energy_mj": "0.5J"}}), scores(), costs(energy))
    assert made.problem({"chat": 1}).limits[0].capacity == 500


@pytest.mark.parametrize("limits", [{"memory": "78_000"}, {"latency": "300"}, {"columns": {"energy": "5"}}])
def test_a_limit_without_a_unit_is_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"unit|share"):
        request(limits)


def test_a_limit_on_a_column_that_is_not_there_names_it() -> None:
    with pytest.raises(SpecError, match=r"needs the column energy_mj.*columns: decode_ms"):
        builder({"columns": {"energy_mj": "1J"}})


def test_uses_and_predictions_agree_with_hand_counts() -> None:
    made = builder({"memory": "1GB", "throughput": "1 tok/s", "time_per_output_token": "1s"})
    blocks = ["attn:kv2+ffn:i256", "attn:no_op+ffn:i96", "attn:kv4+ffn:i512", "attn:no_op+ffn:no_op"]
    architecture = Architecture.parse(blocks)
    prefill, decode = 1 + 3.5 + 1 + 6, 10 + 31 + 8 + 50
    memory = 4 * (1000 + 180 + 40 + 300) + 21 * (4 + 8)
    prediction = made.predict(architecture, {"chat": 1})["chat"]
    assert (prediction.prefill_ms, prediction.decode_ms) == (prefill, decode)
    assert (prediction.parameters, prediction.memory_bytes) == (1520, memory)
    uses = {use.name: use for use in made.limit_uses(architecture, {"chat": 1})}
    assert uses["memory"].usage == memory
    assert uses["throughput"].usage == pytest.approx(11 / (prefill + decode) * 1e3)
    assert uses["throughput"].sense == "at_least"
    assert uses["time_per_output_token"].usage == pytest.approx(decode / 10)


def test_the_batch_size_is_chosen_and_each_one_explained() -> None:
    # A larger batch serves more tokens per second, and needs more memory for its cache.
    by_rate = find_architecture(builder({"throughput": "140 tok/s"}, scenario={"batch_sizes": [1, 2]}))
    assert by_rate.batch_sizes == {"chat": 2}
    assert by_rate.best.prediction.batch_size == 2
    by_memory = find_architecture(builder({"memory": "7600B"}, scenario={"batch_sizes": [1, 2]}))
    assert by_memory.batch_sizes == {"chat": 1}
    outcomes = {tried.batch_sizes["chat"]: (tried.score, tried.outcome) for tried in by_memory.outcomes}
    assert outcomes[1] == (by_memory.best.score, "solved")
    assert outcomes[2][0] is None
    assert float(outcomes[2][1].removeprefix("left out: it scores ").split()[0]) > by_memory.best.score


def test_a_batch_size_that_cannot_fit_says_so() -> None:
    record = find_architecture(builder({"time_to_first_token": "1.5ms"}, scenario={"batch_sizes": [1, 2]}))
    (large,) = [tried for tried in record.outcomes if tried.batch_sizes == {"chat": 2}]
    assert large.score is None
    assert "time_to_first_token was 1.5ms, and at least 2" in large.outcome


def test_ties_go_to_the_larger_batch() -> None:
    record = find_architecture(builder({"parameters": "2kparams"}, scenario={"batch_sizes": [1, 2]}))
    assert record.batch_sizes == {"chat": 2}


def test_several_scenarios_hold_together_each_at_its_own_batch() -> None:
    rag = {"name": "rag", "prompt_tokens": 100, "generated_tokens": 2, "batch_sizes": [1, 2]}
    rag["limits"] = {"time_to_first_token": "10ms"}
    both = find_architecture(builder({"block_decode_time": "60%"}, more_scenarios=[rag]))
    alone = find_architecture(builder({"block_decode_time": "60%"}))
    assert both.best.score > alone.best.score
    assert both.batch_sizes == {"chat": 1, "rag": 1}
    assert {(use.scenario, use.name) for use in both.best.limits} == {
        ("chat", "block_decode_time"),
        ("rag", "time_to_first_token"),
    }
    assert all(use.usage <= use.threshold for use in both.best.limits)


def test_a_mix_weighs_scenarios() -> None:
    rag = {"name": "rag", "weight": 3, "prompt_tokens": 100, "generated_tokens": 1, "limits": {}}
    made = builder({}, more_scenarios=[rag], mix={"latency": "50%", "throughput": "90%"})
    problem = made.problem({"chat": 1, "rag": 2})
    chat, rag_ms = 1 + LAYERS * 6 + 10 + LAYERS * 50, 2 + LAYERS * 12 + 10 + LAYERS * 50 * 2**0.5
    limits = {limit.name: limit for limit in problem.limits}
    outside = 0.25 * 11 + 0.75 * 12
    assert limits["(mix)/latency"].capacity == pytest.approx(0.5 * (0.25 * chat + 0.75 * rag_ms) - outside)
    outside = 0.25 * 11 + 0.75 * 12 / 2
    assert limits["(mix)/throughput"].capacity == pytest.approx((0.25 * chat + 0.75 * rag_ms / 2) / 0.9 - outside)


@pytest.mark.parametrize(
    ("constraints", "broken"),
    [
        ({"keep": {"attention": [0, -1]}}, lambda blocks: any(blocks[i].attention != OWN.attention for i in (0, 3))),
        ({"keep": {"ffn": [3]}}, lambda blocks: blocks[3].ffn != OWN.ffn),
        ({"linear": False}, lambda blocks: any(b.attention.kind == "linear" for b in blocks)),
        ({"no_op": False}, lambda blocks: any("no_op" in (b.attention.kind, b.ffn.kind) for b in blocks)),
        ({"ffn_multiple_of": 256}, lambda blocks: any(b.ffn.size % 256 for b in blocks)),
        ({"tensor_parallel": 64}, lambda blocks: any(b.ffn.size % 64 for b in blocks)),
        ({"max_ffn_widths": 1}, lambda blocks: len({b.ffn for b in blocks if b.ffn.kind == "sized"}) > 1),
        ({"uniform_kv_heads": True}, lambda blocks: len({b.attention.size for b in blocks if b.attention.size}) > 1),
    ],
)
def test_constraints_hold_and_cost_something(constraints: dict[str, Any], broken: Any) -> None:
    limits = [{"block_time": "75%"}, {"block_time": "40%"}, {"parameters": "2000params"}, {"kv_bytes_per_token": "20B"}]
    scored = []
    for limit in limits:
        free = find_architecture(builder(limit)).best
        constrained = find_architecture(builder(limit, constraints=constraints)).best
        assert not broken(constrained.architecture.layers)
        assert constrained.score >= free.score
        scored.append((free, constrained))
    assert any(broken(free.architecture.layers) and bound.score > free.score for free, bound in scored), "never binds"


def test_constraints_that_rule_out_the_parent_are_refused() -> None:
    with pytest.raises(SpecError, match=r"rule out the parent's own ffn:i512.*ffn_multiple_of \(96\)"):
        builder({"block_time": "50%"}, constraints={"ffn_multiple_of": 96})
    with pytest.raises(SpecError, match=r"keep\.attention names layer 4, and there are 4 layers"):
        builder({"block_time": "50%"}, constraints={"keep": {"attention": [4]}})


def test_a_block_that_spans_layers_empties_those_after_it() -> None:
    table = scores()
    spanning = Option(BlockVariant.parse("attn:kv4+ffn:i512"), 2)
    layers = [dict(layer) for layer in table.layers]
    layers[1][spanning] = 0.25
    made = ProblemBuilder(request({"block_time": "75%"}), ScoreTable(PARENT, tuple(layers)), costs())
    chosen = find_architecture(made).best
    assert chosen.architecture.spans == ((1, 2),)
    assert [str(block) for block in chosen.architecture.layers] == [
        str(OWN),
        str(OWN),
        "attn:no_op+ffn:no_op",
        str(OWN),
    ]
    assert chosen.score == 0.25
    assert chosen.prediction.prefill_ms == 1 + 3 * 6
    kept = ProblemBuilder(
        request({"block_time": "75%"}, constraints={"keep": {"ffn": [2]}}), ScoreTable(PARENT, tuple(layers)), costs()
    )
    assert find_architecture(kept).best.architecture.spans == ()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_scores_of_any_magnitude_give_the_same_architecture(scale: float) -> None:
    made = ProblemBuilder(request({"block_time": "55%", "memory": "80%"}), scores(scale=scale), costs())
    plain = find_architecture(builder({"block_time": "55%", "memory": "80%"}))
    record = find_architecture(made)
    assert record.best.architecture == plain.best.architecture
    assert record.best.score == pytest.approx(scale * plain.best.score)


def test_what_loosening_a_limit_buys_is_what_a_new_search_gains() -> None:
    record = find_architecture(builder({"block_time": "50%", "memory": "100%"}))
    prices = {price.limit: price for price in record.prices}
    assert (prices["memory"].at_least, prices["memory"].at_most) == (0, 0)
    allowed = next(use.threshold for use in record.best.limits if use.name == "block_time")
    share = 0.5 * (1 + prices["block_time"].step / allowed)
    looser = find_architecture(builder({"block_time": f"{100 * share:.9f}%"}))
    gain = pytest.approx(record.best.score - looser.best.score)
    assert (prices["block_time"].at_least, prices["block_time"].at_most) == (gain, gain)


def test_runner_ups_name_what_else_a_layer_would_take() -> None:
    record = find_architecture(builder({"block_time": "60%"}))
    for runner_up in record.runner_ups:
        assert runner_up.option == str(record.best.architecture.layers[runner_up.layer])
        assert len(runner_up.others) == 1
        assert runner_up.others != (runner_up.option,)
        assert runner_up.at_least is not None
        assert runner_up.at_least >= 0
        assert runner_up.at_most == runner_up.at_least, "a small model is explained exactly"


def test_infeasible_names_the_least_that_can_be_had_and_that_can_be_met() -> None:
    with pytest.raises(InfeasibleError, match=r"latency was 10ms, and at least 11\.0ms") as error:
        find_architecture(builder({"latency": "10ms"}))
    assert "batch size 1" in str(error.value)
    find_architecture(builder({"latency": "11.0ms"}))
    with pytest.raises(InfeasibleError, match=r"parameters was 900params, and at least 1,000 params"):
        check_feasible(builder({"parameters": "900params"}))


def test_warnings_say_what_is_suspicious() -> None:
    record = find_architecture(builder({"block_time": "2%"}))
    empty, untrusted = search_warnings(record)
    assert empty.startswith("4 of 4 layers are empty")
    assert "is above every measured score" in untrusted
    assert search_warnings(find_architecture(builder({"block_time": "90%"}))) == []


def test_a_missing_cost_names_layer_variant_and_column() -> None:
    known = costs()
    lacking = CostTable(tuple(row for row in known.rows if row.part != "ffn:i96" or "decode_ms" not in row.values))
    with pytest.raises(CoverageError, match=r"no prefill_ms of ffn:i96 for layer 0"):
        find_architecture(ProblemBuilder(request({"block_time": "50%"}), scores(), lacking))


def test_tables_refuse_what_is_no_cost_or_score() -> None:
    with pytest.raises(SpecError, match=r"decode_ms of ffn:i96, batch size 3 is -1"):
        costs((CostRow("ffn:i96", {"decode_ms": -1.0}, batch_size=3),))
    with pytest.raises(NonFiniteError, match="decode_ms of ffn:i96, layer 2 is nan"):
        costs((CostRow("ffn:i96", {"decode_ms": float("nan")}, layer=2),))
    with pytest.raises(SpecError, match="parameters of ffn:i96 is given twice"):
        costs((CostRow("ffn:i96", {"parameters": 1.0}),))
    with pytest.raises(NonFiniteError, match=r"score of layer 0 attn:kv4\+ffn:i512 is inf"):
        ScoreTable(Architecture(layers=(OWN,)), ({Option(OWN): float("inf")},))


def test_the_most_specific_row_wins_column_by_column() -> None:
    table = costs((CostRow("ffn:i512", {"decode_ms": 7.0}, layer=2, batch_size=1),))
    attention = HALVES["attn:kv4"][3]
    assert table.block("decode_ms", 2, OWN, "chat", 1) == 7.0 + attention
    assert table.block("decode_ms", 1, OWN, "chat", 1) == 30.0 + attention
    whole = costs((CostRow(str(OWN), {"decode_ms": 1.0}),))
    assert whole.block("decode_ms", 1, OWN, "chat", 1) == 1.0


def test_the_frontier_of_a_limit_goes_over_all_batch_sizes() -> None:
    asked = {"search": {"frontier_points": 9, "frontier_limit": "throughput"}, "scenario": {"batch_sizes": [1, 2]}}
    record = find_architecture(builder({"throughput": "60 tok/s", "memory": "7800B"}, **asked))
    rates = [next(use.usage for use in point.limits if use.name == "throughput") for point in record.frontier]
    scored = [point.score for point in record.frontier]
    assert len(scored) > 3
    assert scored == sorted(scored, reverse=True)
    assert rates == sorted(rates, reverse=True)
    assert {point.prediction.batch_size for point in record.frontier} == {1, 2}
    for point, rate in zip(record.frontier, rates, strict=True):
        again = find_architecture(
            builder({"throughput": f"{rate * (1 - 1e-9):.12f} tok/s", "memory": "7800B"}, **asked)
        )
        assert again.best.score <= point.score + 1e-9
    with pytest.raises(SpecError, match="frontier_limit is 'latency', and scenario chat has no such limit"):
        find_architecture(builder({"memory": "1GB"}, search={"frontier_limit": "latency"}))


NOTHING_OUTSIDE = CostTable(tuple(row for row in costs().rows if row.part != "outside"))


@pytest.mark.parametrize("frontier_limit", [None, "throughput"])
def test_a_frontier_holds_all_other_limits_and_has_no_model_of_nothing(frontier_limit: str | None) -> None:
    """A published library has no-ops and nothing outside the blocks: its rate of no time is unbounded."""
    search = {"frontier_points": 9, "frontier_limit": frontier_limit}
    asked = request({"throughput": "60 tok/s", "memory": "3000B", "parameters": "60%"}, search=search)
    record = find_architecture(ProblemBuilder(asked, scores(), NOTHING_OUTSIDE))
    unlimited = find_architecture(
        ProblemBuilder(request({"throughput": "60 tok/s"}, search=search), scores(), NOTHING_OUTSIDE)
    )
    assert len(record.frontier) >= 4
    for point in record.frontier:
        memory, parameters = (next(use for use in point.limits if use.name == n) for n in ("memory", "parameters"))
        assert memory.usage <= memory.threshold
        assert parameters.usage <= parameters.threshold
        assert point.prediction.total_ms > 0
    assert any(point.prediction.memory_bytes > 3000 for point in unlimited.frontier), "the limit binds"
    assert not any(point.architecture.layers == (EMPTY_BLOCK,) * LAYERS for point in unlimited.frontier)
    least = min(point.prediction.total_ms for point in unlimited.frontier)
    assert least == 5.5, "the fastest model of one subblock: a linear attention"


def test_the_empty_model_is_offered_where_something_lies_outside() -> None:
    record = find_architecture(builder({"block_time": "60%"}, search={"frontier_points": 9}))
    assert record.frontier[0].architecture.layers == (EMPTY_BLOCK,) * LAYERS


def test_a_model_of_no_time_has_an_unbounded_rate_and_can_be_printed() -> None:
    asked = request({"parameters": "1params", "throughput": "60 tok/s"})
    record = find_architecture(ProblemBuilder(asked, scores(), NOTHING_OUTSIDE))
    assert record.best.architecture.layers == (EMPTY_BLOCK,) * LAYERS
    use = next(use for use in record.best.limits if use.name == "throughput")
    assert (use.usage, use.share) == (None, None)
    assert "no bound" in answer_text(record)


def test_a_share_of_a_rate_that_is_unbounded_is_refused() -> None:
    free = CostTable(tuple(CostRow(part, {"runtime_ms": 0.0, "parameters": p}) for part, (p, *_) in HALVES.items()))
    with pytest.raises(SpecError, match=r"throughput of scenario chat is 160% of the parent's value, which is 0"):
        ProblemBuilder(request({"throughput": "160%"}), scores(), free).problem({"chat": 1})


COUNTED = {
    "attention_layers": lambda blocks: sum(block.attention.kv_heads > 0 for block in blocks),
    "kv_heads": lambda blocks: sum(block.attention.kv_heads for block in blocks),
    "attn:linear": lambda blocks: sum(str(block.attention) == "attn:linear" for block in blocks),
    "attn:kv4": lambda blocks: sum(str(block.attention) == "attn:kv4" for block in blocks),
    "attn:kv": lambda blocks: sum(block.attention.kv_heads > 0 for block in blocks),
    "ffn:i": lambda blocks: sum(block.ffn.ffn_width > 0 for block in blocks),
}


@pytest.mark.parametrize(
    ("limits", "name", "most"),
    [
        ({"attention_layers": 2}, "attention_layers", 2),
        ({"attention_layers": "50%"}, "attention_layers", 2),
        ({"attention_layers": "2 layers"}, "attention_layers", 2),
        ({"kv_heads": 7}, "kv_heads", 7),
        ({"kv_heads": "50%"}, "kv_heads", 8),
        ({"counts": {"attn:kv4": 1}}, "attn:kv4", 1),
        ({"counts": {"attn:kv": "75%"}}, "attn:kv", 3),
        ({"counts": {"ffn:i": 3}}, "ffn:i", 3),
        ({"kv_bytes_per_token": "8B", "counts": {"attn:linear": 1}}, "attn:linear", 1),
    ],
)
def test_counts_are_limits(limits: dict[str, Any], name: str, most: int) -> None:
    """Every count holds and costs something, and its use is the count of the architecture."""
    other = {key: value for key, value in limits.items() if key == "kv_bytes_per_token"} or {"block_time": "100%"}
    loose, record = find_architecture(builder(other)).best, find_architecture(builder(limits))
    use = next(use for use in record.best.limits if use.name == name)
    assert use.usage == COUNTED[name](record.best.architecture.layers)
    assert use.usage <= use.threshold == most
    assert COUNTED[name](loose.architecture.layers) > most
    assert record.best.score > loose.score
    price = next(price for price in record.prices if price.limit == name)
    assert price.step == 1


def test_a_count_that_cannot_hold_says_what_can_be_had() -> None:
    text = r"ffn:no_op was 1, and at least 3 layers .* can be had with the others held"
    with pytest.raises(InfeasibleError, match=text):
        find_architecture(builder({"parameters": "1050params", "counts": {"ffn:no_op": 1}}))


def test_layers_that_a_block_spans_count_as_empty() -> None:
    layers = [dict(layer) for layer in scores().layers]
    layers[1][Option(OWN, 2)] = 0.25
    table = ScoreTable(PARENT, tuple(layers))
    asked = {"block_time": "75%", "attention_layers": 3}
    record = find_architecture(ProblemBuilder(request(asked), table, costs()))
    assert record.best.architecture.spans == ((1, 2),)
    assert next(use.usage for use in record.best.limits if use.name == "attention_layers") == 3
    no_empty = request({"block_time": "75%", "counts": {"attn:no_op": "1 layers", "ffn:no_op": 1}})
    assert find_architecture(ProblemBuilder(no_empty, table, costs())).best.architecture.spans == ((1, 2),)


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"attention_layers": "4.5"}, "'4.5' is no whole number"),
        ({"kv_heads": "80GiB"}, "unit 'GiB'; use one of: no unit, layers, heads, %"),
        ({"counts": {"attn:mamba": 3}}, "'attn:mamba' is no variant id"),
        ({"counts": {"attn:kv4": 1}, "columns": {"attn:kv4": "50%"}}, "outside `columns`"),
    ],
)
def test_bad_counts_are_refused(limits: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        request(limits)


def test_a_share_of_a_kind_that_the_parent_lacks_is_refused() -> None:
    with pytest.raises(SpecError, match=r"ffn:no_op of scenario chat is 50% .* which is 0: give a number"):
        builder({"counts": {"ffn:no_op": "50%"}}).problem({"chat": 1})


def test_the_answer_comes_before_its_explanations() -> None:
    seen = []
    asked = {"throughput": "60 tok/s"}
    record = find_architecture(builder(asked, search={"baselines": ["greedy"]}), seen.append)
    (answer,) = seen
    assert answer.solutions == record.solutions
    assert (answer.frontier, answer.baselines, answer.prices, answer.runner_ups) == ((), (), (), ())
    assert all((record.frontier, record.baselines, record.prices, record.runner_ups))
    text = explanation_text(record)
    assert all(title in text for title in ("What a looser limit gains", "Runners-up", "greedy"))
    assert "Limits" in answer_text(answer)


def test_other_ways_to_choose_are_searched_over_the_same_problem() -> None:
    names = ("mip_no_op_only", "mip_lm_loss", "greedy", "uniform", "random", "maximise_parameters")
    table = scores()
    # By the next-token loss, the last layers are the fragile ones, as they are the first by the score.
    lm_loss = tuple(
        {option: (LAYERS - layer) * s for option, s in found.items()} for layer, found in enumerate(table.layers)
    )
    asked = request({"block_time": "60%", "memory": "95%"}, search={"baselines": names})
    record = find_architecture(ProblemBuilder(asked, ScoreTable(table.parent, table.layers, "kl", lm_loss), costs()))
    found = {baseline.method: baseline for baseline in record.baselines}
    assert {*found, *(name.removeprefix("baseline ") for name in record.omissions)} == set(names)
    assert all(baseline.score >= record.best.score for baseline in found.values())
    kinds = {half for block in found["mip_no_op_only"].architecture.layers for half in (block.attention, block.ffn)}
    assert all(half in (OWN.attention, OWN.ffn) or half.kind == "no_op" for half in kinds)
    assert found["mip_lm_loss"].architecture != record.best.architecture

    def lost(architecture: Architecture) -> float:
        return sum(lm_loss[layer][Option(block)] for layer, block in enumerate(architecture.layers))

    assert lost(found["mip_lm_loss"].architecture) < lost(record.best.architecture)
    without = find_architecture(builder({"block_time": "60%"}, search={"baselines": ["mip_lm_loss"]}))
    assert "no increase of the next-token loss" in without.omissions["baseline mip_lm_loss"]


SERVED_ON = {"devices": "2 x abacus", "memory": "9000B"}


def test_the_memory_of_the_target_is_a_limit_that_another_may_tighten():
    held = builder({"parameters": "100Gparams"}, served_on=SERVED_ON)
    limits = {limit.name: limit.capacity for limit in held.problem({"chat": 2}).limits}
    assert limits["chat/target_memory"] == 9000 - 4000
    record = find_architecture(held)
    assert record.best.prediction.memory_bytes <= 9000 < record.parent.memory_bytes
    assert find_architecture(builder({"parameters": "100Gparams"})).best.score == 0 < record.best.score
    tighter = find_architecture(builder({"memory": "6000B"}, served_on=SERVED_ON))
    assert tighter.best.prediction.memory_bytes <= 6000
    with pytest.raises(InfeasibleError, match="target_memory"):
        check_feasible(builder({"parameters": "100Gparams"}, served_on=SERVED_ON | {"memory": "3000B"}))


def test_an_optimistic_reservation_holds_the_mean_context():
    chat = {"chat": 2}
    whole = builder({"memory": "9000B"}, served_on=SERVED_ON).predict(PARENT, chat)["chat"]
    mean = builder({"memory": "9000B"}, served_on=SERVED_ON | {"reservation": "optimistic"}).predict(PARENT, chat)
    assert whole.memory_bytes - mean["chat"].memory_bytes == 2 * 5.5 * LAYERS * 8


def test_more_sequences_than_the_engine_takes_are_refused():
    with pytest.raises(SpecError, match="has batch size 2, and the engine on 2 x abacus takes 1 sequences"):
        builder({"memory": "9000B"}, served_on=SERVED_ON | {"max_sequences": 1}, scenario={"batch_sizes": [1, 2]})


def test_under_continuous_batching_a_token_shares_the_prefills_of_others():
    """By hand: a token is the whole run over its tokens; a first token one prompt, its wait, and a step."""
    limits = {"time_per_output_token": "20ms", "time_to_first_token": "1s"}
    continuous = {"batching": "continuous"}
    token, first = builder(limits, scenario=continuous).limit_uses(PARENT, {"chat": 2})
    names = {use.name: use for use in (token, first)}
    prefill, decode = 2 * (LAYERS * 6 + 1), LAYERS * 50 * 2**0.5 + 10
    assert names["time_per_output_token"].usage == pytest.approx((prefill + decode) / 11)
    busy = prefill / (prefill + decode)
    expected = (1 + busy / (2 * (1 - busy))) * prefill / 2 + decode / 10
    assert names["time_to_first_token"].usage == pytest.approx(expected)
    static = {use.name: use.usage for use in builder(limits).limit_uses(PARENT, {"chat": 2})}
    assert static == {
        "time_per_output_token": pytest.approx(decode / 10),
        "time_to_first_token": pytest.approx(prefill),
    }


def test_the_search_says_how_far_its_costs_are_from_measurements():
    record = find_architecture(builder({"memory": "9000B"}, served_on=SERVED_ON | {"accuracy": "within 4 %"}))
    assert "Computed costs: within 4 %." in answer_text(record)
