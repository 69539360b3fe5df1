"""A puzzletron campaign searched again: the optimum is that of brute force, units hold, damage is named."""

import itertools
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from puzzle_core.errors import NonFiniteError, PuzzleError
from puzzle_core.interop.puzzletron import LIBRARY, STATS, VALIDATION, import_puzzle_dir
from puzzle_core.search.from_tables import read_request, search_tables
from puzzle_core.search.search_record import SearchRecord
from tests.puzzletron import BATCH_SIZES, BF16, KV_HEADS, LAYERS, TRAFFICS, WIDTHS, Campaign

SOLUTION = f"{VALIDATION}/solution_3.json"
PARENT = (KV_HEADS[0], WIDTHS[0])


def search(out: Path, traffic: tuple[int, int], limits: dict[str, str], **asked: Any) -> SearchRecord:
    """Fill limits into the scenario that the import wrote, and search."""
    path = out / "scenarios" / f"{traffic[0]}-in-{traffic[1]}-out.yaml"
    scenario = out / "scenario.yaml"
    scenario.write_text(yaml.safe_dump({"scenario": yaml.safe_load(path.read_text()) | {"limits": limits}} | asked))
    return search_tables(out / "scores.csv", out / "costs.csv", read_request([scenario]), out / "answer")


def totals(
    campaign: Campaign, blocks: list[tuple[int | None, int | None]], batch: int, traffic: tuple[int, int]
) -> Any:
    """Bytes, and prefill and decode ms, of a whole model, counted from the campaign's own numbers."""
    parts: list[tuple[str, int | None]] = [("outside", None)]
    parts += [part for kv_heads, width in blocks for part in (("attn", kv_heads), ("ffn", width))]
    tokens = batch * sum(traffic)
    size = sum(2 * campaign.parameters(*part) + campaign.kv_bytes(*part, tokens) for part in parts)
    times = [campaign.ms["outside" if part[0] == "outside" else part, batch, traffic[0]] for part in parts]
    return size, sum(prefill for prefill, _ in times), sum(decode for _, decode in times)


def best(campaign: Campaign, traffic: tuple[int, int], max_bytes: float, min_rate: float, max_prefill: float) -> float:
    """The least KL of all architectures and batch sizes within the limits, one after the other."""
    pairs, found = list(itertools.product(KV_HEADS, WIDTHS)), math.inf
    for batch, blocks in itertools.product(BATCH_SIZES, itertools.product(pairs, repeat=LAYERS)):
        size, prefill, decode = totals(campaign, blocks, batch, traffic)
        rate = batch * traffic[1] / (prefill + decode) * 1e3
        if size <= max_bytes and rate >= min_rate and prefill <= max_prefill:
            found = min(found, sum(campaign.kl[layer, *block] for layer, block in enumerate(blocks)))
    return found


@pytest.mark.parametrize("traffic", TRAFFICS)
@pytest.mark.parametrize("share", [0.85, 0.6])
def test_the_optimum_is_that_of_brute_force(campaign: Campaign, tmp_path: Path, traffic: Any, share: float) -> None:
    import_puzzle_dir(campaign.write(), tmp_path / "out")
    size, prefill, decode = totals(campaign, [PARENT] * LAYERS, 8, traffic)
    rate = 8 * traffic[1] / (prefill + decode) * 1e3
    limits = {
        "memory": f"{share * size / 2**20}MiB",
        "throughput": f"{rate / share} tok/s",
        "time_to_first_token": f"{0.9 * prefill / 1e3}s",
    }
    expected = best(campaign, traffic, share * size, rate / share, 0.9 * prefill)
    assert 0 < expected < math.inf
    assert search(tmp_path / "out", traffic, limits).best.score == pytest.approx(expected, abs=1e-12)


