"""Ids of variants, blocks and architectures, and what a parent can have."""

import pytest

from puzzle_core.architecture import Architecture, BlockVariant, Variant
from puzzle_core.errors import SpecError
from tests.conftest import MIXED


@pytest.mark.parametrize("variant", ["attn:kv4", "attn:linear", "attn:no_op", "ffn:i8704", "ffn:linear", "ffn:no_op"])
def test_variant_ids_round_trip(variant):
    assert str(Variant.parse(variant)) == variant
    assert Variant.parse(Variant.parse(variant)) == Variant.parse(variant)


@pytest.mark.parametrize(
    "text", ["", "attn", "attn:kv", "attn:kv0", "attn:i4", "ffn:kv4", "ffn:i-1", "ffn:noop", "mlp:i4", "attn:kv4 "]
)
def test_what_is_no_variant_id_is_refused(text):
    with pytest.raises(ValueError, match="is no variant id: use attn:kv4"):
        Variant.parse(text)


def test_architectures_round_trip_through_ids_and_json():
    architecture = Architecture.parse(MIXED)
    assert tuple(map(str, architecture.layers)) == MIXED
    assert Architecture.model_validate_json(architecture.model_dump_json()) == architecture
    assert '"attn:no_op"' in architecture.model_dump_json()


def test_subblocks_cannot_change_places():
    with pytest.raises(ValueError, match=r"'ffn:i4\+attn:kv4' is not a block variant"):
        BlockVariant.parse("ffn:i4+attn:kv4")


def test_replace_changes_one_layer(parent):
    own, block = Architecture.of_parent(parent.shape), BlockVariant.parse(MIXED[0])
    changed = own.replace(2, block)
    assert changed.layers[2] == block
    assert changed.replace(2, parent.shape.largest_block) == own


def test_a_parent_refuses_what_it_cannot_have(parent):
    for fits in ("attn:kv4", "attn:kv1", "attn:linear", "ffn:i48", "ffn:no_op"):
        assert str(parent.shape.check(Variant.parse(fits))) == fits
    for kv_heads in (3, 8):
        with pytest.raises(
            SpecError, match=rf"{kv_heads} KV heads do not divide the parent's 4; use one of \[1, 2, 4\]"
        ):
            parent.shape.check(Variant("attn", "sized", kv_heads))
    with pytest.raises(SpecError, match=r"ffn:i49 is wider than the parent's FFN \(48\)"):
        parent.shape.check(Variant("ffn", "sized", 49))
