"""Every family's row gives transformers' own logits, bitwise; a row that leaves something out does not."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from puzzle_core.architecture import ModelShape, Variant
from puzzle_core.errors import ArtifactError, ParentError
from puzzle_core.export.source import Source, shared_reasons
from puzzle_core.families import family as family_module
from puzzle_core.families.config_keys import is_neutral
from puzzle_core.families.family import FAMILIES, Family, SubblockNorms
from puzzle_core.families.missing import MISSING
from puzzle_core.model.activations import Activations
from puzzle_core.model.child import load_child, load_parent
from puzzle_core.model.child_config import read_child_config
from puzzle_core.model.parent import Parent
from puzzle_core.model.remote.modeling_puzzle import MASKS
from puzzle_core.model.surgery import variant_block
from puzzle_core.spec import ParentSpec
from tests.conftest import CPU, MIXED
from tests.pico import GRANITE_SCALARS, PICOS, SIZES, Pico, edit_config, write_pico

FULL = ["full_attention"] * SIZES["num_hidden_layers"]
OTHER_PICOS = {
    "gemma": Pico("gemma", {"head_dim": 8}),
    "lfm2": Pico("lfm2", {"rms_norm_eps": 1e-5, "hidden_act": "silu", "block_auto_adjust_ff_dim": False}),
}


def row_like_llama(model_type: str, class_prefix: str, **fields) -> Family:
    return Family.model_validate(
        FAMILIES["llama"].model_dump() | {"model_type": model_type, "class_prefix": class_prefix} | fields
    )


# Families that are not supported, because not all stages know what they have. They show that the fields work.
OTHER_ROWS = {
    "gemma": row_like_llama("gemma", "Gemma", embedding_sqrt_hidden=True),
    "lfm2": row_like_llama(
        "lfm2",
        "Lfm2",
        attention_names={"output": "out_proj", "query_norm": "q_layernorm", "key_norm": "k_layernorm"},
        ffn_names={"module": "feed_forward", "gate": "w1", "up": "w3", "down": "w2"},
        attention_norms={"before": "operator_norm"},
        ffn_norms={"before": "ffn_norm"},
        final_norm="embedding_norm",
        qk_norm=True,
        config_keys=(
            "norm_eps",
            "conv_bias",
            "conv_L_cache",
            "block_multiple_of",
            "block_ffn_dim_multiplier",
            "block_auto_adjust_ff_dim",
            "full_attn_idxs",
        ),
    ),
}
LLAMAS_NAME = {
    "feed_forward": "mlp",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "out_proj": "o_proj",
    "operator_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""By LFM2's names."""
LEFT_OUT = {
    "granite-embedding": ("granite", {"embedding_scale_key": None}),
    "granite-residual": ("granite", {"residual_scale_key": None}),
    "granite-logits": ("granite", {"logits_divisor_key": None}),
    "gemma-embedding": ("gemma", {"embedding_sqrt_hidden": False}),
    "gemma2-softcap": ("gemma2", {"logits_softcap_key": None}),
}
IN_PUBLISHED_FILES = {
    "gemma3_text": {"sliding_window_pattern", "rope_local_base_freq"},
    "glm": {"partial_rotary_factor"},
    "glm4": {"partial_rotary_factor"},
    "hunyuan_v1_dense": {"use_qk_norm"},
    "phi3": {"partial_rotary_factor"},
    "smollm3": {"max_window_layers"},
}
"""Keys of rows that no config class declares, by family."""


def transformers_logits(directory: Path, ids_NT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(input_ids=ids_NT.long()).logits


def logits_of(directory: Path, ids_NT: torch.Tensor) -> torch.Tensor:
    parent = Parent(ParentSpec(path=str(directory)))
    return load_parent(parent, torch.float32, CPU)(input_ids=ids_NT.long()).logits


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory):
    """The directory of a pico parent of a family that is not supported; shared, so never changed."""
    return {name: write_pico(tmp_path_factory.mktemp(name), pico) for name, pico in OTHER_PICOS.items()}


@pytest.fixture(scope="module")
def directory_of(other_checkpoint, checkpoint_of):
    """The directory of a pico parent, of a family that is supported or not; shared, so never changed."""
    return lambda name: other_checkpoint[name] if name in OTHER_PICOS else checkpoint_of(name)


@pytest.fixture
def with_rows(monkeypatch):
    """Make families known for one test, or known with some of their fields changed."""

    def add(name, **changes):
        row = OTHER_ROWS.get(name) or FAMILIES[name]
        monkeypatch.setitem(FAMILIES, name, row.model_copy(update=changes))

    return add