def test_units_are_those_of_the_files(campaign: Campaign, tmp_path: Path) -> None:
    found = import_puzzle_dir(campaign.write(), tmp_path / "out")
    record = search(tmp_path / "out", TRAFFICS[1], {"memory": "100%"})
    size, prefill, decode = totals(campaign, [PARENT] * LAYERS, 8, TRAFFICS[1])
    its = record.parent.totals
    assert its["memory_bytes"] == pytest.approx(size, rel=1e-12)
    assert (its["prefill_ms"], its["decode_ms"]) == pytest.approx((prefill, decode), rel=1e-12)
    assert its["runtime_ms"] == pytest.approx(prefill + decode, rel=1e-12)
    assert its["kv_bytes_per_token"] == LAYERS * campaign.kv_bytes("attn", 8, tokens=1)
    outside = campaign.parameters("outside", None)
    blocks = campaign.parameters("attn", 8) + campaign.parameters("ffn", 1024)
    assert its["parameters"] == its["active_parameters"] == outside + LAYERS * blocks
    assert str(found.parent) == "attn:kv8+ffn:i1024"
    assert (found.metric, found.scores, found.costs.left) == ("kl_div", LAYERS * 8, 12)
    assert found.costs.precision == "weights bfloat16, activations bfloat16, kv_cache bfloat16"


def test_other_precisions_are_taken_when_asked_for(campaign: Campaign, tmp_path: Path) -> None:
    place = campaign.write()
    with pytest.raises(PuzzleError, match=r"several settings \(kv_cache_dtype=bfloat16, int8\).*--stats kv_cache"):
        import_puzzle_dir(place, tmp_path / "out", stats={"weights_dtype": "int8"})
    found = import_puzzle_dir(place, tmp_path / "out", stats={"weights_dtype": "int8", "kv_cache_dtype": "int8"})
    assert found.costs.precision == "weights int8, activations int8, kv_cache int8"
    its = search(tmp_path / "out", TRAFFICS[0], {"memory": "100%"}).parent.totals
    assert its["kv_bytes_per_token"] == LAYERS * campaign.kv_bytes("attn", 8, 1, entry_bytes=1)
    assert "runtime_ms" not in its, "only bfloat16 is timed there"
    with pytest.raises(PuzzleError, match=r"none of the 16 profiles .* has n_embd=64; there are: activations_dtype=bf"):
        import_puzzle_dir(place, tmp_path / "out", stats={"n_embd": "64"})


def test_a_campaign_without_times_can_be_searched_by_memory(campaign: Campaign, tmp_path: Path) -> None:
    campaign.timed = False
    import_puzzle_dir(campaign.write(), tmp_path / "out")
    assert search(tmp_path / "out", TRAFFICS[0], {"memory": "70%"}).best.score > 0
    with pytest.raises(PuzzleError, match=r"limit latency .* needs the column runtime_ms"):
        search(tmp_path / "out", TRAFFICS[0], {"latency": "70%"})


def test_one_block_may_replace_several_layers(campaign: Campaign, tmp_path: Path) -> None:
    campaign.spans = {(1, 2): 0.0001}
    import_puzzle_dir(campaign.write(), tmp_path / "out")
    record = search(tmp_path / "out", TRAFFICS[0], {"parameters": "90%"})
    assert (record.best.score, record.best.architecture.spans) == (0.0001, ((1, 2),))


def test_another_measure_counts_from_the_parents_own(campaign: Campaign, tmp_path: Path) -> None:
    place = campaign.write()
    found = import_puzzle_dir(place, tmp_path / "out", metric="lm_loss")
    frame = pd.read_csv(tmp_path / "out" / "scores.csv")
    own = frame[(frame.attention == "attn:kv8") & (frame.ffn == "ffn:i1024")]
    assert (found.metric, list(frame.columns[-1:])) == ("lm_loss", ["lm_loss"])
    assert list(own.lm_loss) == [1.5] * LAYERS
    with pytest.raises(PuzzleError, match=r"teacher.json has no greedy_teacher_prediction_in_student_top_1"):
        import_puzzle_dir(place, tmp_path / "out", metric="greedy_teacher_prediction_in_student_top_1")
    with pytest.raises(PuzzleError, match=r"solution_0.json has no bleu; its measures are: lm_loss, kl_div"):
        import_puzzle_dir(place, tmp_path / "out", metric="bleu")


