"""Roofline times: worked out by hand on round figures, and as physics has it where figures change."""

import pytest

from puzzle_core.architecture import ModelShape, Variant
from puzzle_core.cost.roofline import roofline
from puzzle_core.errors import SpecError
from puzzle_core.sizes import outside_parameters, variant_size
from puzzle_core.target import Efficiency, HardwareSpec, Interconnect, Serving, TargetSpec
from puzzle_core.work import Traffic

SHAPE = ModelShape(
    family="llama", layers=4, hidden=1024, heads=16, kv_heads=8, head_dim=64, ffn_width=4096, vocabulary=32000,
    tied_embeddings=False, qkv_bias=False, attention_out_bias=False, mlp_bias=False, qk_norm=False, max_positions=4096,
)  # fmt: skip
VARIANTS = tuple(
    map(Variant.parse, ("attn:kv8", "attn:kv4", "attn:linear", "attn:no_op", "ffn:i4096", "ffn:i512", "ffn:linear"))
)
PERFECT = Efficiency(compute=1, exposed=0, bandwidth=1, link=1, overhead_us=0, sequence_us=0, pass_us=0)
SLOW, FAST = "1 GFLOP/s", "1000 PFLOP/s"


def target(rate=FAST, bandwidth="1TB/s", precision="float16", kv_cache="float16", efficiency=PERFECT, **hardware):
    return TargetSpec(
        costs="roofline",
        hardware=HardwareSpec(
            device="abacus",
            weights=precision,
            activations="float16",
            kv_cache=kv_cache,
            memory="80GB",
            bandwidth=bandwidth,
            efficiency=efficiency,
            **{"peak_rates": {"float16": rate}} | hardware,
        ),
    )


def costs(asked=None, prompt_tokens=128, generated_tokens=65, batch_size=2):
    traffic = Traffic(prompt_tokens=prompt_tokens, generated_tokens=generated_tokens, batch_size=batch_size)
    return roofline(SHAPE, VARIANTS, traffic, asked or target())


def test_decoding_a_small_batch_reads_every_weight_once_per_step():
    ffn = costs().variants["ffn:i4096"]
    weights = 2 * variant_size(SHAPE, Variant.parse("ffn:i4096")).parameters
    activations = 2 * 2 * (2 * 1024 + 2 * 4096)
    assert ffn.decode_ms == pytest.approx(64 * (weights + activations) / 1e12 * 1e3)


def test_compute_bound_prefill_takes_two_operations_per_parameter_and_token():
    ffn = costs(target(rate="1 TFLOP/s", bandwidth="1000TB/s")).variants["ffn:i4096"]
    parameters = variant_size(SHAPE, Variant.parse("ffn:i4096")).parameters
    assert ffn.prefill_ms == pytest.approx(2 * parameters * 2 * 128 / 1e12 * 1e3)


def test_the_cache_is_read_whole_at_every_step():
    """Against a sum over the steps, one by one: step t attends to the prompt and t generated tokens."""
    attention = costs().variants["attn:kv8"]
    parameters = variant_size(SHAPE, Variant.parse("attn:kv8")).parameters
    projections = 2 * parameters + 2 * 2 * (2 * 1024 + 4 * (16 + 8) * 64)
    cache = sum(2 * (128 + t) * 2 * 8 * 64 * 2 for t in range(1, 65))
    assert attention.decode_ms == pytest.approx((64 * projections + cache) / 1e12 * 1e3)


def test_prefill_attends_to_earlier_tokens_only():
    """Against a sum over the positions: the n-th token has n products of each head with keys, and n with values."""
    asked = target(rate="1 TFLOP/s", bandwidth="1000TB/s")
    with_attention = costs(asked).variants["attn:kv8"].prefill_ms
    parameters = variant_size(SHAPE, Variant.parse("attn:kv8")).parameters
    operations = 2 * sum(2 * parameters + 2 * 2 * 16 * 64 * n for n in range(1, 129))
    assert with_attention == pytest.approx(operations / 1e12 * 1e3)


def test_outside_is_the_head_and_a_row_of_the_embedding_per_token():
    head = 32000 * 1024
    decode_bytes = 2 * head + 2 * 1024 * (2 + 2) + 2 * 2 * 32000 * 4
    assert costs().outside.decode_ms == pytest.approx(64 * decode_bytes / 1e12 * 1e3)
    assert head < outside_parameters(SHAPE)


