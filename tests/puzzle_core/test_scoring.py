"""Replace-1-block scores: those of a copied model that is run whole, and exactly zero for the parent's own block."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle_core import scoring
from puzzle_core.architecture import Architecture, BlockVariant
from puzzle_core.compute_slots import ComputeSlot
from puzzle_core.errors import NonFiniteError
from puzzle_core.model import activations as activations_module
from puzzle_core.model.activations import Activations, ChildActivations
from puzzle_core.model.child import load_child
from puzzle_core.model.parent import Parent
from puzzle_core.spec import ParentSpec
from puzzle_core.work import ScoreWork
from tests.conftest import CPU, MIXED, trained_variants
from tests.reference.quality import comparison, with_attention, with_ffn

LAST = 4
CASES = [
    (0, "attn:kv1+ffn:i48"),
    (0, "attn:no_op+ffn:i48"),
    (1, "attn:linear+ffn:i48"),
    (1, "attn:kv4+ffn:i12"),
    (2, "attn:kv4+ffn:linear"),
    (2, "attn:kv4+ffn:no_op"),
    (3, "attn:kv2+ffn:i24"),
    (3, "attn:no_op+ffn:no_op"),
    (LAST, "attn:linear+ffn:linear"),
    (LAST, "attn:kv1+ffn:i48"),
]


@pytest.fixture
def weights_of(initial_state):
    """Training-free weights of both subblocks of a block variant, by id."""

    def state(layer, block):
        return {variant: initial_state("llama", layer, variant) for variant in block.split("+")}

    return state


@pytest.fixture
def score(activations, weights_of):
    """Score a block variant in a layer of the plain parent."""

    def run(layer, block, activations=activations, weights=None, slot=None):
        variants = BlockVariant.parse(block)
        work = ScoreWork(parent="p", layer=layer, block=variants, attention=None, ffn=None, tokens="t", dtype="float32")
        return scoring.score_block(work, activations, weights_of(layer, block) if weights is None else weights, slot)

    return run


@pytest.mark.parametrize(("layer", "block"), CASES)
def test_scores_are_those_of_a_changed_copy_run_whole(layer, block, score, weights_of, checkpoint_of, ids_NT):
    parent = AutoModelForCausalLM.from_pretrained(checkpoint_of("llama"), dtype=torch.float32)
    variants, weights = BlockVariant.parse(block), weights_of(layer, block)
    changed = with_attention(parent, layer, variants.attention.kind, weights[str(variants.attention)])
    changed = with_ffn(changed, layer, variants.ffn.kind, weights[str(variants.ffn)])
    with torch.no_grad():
        logits = [model(input_ids=ids_NT.long()).logits for model in (parent, changed)]
    expected, found = comparison(*logits, ids_NT.long()), score(layer, block)
    assert found.kl_nats_per_token > 0.001
    assert found.kl_nats_per_token == pytest.approx(expected["kl"], rel=1e-4)
    assert found.lm_loss_increase_nats_per_token == pytest.approx(expected["loss_increase"], rel=1e-3, abs=1e-6)
    assert found.top1_agreement == expected["agreement"]


@pytest.mark.parametrize("name", ["gemma3_text", "olmo3", "phi3"])
@pytest.mark.parametrize("block", ["attn:kv1+ffn:i48", "attn:kv4+ffn:i12", "attn:linear+ffn:no_op"])
def test_scores_are_those_of_a_child_run_whole_in_every_family(
    name, block, activations_of, initial_state, assemble, checkpoint_of, ids_NT
):
    """Windows, norms behind subblocks and rotary positions by kind hold in the layers after the block, too."""
    activations, layer = activations_of(name), 1
    variants = BlockVariant.parse(block)
    weights = {
        v: initial_state(name, layer, v) for v in trained_variants(variants, activations.parent.shape.largest_block)
    }
    work = ScoreWork(parent="p", layer=layer, block=variants, attention=None, ffn=None, tokens="t", dtype="float32")
    blocks = tuple(block if number == layer else "attn:kv4+ffn:i48" for number in range(LAST + 1))
    parent = AutoModelForCausalLM.from_pretrained(checkpoint_of(name), dtype=torch.float32)
    with torch.no_grad():
        models = (parent, load_child(assemble(name, blocks), torch.float32, CPU))
        expected = comparison(*(model(input_ids=ids_NT.long()).logits for model in models), ids_NT.long())
    found = scoring.score_block(work, activations, weights)
    assert found.kl_nats_per_token > 0.001
    assert found.kl_nats_per_token == pytest.approx(expected["kl"], rel=1e-4)


@pytest.mark.parametrize("layer", [0, 2, LAST])
def test_the_parents_own_block_scores_exactly_zero(layer, score):
    found = score(layer, "attn:kv4+ffn:i48", weights={})
    assert (found.kl_nats_per_token, found.lm_loss_increase_nats_per_token, found.top1_agreement) == (0.0, 0.0, 1.0)


def test_the_layer_matters(score):
    scores = [score(layer, "attn:no_op+ffn:i48").kl_nats_per_token for layer in range(LAST + 1)]
    assert len(set(scores)) == LAST + 1


@pytest.fixture
def recaptured(parent, ids_NT, tmp_path):
    """The states that all scores start from, captured anew."""

    def capture():
        activations = Activations(tmp_path, parent, ids_NT, torch.float32, CPU)
        activations.capture_embedding()
        for layer in range(LAST + 1):
            activations.capture_layer(layer)
        return activations

    return capture


def test_scores_do_not_depend_on_the_rows_of_a_batch(score, recaptured, monkeypatch):
    monkeypatch.setattr(activations_module, "FORWARD_TOKENS", 64)
    in_parts, whole = score(2, "attn:kv1+ffn:i12", recaptured()), score(2, "attn:kv1+ffn:i12")
    assert in_parts.kl_nats_per_token == pytest.approx(whole.kl_nats_per_token, rel=1e-5)
    assert in_parts.top1_agreement == whole.top1_agreement


def test_scores_are_the_same_from_log_probabilities_that_were_kept(score, recaptured):
    activations = recaptured()
    activations.capture_log_probabilities()
    for block in ("attn:kv1+ffn:i12", "attn:kv4+ffn:i48"):
        assert score(2, block, activations) == score(2, block)


def test_a_weight_that_is_not_finite_names_layer_and_variant(score, weights_of):
    weights = weights_of(3, "attn:kv1+ffn:i48")
    weights["attn:kv1"]["self_attn.q_proj.weight"][0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"layer 3 attn:kv1\+ffn:i48 is not finite"):
        score(3, "attn:kv1+ffn:i48", weights=weights)


@pytest.fixture
def beyond_memory(checkpoint_of, ids_NT, tmp_path):
    """Captured states of the plain parent, of which a process keeps no layer."""
    small = Parent(ParentSpec(path=str(checkpoint_of("llama"))), cached_bytes=1)
    activations = Activations(tmp_path / "beyond", small, ids_NT, torch.float32, CPU)
    activations.capture_embedding()
    for layer in range(LAST + 1):
        activations.capture_layer(layer)
    return activations


@pytest.fixture
def loads(monkeypatch):
    """How often each layer of a parent is loaded."""
    counts, load = Counter(), Parent.load_block

    def count(self, layer, *arguments):
        counts[layer] += 1
        return load(self, layer, *arguments)

    monkeypatch.setattr(Parent, "load_block", count)
    return counts


@pytest.mark.parametrize("state_bytes", [2**30, 1])
def test_scores_side_by_side_load_each_layer_once_for_all_of_them(
    state_bytes, score, beyond_memory, loads, weights_of, monkeypatch
):
    blocks = [f"attn:{attention}+ffn:{ffn}" for attention in ("kv4", "kv1", "no_op") for ffn in ("i48", "i12", "no_op")]
    places = [(1, block) for block in blocks[1:]] + [(2, blocks[1])]
    expected = [score(*place) for place in places]
    assert loads.keys() <= {1, 2, 3, LAST}  # from the cache of the shared parent, at most once each
    assert set(loads.values()) <= {1}
    loads.clear()
    monkeypatch.setattr(scoring, "COMPARED_TOKENS", 32)
    in_batches = [score(*place) for place in places]
    monkeypatch.setattr(scoring, "STATE_BYTES", {"cpu": state_bytes})
    loads.clear()
    barrier, load_subblocks = threading.Barrier(3, timeout=30), scoring.load_subblocks

    def wait(*arguments):  # a score is under way with the others
        barrier.wait()
        return load_subblocks(*arguments)

    monkeypatch.setattr(scoring, "load_subblocks", wait)
    weights = [weights_of(*place) for place in places]  # the works are three groups of three

    def run(number):
        return score(*places[number], beyond_memory, weights[number], ComputeSlot("cpu", most=3))

    found = []
    for first in range(0, len(places), 3):
        with ThreadPoolExecutor(3) as pool:
            found += pool.map(run, range(first, first + 3))
    assert found == in_batches
    assert [record.kl_nats_per_token for record in found] == pytest.approx([e.kl_nats_per_token for e in expected])
    chunks = 1 if state_bytes > 1 else 3
    assert {layer: loads[layer] for layer in (3, LAST)} == {3: 3 * chunks, LAST: 3 * chunks}
    assert loads[2] == 3 * chunks
    assert loads[1] <= 3  # groups with a block that keeps a subblock of the parent


def test_scores_in_a_child_share_its_layers_too(beyond_memory, weights_of, tmp_path, monkeypatch):
    architecture = Architecture.parse(MIXED)

    def library(layer):
        return {v: weights for v, weights in weights_of(layer, MIXED[layer]).items() if weights}

    def opened():
        return ChildActivations(tmp_path / "child", beyond_memory, architecture, library)

    works = [
        ScoreWork(
            parent="p",
            layer=layer,
            block=BlockVariant.parse(block),
            attention=None,
            ffn=None,
            tokens="t",
            dtype="float32",
        )
        for layer, block in ((1, "attn:kv1+ffn:i48"), (1, "attn:kv4+ffn:no_op"), (3, "attn:no_op+ffn:linear"))
    ]

    def run(work):
        slot = ComputeSlot("cpu", most=2)
        return scoring.score_block(work, opened(), weights_of(work.layer, str(work.block)), slot)

    child = opened()
    child.capture_embedding()
    for layer in range(LAST + 1):
        child.capture_layer(layer)
    with ThreadPoolExecutor(3) as pool:
        shared = list(pool.map(run, works))
    monkeypatch.setattr(Parent, "fits_cache", lambda *_: True)
    assert shared == [run(work) for work in works]
    assert len({score.kl_nats_per_token for score in shared}) == 3


def test_one_after_the_other_loads_each_layer_for_each_score(score, beyond_memory, loads):
    for block in ("attn:kv1+ffn:i12", "attn:no_op+ffn:no_op"):
        score(1, block, beyond_memory)
    assert loads == {2: 2, 3: 2, LAST: 2}