def test_every_family_has_a_pico_parent_that_is_compared_with_transformers():
    assert {pico.family for pico in PICOS.values()} == set(FAMILIES)
    assert set(FAMILIES) == {file.stem for file in Path(family_module.__file__).parent.glob("*.yaml")}
    assert all(row.model_type == name for name, row in FAMILIES.items())


def test_the_page_of_formats_lists_every_family():
    page = (Path(__file__).parents[3] / "docs" / "formats.md").read_text().split("## Parents\n")[1].split("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)) == sorted(FAMILIES)


@pytest.mark.parametrize("name", PICOS)
def test_a_row_gives_the_logits_of_transformers_bitwise(name, parent_of, reference_logits, ids_NT):
    model = load_parent(parent_of(name), torch.float32, CPU)
    assert torch.equal(model(input_ids=ids_NT.long()).logits, reference_logits(name))


@pytest.mark.parametrize("name", PICOS)
def test_a_row_names_every_tensor_that_transformers_saves(name, parent_of):
    row, saved = FAMILIES[PICOS[name].family], {*parent_of(name).checkpoint.headers}
    assert tensors_named_by(row, parent_of(name).shape) == saved - {"lm_head.weight"}


def test_a_row_with_other_names_than_llamas_names_every_tensor_of_transformers_model(with_rows, other_checkpoint):
    with_rows("lfm2")
    model = AutoModelForCausalLM.from_pretrained(other_checkpoint["lfm2"])
    shape = Parent(ParentSpec(path=str(other_checkpoint["lfm2"]))).shape
    assert tensors_named_by(OTHER_ROWS["lfm2"], shape) == {*model.state_dict()} - {"lm_head.weight"}
    assert tensors_named_by(OTHER_ROWS["lfm2"], shape) != tensors_named_by(FAMILIES["llama"], shape)


def tensors_named_by(row: Family, shape: ModelShape) -> set[str]:
    """The tensors, all but the head's, that the names and flags of a row give a parent of this shape."""
    attention, ffn = row.attention_names, row.ffn_names
    biased = {attention.path(part): shape.qkv_bias for part in ("query", "key", "value")}
    biased |= {attention.path("output"): shape.attention_out_bias}
    biased |= {ffn.path(part): shape.mlp_bias for part in (*ffn.wide, "down")}
    weights = {*biased, *row.attention_norms.names, *row.ffn_norms.names}
    weights |= {attention.path("query_norm"), attention.path("key_norm")} if shape.qk_norm else set()
    layer = {f"{name}.weight" for name in weights} | {f"{name}.bias" for name, has_bias in biased.items() if has_bias}
    outside = {"model.embed_tokens.weight", f"model.{row.final_norm}.weight"}
    return outside | {f"model.layers.{number}.{name}" for number in range(shape.layers) for name in layer}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_knows_every_key_that_transformers_config_class_sets(name):
    config = CONFIG_MAPPING[name]().to_dict()
    assert FAMILIES[name].unknown_keys(config) == {}
    assert set(FAMILIES[name].config_keys) <= {*config} | IN_PUBLISHED_FILES.get(name, set())


def test_the_keys_of_a_row_are_needed(monkeypatch, checkpoint_of):
    monkeypatch.setitem(FAMILIES, "llama", FAMILIES["llama"].model_copy(update={"config_keys": ("mlp_bias",)}))
    with pytest.raises(ParentError, match="'llama' does not have here: attention_bias = True"):
        Parent(ParentSpec(path=str(checkpoint_of("attention-bias"))))


@pytest.mark.parametrize("name", OTHER_ROWS)
def test_fields_of_the_next_families_give_the_logits_of_transformers_bitwise(
    name, with_rows, other_checkpoint, ids_NT, tmp_path
):
    with_rows(name)
    expected = transformers_logits(other_checkpoint[name], ids_NT)
    assert torch.equal(logits_of(other_checkpoint[name], ids_NT), expected)
    parent = Parent(ParentSpec(path=str(other_checkpoint[name])))
    activations = Activations(tmp_path, parent, ids_NT, torch.float32, CPU)
    activations.capture_embedding()
    for layer in range(parent.shape.layers):
        activations.capture_layer(layer)
    predicted = activations.predictions(slice(None))(slice(None))
    assert torch.equal(predicted, expected.log_softmax(-1).flatten(0, 1))


@pytest.mark.parametrize("variant", ["attn:linear", "ffn:i24", "ffn:linear"])
@pytest.mark.parametrize("name", ["olmo2", "gemma2", "lfm2"])
def test_variants_keep_the_norms_of_their_subblock_where_the_row_says(name, variant, with_rows, directory_of):
    with_rows(name)
    parent, kind = Parent(ParentSpec(path=str(directory_of(name)))), Variant.parse(variant)
    contribution_I = torch.arange(float(parent.shape.ffn_width))
    state = kind.row.initial_state(parent.layer_tensors(1), parent.shape, kind.size, contribution_I)
    block = variant_block(parent, 1, kind, state, torch.float32, CPU)
    norms = FAMILIES[name].attention_norms if kind.subblock == "attn" else FAMILIES[name].ffn_norms
    assert {*norms.names} < {tensor.split(".")[0] for tensor in block.state_dict()}
    for norm in norms.names:
        assert torch.equal(getattr(block, norm).weight, parent.layer_tensors(1)[f"{norm}.weight"])


def test_weights_are_cut_alike_whatever_their_names(with_rows, other_checkpoint):
    with_rows("lfm2")
    parent = Parent(ParentSpec(path=str(other_checkpoint["lfm2"])))
    layer, contribution_I = parent.layer_tensors(2), torch.arange(float(parent.shape.ffn_width))
    as_llama = {re.sub("|".join(LLAMAS_NAME), lambda m: LLAMAS_NAME[m[0]], name): layer[name] for name in layer}
    shape = parent.shape.model_copy(update={"family": "llama"})
    for variant in map(Variant.parse, ("attn:kv2", "attn:linear", "ffn:i24", "ffn:linear")):
        state = variant.row.initial_state(layer, parent.shape, variant.size, contribution_I)
        expected = variant.row.initial_state(as_llama, shape, variant.size, contribution_I)
        assert [tensor.tolist() for tensor in state.values()] == [tensor.tolist() for tensor in expected.values()]


@pytest.mark.parametrize(("name", "change"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_a_row_that_ignores_a_scalar_gives_other_logits(name, change, with_rows, directory_of, ids_NT):
    with_rows(name, **change)
    logits = logits_of(directory_of(name), ids_NT)
    assert not torch.allclose(logits, transformers_logits(directory_of(name), ids_NT), atol=0.01)


def test_a_row_that_ignores_the_cap_of_attention_does_not_run(with_rows, checkpoint_of, ids_NT):
    with_rows("gemma2", attention_softcap_key=None)
    with pytest.raises(ValueError, match="`sdpa` attention does not support `softcap`"):
        logits_of(checkpoint_of("gemma2"), ids_NT)


@pytest.mark.parametrize("name", ["mistral-window", "qwen2-windows", "olmo3"])
def test_layers_without_their_window_give_other_logits(name, monkeypatch, checkpoint_of, ids_NT):
    monkeypatch.setitem(MASKS, "sliding_attention", MASKS["full_attention"])
    logits = logits_of(checkpoint_of(name), ids_NT)
    assert not torch.allclose(logits, transformers_logits(checkpoint_of(name), ids_NT), atol=0.01)


def test_a_row_with_norms_in_other_places_gives_other_logits(monkeypatch, checkpoint_of, ids_NT):
    changes = {
        "attention_norms": SubblockNorms(after="input_layernorm"),
        "ffn_norms": SubblockNorms(after="post_attention_layernorm"),
    }
    monkeypatch.setitem(FAMILIES, "llama", FAMILIES["llama"].model_copy(update=changes))
    logits = logits_of(checkpoint_of("llama"), ids_NT)
    assert not torch.allclose(logits, transformers_logits(checkpoint_of("llama"), ids_NT), atol=0.01)


@pytest.mark.parametrize("name", ["granite", "gemma"])
def test_a_family_under_the_names_of_llama_would_run_and_be_wrong(name, monkeypatch, directory_of, ids_NT):
    """The tensors have Llama's names and shapes, so only the config can say that this is no Llama."""
    llama = FAMILIES["llama"].model_copy(
        update={"model_type": "llama", "config_keys": (*FAMILIES["llama"].config_keys, *GRANITE_SCALARS)}
    )
    monkeypatch.setitem(FAMILIES, "llama", llama)
    directory = as_llama(directory_of(name), architectures=["LlamaForCausalLM"])
    logits = logits_of(directory, ids_NT)
    assert not torch.allclose(logits, transformers_logits(directory_of(name), ids_NT), atol=0.01)


def as_llama(directory: Path, **changes) -> Path:
    """A copy of a checkpoint beside it that says it is a Llama's."""
    copy = Path(shutil.copytree(directory, directory.with_name(f"{directory.name}-as-llama"), dirs_exist_ok=True))
    edit_config(copy, model_type="llama", **changes)
    return copy


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("granite", {}, r"model_type 'llama', but its architectures are \['GraniteForCausalLM'\]"),
        (
            "granite",
            {"architectures": None},
            "'llama' does not have here: attention_multiplier = 0.5, embedding_multiplier = 3.0, logits_scaling = 2.0, "
            "residual_multiplier = 0.25",
        ),
        ("gemma", {}, r"model_type 'llama', but its architectures are \['GemmaForCausalLM'\]"),
    ],
    ids=["granite", "granite by its scalars", "gemma"],
)
def test_a_family_under_the_names_of_llama_is_refused(name, changes, message, directory_of):
    directory = as_llama(directory_of(name), **changes)
    with pytest.raises(ParentError, match=message):
        Parent(ParentSpec(path=str(directory)))


@pytest.mark.parametrize("name", OTHER_PICOS)
def test_a_family_without_a_row_is_refused(name, other_checkpoint):
    with pytest.raises(ParentError, match=rf"of family '{name}', which is not supported.*; supported: arcee, "):
        Parent(ParentSpec(path=str(other_checkpoint[name])))


@pytest.mark.parametrize(("name", "missing"), MISSING.items())
def test_a_family_that_no_row_can_describe_is_refused_with_what_is_missing(name, missing, tmp_path):
    assert name in CONFIG_MAPPING
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
    with pytest.raises(ParentError, match=f"of family '{name}', which is not supported, for it has {missing}; supp"):
        Parent(ParentSpec(path=str(tmp_path)))


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe", "ernie4_5_moe", "glm4_moe"]
)
def test_mixtures_of_experts_are_refused_by_name(name, tmp_path):
    CONFIG_MAPPING[name]().save_pretrained(tmp_path)
    with pytest.raises(ParentError, match=f"of family '{name}', which is not supported, for it has mixture-of-experts"):
        Parent(ParentSpec(path=str(tmp_path)))