def test_the_parent_is_its_blocks_and_what_lies_outside():
    record = costs()
    for phase in ("prefill_ms", "decode_ms"):
        block = sum(getattr(record.variants[half], phase) for half in ("attn:kv8", "ffn:i4096"))
        assert getattr(record.parent, phase) == pytest.approx(4 * block + getattr(record.outside, phase))
    assert (record.source, record.weight_bytes, record.kv_bytes, record.rounds) == ("roofline", 2, 2, None)
    assert "attn:no_op" not in record.variants


def test_smaller_variants_take_less_time():
    times = costs().variants
    for smaller, larger in (("attn:kv4", "attn:kv8"), ("ffn:i512", "ffn:i4096"), ("ffn:linear", "ffn:i512")):
        assert times[smaller].prefill_ms < times[larger].prefill_ms
        assert times[smaller].decode_ms < times[larger].decode_ms


def test_one_generated_token_needs_no_decoding():
    assert {timing.decode_ms for timing in costs(generated_tokens=1).variants.values()} == {0.0}


def test_four_bit_weights_are_a_quarter_to_read_and_no_faster_to_multiply():
    full, quarter = costs(batch_size=1), costs(target(precision="int4"), batch_size=1)
    ratio = quarter.variants["ffn:i4096"].decode_ms / full.variants["ffn:i4096"].decode_ms
    assert 0.257 < ratio < 0.265
    assert quarter.weight_bytes == pytest.approx((4 + 16 / 128) / 8)
    slow = [costs(target(precision=p, rate=SLOW)).variants["ffn:i4096"].prefill_ms for p in ("int4", "float16")]
    assert slow[0] == slow[1]


def test_an_eight_bit_cache_is_half_to_read():
    full, half = (costs(target(kv_cache=p), generated_tokens=4097, batch_size=64) for p in ("float16", "int8"))
    assert half.kv_bytes == 1
    assert half.variants["ffn:i4096"] == full.variants["ffn:i4096"]
    assert 0.5 < half.variants["attn:kv8"].decode_ms / full.variants["attn:kv8"].decode_ms < 0.52


@pytest.mark.parametrize(
    ("factor", "rate", "phase"),
    [("compute", SLOW, "prefill_ms"), ("compute", SLOW, "decode_ms"), ("bandwidth", FAST, "decode_ms")],
)
def test_half_of_an_efficiency_doubles_the_time_that_it_bounds(factor, rate, phase):
    half = target(rate=rate, efficiency=PERFECT.model_copy(update={factor: 0.5}))
    times = [getattr(costs(asked).variants["ffn:i4096"], phase) for asked in (target(rate=rate), half)]
    assert times[1] == pytest.approx(2 * times[0])


def test_memory_time_that_is_exposed_adds_to_computing_and_never_to_itself():
    """At the ridge, where computing takes as long as memory, nothing hidden is twice as long as all hidden."""
    bare = PERFECT.model_copy(update={"exposed": 1})
    plain, exposed = costs(batch_size=1), costs(target(efficiency=bare), batch_size=1)
    few = [record.variants["ffn:i4096"].decode_ms for record in (plain, exposed)]
    assert few[1] == pytest.approx(few[0], rel=1e-3)
    ffn = costs(target(rate="1 TFLOP/s", bandwidth="1000TB/s")).variants["ffn:i4096"].prefill_ms
    memory = costs(target()).variants["ffn:i4096"].prefill_ms
    both = costs(target(rate="1 TFLOP/s", efficiency=bare)).variants["ffn:i4096"].prefill_ms
    assert both == pytest.approx(ffn + memory)


def test_a_link_has_a_share_of_its_own():
    link = Interconnect(bandwidth="1GB/s", latency="1e-6us")
    full, half = (
        costs(target(tensor_parallel=2, interconnect=link, efficiency=PERFECT.model_copy(update={"link": share})))
        for share in (1, 0.5)
    )
    times = [record.variants["ffn:linear"].prefill_ms for record in (full, half)]
    assert times[1] == pytest.approx(2 * times[0], rel=0.05)


