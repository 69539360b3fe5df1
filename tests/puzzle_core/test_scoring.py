"""Replace-1-block scores: those of a copied model that is run whole, and exactly zero for the parent's own block."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle_core import scoring
from puzzle_core.architecture import BlockVariant
from puzzle_core.errors import NonFiniteError
from puzzle_core.model import activations as activations_module
from puzzle_core.model.activations import Activations
from puzzle_core.model.child import load_child
from puzzle_core.work import ScoreWork
from tests.conftest import CPU, trained_variants
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

    def run(layer, block, activations=activations, weights=None):
        variants = BlockVariant.parse(block)
        work = ScoreWork(parent="p", layer=layer, block=variants, attention=None, ffn=None, tokens="t", dtype="float32")
        return scoring.score_block(work, activations, weights_of(layer, block) if weights is None else weights)

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
    weights = {v: initial_state(name, layer, v) for v in trained_variants(variants, activations.parent.shape)}
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
