"""Swapped subblocks: bitwise nothing happens when a block is replaced by itself, and nothing ever to the parent."""

import pytest
import torch

from puzzle_core.architecture import Option, Variant
from puzzle_core.distill import bld
from puzzle_core.model.surgery import Subblocks, load_subblocks, variant_block
from puzzle_core.records import digest_file
from puzzle_core.spec import BldSpec
from puzzle_core.work import BldWork
from tests.conftest import CPU
from tests.pico import PICOS


@pytest.mark.parametrize("name", PICOS)
def test_block_replaced_by_a_copy_of_itself_is_bitwise_the_parents(name, activations_of, initial_state):
    activations = activations_of(name)
    parent, own, contexts = activations.parent, activations.parent.shape.largest_block, activations.contexts()
    for layer in range(parent.shape.layers):
        block = Subblocks(
            *(
                variant_block(parent, layer, variant, initial_state(name, layer, str(variant)), torch.float32, CPU)
                for variant in own.subblocks
            )
        )
        assert torch.equal(block(activations.layer_input(layer), **contexts[layer]), activations.layer_input(layer + 1))


def test_another_layers_weights_would_be_seen(activations, initial_state):
    attention = activations.parent.shape.largest_block.attention
    state = initial_state("llama", 2, str(attention))
    block = variant_block(activations.parent, 1, attention, state, torch.float32, CPU)
    output = block.attend(activations.layer_input(1), **activations.contexts()[1])
    assert not torch.allclose(output, activations.post_attention(1), atol=0.1)


def test_no_op_subblocks_add_nothing(activations):
    option = Option.parse("attn:no_op+ffn:no_op")
    empty = load_subblocks(activations.parent, 0, option, {}, torch.float32, CPU)
    assert torch.equal(empty(activations.layer_input(0), **activations.contexts()[0]), activations.layer_input(0))


def test_subblocks_are_the_parents_own_modules_where_nothing_is_swapped(parent):
    linear = {
        "ffn:linear": {
            "mlp.linear_mlp.weight": torch.eye(32),
            "post_attention_layernorm.weight": torch.ones(32),
        }
    }
    block = load_subblocks(parent, 0, Option.parse("attn:kv4+ffn:linear"), linear, torch.float32, CPU)
    assert block.attention is parent.block(0, torch.float32, CPU)
    assert block.ffn.self_attn is None


def test_nothing_writes_to_the_parent_even_when_a_training_dies(activations, contributions_of, tmp_path):
    parent = activations.parent
    own = {name: tensor.clone() for name, tensor in parent.block(1, torch.float32, CPU).state_dict().items()}
    files = [digest_file(file) for file in parent.checkpoint.files]

    def die(progress):
        if progress.step == 2:
            raise KeyboardInterrupt

    for variant in (Variant.parse("attn:kv1"), parent.shape.largest_block.ffn):
        work = BldWork(
            parent="p",
            layer=1,
            variant=variant,
            tokens="t",
            contributions=None,
            seed=0,
            spec=BldSpec(batch_tokens=32, optimizer={"learning_rate": 0.1}),
        )
        with pytest.raises(KeyboardInterrupt):
            bld.train_variant(work, activations, contributions_of("llama"), tmp_path, report=die)
    after = parent.block(1, torch.float32, CPU).state_dict()
    assert all(torch.equal(own[name], after[name]) for name in own)
    assert [digest_file(file) for file in parent.checkpoint.files] == files
