"""Search from files: every format, units, and each way a table can be wrong, named by row and column."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from puzzle_core.architecture import Architecture, BlockVariant
from puzzle_core.errors import CoverageError, InfeasibleError, PuzzleError, SpecError, StorageError
from puzzle_core.report.search_text import answer_text
from puzzle_core.search.from_tables import read_request, search_tables
from puzzle_core.search.search_record import SearchRecord
from puzzle_core.search.table_files import read_costs, read_scores
from puzzle_core.search.tables import Option

SCORES = """layer,attention,ffn,score
0,kv4,i512,0
0,kv4,i256,1
0,no_op,i512,2
1,kv4,i512,0
1,kv4,i256,0.5
1,no_op,i512,4
"""
COSTS = """subblock,variant,batch_size,parameters,decode_ms,prefill_ms
attn,kv4,,100,,
attn,no_op,,0,,
ffn,i512,,200,,
ffn,i256,,100,,
outside,,,50,,
attn,kv4,8,,10,1
attn,no_op,8,,0,0
ffn,i512,8,,20,2
ffn,i256,8,,10,1
outside,,8,,5,1
"""
SCENARIO = {"name": "chat", "prompt_tokens": 8, "generated_tokens": 9, "batch_sizes": [8]}


def write(place: Path, scores: str = SCORES, costs: str = COSTS, limits: Any = None, **more: Any) -> tuple[Path, ...]:
    (place / "scores.csv").write_text(scores)
    (place / "costs.csv").write_text(costs)
    scenario = SCENARIO | {"limits": limits or {"latency": "62ms"}} | more
    (place / "scenario.yaml").write_text(yaml.safe_dump(scenario))
    return place / "scores.csv", place / "costs.csv", place / "scenario.yaml"


def search(place: Path, **options: Any) -> SearchRecord:
    scores, costs, scenario = write(place, **options)
    return search_tables(scores, costs, read_request([scenario]), place / "out")


def test_the_best_of_a_table_that_can_be_counted_by_hand(tmp_path: Path) -> None:
    # The parent takes 6 + 2 * 33 = 72 ms; one i256 saves 11 ms, one no-op attention too: the cheapest way down is 0.5.
    record = search(tmp_path)
    assert [str(block) for block in record.best.architecture.layers] == ["attn:kv4+ffn:i512", "attn:kv4+ffn:i256"]
    assert (record.best.score, record.best.optimal) == (0.5, True)
    assert record.best.prediction.total_ms == 61
    out = tmp_path / "out"
    assert SearchRecord.read(out / "search.json") == record
    assert Architecture.read(out / "architecture.json") == record.best.architecture
    frontier = pd.read_csv(out / "frontier.csv")
    assert frontier["score"].is_monotonic_decreasing
    assert frontier["chat/runtime_ms"].is_monotonic_increasing


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_other_formats_give_the_same_answer(tmp_path: Path, suffix: str) -> None:
    scores, costs, scenario = write(tmp_path)
    plain = search_tables(scores, costs, read_request([scenario]), tmp_path / "plain")
    for table in (scores, costs):
        frame = pd.read_csv(table)
        if suffix == ".json":
            frame.to_json(table.with_suffix(suffix), orient="records")
        else:
            frame.to_parquet(table.with_suffix(suffix))
    again = search_tables(
        scores.with_suffix(suffix), costs.with_suffix(suffix), read_request([scenario]), tmp_path / "again"
    )
    assert again.best.architecture == plain.best.architecture
    assert again.best.limits == plain.best.limits


def test_block_rows_and_layer_rows_win_over_subblock_rows(tmp_path: Path) -> None:
    rows = [line.split(",") for line in COSTS.splitlines()[1:]]
    lines = ["subblock,variant,attention,ffn,layer,batch_size,parameters,decode_ms,prefill_ms"]
    lines += [",".join([*row[:2], "", "", "", *row[2:]]) for row in rows]
    lines.append(",,kv4,i256,1,8,,90,9")
    record = search(tmp_path, costs="\n".join(lines))
    assert str(record.best.architecture.layers[1]) != "attn:kv4+ffn:i256", "it is dear in layer 1 now"


def test_larger_scores_may_be_better(tmp_path: Path) -> None:
    scores, costs, scenario = write(tmp_path, scores=SCORES.replace("score", "accuracy"))
    frame = pd.read_csv(scores)
    frame["accuracy"] = 10 - frame["accuracy"]
    frame["seconds"] = 1.0
    frame.to_csv(scores, index=False)
    with pytest.raises(PuzzleError, match=r"which column is the score.*accuracy, seconds"):
        search_tables(scores, costs, read_request([scenario]), tmp_path / "out")
    record = search_tables(scores, costs, read_request([scenario]), tmp_path / "out", score="accuracy", maximise=True)
    assert str(record.best.architecture.layers[1]) == "attn:kv4+ffn:i256"
    assert record.best.score == -19.5


def test_the_parent_is_the_widest_or_the_one_that_is_named(tmp_path: Path) -> None:
    scores, _, _ = write(tmp_path)
    assert str(read_scores(scores).parent.layers[0]) == "attn:kv4+ffn:i512"
    named = BlockVariant.parse("attn:kv4+ffn:i256")
    assert set(read_scores(scores, parent=named).parent.layers) == {named}


@pytest.mark.parametrize(
    ("scores", "costs", "message"),
    [
        (SCORES.replace("0,kv4,i256,1", "0,kv4,i256,"), COSTS, "scores.csv line 3, column score is empty"),
        (SCORES.replace("0,kv4,i256,1", "0,kv4,i256,much"), COSTS, "column score: 'much' is no number"),
        (SCORES.replace("0,kv4,i256,1", "0,kv4,i256,inf"), COSTS, "scores.csv line 3, column score is inf"),
        (SCORES + "1,kv4,i256,2\n", COSTS, r"scores.csv line 8: layer 1 attn:kv4\+ffn:i256 was scored before.*line 6"),
        (SCORES.replace("0,kv4,i256", "0,q4,i256"), COSTS, "scores.csv line 3: 'attn:q4' is no variant id"),
        (SCORES.replace("1,kv4,i512,0\n1,kv4,i256,0.5\n1", "2"), COSTS, r"no scores of layers \[1\]"),
        (SCORES.replace("layer", "depth"), COSTS, "scores.csv has no column 'layer'"),
        (SCORES.replace("0,kv4,i256", "0.5,kv4,i256"), COSTS, "column layer: 0.5 is no layer"),
        (SCORES, COSTS.replace("ffn,i256,8,,10,1\n", ""), "no decode_ms of ffn:i256|no prefill_ms of ffn:i256"),
        (SCORES, COSTS.replace("ffn,i256,8,,10,1", "ffn,i256,8,,-10,1"), "decode_ms of ffn:i256,.*line 10.* is -10"),
        (SCORES, COSTS + "ffn,i256,8,,11,1\n", "decode_ms of ffn:i256.*line 12.*given twice.*line 10"),
        (SCORES, COSTS.replace("ffn,i256,8,,10,1", "ffn,i256,8,,nan?,1"), "costs.csv line 10, column decode_ms: 'nan"),
        (SCORES, COSTS.replace("decode_ms", "decoding"), "limit latency of scenario chat needs the column runtime_ms"),
        (SCORES, COSTS.replace("ffn,i256,8", ",,8"), "costs.csv line 10 is about nothing"),
        (SCORES, "subblock,variant\nattn,kv4\n", "has no cost column"),
        ("", COSTS, "cannot read the table"),
    ],
)  # fmt: skip
def test_bad_tables_are_refused_by_row_and_column(tmp_path: Path, scores: str, costs: str, message: str) -> None:
    with pytest.raises(PuzzleError, match=f"(?s){message}"):
        search(tmp_path, scores=scores, costs=costs)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"latency": 60}, "limits.latency.*'60' has no unit"),
        ({"memory": 78_000}, "'78000' has no unit"),
        ({"latencies": "60ms"}, "latencies: unknown key; did you mean 'latency'"),
        ({"columns": {"heat": "60%"}}, "needs the column heat"),
        ({"columns": {"parameters_used": "60"}}, "only be a share"),
    ],
)
def test_bad_limits_are_refused(tmp_path: Path, limits: dict[str, Any], message: str) -> None:
    with pytest.raises(PuzzleError, match=f"(?s){message}"):
        search(tmp_path, limits=limits)


def test_infeasible_says_what_can_be_had(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError, match=r"latency was 20ms, and at least 50\.0ms"):
        search(tmp_path, limits={"latency": "20ms"})
    assert search(tmp_path, limits={"latency": "50.0ms"}).best.prediction.total_ms == 50


def test_scenarios_of_several_files_hold_together(tmp_path: Path) -> None:
    scores, costs, first = write(tmp_path)
    second = tmp_path / "rag.yaml"
    second.write_text(yaml.safe_dump({"name": "rag", "batch_sizes": [8], "limits": {"parameters": "500params"}}))
    request = read_request([first, second])
    assert [scenario.name for scenario in request.scenarios] == ["chat", "rag"]
    record = search_tables(scores, costs, request, tmp_path / "out")
    assert record.best.prediction.parameters <= 500
    run_spec = tmp_path / "run.yaml"
    content = yaml.safe_load(first.read_text())
    run_spec.write_text(yaml.safe_dump({"parent": {"path": "x"}, "scenario": content, "constraints": {"no_op": False}}))
    assert read_request([run_spec]).constraints.no_op is False


def test_an_old_key_is_refused_with_the_new_name(tmp_path: Path) -> None:
    *_, scenario = write(tmp_path)
    content = {"scenario": yaml.safe_load(scenario.read_text()), "form": {"no_op": False}}
    scenario.write_text(yaml.safe_dump(content))
    with pytest.raises(SpecError, match="form: `form` is now `constraints`"):
        read_request([scenario])


def test_the_command_imports_neither_torch_nor_prefect_nor_mlflow(tmp_path: Path) -> None:
    scores, costs, scenario = write(tmp_path)
    probe = (
        "import sys, json; from flows.cli.main import main; code = main(sys.argv[1:]); "
        "sys.stderr.write(json.dumps([code, [m for m in ('torch', 'prefect', 'mlflow') if m in sys.modules]]))"
    )
    command = [sys.executable, "-c", probe, "search", "--scores", str(scores), "--costs", str(costs)]
    command += ["--scenario", str(scenario), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stderr.splitlines()[-1]) == [0, []]
    titles = ["Architectures within the limits", "Layers", "What a looser limit gains", "Runners-up", "answer: "]
    places = [done.stdout.index(title) for title in titles]
    assert places == sorted(places), "the answer first"


def test_a_cost_table_names_its_columns(tmp_path: Path) -> None:
    _, costs, _ = write(tmp_path)
    assert read_costs(costs).columns == {"parameters", "decode_ms", "prefill_ms"}


@pytest.mark.parametrize("ending", [".csv", ".json", ".parquet"])
@pytest.mark.parametrize("name", ["chat", "1024", "1e3", "007", "NA", "null", "2024-01-01", "True"])
def test_names_of_scenarios_that_look_like_something_else(tmp_path, name, ending):
    rows = [
        {"subblock": "ffn", "variant": "i8", "scenario": scenario, "runtime_ms": ms}
        for scenario, ms in ((None, 1.0), (name, 10.0))
    ]
    frame, file = pd.DataFrame(rows), tmp_path / f"costs{ending}"
    {".csv": frame.to_csv, ".parquet": frame.to_parquet}.get(ending, lambda f, **_: frame.to_json(f, orient="records"))(
        file, index=False
    )
    general, special = read_costs(file).rows
    assert (general.scenario, special.scenario) == (None, name)


def test_whole_numbers_in_a_column_with_gaps_are_names_without_a_point(tmp_path):
    file = tmp_path / "costs.json"
    row = {"subblock": "ffn", "variant": "i8", "ms": 1}
    file.write_text(json.dumps([row | {"scenario": 1024}, row]))
    assert [row.scenario for row in read_costs(file).rows] == ["1024", None]


def test_a_layer_beyond_all_models_is_refused_and_not_listed(tmp_path):
    (tmp_path / "scores.csv").write_text("layer,attention,ffn,kl\n50000000,kv8,i8,0\n")
    with pytest.raises(SpecError, match="has a layer 50,000,000"):
        read_scores(tmp_path / "scores.csv")


@pytest.mark.parametrize("maximise", [False, True])
def test_an_absolute_score_needs_the_parents_own(tmp_path, maximise):
    (tmp_path / "scores.csv").write_text("layer,attention,ffn,lm_loss\n0,kv8,i8,2.1\n0,kv8,i4,2.2\n1,kv8,i4,2.3\n")
    with pytest.raises(CoverageError, match=r"no lm_loss of the parent's own block attn:kv8\+ffn:i8 in layers \[1\]"):
        read_scores(tmp_path / "scores.csv", maximise=maximise)


def test_the_parent_of_a_distance_scores_0(tmp_path):
    (tmp_path / "scores.csv").write_text("layer,attention,ffn,kl\n0,kv8,i8,0\n0,kv8,i4,0.2\n1,kv8,i4,0.3\n")
    table = read_scores(tmp_path / "scores.csv", distance=True)
    assert [scores[Option(table.parent.layers[0])] for scores in table.layers] == [0, 0]
    with pytest.raises(SpecError, match="give --distance or --maximise"):
        read_scores(tmp_path / "scores.csv", distance=True, maximise=True)


@pytest.mark.parametrize(
    ("asked", "written", "alike"),
    [
        ("1024", "1024.0", True),  # as pandas writes a column that has an empty cell
        ("1000", "1e3", True),
        ("chat", "Chat", True),
        ("long-chat", "long chat", True),
        ("long_chat", "long-chat", True),
        ("chat", "chat2", False),
        ("1024", "2048", False),
        ("nan", "NaN", True),
    ],
)
def test_rows_of_a_scenario_in_another_spelling_are_refused_and_not_left_out(tmp_path, asked, written, alike):
    """A row for all scenarios would be taken in their place, in silence."""
    named = [f"{row}," for row in COSTS.splitlines()]
    special = named[-1].split(",")
    special[-1] = written
    costs = "\n".join([named[0] + "scenario", *named[1:], ",".join(special)])
    scores, table, scenario = write(tmp_path, costs=costs, name=asked)
    if alike:
        with pytest.raises(SpecError, match=f"for scenario '{written}', and the search is for '{asked}'"):
            search_tables(scores, table, read_request([scenario]), tmp_path / "out")
    else:
        search_tables(scores, table, read_request([scenario]), tmp_path / "out")


def test_a_scenario_called_mix_is_a_scenario(tmp_path: Path) -> None:
    rows = [line for line in COSTS.splitlines() if "," in line]
    named = [rows[0] + ",scenario", *(f"{row}," for row in rows[1:])]
    dear = [
        f"{subblock},{variant},8,,{ms},0,mix" for subblock, variant, ms in (("ffn", "i256", 15), ("ffn", "i512", 20))
    ]
    scores, costs, first = write(tmp_path, costs="\n".join(named + dear), name="mix", limits={"latency": "64ms"})
    second = tmp_path / "rag.yaml"
    second.write_text(yaml.safe_dump(SCENARIO | {"name": "rag"}))
    record = search_tables(scores, costs, read_request([first, second]), tmp_path / "out")
    assert [(use.scenario, use.usage) for use in record.best.limits] == [("mix", 63.0)]  # the mix of both takes 62 ms


def test_columns_of_a_users_table_stand_beside_the_other_limits(tmp_path: Path) -> None:
    record = search(tmp_path, limits={"latency": "62ms", "decode_ms": "60ms", "parameters": "100%"})
    assert {use.name for use in record.best.limits} == {"latency", "decode_ms", "parameters"}
    with pytest.raises(SpecError, match="decode_ms: given here and under `columns`"):
        search(tmp_path, limits={"decode_ms": "60ms", "columns": {"decode_ms": "50ms"}})
    with pytest.raises(
        SpecError, match=r"limits\.heat: unknown key; .*a column of the cost table goes under `columns`"
    ):
        search(tmp_path, limits={"heat": "60%"})


def test_a_misspelt_key_beside_a_scenario_is_refused(tmp_path: Path) -> None:
    *_, scenario = write(tmp_path)
    content = {"scenario": yaml.safe_load(scenario.read_text()), "constraint": {"no_op": False}, "bld": {"tokens": 9}}
    scenario.write_text(yaml.safe_dump(content))
    with pytest.raises(SpecError, match=r"constraint: unknown key; did you mean 'constraints'\?$"):
        read_request([scenario])
    scenario.write_text("name: chat\nlimits: {latency: 62ms}\nlimits: {latency: 99ms}\n")
    with pytest.raises(SpecError, match="the key 'limits' is there twice"):
        read_request([scenario])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"search": {"frontier_points": 10**12}}, "search.frontier_points: .*less than or equal to 1000"),
        ({"search": {"solutions": 10**9}}, "search.solutions: .*less than or equal to 1000"),
        ({"scenario": SCENARIO | {"name": 1024}}, r"scenario.name: .*: put it in quotes \(found 1024\)"),
        ({"search": {"alpha": 1}}, "search.alpha: .*less than 1"),
        ({"scenario": SCENARIO | {"batch_sizes": [*range(1, 1002)]}}, "1,001 combinations.*at most 1,000"),
        ({"scenario": SCENARIO | {"prompt_tokens": 10**400}}, "scenario.prompt_tokens: "),
        ({"scenario": SCENARIO | {"limits": {"latency": "1e400ms"}}}, "'1e400ms' is not between 1e-30 and 1e"),
    ],
)
def test_sizes_are_checked_before_the_work(tmp_path: Path, asked: dict[str, Any], message: str) -> None:
    *_, scenario = write(tmp_path)
    scenario.write_text(yaml.safe_dump({"scenario": SCENARIO | {"limits": {"latency": "62ms"}}} | asked))
    with pytest.raises(SpecError, match=message):
        read_request([scenario])


def test_a_file_in_the_place_of_the_answer_is_refused_before_the_search(tmp_path, monkeypatch):
    scores, costs, scenario = write(tmp_path)
    monkeypatch.setattr("puzzle_core.search.from_tables.find_architecture", lambda builder: pytest.fail("searched"))
    for out in (scores, scores / "below"):
        with pytest.raises(StorageError, match=f"{out} should be a directory, and is or lies below a file"):
            search_tables(scores, costs, read_request([scenario]), out)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        (COSTS.replace("ffn,i256,8,,10,1", "ffn,i256,8,,1e-300,1"), "decode_ms is 1e-300: numbers lie between"),
        (COSTS.replace("ffn,i256,8,,10,1", "ffn,i256,8,,10,1,7"), "line 10 has 7 cells, and the header 6"),
        (COSTS.replace("prefill_ms", "decode_ms"), "more than one column 'decode_ms'"),
        (COSTS.replace("ffn,i256,8,,10,1", 'ffn,i256,8,,"10,1'), "cannot read the table"),
    ],
)
def test_tables_that_no_reader_should_guess_at(tmp_path: Path, costs: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        search(tmp_path, costs=costs)


def test_blanks_an_index_and_a_byte_order_mark_change_no_table(tmp_path: Path) -> None:
    plain = read_costs(write(tmp_path)[1])
    lines = COSTS.splitlines()
    spaced = [
        ", " + lines[0].replace(",", " ,"),
        "",
        *(f"{n}, " + line.replace(",", ", ") for n, line in enumerate(lines[1:])),
    ]
    (tmp_path / "spaced.csv").write_text("\n".join(spaced), encoding="utf-8-sig")
    spaced_rows = read_costs(tmp_path / "spaced.csv").rows
    assert [row._replace(origin="") for row in spaced_rows] == [row._replace(origin="") for row in plain.rows]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"layer": {"0": 1}}', "no list of objects"),
        ('[{"layer": 0, "layer": 1}]', "an object has 'layer' twice"),
        ("[" * 100_000, "cannot read the table"),
        ('[{"subblock": "ffn", "variant": "i8", "ms": true}]', "row 0, column ms: True is no number"),
        ('[{"subblock": "ffn", "variant": "i8", "ms": 1%s}]' % ("0" * 400), "row 0, column ms: 1000.* is no number"),
        ('[{"subblock": "ffn", "variant": "i%s", "ms": 1}]' % ("9" * 30), "is no variant id"),
    ],
)  # fmt: skip
def test_json_tables_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "costs.json").write_text(content)
    with pytest.raises(SpecError, match=message):
        read_costs(tmp_path / "costs.json")


def test_a_share_of_nothing_is_refused(tmp_path: Path) -> None:
    nothing = COSTS.replace(",100,,", ",0,,").replace(",200,,", ",0,,").replace(",50,,", ",0,,")
    with pytest.raises(SpecError, match="limit parameters of scenario chat is 60% of the parent's value, which is 0"):
        search(tmp_path, costs=nothing, limits={"parameters": "60%"})


def test_a_rate_of_no_time_has_no_bound(tmp_path: Path) -> None:
    timeless = "\n".join(line.rsplit(",", 2)[0] + ",0,0" if ",8," in line else line for line in COSTS.splitlines())
    record = search(tmp_path, costs=timeless, limits={"throughput": "6000 tok/s", "parameters": "550params"})
    assert {use.name: use.usage for use in record.best.limits} == {"throughput": None, "parameters": 550}
    assert "no bound" in answer_text(record)
