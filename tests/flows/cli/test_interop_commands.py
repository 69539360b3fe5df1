"""`puzzle import`, `puzzle export-config` and `puzzle export-library`, as users run them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.cli.main import main
from puzzle_core.architecture import Architecture, Variant
from puzzle_core.report.library_index import LibraryIndex
from puzzle_core.search.from_tables import read_request, search_tables
from tasks.runtime.context import RunContext
from tests.puzzletron import make_campaign
from tests.workflow import SCORED, TRAINED

BLOCKS = ["attn:kv2+ffn:i512", "attn:no_op+ffn:i256", "attn:kv4+ffn:no_op"]
PARENT = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 768,
    "vocab_size": 1000,
    "max_position_embeddings": 1024,
}


@pytest.fixture
def campaign(tmp_path):
    """A campaign of four layers, in a directory of its own."""
    return make_campaign(tmp_path / "puzzle")


def test_a_campaign_is_imported_and_searched_without_torch(campaign, tmp_path, capsys):
    out, answer = tmp_path / "out", tmp_path / "answer"
    assert main(["import", "puzzletron", str(campaign.write()), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "32 scores by kl_div, over the parent's attn:kv8+ffn:i1024" in printed
    scenario = out / "scenarios" / "128-in-64-out.yaml"
    content = yaml.safe_load(scenario.read_text()) | {"limits": {"memory": "70%"}}
    scenario.write_text(yaml.safe_dump(content))
    hint = next(line for line in printed.splitlines() if str(scenario) in line)
    command = hint.replace("ANSWER", str(answer)).split()[1:]
    probe = "import sys; from flows.cli.main import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe, *command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
    expected = search_tables(out / "scores.csv", out / "costs.csv", read_request([scenario]), tmp_path / "again")
    assert Architecture.read(answer / "architecture.json") == expected.best.architecture


def test_an_import_says_what_is_wrong(campaign, tmp_path, capsys):
    place = str(campaign.write())
    for arguments, code, message in (
        ([str(tmp_path), "--out", "o"], 1, r"cannot read the costs .*subblock_stats.json"),
        ([place, "--out", "o", "--stats", "int8"], 2, r'"int8" for --stats. write KEY=VALUE'),
    ):
        assert main(["import", "puzzletron", *arguments]) == code
        assert re.search(message, capsys.readouterr().err)


def test_a_config_goes_out_and_comes_back(tmp_path):
    files = {name: tmp_path / f"{name}.json" for name in ("parent", "config", "again")}
    files["parent"].write_text(json.dumps(PARENT))
    architecture = Architecture.parse(BLOCKS)
    (tmp_path / "answer").mkdir()
    architecture.write(tmp_path / "answer" / "architecture.json")
    for answer in (tmp_path / "answer", tmp_path / "answer" / "architecture.json"):
        options = ["--parent-config", str(files["parent"]), "--out", str(files["config"])]
        assert main(["export-config", str(answer), *options]) == 0
        assert main(["import", "block-configs", str(files["config"]), "--out", str(files["again"])]) == 0
        assert Architecture.read(files["again"]) == architecture
        files["again"].unlink()


def test_a_config_that_cannot_be_is_not_written(tmp_path, capsys):
    (tmp_path / "parent.json").write_text(json.dumps(PARENT))
    Architecture.parse(["attn:kv4+ffn:i100", *BLOCKS[1:]]).write(tmp_path / "architecture.json")
    options = ["--parent-config", str(tmp_path / "parent.json"), "--out", str(tmp_path / "config.json")]
    assert main(["export-config", str(tmp_path / "architecture.json"), *options]) == 1
    assert "layer 0 attn:kv4+ffn:i100: block_configs cannot carry an FFN of width 100" in capsys.readouterr().err
    assert not (tmp_path / "config.json").exists()


@pytest.fixture
def exported(again, tmp_path):
    """Export the library of a finished run: the exit code, and the index."""
    spec = again()
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))

    def run():
        out = tmp_path / "library.json"
        return main(["export-library", str(tmp_path / "spec.yaml"), "--out", str(out)]), out

    return spec, run


def test_the_index_says_what_the_store_has(exported):
    spec, run = exported
    code, out = run()
    assert code == 0
    index, store = LibraryIndex.read(out), RunContext.of(spec).store()
    variants = [(layer.layer, variant) for layer in index.layers for variant in layer.variants]
    scores = [score for layer in index.layers for score in layer.scores]
    assert (len(variants), len(scores)) == (TRAINED, SCORED)
    for layer, variant in variants:
        directory = Path(index.store) / variant.key
        work, record = (json.loads((directory / "record.json").read_text())[part] for part in ("work", "record"))
        assert (work["layer"], Variant.parse(work["variant"])) == (layer, variant.variant)
        assert variant.final_loss == record["final_loss"] < variant.initial_loss
        assert variant.size_bytes == (directory / "weights.safetensors").stat().st_size
    for score in scores:
        assert score.kl_nats_per_token == store.manifest(score.key).record["kl_nats_per_token"] > 0


def test_half_a_library_has_no_index(exported, capsys):
    spec, run = exported
    key = sorted(RunContext.of(spec).store().keys("bld"))[0]
    shutil.rmtree(Path(spec.runtime.store) / key)
    code, out = run()
    assert (code, out.exists()) == (1, False)
    assert f"lacks 1 trained variants and 0 scores of this library (first {key})" in capsys.readouterr().err
