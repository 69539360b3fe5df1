"""The published 49B child counted exactly, and published throughputs of parent and child against the roofline."""

import json
from pathlib import Path

import pytest
from scipy.stats import spearmanr

from benchmarks.published_targets import PUBLISHED, TARGET, compare, read_published
from puzzle_core.architecture import Architecture
from puzzle_core.sizes import architecture_parameters, kv_entries, outside_parameters
from puzzle_core.target import Efficiency, load_target

CONFIG = Path(__file__).parents[4] / "shared/data/nemotron49b_config.json"
RATIOS = (2.07, 2.17, 1.76, 2.11, 1.92, 1.96)

pytestmark = pytest.mark.skipif(not CONFIG.exists(), reason=f"the published configuration is not at {CONFIG}")


@pytest.fixture(scope="module")
def published():
    """The parent's shape and the child."""
    return read_published(CONFIG)


def test_the_published_child_has_the_published_size(published):
    shape, child = published
    attentions = [block.attention for block in child.layers]
    assert architecture_parameters(shape, child) == 49_867_145_216
    assert architecture_parameters(shape, Architecture.of_parent(shape)) == 70_553_706_496
    assert outside_parameters(shape) == 2 * 128_256 * 8192 + 8192
    assert [sum(a.kind == kind for a in attentions) for kind in ("sized", "no_op")] == [49, 31]
    assert kv_entries(shape, child, tokens=1) == 49 * 2 * 8 * 128


def test_its_parameters_are_those_of_a_count_by_hand(published):
    """From the configuration's own keys: norms, four attention and three FFN matrices per layer, embedding and head."""
    config = json.loads(CONFIG.read_text())
    hidden, total = config["hidden_size"], 2 * config["vocab_size"] * config["hidden_size"] + config["hidden_size"]
    for block in config["block_configs"]:
        if not block["attention"]["no_op"]:
            key_value = hidden // block["attention"]["n_heads_in_group"]
            total += hidden + 2 * hidden * hidden + 2 * hidden * key_value
        width = int(2 * block["ffn"]["ffn_mult"] * hidden / 3)
        total += hidden + 3 * hidden * (width + -width % 256)
    assert architecture_parameters(*published) == total


def test_the_ratios_are_those_of_the_publication():
    assert [row.ratio for row in PUBLISHED] == pytest.approx(RATIOS, abs=0.011)


@pytest.mark.parametrize("efficiency", [None, Efficiency(prefill_compute=0.5, decode_compute=0.5, bandwidth=0.9)])
def test_the_roofline_ranks_scenarios_and_gives_most_ratios(published, efficiency):
    """With the shipped factors and with others: what it says of ratios is physics, not a choice of factors."""
    target = load_target(TARGET)
    assert target.hardware
    if efficiency:
        target = target.model_copy(update={"hardware": target.hardware.model_copy(update={"efficiency": efficiency})})
    compared = compare(*published, target)
    parents = [(row.parent, parent.throughput) for row, parent, _ in compared]
    children = [(row.child, child.throughput) for row, _, child in compared]
    for pairs in (parents, children):
        assert spearmanr(pairs).statistic > 0.9
    errors = [child.throughput / parent.throughput / row.ratio - 1 for row, parent, child in compared]
    assert sum(abs(error) < 0.25 for error in errors) >= 4
    assert max(map(abs, errors)) < 0.45


def test_without_communication_the_parent_would_look_too_good(published):
    """A planted fault: an interconnect of no cost turns the check of ratios red."""
    target = load_target(TARGET)
    assert target.hardware
    assert target.hardware.interconnect
    free = target.hardware.interconnect.model_copy(update={"bandwidth": "1000TB/s", "latency": "1e-6us"})
    target = target.model_copy(update={"hardware": target.hardware.model_copy(update={"interconnect": free})})
    errors = [
        child.throughput / parent.throughput / row.ratio - 1 for row, parent, child in compare(*published, target)
    ]
    assert sum(abs(error) < 0.25 for error in errors) < 4
