"""The `puzzle` command: its help, its plan, its report, and what it says of bad input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli.main import SUBCOMMANDS, app, main
from puzzle_core.model.checkpoint import INDEX
from tests.pico import edit_config, edit_tensors
from tests.workflow import artifacts, merged, placed, publish_costs, write_spec

ROOT = Path(__file__).parents[2]
SPEC = ("SPEC", "--set KEY=VALUE")
HELP = {
    "run": SPEC,
    "build-library": (*SPEC, "--layers FIRST-LAST"),
    "search": (*SPEC, "--scores", "--costs", "--scenario", "--out", "--score", "--maximise", "--parent"),
    "targets": (*SPEC, "--targets DIR", "--search"),
    "calibrate": ("TARGET", "--measurements FILE", "--spec SPEC", "--write"),
    "train-child": SPEC,
    "check": (*SPEC, "plan"),
    "report": ("RUN", "--store"),
    "cost": ("RUN", "--store", "--price-per-hour"),
    "export": ("CHILD", "--format", "--out", "--name", "--dtype", "--widths", "grid, pad, any", "--store", "--mlflow"),
    "push": ("CHILD", "--hub ORG/NAME", "--endpoint URL", "--private"),
    "lineage": ("CHILD", "--mlflow", "--store"),
    "promote": ("CHILD", "--answers TARGET-SCENARIO", "--mlflow"),
    "bench": (
        *(
            "CHILD",
            "--engine",
            "One of torch, vllm, llama.cpp.",
            "--out",
            "--batch",
            "--context",
            "--generate",
            "--dtype",
        ),
        *("--gguf-type", "--threads", "--rounds", "--python", "--store", "[default: 1 4]"),
    ),
    "store": ("ls", "show", "verify", "gc"),
    "store ls": ("STAGE", "--store"),
    "store show": ("KEY", "--store"),
    "store verify": ("STAGE", "--store"),
    "store gc": ("--dry-run", "--older-than DAYS", "--store"),
    "import": ("puzzletron", "block-configs"),
    "import puzzletron": ("DIRECTORY", "--out", "--metric", "--stats KEY=VALUE"),
    "import block-configs": ("CONFIG", "--out"),
    "export-config": ("ANSWER", "--parent-config", "--out"),
    "export-library": (*SPEC, "--out"),
    "up": ("--prefect-port PORT", "--mlflow-port PORT"),
    "down": (),
    "automations": (),
    "ui": ("--port",),
    "pretrain-example": ("--out", "--steps", "--processes"),
}
HEAVY = ("torch", "transformers", "prefect", "mlflow", "pandas")


@pytest.fixture
def command(capsys):
    """Run the command in this process: its exit code, what it printed, and what it said on stderr."""

    def run(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def shell(prefect_server, tmp_path):
    """Run the command as users do, against the server of this session."""

    def run(*arguments):
        environment = os.environ | {"PREFECT_API_URL": prefect_server, "PYTHONPATH": str(ROOT)}
        environment["PREFECT_LOCAL_STORAGE_PATH"] = str(tmp_path / "results")
        start = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
        done = subprocess.run(start, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    return run


def in_order(text, *wanted):
    """Whether the words come in the text, in this order."""
    for words in wanted:
        if words not in text:
            return False
        text = text.split(words, 1)[1]
    return True


@pytest.mark.parametrize("name", HELP)
def test_every_subcommand_explains_its_arguments(name, command):
    code, shown, errors = command(*name.split(), "--help")
    assert (code, errors) == (0, "")
    assert shown.startswith(f"Usage: puzzle {name} ")
    words = " ".join(shown.replace("│", " ").split())
    assert not [wanted for wanted in ("--debug", *HELP[name]) if wanted not in words], shown


def test_help_names_every_subcommand(command):
    code, shown, errors = command("--help")
    assert (code, errors) == (0, "")
    rows = [line.strip("│ ").split("  ")[0] for line in shown.splitlines()]
    assert [name for name in rows if name in HELP] == list(SUBCOMMANDS)
    assert {name for name in HELP if " " not in name} == SUBCOMMANDS.keys()
    assert "--debug" in shown


def test_help_of_every_subcommand_imports_no_heavy_package():
    """All modules of subcommands, in a process that has imported nothing else."""
    probe = (
        "import sys; from flows.cli.main import main; "
        f"codes = [main([*name.split(), '--help']) for name in {list(HELP)}]; "
        f"print(set(codes), [name for name in {HEAVY} if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "{0} []"


def test_help_of_the_command_imports_no_module_of_a_subcommand():
    probe = (
        "import sys; from flows.cli.main import main; main(['--help']); "
        "print(sorted(name for name in sys.modules if name.startswith('flows.cli.') or name.startswith('pydantic')))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['flows.cli.main']"


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("store",),
        ("nothing",),
        ("check",),
        ("check", "--nothing"),
        ("check", "a.yaml", "b.yaml"),
        ("ui", "--port", "x"),
    ],
)
def test_wrong_usage_has_its_own_exit_code(arguments, command):
    code, _, errors = command(*arguments)
    assert code == 2
    assert "Traceback" not in errors


def test_an_interrupt_has_its_own_exit_code(command, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.cli.flow_commands.load_spec", interrupt)
    code, shown, errors = command("check", tmp_path / "spec.yaml")
    assert (code, shown) == (130, "")
    assert errors == "puzzle: interrupted; finished artifacts are in the store, run again to continue\n"


@pytest.mark.parametrize("shell_name", ["bash", "zsh", "fish"])
def test_completion_knows_subcommands_and_their_options(shell_name):
    script = app.generate_completion(shell=shell_name)
    assert not [word for word in (*SUBCOMMANDS, "older-than", "parent-config", "gguf-type") if word not in script]


def test_check_prints_what_is_to_do_and_does_nothing(content, command, tmp_path):
    code, shown, said = command("check", write_spec(placed(content, tmp_path), tmp_path / "spec.yaml"))
    assert (code, said) == (0, "")
    assert in_order(shown, "pico: ", "llama, 5 layers", "BLD", "0", "10", "scores", "0", "20", "disk: ", "tokens: ")
    assert not (tmp_path / "store").exists()


def test_check_refuses_texts_that_give_too_few_tokens(content, command, tmp_path):
    file = write_spec(placed(content, tmp_path), tmp_path / "spec.yaml")
    code, _, said = command("check", file, "--set", "evaluation.tokens=10000000")
    assert code == 1
    assert in_order(said, "split 'evaluation' needs 10,000,000 tokens", "documents of the texts gave only")


def test_check_of_a_finished_run_finds_it_all_and_changes_nothing(finished, command, tmp_path):
    store = finished.content["runtime"]["store"]
    before = artifacts(store)
    code, shown, _ = command("check", write_spec(finished.content, tmp_path / "spec.yaml"))
    assert code == 0
    rows = [line.split() for line in shown.splitlines()]
    for row in (["tokens", "5", "0"], ["BLD", "10", "0"], ["scores", "20", "0"], ["search", "1", "0"]):
        assert row in rows
    assert artifacts(store) == before


def test_a_changed_spec_on_the_command_line_is_what_is_checked(finished, command, tmp_path):
    file = write_spec(finished.content, tmp_path / "spec.yaml")
    code, shown, _ = command("check", file, "--set", "bld.epochs=2", "--set", "name=other")
    assert code == 0
    assert shown.startswith("other: ")
    assert ["BLD", "0", "10"] in [line.split() for line in shown.splitlines()]


@pytest.mark.parametrize("name", ["pico", "key"])
def test_report_prints_the_final_table_and_where_the_pages_lie(name, finished, command):
    store = finished.content["runtime"]["store"]
    code, shown, _ = command("report", finished.report if name == "key" else name, "--store", store)
    assert code == 0
    assert in_order(
        shown, "parent", "child after assembly", "child after GKD", "perplexity", "top-1 accuracy", "report: "
    )
    assert Path(shown.split("report: ")[1].strip()).is_file()


def test_a_report_that_is_not_there_is_said_with_those_that_are(finished, command):
    code, shown, said = command("report", "nobody", "--store", finished.content["runtime"]["store"])
    assert (code, shown) == (1, "")
    assert said.startswith("puzzle: ")
    assert "'nobody'" in said
    assert "its reports: pico" in said


def forget_a_shard(directory):
    next(iter(sorted(directory.glob("model-*.safetensors")))).unlink()


def cut_a_shard(directory):
    file = sorted(directory.glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])


def spoil_a_weight(directory):
    edit_tensors(directory, lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"][3, 4].fill_(float("nan")))


PARENTS = {
    "missing shard": ("sharded", forget_a_shard, ["lacks 1 of its 10 shards", "model-00001"]),
    "truncated shard": ("sharded", cut_a_shard, ["model-00002", "truncated"]),
    "no index": ("sharded", lambda directory: (directory / INDEX).unlink(), ["safetensors"]),
    "config of another size": ("llama", lambda directory: edit_config(directory, intermediate_size=64), ["64", "48"]),
    "config with more layers": ("llama", lambda directory: edit_config(directory, num_hidden_layers=6), ["layers.5."]),
    "unsupported family": ("llama", lambda directory: edit_config(directory, model_type="gpt2"), ["gpt2", "llama"]),
    "NaN in the weights": ("llama", spoil_a_weight, ["model.layers.2.mlp.up_proj.weight", "1 NaN"]),
    "KV heads that are none": ("llama", lambda directory: edit_config(directory, num_key_value_heads=0),
                               ["config.json is not valid", "'num_key_value_heads' is 0"]),
    "KV heads that do not divide the heads": ("llama", lambda directory: edit_config(directory, num_key_value_heads=3),
                                              ["3 KV heads do not divide 8"]),
    "no tokenizer": ("llama", lambda directory: (directory / "tokenizer.json").unlink(),
                     ["cannot load the tokenizer", "fetch them again"]),
}  # fmt: skip
TEXTS = {
    "empty.txt": (b" \n", ["holds no text"]),
    "latin.txt": ("naïve".encode("latin-1"), ["not UTF-8", "iconv"]),
    "half-a-character.json": (rb'["whole", "\ud83d"]', ["entry 1", "half of a surrogate pair"]),
}
SPECS = {
    "KV heads that do not divide": ({"variants": {"kv_heads": [3]}}, ["attn:kv3", "4", "[1, 2, 4]"]),
    "FFN wider than the parent's": ({"variants": {"ffn_widths": [64]}}, ["ffn:i64", "wider", "48"]),
    "unknown key": ({"bdl": {"tokens": 5}}, ["bdl", "did you mean 'bld'"]),
    "unknown key inside": ({"bld": {"batch_token": 5}}, ["bld.batch_token", "did you mean 'batch_tokens'"]),
    "value of a wrong kind": ({"gkd": {"tokens": "many"}}, ["gkd.tokens", "many"]),
    "limit without a unit": ({"scenario": {"limits": {"memory": "5 parsecs"}}}, ["scenario.limits.memory", "parsecs"]),
    "parent that is not there": ({"parent": {"path": "/nowhere"}}, ["/nowhere"]),
    "texts that are not there": ({"data": {"train_texts": ["/nowhere.txt"]}}, ["/nowhere.txt", "does not exist"]),
    "store of an unknown kind": ({"runtime": {"store": "gopher://there"}}, ["gopher://there", "runtime.store"]),
    "windows too long": ({"data": {"sequence_length": 256}, "bld": {"batch_tokens": 256}, "gkd": {"batch_tokens": 256}},
                         ["data.sequence_length", "256", "128"]),
    "layers that are not there": ({"variants": {"layers": [{"first_layer": 5, "last_layer": 5}]}}, ["variants.layers"]),
}  # fmt: skip


def refused(ended, wanted, store):
    """Whether one readable message with all these words came of it, and nothing else."""
    code, shown, said = ended
    assert code == 1
    assert shown == ""
    assert said.startswith("puzzle: ")
    assert said.count("puzzle: ") == 1
    assert "Traceback" not in said
    assert not [words for words in wanted if words not in said], said
    assert not (store / "bld").exists()
    return True


@pytest.mark.parametrize("name", PARENTS)
def test_a_bad_parent_is_refused(name, content, copy_of, command, tmp_path):
    pico, harm, wanted = PARENTS[name]
    directory = copy_of(pico)
    harm(directory)
    file = write_spec(merged(placed(content, tmp_path), {"parent": {"path": str(directory)}}), tmp_path / "spec.yaml")
    assert refused(command("check", file), [*wanted, str(directory)], tmp_path / "store")


@pytest.mark.parametrize("name", TEXTS)
def test_a_bad_text_is_refused(name, content, command, tmp_path):
    text, wanted = TEXTS[name]
    (tmp_path / name).write_bytes(text)
    changes = {"data": {"train_texts": [str(tmp_path / name)]}}
    file = write_spec(merged(placed(content, tmp_path), changes), tmp_path / "spec.yaml")
    assert refused(command("check", file), [*wanted, name], tmp_path / "store")


@pytest.mark.parametrize("name", SPECS)
def test_a_bad_spec_is_refused(name, content, command, tmp_path):
    changes, wanted = SPECS[name]
    file = write_spec(merged(placed(content, tmp_path), changes), tmp_path / "spec.yaml")
    assert refused(command("check", file), wanted, tmp_path / "store")


def test_a_spec_that_is_not_there_is_refused(command, tmp_path):
    assert refused(command("check", tmp_path / "spec.yaml"), ["cannot read", "spec.yaml"], tmp_path / "store")


def test_a_spec_that_is_not_yaml_is_refused(command, tmp_path):
    (tmp_path / "spec.yaml").write_text("name: [pico")
    assert refused(command("check", tmp_path / "spec.yaml"), ["spec.yaml", "not YAML"], tmp_path / "store")


def test_with_debug_the_traceback_is_shown(command, tmp_path):
    with pytest.raises(Exception, match="cannot read the spec"):
        command("--debug", "check", tmp_path / "spec.yaml")


def test_fewer_tokens_than_asked_are_refused_before_any_training(content, prefect_server, command, tmp_path):
    changes = {"bld": {"tokens": 10_000_000}}
    file = write_spec(merged(placed(content, tmp_path), changes), tmp_path / "spec.yaml")
    ended = command("build-library", file)
    assert refused(ended, ["'bld'", "10,000,000 tokens", "fewer tokens or add texts"], tmp_path / "store")


def test_a_run_with_a_limit_that_nothing_can_meet_is_refused_with_one_message(spec_of, shell, tmp_path):
    spec = spec_of(scenario={"limits": {"parameters": "1%"}})
    publish_costs(spec)
    ended = shell("run", write_spec(spec, tmp_path / "spec.yaml"))
    assert refused(ended, ["'chatbot'", "parameters was 1%, and at least", "can be had"], tmp_path / "store")


def test_a_run_on_a_full_disk_is_refused_with_one_message(spec_of, prefect_server, command, small_disk, tmp_path):
    spec = spec_of(
        runtime={"scratch": str(small_disk / "scratch")}, bld={"tokens": 2560}, scenario={"limits": {"memory": "90%"}}
    )
    publish_costs(spec)
    ended = command("run", write_spec(spec, tmp_path / "spec.yaml"))
    assert refused(ended, [str(small_disk), "MiB free", "set runtime.scratch to a larger disk"], tmp_path / "store")


def test_a_run_on_a_parent_with_nan_is_refused_with_one_message(content, copy_of, prefect_server, command, tmp_path):
    directory = copy_of("llama")
    spoil_a_weight(directory)
    file = write_spec(merged(placed(content, tmp_path), {"parent": {"path": str(directory)}}), tmp_path / "spec.yaml")
    assert refused(command("run", file), ["up_proj.weight", "1 NaN", "fetch it again"], tmp_path / "store")
