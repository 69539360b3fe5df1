"""FFN fusion: one wide FFN gives the sum of the FFNs that it replaces, on the input that all of them get."""

import pytest
import torch

from puzzle_core.architecture import Architecture, Variant
from puzzle_core.distill.gkd import loss_terms
from puzzle_core.errors import SpecError
from puzzle_core.families.family import FAMILIES
from puzzle_core.fusible import check_fusible, fused
from puzzle_core.model.child import load_child, load_parent
from puzzle_core.model.fusion import fused_ffn
from puzzle_core.model.surgery import variant_block
from puzzle_core.sizes import architecture_parameters
from puzzle_core.spec import GkdSpec
from tests.conftest import CPU

REFUSED = {"exaone4", "gemma2", "gemma3_text", "glm4", "olmo2", "olmo3"}
FUSIBLE = ["llama", "phi3", "mlp-bias", "arcee", "granite", "glm", "helium"]


@pytest.mark.parametrize("name", FUSIBLE)
def test_the_fused_ffn_is_the_sum_of_those_that_it_replaces(name, parent_of):
    parent, layers, widths = parent_of(name), (1, 2, 4), [48, 48, 48]
    prefixes, entering_BTD = FAMILIES[parent.shape.family].ffn_prefixes, torch.randn(2, 8, 32, dtype=torch.float64)
    states = [{k: t for k, t in parent.layer_tensors(layer).items() if k.startswith(prefixes)} for layer in layers]

    def added(width, state):
        block = variant_block(parent, 1, Variant("ffn", "sized", width), state, torch.float64, CPU)
        return block.feed(entering_BTD) - entering_BTD

    check_fusible(parent.shape)
    fused = added(sum(widths), fused_ffn(states, widths, parent.shape))
    expected = sum(added(width, state) for width, state in zip(widths, states, strict=True))
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-6)
    alone = added(48, states[0])
    assert (fused - alone).abs().max() > 1e-2


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_families_that_normalise_what_leaves_an_ffn_are_refused(family, parent_of):
    with pytest.raises(SpecError, match=f"family {family} normalises the output of every FFN by itself"):
        check_fusible(parent_of(family).shape)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ("kv4+i8 no_op+i4 no_op+i2 kv4+i8", "kv4+i14 x3,kv4+i8"),
        ("kv4+i8 kv2+i4 no_op+i2 no_op+no_op no_op+i4 linear+i8 no_op+i8", "kv4+i8,kv2+i10 x4,linear+i16 x2"),
        ("kv4+i8 no_op+no_op no_op+no_op kv4+i8", "kv4+i8,no_op+no_op,no_op+no_op,kv4+i8"),
        ("kv4+no_op no_op+i8 no_op+linear no_op+i8 no_op+i2", "kv4+no_op,no_op+i8,no_op+linear,no_op+i10 x2"),
        ("no_op+i8 no_op+i8 no_op+no_op", "no_op+i16 x2,no_op+no_op"),
        ("kv4+i8 kv4+i8", "kv4+i8,kv4+i8"),
    ],
)
def test_runs_are_ffns_with_no_attention_between_them(blocks, expected):
    def parse(texts):
        return Architecture.parse(["attn:" + text.replace("+", "+ffn:") for text in texts])

    assert fused(parse(blocks.split())) == parse(expected.split(","))


BLOCKS = ("attn:kv2+ffn:i24", "attn:no_op+ffn:i48", "attn:no_op+ffn:no_op", "attn:no_op+ffn:i12", "attn:kv4+ffn:i48")


@pytest.mark.parametrize("name", ["llama", "phi3", "mlp-bias", "granite"])
def test_the_fused_child_runs_its_ffns_side_by_side(name, parent_of, assemble, ids_NT, tmp_path):
    parent, architecture = parent_of(name), Architecture.parse(BLOCKS)
    plain = load_child(assemble(name, BLOCKS), torch.float32, CPU).requires_grad_(False)
    written = assemble(name, BLOCKS, fuse_ffn=True)
    model, ids_BT = load_child(written, torch.float32, CPU).requires_grad_(False), ids_NT.long()
    assert len(model.model.layers) == 2
    assert sum(p.numel() for p in model.parameters()) == architecture_parameters(parent.shape, fused(architecture))
    first, *following, last = plain.model.layers
    contexts = plain.model.contexts(plain.model.embed(ids_BT), torch.arange(16)[None])
    x = first.attend(plain.model.embed(ids_BT), **contexts["full_attention"])
    x = x + sum(block.feed(x) - x for block in (first, *following))
    expected = plain.head(plain.model.normalise(last(x, **contexts["full_attention"])))
    torch.testing.assert_close(model(input_ids=ids_BT).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, plain(input_ids=ids_BT).logits, atol=1e-2)
    states = model.model(input_ids=ids_BT, output_hidden_states=True).hidden_states
    terms = loss_terms(load_parent(parent, torch.float32, CPU), model, ids_BT, GkdSpec(), imitated=[3, 4])
    assert len(states) == 2
    assert set(terms) == {"cosine", "kl"}