def test_a_mixture_of_experts_under_the_name_of_a_family_is_refused(copy_of):
    directory = copy_of("mistral")
    edit_config(directory, num_local_experts=8)
    with pytest.raises(ParentError, match="'mistral' does not have here: num_local_experts = 8"):
        Parent(ParentSpec(path=str(directory)))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("key", "value"), [("logit_scale", 0.0625), ("use_something", True)])
def test_a_key_that_no_row_knows_is_refused_by_name(name, key, value, copy_of):
    directory = copy_of(name)
    edit_config(directory, **{key: value})
    with pytest.raises(ParentError, match=f"family '{name}' does not have here: {key} = {value}"):
        Parent(ParentSpec(path=str(directory)))


def test_neutral_values_and_bookkeeping_change_nothing(copy_of, ids_NT, checkpoint_of):
    directory = copy_of("llama")
    edit_config(
        directory,
        logits_scaling=1.0,
        final_logit_softcapping=None,
        use_something=False,
        clip_qkv=0,
        unsloth_version="2026.1",
        _attn_implementation_autoset=True,
        temperature=0.6,
        cache_implementation="hybrid",
        empty={},
    )
    assert torch.equal(logits_of(directory, ids_NT), transformers_logits(checkpoint_of("llama"), ids_NT))
    assert not is_neutral("use_something", True)