def test_an_attention_takes_time_for_every_sequence_that_decodes():
    plain, slow = costs(), costs(target(efficiency=PERFECT.model_copy(update={"sequence_us": 3})))
    added = {name: slow.variants[name].decode_ms - plain.variants[name].decode_ms for name in plain.variants}
    assert added["attn:kv8"] == pytest.approx(64 * 2 * 0.003)
    assert added["ffn:i4096"] == added["attn:linear"] == 0
    assert slow.variants["attn:kv8"].prefill_ms == plain.variants["attn:kv8"].prefill_ms


def test_a_pass_has_at_most_as_many_tokens_as_the_engine_takes():
    """Twice the passes read the weights twice; what is bound by compute takes as long."""
    few = target(serving=Serving(max_tokens=128))
    assert costs(few).variants["ffn:i4096"].prefill_ms > 1.5 * costs().variants["ffn:i4096"].prefill_ms
    slow = [costs(target(rate=SLOW, serving=Serving(max_tokens=most))) for most in (128, 8192)]
    assert slow[0].variants["ffn:i4096"].prefill_ms == pytest.approx(slow[1].variants["ffn:i4096"].prefill_ms)


def test_stages_of_a_pipeline_work_on_parts_of_the_batch():
    link = Interconnect(bandwidth="1000TB/s", latency="1us")
    piped = costs(target(pipeline_parallel=2, interconnect=link), batch_size=2)
    alone = costs(target(), batch_size=1)
    assert piped.variants["ffn:i4096"] == alone.variants["ffn:i4096"]
    assert piped.outside.decode_ms == pytest.approx(alone.outside.decode_ms + 64 * 0.001)


def test_embedding_and_head_have_their_own_bits():
    rates = {"float16": FAST, "fp8": FAST}
    record = costs(target(precision="fp8", peak_rates=rates))
    assert (record.weight_bytes, record.embedding_bytes) == (1, 2)
    small = costs(target(precision="q8_0", peak_rates=rates))
    assert small.weight_bytes == small.embedding_bytes == 8.5 / 8
    assert small.outside.decode_ms < record.outside.decode_ms


def test_devices_that_cannot_share_the_model_are_refused():
    link = Interconnect(bandwidth="1000TB/s", latency="1us")
    with pytest.raises(SpecError, match="tensor_parallel is 3, and the model has 16 heads"):
        costs(target(tensor_parallel=3, interconnect=link))
    with pytest.raises(SpecError, match="pipeline_parallel is 5, and the model has 4 layers"):
        costs(target(pipeline_parallel=5, interconnect=link))


def test_overhead_is_per_subblock_and_step():
    plain, slow = costs(), costs(target(efficiency=PERFECT.model_copy(update={"overhead_us": 7})))
    for name in plain.variants:
        assert slow.variants[name].prefill_ms - plain.variants[name].prefill_ms == pytest.approx(0.007)
        assert slow.variants[name].decode_ms - plain.variants[name].decode_ms == pytest.approx(64 * 0.007)


def test_devices_share_work_and_pay_for_adding_up():
    link = Interconnect(bandwidth="100GB/s", latency="3us")
    alone, shared = (costs(target(tensor_parallel=n, interconnect=link)) for n in (1, 4))
    for name in alone.variants:
        sent = 2 * 3 / 4 * 2 * 1024 * 2
        all_reduce = 64 * (sent / 100e9 + 3e-6) * 1e3
        assert shared.variants[name].decode_ms == pytest.approx(alone.variants[name].decode_ms / 4 + all_reduce)


def test_fewer_kv_heads_than_devices_are_copied():
    link = Interconnect(bandwidth="1000TB/s", latency="1e-6us")
    long = {"generated_tokens": 4097, "batch_size": 64}
    alone, shared = (costs(target(tensor_parallel=n, interconnect=link), **long) for n in (1, 16))
    shares = {name: shared.variants[name].decode_ms / alone.variants[name].decode_ms for name in alone.variants}
    assert shares["attn:kv8"] == pytest.approx(1 / 8, rel=0.05)
    assert shares["ffn:i4096"] == pytest.approx(1 / 16, rel=0.05)


def test_a_target_without_figures_is_refused():
    with pytest.raises(SpecError, match="target this-machine has no figures to compute from"):
        costs(TargetSpec())
