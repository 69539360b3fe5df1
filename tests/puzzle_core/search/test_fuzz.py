"""Requests and tables of every kind: each ends in an answer that trying all architectures confirms, or in an error.

PUZZLE_FUZZ multiplies the number of examples: 4 gives 2,000.
"""

import csv
import io
import json
import os
from contextlib import suppress
from itertools import product
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puzzle_core.errors import InfeasibleError, PuzzleError
from puzzle_core.report.search_text import answer_text
from puzzle_core.search.from_tables import read_request, search_tables
from puzzle_core.search.problem import Problem
from puzzle_core.search.problem_builder import ProblemBuilder
from puzzle_core.search.run_search import combinations_of, find_architecture
from puzzle_core.search.table_files import read_costs, read_scores
from puzzle_core.spec import SearchRequest
from puzzle_core.yaml_file import parse_record

SETTINGS: dict[str, Any] = {"database": None, "deadline": None, "derandomize": True}
SETTINGS["suppress_health_check"] = list(HealthCheck)
TIMES = int(os.environ.get("PUZZLE_FUZZ", "1"))
ATTENTIONS, FFNS = ("kv8", "kv4", "linear", "no_op"), ("i512", "i256", "no_op")
COLUMNS = ("parameters", "parameter_bytes", "kv_bytes_per_token", "prefill_ms", "decode_ms", "energy_mj")

magnitudes = st.sampled_from([0.0, 0.0, 1.0, 1.0, 2.0, 3.0, 0.1, 1e-30, 1e-12, 1e-9, 1e-6, 1e6, 1e9, 1e12, 1e15, 1e30])
amounts = st.one_of(magnitudes, st.integers(0, 9).map(float), st.floats(1e-3, 1e3))
shares = st.sampled_from(["100%", "100%", "100%", "90%", "60%", "99.9999999%", "120%", "1e9%", "1e-9%"])


def quantities(unit: str) -> st.SearchStrategy[str]:
    numbers = st.one_of(magnitudes.filter(bool), st.floats(1e-3, 1e6)).map(lambda amount: f"{amount:g}{unit}")
    return st.one_of(shares, shares, shares, numbers)


LIMITS = {
    "memory": quantities("B"),
    "parameters": quantities("params"),
    "active_parameters": quantities("params"),
    "kv_bytes_per_token": quantities("kB"),
    "throughput": quantities(" tok/s"),
    "time_to_first_token": quantities("ms"),
    "time_per_output_token": quantities("us"),
    "latency": quantities("ms"),
    "block_time": shares,
    "block_decode_time": shares,
    "energy_mj": quantities("mJ"),
    "attention_layers": st.sampled_from(["1", "2", "100%", "60%"]),
    "kv_heads": st.sampled_from(["4", "8", "16", "100%", "60%"]),
}
"""A text for each limit, most of them readable."""