def test_the_older_form_of_sizes_is_read(campaign: Campaign, tmp_path: Path) -> None:
    place = campaign.write()
    before = import_puzzle_dir(place, tmp_path / "before")

    def older(content: Any) -> Any:
        if isinstance(content, dict):
            if "num_key_value_heads" in content:
                kv_heads = content.pop("num_key_value_heads")
                content["n_heads_in_group"] = kv_heads and 16 // kv_heads
            for value in content.values():
                older(value)
        elif isinstance(content, list):
            for value in content:
                older(value)

    for file in place.rglob("*.json"):
        campaign.change(str(file.relative_to(place)), older)
    assert import_puzzle_dir(place, tmp_path / "after").parent == before.parent
    for name in ("scores.csv", "costs.csv"):
        assert (tmp_path / "after" / name).read_text() == (tmp_path / "before" / name).read_text()


BF16_PROFILE = list(itertools.product(BATCH_SIZES, TRAFFICS, ["nvfp4", "int8", "int8 bf16", "bf16"])).index(
    (1, TRAFFICS[0], "bf16")
)
DAMAGE = {
    "a file that holds something else": (SOLUTION, lambda c: [c], "the scores of one replacement, must hold an object"),
    "a score that is NaN": (
        SOLUTION,
        lambda c: c["kl_div"].update(avg=math.nan),
        r"solution_3.json: kl_div.avg is nan",
    ),
    "a score that is missing": (
        SOLUTION,
        lambda c: c.pop("kl_div") and None,
        r"solution_3.json has no kl_div; its measures",
    ),
    "a score that is text": (
        SOLUTION,
        lambda c: c["kl_div"].update(avg="1"),
        r"kl_div.avg is '1'; it must be a number",
    ),
    "a file that is no solution": (
        SOLUTION,
        lambda c: c.pop("puzzle_solution") and None,
        r"solution_3.json, puzzle_solution:",
    ),
    "several blocks for one layer": (
        SOLUTION,
        lambda c: c["puzzle_solution"]["single_sequence_replacement"]["child_block_configs"].append({}),
        r"solution_3.json: 2 child_block_configs replace layers \[0\]",
    ),
    "layers that are apart": (
        LIBRARY,
        lambda c: c[7].update(parent_layer_indices=[0, 2]),
        r"library.json entry 7.*\[0, 2\] are",
    ),
    "a library of version 2": (
        LIBRARY,
        lambda c: {"version": 2, "entries": c},
        "has version 2; only version 1, a list, is supported",
    ),
    "a replacement of another width": (
        LIBRARY,
        lambda c: c[9]["child_block_configs"][0]["ffn"].update(intermediate_size=768),
        "is not in replacement_library.json",
    ),
    "another run's library": (
        LIBRARY,
        lambda c: c.pop() and None,
        "solution_31.json: layer 3 .* is not in replacement_lib",
    ),
    "a mamba": (
        LIBRARY,
        lambda c: c[5]["child_block_configs"][0]["attention"].update(mamba={"state_dim": 8}),
        "entry 5, attention: mamba is",
    ),
    "experts": (
        STATS,
        lambda c: c[BF16_PROFILE]["subblocks"][3]["subblock_config"].update(moe={"num_local_experts": 8}),
        f"profile {BF16_PROFILE} subblock 3, ffn: moe is",
    ),
    "memory that is NaN": (
        STATS,
        lambda c: c[BF16_PROFILE]["subblocks"][3].update(memory_mib=math.nan),
        rf"memory_bytes of ffn:i1024, layer 0, batch size 1, .*profile {BF16_PROFILE} subblock 3\) is nan",
    ),
    "memory that is missing": (
        STATS,
        lambda c: c[BF16_PROFILE]["subblocks"][3].pop("memory_mib") and None,
        rf"profile {BF16_PROFILE}: subblocks.3.memory_mib: Field required",
    ),
    "a subblock that is missing": (
        STATS,
        lambda c: c[BF16_PROFILE]["subblocks"].pop(3) and None,
        r"of ffn:i1024 for layer 0 .*scenario 128-in-64-out, batch size 1",
    ),
    "a subblock that is there twice": (
        STATS,
        lambda c: c[BF16_PROFILE]["subblocks"].append(c[BF16_PROFILE]["subblocks"][3]),
        rf"subblock 24\) is given twice, before by .*profile {BF16_PROFILE} subblock 3",
    ),
    "times without those outside": (
        STATS,
        lambda c: c[BF16_PROFILE]["non_block"].update(runtime_ms=None),
        f"profile {BF16_PROFILE} times its subblocks, and its non_block has no runtime_ms",
    ),
    "two profiles for one batch size": (
        STATS,
        lambda c: c.append(c[BF16_PROFILE]),
        "an earlier profile has the same batch size and sequence lengths",
    ),
    "several widths of the whole model": (
        STATS,
        lambda c: c[BF16_PROFILE]["args"].update(n_embd=256),
        r"\(n_embd=256, 512\).*--stats n_embd=",
    ),
}