WINDOWS_REFUSED = {
    "unknown kind": ("qwen3", {"layer_types": ["chunked_attention", *FULL[1:]]}, "of kind 'chunked_attention'"),
    "kind that the family lacks": (
        "llama",
        {"layer_types": ["sliding_attention", *FULL[1:]], "sliding_window": None},
        "kind 'sliding_attention', which family 'llama' does not have here; it has full_attention",
    ),
    "layer types that nothing reads": (
        "mistral-window",
        {"layer_types": FULL},
        r"sliding_window = 6 and layer_types = .* one window for all layers, or none; remove layer_types",
    ),
    "no width": (
        "qwen2-windows",
        {"layer_types": ["sliding_attention", *FULL[1:]], "use_sliding_window": False},
        "sliding-window attention by layer_types, and no sliding_window",
    ),
    "both ways": ("gemma3_text", {"use_bidirectional_attention": True}, "not have here: use_bidirectional_attention"),
    "rotary positions of the length": (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [2.0],
                             "partial_rotary_factor": 0.5}},
        "uses rope type 'longrope'",
    ),
    "rotary positions of the length, in one kind": (
        "olmo3",
        {"rope_parameters": {"full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}},
        "uses rope type 'dynamic'",
    ),
    "no scale of queries": (
        "ministral3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "rope_parameters of family 'ministral3' need llama_4_scaling_beta, original_max_position_embeddings",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), WINDOWS_REFUSED.values(), ids=WINDOWS_REFUSED)
def test_what_a_row_cannot_run_of_its_family_is_refused_by_name(name, changes, message, copy_of):
    directory = copy_of(name)
    edit_config(directory, **changes)
    with pytest.raises(ParentError, match=message):
        Parent(ParentSpec(path=str(directory)))


UNLIKE_LLAMA = {
    "arcee": "ffn_names",
    "ernie4_5": "rotary_pairs",
    "exaone4": "attention_norms, ffn_norms",
    "gemma2": "attention_norms, ffn_norms, embedding_sqrt_hidden, attention_softcap_key, logits_softcap_key",
    "gemma3_text": "attention_norms, ffn_norms, embedding_sqrt_hidden, logits_softcap_key",
    "glm": "rotary_pairs",
    "glm4": "attention_norms, ffn_norms, rotary_pairs",
    "granite": "embedding_scale_key, residual_scale_key, logits_divisor_key",
    "helium": "rotary_pairs",
    "hunyuan_v1_dense": "attention_names",
    "ministral3": "rope_keys",
    "olmo2": "attention_norms, ffn_norms",
    "olmo3": "attention_norms, ffn_norms",
}
"""What formats made for Llamas cannot hold, by family; families that are not listed have nothing of it."""


@pytest.mark.parametrize(("name", "fields"), [*UNLIKE_LLAMA.items(), ("gemma", "embedding_sqrt_hidden")])
def test_an_export_refuses_what_its_format_cannot_carry(name, fields, with_rows, directory_of):
    with_rows(name)
    reasons = shared_reasons(Source(directory_of(name)))
    assert f"its family {name} has {fields}, which the format has no place for" in reasons


@pytest.mark.parametrize("name", ["mistral-window", "qwen2-windows"])
def test_an_export_refuses_windows(name, checkpoint_of):
    reasons = shared_reasons(Source(checkpoint_of(name)))
    assert reasons == ["its layers attend within a sliding window, which the format has no place for"]


def test_an_export_has_nothing_against_the_names_norms_and_scalars_of_other_families():
    assert {name for name, row in FAMILIES.items() if row.unlike_llama} == {*UNLIKE_LLAMA}


def drop_family(directory: Path) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "family"}))