@st.composite
def limits(draw: st.DrawFn) -> dict[str, str]:
    names = draw(st.lists(st.sampled_from([*LIMITS]), min_size=1, max_size=2, unique=True))
    return {name: draw(LIMITS[name]) for name in names}


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """A request in which every key is known and every value readable."""
    counts = st.sampled_from([1, 2, 128, 10**9])
    scenarios = [
        {
            "name": name,
            "prompt_tokens": draw(counts),
            "generated_tokens": draw(counts),
            "batch_sizes": draw(st.lists(counts, min_size=1, max_size=2)),
            "weight": draw(st.sampled_from([1.0, 1e-6, 1e6])),
            "limits": draw(limits()),
        }
        for name in draw(st.sampled_from([["chat"], ["chat"], ["mix", "outside"]]))
    ]
    constraints = {
        "linear": draw(st.booleans()),
        "max_ffn_widths": draw(st.sampled_from([None, 1, 10**9])),
        "uniform_kv_heads": draw(st.booleans()),
        "keep": {"attention": draw(st.sampled_from([[], [0], [-1]]))},
    }
    search = {
        "frontier_points": 2,
        "frontier_limit": draw(st.sampled_from([None, None, next(iter(scenarios[0]["limits"]))])),
        "solutions": draw(st.sampled_from([1, 1, 2])),
        "explain": draw(st.booleans()),
        "baselines": draw(st.sampled_from([[], ["greedy", "uniform", "random", "maximise_parameters", "mip_lm_loss"]])),
    }
    mix = draw(st.sampled_from([None, None, {"latency": "90%"}, {"throughput": "110%"}]))
    more = {"mix": mix} if mix else {}
    return {
        "scenario": scenarios[0],
        "more_scenarios": scenarios[1:],
        "search": search,
        "constraints": constraints,
    } | more


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of scores and of costs that are whole, with numbers of every size."""
    own = {"attention": ATTENTIONS[0], "ffn": FFNS[0]}
    blocks = st.fixed_dictionaries({"attention": st.sampled_from(ATTENTIONS), "ffn": st.sampled_from(FFNS)})
    scores = []
    layers = draw(st.integers(1, 3))
    for layer in range(layers):
        others = draw(st.lists(blocks, max_size=3, unique_by=lambda block: tuple(block.values())))
        spans = draw(st.sampled_from([1, 1, 1, 2])) if layer + 2 <= layers else 1
        for block in [own, *(other for other in others if other != own)]:
            span = {"span": spans if block is not own else 1}
            scores.append({"layer": layer, **block, "kl": draw(amounts)} | span)
    columns = draw(st.sampled_from([COLUMNS, COLUMNS, (*COLUMNS, "memory_bytes"), COLUMNS[:3]]))
    outside = st.sampled_from([0.0, 0.0, 0.0, 1.0, 1.0, 1e6])
    parts = [("attn", name) for name in ATTENTIONS] + [("ffn", name) for name in FFNS] + [("outside", "")]
    scopes = draw(st.lists(st.sampled_from([{"layer": 0}, {"batch_size": 2}, {"scenario": "mix"}]), max_size=1))
    costs = [
        {"subblock": subblock, "variant": variant, **scope}
        | {column: draw(amounts if variant else outside) for column in columns}
        for scope in [{}, *scopes]
        for subblock, variant in parts
    ]
    return scores, costs


def as_csv(rows: list[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def feasible_scores(problem: Problem, tolerance: float) -> list[float]:
    """The score of every choice that holds limits and rules."""
    choices = product(*(range(len(ids)) for ids in problem.options))
    return [problem.total_score(choice) for choice in choices if problem.feasible(choice, tolerance)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=112 * TIMES, **SETTINGS)
@given(rows=tables(), content=requests())
def test_every_readable_request_has_the_best_answer_or_an_error(place, rows, content):
    scores, costs = (place / name for name in ("scores.csv", "costs.csv"))
    for file, part in zip((scores, costs), rows, strict=True):
        file.write_text(as_csv(part))
    request = parse_record(SearchRequest, content, "request", "scenario")
    builder = None
    try:
        builder = ProblemBuilder(request, read_scores(scores, distance=True), read_costs(costs))
        record = find_architecture(builder)
    except InfeasibleError:
        assert builder is not None
        for batch_sizes in combinations_of(builder):
            assert not feasible_scores(builder.problem(batch_sizes), -1e-6)
        return
    except PuzzleError:
        return
    assert answer_text(record)
    best = min(
        (score for sizes in combinations_of(builder) for score in feasible_scores(builder.problem(sizes), -1e-6)),
        default=np.inf,
    )
    least = min(sum(float(values.min()) for values in builder.problem(record.batch_sizes).score), record.best.score)
    assert record.best.score <= best + 1e-5 * max(best - least, 0.0) + 1e-12 * abs(best)
    assert all(use.usage <= use.threshold * (1 + 1e-6) for use in record.best.limits if use.sense == "at_most")


cells = st.one_of(
    st.sampled_from(["", " ", "0", "1", "-1", "1.5", "kv4", "attn:kv4", "ffn:i256", "no_op", "outside", "attn", "ffn"]),
    st.sampled_from(
        ["nan", "inf", "1e400", "1e-300", "9" * 50, "0x10", "1_0", "chat", "é", "\ud800", "a\nb", '"', "\0"]
    ),
    st.text(max_size=5),
)
values = st.one_of(
    cells,
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(10**300, 10**320),
    st.floats(),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)
names = st.one_of(
    st.sampled_from(
        ["layer", "attention", "ffn", "span", "score", "subblock", "variant", "batch_size", "scenario", "ms"]
    ),
    st.sampled_from(["", " ", "decode_ms", "prefill_ms", "parameters", "memory_bytes"]),
    st.text(max_size=4),
)


@settings(max_examples=250 * TIMES, **SETTINGS)
@given(
    columns=st.lists(names, max_size=7),
    rows=st.lists(st.lists(values, max_size=7), max_size=3),
    ending=st.sampled_from([".csv", ".json", ".json"]),
    maximise=st.booleans(),
)
def test_every_table_is_read_or_refused(place, columns, rows, ending, maximise):
    file = place / f"table{ending}"
    if ending == ".csv":
        text = "\n".join(",".join(map(str, cells)) for cells in [columns, *rows])
    else:
        text = json.dumps([dict(zip(columns, cells, strict=False)) for cells in rows])
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    for read in (lambda: read_scores(file, maximise=maximise), lambda: read_costs(file)):
        with suppress(PuzzleError):
            read()


@settings(max_examples=75 * TIMES, **SETTINGS)
@given(content=st.binary(max_size=60) | st.text(alphabet='[]{}:,"0aé\n ', max_size=60).map(str.encode))
def test_every_file_is_read_or_refused(place, content):
    for ending in (".csv", ".json", ".parquet", ".yaml"):
        file = place / f"file{ending}"
        file.write_bytes(content)
        with suppress(PuzzleError):
            read_request([file]) if ending == ".yaml" else read_costs(file)


@st.composite
def spoilt(draw: st.DrawFn) -> Any:
    """A request with one part replaced, renamed or taken away."""
    content = draw(requests())
    place = content
    while True:
        key = draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or not place[key] or draw(st.booleans()):
            break
        place = place[key]
    action = draw(st.sampled_from(["replace", "replace", "rename", "remove"]))
    value = place.pop(key) if action != "replace" else None
    if action == "replace":
        place[key] = draw(values | st.sampled_from([10**12, -1, 1e300, 1e-300, [], {}, [1] * 2000]))
    elif action == "rename":
        place[draw(names | st.sampled_from([key + "s", key[:-1], key.upper()]))] = value
    return content


@settings(max_examples=63 * TIMES, **SETTINGS)
@given(content=spoilt())
def test_every_request_is_read_or_refused(place, content):
    file = place / "request.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    (place / "scores.csv").write_text("layer,attention,ffn,kl\n0,kv8,i512,0\n0,kv8,i256,1\n")
    rows = ["subblock,variant,decode_ms,prefill_ms,parameters,parameter_bytes,kv_bytes_per_token,energy_mj"]
    rows += ["attn,kv8,1,1,1,2,3,4", "ffn,i512,3,3,3,3,0,3", "ffn,i256,1,1,1,2,0,2"]
    (place / "costs.csv").write_text("\n".join(rows))
    with suppress(PuzzleError):
        search_tables(place / "scores.csv", place / "costs.csv", read_request([file]), place / "out")