@pytest.mark.parametrize(("name", "change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(campaign: Campaign, tmp_path: Path, name: str, change: Any, message: str) -> None:
    place = campaign.write()
    campaign.change(name, change)
    with pytest.raises(PuzzleError, match=f"(?s){message}"):
        import_puzzle_dir(place, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing is written before all is checked"


def test_a_campaign_whose_scoring_was_not_finished_is_refused(campaign: Campaign, tmp_path: Path) -> None:
    place = campaign.write()
    for number in (30, 31):
        (place / VALIDATION / f"solution_{number}.json").unlink()
    with pytest.raises(PuzzleError, match=r"2 replacements of replacement_library.json have no score .*layer 3"):
        import_puzzle_dir(place, tmp_path / "out")
    for file in (place / VALIDATION).glob("solution_*.json"):
        file.unlink()
    with pytest.raises(PuzzleError, match=r"holds no solution_N\.json"):
        import_puzzle_dir(place, tmp_path / "out")


def test_files_of_two_runs_are_told_apart(campaign: Campaign, tmp_path: Path) -> None:
    place = campaign.write()

    def narrower(content: Any) -> None:
        kept = content["puzzle_solution"]["chosen_replacements"][-1]["child_block_configs"][0]
        kept["ffn"]["intermediate_size"] = 768

    campaign.change(f"{VALIDATION}/solution_0.json", narrower)
    with pytest.raises(PuzzleError, match=r"solution_1.json keeps attn:kv8\+ffn:i1024 in layer 3 where solution_0"):
        import_puzzle_dir(place, tmp_path / "out")


def test_a_missing_file_is_named(campaign: Campaign, tmp_path: Path) -> None:
    place = campaign.write()
    (place / "subblock_stats.json").unlink()
    with pytest.raises(PuzzleError, match=r"cannot read the costs .*subblock_stats.json: No such file"):
        import_puzzle_dir(place, tmp_path / "out")


def test_a_file_that_was_cut_off_is_named(campaign: Campaign, tmp_path: Path) -> None:
    place = campaign.write()
    for name, what in ((SOLUTION, "scores of one"), (STATS, "costs"), (LIBRARY, "replacement library")):
        text = (place / name).read_text()
        (place / name).write_text(text[: len(text) // 2])
        with pytest.raises(PuzzleError, match=f"{Path(name).name}, the {what}.*, is not JSON"):
            import_puzzle_dir(place, tmp_path / "out")
        (place / name).write_text(text)
    assert import_puzzle_dir(place, tmp_path / "out").scores == LAYERS * 8


def test_a_non_finite_score_is_of_its_own_kind(campaign: Campaign, tmp_path: Path) -> None:
    place = campaign.write()
    campaign.change(SOLUTION, lambda content: content["kl_div"].update(avg=math.inf))
    with pytest.raises(NonFiniteError):
        import_puzzle_dir(place, tmp_path / "out")


def test_an_import_says_where_everything_is(campaign: Campaign, tmp_path: Path) -> None:
    found = import_puzzle_dir(campaign.write(), tmp_path / "out")
    assert BF16 in campaign.profile_keys()[BF16_PROFILE]
    assert [path.name for path in found.scenarios] == ["128-in-64-out.yaml", "1024-in-256-out.yaml"]
    assert yaml.safe_load(found.scenarios[0].read_text())["batch_sizes"] == list(BATCH_SIZES)
