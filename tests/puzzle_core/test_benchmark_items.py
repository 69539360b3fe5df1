"""Files of multiple-choice items: both forms, compression, limits, and what is refused by line."""

import gzip
import json
import lzma

import pytest

from puzzle_core.benchmark_items import digest_items, read_items
from puzzle_core.errors import DataError

PLAIN = {"query": "Is it", "choices": ["so", "not so"], "label": 1, "id": 7}
SHARED = {"contexts": ["Ann, so Ann", "Ann, so Eve"], "continuation": "left.", "label": 0}


def write(path, *items, opener=open):
    with opener(path, "wt") as file:
        file.write("\n".join(json.dumps(item) for item in items) + "\n")
    return path


def test_both_forms_give_contexts_and_continuations(tmp_path):
    plain, shared = read_items(write(tmp_path / "a.jsonl", PLAIN, SHARED))
    assert plain.options() == [("Is it", "so"), ("Is it", "not so")]
    assert shared.options() == [("Ann, so Ann", "left."), ("Ann, so Eve", "left.")]


def test_compression_and_names_do_not_change_the_digest_and_items_do(tmp_path):
    plain = read_items(write(tmp_path / "a.jsonl", PLAIN, SHARED))
    packed = read_items(write(tmp_path / "b.jsonl.gz", PLAIN, SHARED, opener=gzip.open))
    assert packed == plain
    other = read_items(write(tmp_path / "c.jsonl.xz", SHARED, PLAIN, opener=lzma.open))
    assert digest_items(packed) == digest_items(plain) != digest_items(other)


def test_a_limit_takes_the_first_items(tmp_path):
    file = write(tmp_path / "a.jsonl", PLAIN, SHARED, {"not": "read"})
    assert [item.label for item in read_items(file, 2)] == [1, 0]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"query": "a", "label": 0}, "`query` and `choices`"),
        (PLAIN | SHARED, "`query` and `choices`"),
        (PLAIN | {"choices": ["one"], "label": 0}, "two or more"),
        (PLAIN | {"label": 2}, "label 2 with 2 choices"),
        (PLAIN | {"label": -1}, "label: "),
        (PLAIN | {"label": "1"}, "label: "),
        (PLAIN | {"choices": ["a", " "]}, "a choice is empty"),
    ],
)
def test_a_line_that_is_no_item_is_named(tmp_path, item, message):
    with pytest.raises(DataError, match=message) as error:
        read_items(write(tmp_path / "a.jsonl", PLAIN, item))
    assert "a.jsonl, line 2" in str(error.value)


def test_a_file_without_items_is_refused(tmp_path):
    for file in (tmp_path / "missing.jsonl", write(tmp_path / "empty.jsonl")):
        with pytest.raises(DataError, match=r"empty|missing"):
            read_items(file)
