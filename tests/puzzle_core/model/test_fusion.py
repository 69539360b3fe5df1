"""FFN fusion: one wide FFN gives the sum of the FFNs that it replaces, on the input that all of them get."""

import pytest
import torch

from puzzle_core.architecture import EMPTY_BLOCK, Architecture, Variant
from puzzle_core.errors import SpecError
from puzzle_core.families.family import FAMILIES
from puzzle_core.model.fusion import check_fusible, fused_ffn, fusible_runs
from puzzle_core.model.surgery import variant_block
from tests.conftest import CPU
from tests.pico import PICOS

REFUSED = {"exaone4", "gemma2", "gemma3_text", "glm4", "olmo2", "olmo3"}
FUSIBLE = [name for name, pico in PICOS.items() if pico.family not in REFUSED and pico.dtype == torch.float32]


@pytest.mark.parametrize("name", FUSIBLE)
def test_the_fused_ffn_is_the_sum_of_those_that_it_replaces(name, parent_of, activations_of):
    parent, layers, widths = parent_of(name), (1, 2, 4), [48, 48, 48]
    prefixes, entering_BTD = FAMILIES[parent.shape.family].ffn_prefixes, activations_of(name).post_attention(2)
    states = [{k: t for k, t in parent.layer_tensors(layer).items() if k.startswith(prefixes)} for layer in layers]

    def added(width, state):
        block = variant_block(parent, 1, Variant("ffn", "sized", width), state, torch.float64, CPU)
        return block.feed(entering_BTD.double()) - entering_BTD

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
    ("blocks", "runs"),
    [
        ("kv4+i8 no_op+i4 no_op+i2 kv4+i8", [(0, 3)]),
        ("kv4+i8 kv2+i4 no_op+i2 no_op+no_op no_op+i4 linear+i8 no_op+i8", [(1, 5), (5, 7)]),
        ("kv4+i8 no_op+no_op no_op+no_op kv4+i8", []),
        ("kv4+no_op no_op+i8 no_op+linear no_op+i8 no_op+i2", [(3, 5)]),
        ("no_op+i8 no_op+i8", [(0, 2)]),
        ("kv4+i8 kv4+i8", []),
    ],
)
def test_runs_are_ffns_with_no_attention_between_them(blocks, runs):
    ids = [block.split("+") for block in blocks.split()]
    architecture = Architecture.parse([f"attn:{attention}+ffn:{ffn}" for attention, ffn in ids])
    found = fusible_runs(architecture)
    assert [(run.start, run.stop) for run in found] == runs
    for run in found:
        assert all(b == EMPTY_BLOCK or b.attention.is_empty for b in architecture.layers[run.start + 1 : run.stop])