def drop_names(directory: Path) -> None:
    family = json.loads((directory / "config.json").read_text())["family"]
    new = ("attention_names", "ffn_names", "final_norm")
    edit_config(directory, family={name: value for name, value in family.items() if name not in new})


def test_a_child_from_before_descriptions_had_names_is_the_same_child(assemble, ids_NT):
    directory = assemble("llama", MIXED)
    expected = load_child(directory, torch.float32, CPU)(input_ids=ids_NT.long()).logits
    drop_names(directory)
    assert torch.equal(load_child(directory, torch.float32, CPU)(input_ids=ids_NT.long()).logits, expected)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)
    assert torch.equal(model(input_ids=ids_NT.long()).logits, expected)


def test_a_child_from_before_families_were_described_is_the_same_child(assemble, ids_NT):
    directory = assemble("smollm3", MIXED)
    expected = load_child(directory, torch.float32, CPU)(input_ids=ids_NT.long()).logits
    assert read_child_config(directory).family == FAMILIES["smollm3"].description()
    drop_family(directory)
    assert torch.equal(load_child(directory, torch.float32, CPU)(input_ids=ids_NT.long()).logits, expected)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: edit_config(d, family={"model_type": "llama"}),
            "its family wrongly .class_prefix: Field req",
        ),
        (lambda d: (drop_family(d), edit_config(d, parent_config={})), "describes no family, and 'None' is not supp"),
    ],
    ids=["incomplete", "unknown"],
)
def test_a_child_of_a_family_that_nobody_knows_is_refused(damage, message, assemble):
    directory = assemble("llama")
    damage(directory)
    with pytest.raises(ArtifactError, match=message):
        load_child(directory, torch.float32, CPU)
