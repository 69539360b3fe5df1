"""Lowering: what the child adds to the residual stream stays, in its order, in layers that `deci` computes right."""

import itertools

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puzzle_core.architecture import Architecture, BlockVariant, ModelShape, Variant
from puzzle_core.export.lowering import ZERO_ATTENTION, ZERO_FFN, ZERO_LINEAR, PlacedSubblock, lower

SHAPE = ModelShape(
    family="llama", layers=4, hidden=16, heads=4, kv_heads=4, head_dim=4, ffn_width=64, vocabulary=8,
    tied_embeddings=False, qkv_bias=False, attention_out_bias=False, mlp_bias=False, qk_norm=False, max_positions=8,
)  # fmt: skip
no_clock = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine fails no test
BIASED = SHAPE.model_copy(update={"qkv_bias": True, "mlp_bias": True})
attentions = st.sampled_from(["attn:kv4", "attn:kv1", "attn:linear", "attn:no_op"])
ffns = st.sampled_from(["ffn:i64", "ffn:i7", "ffn:linear", "ffn:no_op"])
blocks = st.builds(lambda a, f: BlockVariant.parse(f"{a}+{f}"), attentions, ffns)
architectures = st.lists(blocks, min_size=1, max_size=6).map(lambda found: Architecture(layers=tuple(found)))


def halves(layers):
    return [half for layer in layers for half in (layer.attention, layer.ffn) if half and half.layer is not None]


@no_clock
@given(architectures, st.sampled_from([SHAPE, BIASED]))
def test_what_is_added_stays_in_its_order(architecture, shape):
    expected = [
        PlacedSubblock(layer, variant)
        for layer, block in enumerate(architecture.layers)
        for variant in (block.attention, block.ffn)
        if variant.kind != "no_op"
    ]
    assert halves(lower(architecture, shape)) == expected


@no_clock
@given(architectures, st.sampled_from([SHAPE, BIASED]))
def test_every_layer_is_one_that_deci_computes_right(architecture, shape):
    layers = lower(architecture, shape)
    assert layers[0].attention is not None
    assert any(
        layer.attention and layer.attention.variant.subblock == "attn" and layer.attention.variant.size
        for layer in layers
    )
    for layer in layers:
        assert layer.ffn.variant.kind == "sized"
        if layer.attention and layer.attention.layer is not None and layer.attention.variant.kind == "linear":
            assert layer.ffn == ZERO_FFN or shape is SHAPE
        if layer.attention and layer.attention.variant.subblock == "ffn":
            assert layer.attention.variant.kind == "linear"


@no_clock
@given(architectures)
def test_nothing_is_filled_that_need_not_be(architecture):
    layers = lower(architecture, SHAPE)
    for now, following in itertools.pairwise(layers):
        assert now.ffn != ZERO_FFN or following.attention is not None
        assert following.attention != ZERO_LINEAR


def test_the_parent_is_as_it_was():
    layers = lower(Architecture.of_parent(SHAPE), SHAPE)
    own = (Variant.parse("attn:kv4"), Variant.parse("ffn:i64"))
    assert [(x.attention, x.ffn) for x in layers] == [
        (PlacedSubblock(n, own[0]), PlacedSubblock(n, own[1])) for n in range(4)
    ]


def test_halves_of_two_layers_share_one():
    layers = lower(Architecture.parse(["attn:kv1+ffn:no_op", "attn:no_op+ffn:i7"]), SHAPE)
    assert len(layers) == 1
    assert (layers[0].attention.layer, layers[0].ffn.layer) == (0, 1)


def test_a_child_of_nothing_has_one_layer_of_zeros():
    layers = lower(Architecture.parse(["attn:no_op+ffn:no_op"] * 3), SHAPE)
    assert [(layer.attention, layer.ffn) for layer in layers] == [(ZERO_ATTENTION, ZERO_FFN)]
