"""The run specification: every wrong key and value is said at once, and in words that help."""

import pytest
import yaml

from puzzle_core.architecture import Variant
from puzzle_core.errors import SpecError
from puzzle_core.spec import RunSpec, VariantsSpec, parse_spec
from puzzle_core.spec_file import load_spec

LEAST = {"parent": {"path": "owner/name"}, "scenario": {"limits": {"memory": "60%"}}}


def spec_with(**parts):
    return parse_spec(LEAST | parts, "spec.yaml")


def complaint(**parts):
    """What is said of a spec with these parts."""
    with pytest.raises(SpecError) as caught:
        spec_with(**parts)
    return str(caught.value)


def ids(variants):
    return [str(variant) for variant in variants]


@pytest.fixture
def spec_file(tmp_path):
    """A spec beside a parent and a text, both named relative to it."""
    (tmp_path / "specs").mkdir()
    (tmp_path / "parent").mkdir()
    (tmp_path / "specs" / "stories.txt").write_text("Once")
    file = tmp_path / "specs" / "run.yaml"
    texts = {"train_texts": ["stories.txt", "python-stdlib:train"]}
    file.write_text(yaml.safe_dump(LEAST | {"parent": {"path": "../parent"}, "data": texts}))
    return file


def test_the_least_spec_is_enough():
    assert spec_with() == RunSpec.model_validate_json(spec_with().model_dump_json())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"bdl": {}}, "bdl: unknown key; did you mean 'bld'?"),
        (
            {"bld": {"optimizer": {"lerning_rate": 1}}},
            "bld.optimizer.lerning_rate: unknown key; did you mean 'learning_rate'?",
        ),
        ({"scenario": {"limits": {"memry": "1GB"}}}, "scenario.limits.memry: unknown key; did you mean 'memory'?"),
        ({"variants": {"layers": [{"first_layer": 0, "last_layer": 1, "kv_head": [1]}]}}, "did you mean 'kv_heads'?"),
        ({"gkd": {"zzz": 1}}, "gkd.zzz: unknown key; known keys here: tokens, sequence_length, epochs"),
        ({"form": {"linear": False}}, "form: `form` is now `constraints`"),
        ({"scenario": {"form": {}}}, "scenario.form: unknown key; known keys here"),
    ],
)
def test_an_unknown_key_comes_with_the_nearest_known_one(parts, message):
    assert message in complaint(**parts)


def test_all_errors_are_said_at_once():
    text = complaint(bdl={}, bld={"tokens": -1}, gkd={"batch_tokens": "many"}, parent={})
    assert text.startswith("spec.yaml is not a valid spec:\n")
    for line in ("parent.path: Field required", "bld.tokens: ", "(found -1)", "gkd.batch_tokens: ", "bdl: unknown key"):
        assert line in text


@pytest.mark.parametrize("limit", ["80", 80, 0.5])
def test_a_limit_without_a_unit_is_refused(limit):
    text = complaint(scenario={"limits": {"memory": limit}})
    assert f"scenario.limits.memory: '{limit}' has no unit; use one of: B, kB, MB, GB" in text


