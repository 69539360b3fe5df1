"""Parents whose layers differ: children of this project, and DeciLM checkpoints."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle_core import scoring
from puzzle_core.architecture import Architecture, BlockVariant, Variant
from puzzle_core.distill.bld import train_variant
from puzzle_core.errors import ParentError, SpecError
from puzzle_core.export.hf import export_hf
from puzzle_core.export.source import Source
from puzzle_core.model.child import load_child, load_parent
from puzzle_core.model.parent import Parent
from puzzle_core.sizes import architecture_parameters
from puzzle_core.spec import BldSpec, ParentSpec, VariantsSpec
from puzzle_core.work import BldWork, ScoreWork
from tests.conftest import CPU
from tests.pico import BLOCKS, UNEQUAL, Pico, edit_config, write_pico
from tests.puzzle_core.export.conftest import CARRIED
from tests.reference.quality import comparison

NAME = "llama, unequal"
SPACE = VariantsSpec(kv_heads=(2, 1), ffn_ratios=(0.5,), ffn_widths=(24,))


def logits_of(model, ids_NT):
    with torch.no_grad():
        return model(input_ids=ids_NT.long()).logits


@pytest.fixture
def score(activations_of, initial_state):
    """Score a block variant in a layer of the unequal Llama."""

    def run(layer, block, base=NAME):
        variants, own = BlockVariant.parse(block), BLOCKS[layer].split("+")
        weights = {v: initial_state(base, layer, v) for v in block.split("+") if v not in own and "no_op" not in v}
        work = ScoreWork(parent="p", layer=layer, block=variants, attention=None, ffn=None, tokens="t", dtype="float32")
        return scoring.score_block(work, activations_of(base), weights)

    return run


@pytest.mark.parametrize("name", UNEQUAL)
def test_a_child_opens_as_a_parent_and_with_nothing_changed_is_bitwise_itself(
    name, checkpoint_of, parent_of, assemble, ids_NT
):
    parent = parent_of(name)
    assert [str(block) for block in Architecture.of_parent(parent.shape).layers] == list(BLOCKS)
    expected = logits_of(load_child(checkpoint_of(name), torch.float32, CPU), ids_NT)
    assert torch.equal(logits_of(load_parent(parent, torch.float32, CPU), ids_NT), expected)
    assert torch.equal(logits_of(load_child(assemble(name), torch.float32, CPU), ids_NT), expected)
    counted = sum(tensor.numel() for tensor in load_parent(parent, torch.float32, CPU).parameters())
    assert architecture_parameters(parent.shape, Architecture.of_parent(parent.shape)) == counted


@pytest.mark.parametrize("name", [name for name in CARRIED if f"{name}, unequal" in UNEQUAL and name != "phi4"])
def test_a_decilm_checkpoint_is_a_parent_with_the_logits_of_its_own_code(name, checkpoint_of, ids_NT, tmp_path):
    export_hf(Source(checkpoint_of(f"{name}, unequal")), tmp_path, widths="any")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.float32).eval()
    for code in tmp_path.glob("*.py"):
        code.write_text("raise AssertionError('the code of a checkpoint runs')")
    parent = Parent(ParentSpec(path=str(tmp_path)))
    assert [str(block) for block in parent.shape.blocks] == list(BLOCKS)
    assert torch.equal(logits_of(load_parent(parent, torch.float32, CPU), ids_NT), logits_of(theirs, ids_NT))


def test_the_older_decilm_form_has_its_kv_heads_by_layer(copy_of):
    directory = copy_of("llama")
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "deci", "architectures": ["DeciLMForCausalLM"]}
    config["num_key_value_heads_per_layer"] = [4, 4, 4, 4, 4]
    del config["num_key_value_heads"]
    (directory / "config.json").write_text(json.dumps(config))
    assert not Parent(ParentSpec(path=str(directory))).shape.blocks
    edit_config(directory, num_key_value_heads_per_layer=[4, 4, 2, 4, 4])
    with pytest.raises(ParentError, match=r"does not match its own config.*layers\.2\.self_attn\.k_proj"):
        Parent(ParentSpec(path=str(directory)))


def test_variants_of_a_layer_are_those_cheaper_than_its_own(parent_of):
    shape = parent_of(NAME).shape
    found = [[[str(v) for v in variants] for variants in SPACE.of_layer(n, shape)] for n in range(shape.layers)]
    assert found == [
        [["attn:kv2", "attn:kv1", "attn:linear", "attn:no_op"], ["ffn:i24", "ffn:i12", "ffn:linear", "ffn:no_op"]],
        [["attn:no_op"], ["ffn:i48", "ffn:i24", "ffn:linear", "ffn:no_op"]],
        [["attn:linear", "attn:no_op"], ["ffn:i40", "ffn:i24", "ffn:i20", "ffn:linear", "ffn:no_op"]],
        [["attn:kv4", "attn:kv2", "attn:kv1", "attn:linear", "attn:no_op"], ["ffn:linear", "ffn:no_op"]],
        [["attn:no_op"], ["ffn:no_op"]],
    ]
    with pytest.raises(SpecError, match="ffn:i64 is wider than the parent's FFN"):
        VariantsSpec(ffn_widths=(64,)).of_layer(0, shape)


def test_the_own_block_of_every_layer_scores_zero(score):
    for layer, block in enumerate(BLOCKS):
        found = score(layer, block)
        assert (found.kl_nats_per_token, found.lm_loss_increase_nats_per_token, found.top1_agreement) == (0, 0, 1)


@pytest.mark.parametrize(
    ("layer", "block"),
    [(0, "attn:kv1+ffn:i24"), (0, "attn:kv2+ffn:i12"), (1, "attn:no_op+ffn:i20"), (2, "attn:no_op+ffn:linear")],
)
def test_scores_are_those_of_an_assembled_child_run_whole(layer, block, score, parent_of, assemble, ids_NT):
    blocks = (*BLOCKS[:layer], block, *BLOCKS[layer + 1 :])
    models = load_parent(parent_of(NAME), torch.float32, CPU), load_child(assemble(NAME, blocks), torch.float32, CPU)
    expected, found = comparison(*(logits_of(model, ids_NT) for model in models), ids_NT.long()), score(layer, block)
    assert found.kl_nats_per_token > 0.001
    assert found.kl_nats_per_token == pytest.approx(expected["kl"], rel=1e-4)
    assert found.top1_agreement == expected["agreement"]


@pytest.mark.parametrize(("layer", "variant"), [(0, "attn:kv1"), (2, "ffn:i20"), (3, "attn:linear")])
def test_bld_trains_a_variant_of_a_layer_of_its_own_size(layer, variant, activations_of, contributions_of, tmp_path):
    spec = BldSpec(tokens=64, batch_tokens=32, epochs=4)
    work = BldWork(
        parent="p", layer=layer, variant=Variant.parse(variant), tokens="t", contributions=None, seed=0, spec=spec
    )
    contributions = contributions_of(NAME) if work.variant.row.needs_contributions else None
    record = train_variant(work, activations_of(NAME), contributions, tmp_path)
    assert record.final_loss < record.initial_loss


def test_a_layer_of_another_size_than_the_config_says_is_refused(copy_of, checkpoint_of, tmp_path):
    directory = tmp_path / "child"
    directory.mkdir()
    for file in checkpoint_of(NAME).iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    entries = config["block_configs"]
    edit_config(directory, block_configs=entries[:-1])
    with pytest.raises(ParentError, match="num_hidden_layers 5, and 4 entries in block_configs"):
        Parent(ParentSpec(path=str(directory)))
    entries[1]["ffn"]["intermediate_size"] = 32
    edit_config(directory, block_configs=entries)
    with pytest.raises(ParentError, match=r"other shapes than its config.*layers\.1\.mlp"):
        Parent(ParentSpec(path=str(directory)))


def test_variants_of_a_layer_within_a_window_stay_in_it(ids_NT, tmp_path):
    blocks = ("attn:kv4:w8+ffn:i48", "attn:kv4+ffn:i48") * 2 + ("attn:kv2:w4+ffn:i48",)
    write_pico(tmp_path, Pico(blocks=blocks))
    parent = Parent(ParentSpec(path=str(tmp_path)))
    expected = logits_of(load_child(tmp_path, torch.float32, CPU), ids_NT)
    assert torch.equal(logits_of(load_parent(parent, torch.float32, CPU), ids_NT), expected)
    space = VariantsSpec(kv_heads=(2,), windows=(16, 6), linear=False)
    assert [[str(v) for v in space.of_layer(layer, parent.shape)[0]] for layer in (0, 1, 4)] == [
        ["attn:kv4:w8", "attn:kv4:w6", "attn:kv2:w8", "attn:kv2:w6", "attn:no_op"],
        ["attn:kv4", "attn:kv2", "attn:kv4:w16", "attn:kv4:w6", "attn:kv2:w16", "attn:kv2:w6", "attn:no_op"],
        ["attn:kv2:w4", "attn:no_op"],
    ]
