"""Records: frozen, strict, equal digests for equal content on every machine, files whole or absent."""

import os
import subprocess
import sys
from typing import ClassVar

import pytest
from pydantic import ValidationError

from puzzle_core import records
from puzzle_core.architecture import Architecture
from puzzle_core.errors import ArtifactError
from puzzle_core.records import Record, Work, canonical_json, digest_file, write_text_atomic

DIGEST_ELSEWHERE = """
from puzzle_core.architecture import Architecture
print(Architecture.parse(["attn:kv4+ffn:i512", "attn:no_op+ffn:linear"]).digest())
"""


class Cake(Work):
    stage: ClassVar[str] = "cake"
    version: ClassVar[int] = 3

    flour_grams: float
    eggs: dict[str, int] = {}


def test_records_cannot_be_changed_and_refuse_what_they_do_not_know():
    cake = Cake(flour_grams=200)
    with pytest.raises(ValidationError, match="frozen"):
        cake.flour_grams = 300
    with pytest.raises(ValidationError, match="flower_grams"):
        Cake(flower_grams=200)
    with pytest.raises(ValidationError, match="finite"):
        Cake(flour_grams=float("nan"))


def test_digest_does_not_depend_on_the_order_of_keys_or_the_kind_of_number():
    one = Cake(flour_grams=200, eggs={"white": 1, "yolk": 2})
    assert one.digest() == Cake(eggs={"yolk": 2, "white": 1}, flour_grams=200.0).digest()
    assert one.digest() != Cake(flour_grams=200, eggs={"white": 2, "yolk": 1}).digest()
    assert canonical_json({"b": 1, "a": [1.5, None]}) == '{"a":[1.5,null],"b":1}'


def test_digest_does_not_depend_on_the_process():
    architecture = Architecture.parse(["attn:kv4+ffn:i512", "attn:no_op+ffn:linear"])
    for seed in ("0", "1"):
        elsewhere = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        output = subprocess.run([sys.executable, "-c", DIGEST_ELSEWHERE], env=elsewhere, capture_output=True, text=True)
        assert output.stdout.strip() == architecture.digest()


def test_key_has_stage_and_version(monkeypatch):
    cake = Cake(flour_grams=1)
    assert cake.key == f"cake/v3/{cake.digest()}"
    monkeypatch.setattr(Cake, "version", 4)
    again = Cake(flour_grams=1)
    assert again.key == f"cake/v4/{cake.digest()}"


def test_a_key_is_made_once_and_is_no_part_of_the_record():
    cake = Cake(flour_grams=1)
    before, other = cake.digest(), cake.model_copy(update={"flour_grams": 2.0})
    assert other.key != cake.key
    changed = cake.model_copy(update={"flour_grams": 2.0})
    assert changed.key == other.key == f"cake/v3/{changed.digest()}"
    assert (cake.digest(), cake) == (before, Cake(flour_grams=1))
    assert "key" not in cake.model_dump()


def test_what_is_written_is_read_back(tmp_path):
    cake = Cake(flour_grams=0.1 + 0.2, eggs={"whole": 3})
    cake.write(tmp_path / "deep" / "record.json")
    assert Cake.read(tmp_path / "deep" / "record.json") == cake


@pytest.mark.parametrize("content", ["{", "[]", '{"flour_grams": "much"}', '{"flour_grams": 1, "sugar": 2}'])
def test_a_file_that_holds_something_else_is_named(tmp_path, content):
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"record\.json does not hold a Cake"):
        Cake.read(tmp_path / "record.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"record\.json does not exist"):
        Cake.read(tmp_path / "record.json")


def test_a_crash_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_text_atomic(tmp_path / "file", "old")

    def crash(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(records.os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        write_text_atomic(tmp_path / "file", "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]


def test_digest_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert digest_file(tmp_path / "file").startswith("ba7816bf8f01cfea")


def test_every_record_of_the_project_is_frozen_and_strict():
    def subclasses(kind):
        return {kind}.union(*map(subclasses, kind.__subclasses__()))

    for kind in subclasses(Record) - {Cake}:
        assert kind.model_config["frozen"]
        assert kind.model_config["extra"] == "forbid"