def test_a_share_of_block_time_has_no_absolute_value():
    assert "'3ms' has the unit 'ms'; use one of: %" in complaint(scenario={"limits": {"block_decode_time": "3ms"}})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"scenario": {"limits": {}}}, "no limit given: set at least one of memory"),
        ({"gkd": {"kl_weight": 0, "cosine_weight": 0}}, "all weights are 0"),
        ({"gkd": {"patience": 2, "held_back_checks": 0}}, "patience is 2 and held_back_checks is 0, so nothing is"),
        ({"bld": {"batch_tokens": 100}}, "bld.batch_tokens is 100, not a multiple of data.sequence_length (256)"),
        ({"gkd": {"batch_tokens": 512, "micro_batch_tokens": 768}}, "must be a multiple of gkd.micro_batch_tokens"),
        ({"bld": {"sequence_length": 8192}}, "bld.batch_tokens is 4096, not a multiple of bld.sequence_length (8192)"),
        (
            {"gkd": {"long": {"sequence_length": 8192, "tokens": 1}}},
            "gkd.long.batch_tokens is 4096, not a multiple of gkd.long.sequence_length (8192)",
        ),
        ({"gkd": {"long": {"tokens": 1}}}, "gkd.long.sequence_length: Field required"),
        ({"name": "../up"}, "name: "),
        (
            {"variants": {"layers": [{"first_layer": 3, "last_layer": 2}]}},
            "last_layer (2) comes before first_layer (3)",
        ),
        ({"data": {"train_texts": []}}, "data.train_texts: "),
        ({"evaluation": {"lm_eval_tasks": ["../task.yaml"]}}, "evaluation.lm_eval_tasks.0: "),
        (
            {"scoring": {"method": "fisher"}, "search": {"objective": "lm_loss"}},
            "search.objective is lm_loss, and scoring.method: fisher estimates the KL alone",
        ),
        ({"target": {"dtype": "float16"}}, "target.dtype: "),
        ({"runtime": {"dask_address": "tcp://10.0.0.5:8786"}}, "set task_runner to 'dask'"),
        (
            {"bld": {"source": "streamed"}, "runtime": {"task_runner": "dask"}},
            "bld.source is streamed and runtime.task_runner is dask",
        ),
        ({"bld": {"micro_batch_tokens": 1536}}, "bld.batch_tokens must be a multiple of bld.micro_batch_tokens"),
        ({"runtime": {"task_runner": "dask", "dask_address": "10.0.0.5"}}, "runtime.dask_address: "),
        ({"runtime": {"gkd_machines": 2}}, "set gkd_rendezvous to this machine's name and a free port"),
    ],
)
def test_values_that_make_no_sense_together_are_refused(parts, message):
    assert message in complaint(**parts)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"runtime": {"store": "s3://me:hidden@bucket/prefix"}}, "runtime: store holds credentials or options: give"),
        ({"runtime": {"store": "s3://bucket?secret=hidden"}}, "set AWS_PROFILE"),
        ({"runtime": {"mlflow_uri": "http://me:hidden@host:5000"}}, "set MLFLOW_TRACKING_USERNAME"),
        ({"runtime": {"mlflow_uri": "postgresql://me:hidden@host/mlflow"}}, "runtime: mlflow_uri holds credentials"),
        ({"parent": {"path": "https://me:hidden@host/model"}}, "parent.path is an address with credentials"),
        ({"data": {"train_texts": ["a", "ftp://me:hidden@host/texts"]}}, "data.train_texts.1 is an address with"),
    ],
)
def test_an_address_with_credentials_is_refused_and_not_repeated(parts, message):
    text = complaint(**parts)
    assert message in text
    assert "hidden" not in text


def test_specs_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        spec_with().bld.tokens = 1


def test_paths_are_relative_to_the_file(spec_file):
    spec = load_spec(spec_file)
    assert spec.parent.path == str(spec_file.parents[1] / "parent")
    assert spec.data.train_texts == (str(spec_file.parent / "stories.txt"), "python-stdlib:train")


def test_a_hub_id_is_left_alone(spec_file):
    spec_file.write_text(yaml.safe_dump(LEAST))
    assert load_spec(spec_file).parent.path == "owner/name"


def test_overrides_win_and_are_read_as_yaml(spec_file):
    overrides = ("bld.optimizer.learning_rate=0.5", "variants.kv_heads=[2, 1]", "parent.path=elsewhere/model")
    spec = load_spec(spec_file, overrides)
    assert spec.bld.optimizer.learning_rate == 0.5
    assert spec.variants.kv_heads == (2, 1)
    assert spec.parent.path == "elsewhere/model"


def test_credentials_in_the_address_of_a_cluster_are_refused_and_not_repeated():
    text = complaint(runtime={"task_runner": "dask", "dask_address": "tcp://me:hunter2@10.0.0.5:8786"})
    assert "dask_address holds credentials" in text
    assert "hunter2" not in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bld.tokens", "write part.field=value"),
        ("=1", "write part.field=value"),
        ("parent.path.x=1", "'path' holds a value, not keys"),
        ("bld.token=1", "bld.token: unknown key; did you mean 'tokens'"),
        ("bld.tokens=[1", "the value is not YAML"),
    ],
)
def test_wrong_overrides_are_refused(spec_file, override, message):
    with pytest.raises(SpecError, match=message.replace(".", r"\.")):
        load_spec(spec_file, (override,))


@pytest.mark.parametrize(
    ("content", "message"), [(b"a: [", "is not YAML"), (b"", "holds no keys"), (b"\xff\xfe\xe9", "is not YAML")]
)
def test_files_that_are_no_specs_are_named(tmp_path, content, message):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(SpecError, match=rf"run\.yaml {message}"):
        load_spec(tmp_path / "run.yaml")
    with pytest.raises(SpecError, match=r"cannot read the spec .*none"):
        load_spec(tmp_path / "none")


def test_variants_start_with_the_parents_own_and_repeat_none(parent):
    variants = VariantsSpec(kv_heads=(1, 4, 2), ffn_ratios=(1.0, 0.5, 0.25), ffn_widths=(24, 40))
    attentions, ffns = variants.of_layer(0, parent.shape)
    assert ids(attentions) == ["attn:kv4", "attn:kv2", "attn:kv1", "attn:linear", "attn:no_op"]
    assert ids(ffns) == ["ffn:i48", "ffn:i40", "ffn:i24", "ffn:i12", "ffn:linear", "ffn:no_op"]
    blocks = variants.blocks_of_layer(0, parent.shape)
    assert len(set(blocks)) == 5 * 6
    assert blocks[0] == parent.shape.largest_block


def test_widths_from_ratios_are_multiples(parent):
    variants = VariantsSpec(ffn_ratios=(0.5, 0.3, 0.01), ffn_multiple_of=16, linear=False, no_op=False)
    assert ids(variants.of_layer(0, parent.shape)[1]) == ["ffn:i48", "ffn:i32", "ffn:i16"]


def test_ranges_of_layers_change_what_they_say_and_later_ones_win(parent):
    variants = VariantsSpec(
        kv_heads=(2,),
        ffn_ratios=(0.5,),
        layers=(
            {"first_layer": 0, "last_layer": 1, "no_op": False, "kv_heads": ()},
            {"first_layer": 1, "last_layer": 1, "ffn_widths": (8,), "no_op": True},
        ),
    )
    of_layer = [
        [*ids(attentions), *ids(ffns)] for attentions, ffns in (variants.of_layer(n, parent.shape) for n in range(3))
    ]
    assert of_layer[0] == ["attn:kv4", "attn:linear", "ffn:i48", "ffn:i24", "ffn:linear"]
    assert of_layer[1] == ["attn:kv4", "attn:linear", "attn:no_op", "ffn:i48", "ffn:i8", "ffn:linear", "ffn:no_op"]
    assert of_layer[2][:2] == ["attn:kv4", "attn:kv2"]


def test_variants_that_the_parent_cannot_have_are_refused(parent):
    with pytest.raises(SpecError, match="3 KV heads do not divide the parent's 4"):
        VariantsSpec(kv_heads=(3,)).of_layer(0, parent.shape)
    with pytest.raises(SpecError, match="ffn:i64 is wider than the parent's FFN"):
        VariantsSpec(ffn_widths=(64,)).of_layer(0, parent.shape)
    assert Variant("attn", "linear") in VariantsSpec().of_layer(0, parent.shape)[0]
