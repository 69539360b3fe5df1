"""Safetensors checkpoints: what is written is read back, in shards that keep their size."""

import json

import pytest
import torch
from safetensors.torch import save_file

from puzzle_core.errors import ArtifactError, ParentError
from puzzle_core.model.checkpoint import INDEX, SINGLE, Checkpoint, write_checkpoint

TENSORS = {name: torch.full((size,), float(size)) for name, size in {"a": 3, "b": 4, "c": 5, "d": 60, "e": 1}.items()}


@pytest.mark.parametrize(("limit", "shards"), [(10_000, 1), (50, 3), (1, 5)])
def test_reads_back_what_it_wrote(tmp_path, limit, shards):
    write_checkpoint(tmp_path, TENSORS.items(), max_shard_bytes=limit)
    checkpoint = Checkpoint(tmp_path, ParentError)
    assert len(checkpoint.files) == shards
    assert {name: checkpoint.tensor(name).tolist() for name in TENSORS} == {n: t.tolist() for n, t in TENSORS.items()}
    assert checkpoint.headers["d"] == ((60,), "F32")


def test_a_shard_is_over_the_limit_only_if_one_tensor_is(tmp_path):
    write_checkpoint(tmp_path, TENSORS.items(), max_shard_bytes=40)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    files = Checkpoint(tmp_path, ParentError).files
    shards = [[name for name, shard in weight_map.items() if shard == file.name] for file in files]
    assert shards == [["a", "b"], ["c"], ["d"], ["e"]]


def test_nothing_but_the_checkpoint_is_left_behind(tmp_path):
    write_checkpoint(tmp_path, TENSORS.items(), max_shard_bytes=40)
    named = {INDEX, *(file.name for file in Checkpoint(tmp_path, ParentError).files)}
    assert {file.name for file in tmp_path.iterdir()} == named


@pytest.mark.parametrize("gone", [False, True], ids=["whole", "gone"])
def test_one_file_counts_before_shards(tmp_path, gone):
    """A model that was trained further is often saved as one file into its base model's directory."""
    write_checkpoint(tmp_path, TENSORS.items(), max_shard_bytes=40)
    for shard in Checkpoint(tmp_path, ParentError).files if gone else ():
        shard.unlink()
    newer = {name: tensor + 1 for name, tensor in TENSORS.items()}
    save_file(newer, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path, ParentError)
    assert checkpoint.files == [tmp_path / SINGLE]
    assert all(torch.equal(checkpoint.tensor(name), newer[name]) for name in newer)


def write_two_shards(directory, first, second, weight_map, folder=""):
    (directory / folder).mkdir(exist_ok=True)
    for name, tensors in (("1.safetensors", first), ("2.safetensors", second)):
        save_file(tensors, directory / folder / name)
    index = {"weight_map": {name: folder + shard for name, shard in weight_map.items()}}
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("named", ["1.safetensors", "2.safetensors"])
def test_of_two_copies_in_shards_the_one_that_the_index_names_counts(tmp_path, named):
    copies = {"1.safetensors": torch.ones(1), "2.safetensors": torch.ones(2)}
    write_two_shards(
        tmp_path,
        {"a": copies["1.safetensors"], "b": torch.ones(3)},
        {"a": copies["2.safetensors"], "c": torch.ones(3)},
        {"a": named, "b": "1.safetensors", "c": "2.safetensors"},
    )
    checkpoint = Checkpoint(tmp_path, ParentError)
    assert torch.equal(checkpoint.tensor("a"), copies[named])
    assert checkpoint.headers["a"].shape == copies[named].shape
    assert checkpoint.chosen == {"a": named}


def test_an_index_that_leaves_it_open_or_names_the_wrong_shard_is_refused(tmp_path):
    first, second = {"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1), "c": torch.ones(1)}
    write_two_shards(tmp_path, first, second, {"b": "1.safetensors", "c": "2.safetensors"})
    with pytest.raises(ParentError, match=r"holds 'a' in 2 shards \(1.safetensors, 2.safetensors\), and .* which one"):
        Checkpoint(tmp_path, ParentError)
    places = {"a": "1.safetensors", "b": "1.safetensors", "c": "1.safetensors", "d": "2.safetensors"}
    write_two_shards(tmp_path, first, second | {"d": torch.ones(1)}, places)
    with pytest.raises(ParentError, match=r"1 tensors that its shards do not hold, the first being 'c' in 1\.safetens"):
        Checkpoint(tmp_path, ParentError)


def test_shards_may_lie_in_a_folder(tmp_path):
    first, second = {"a": torch.ones(1)}, {"b": torch.zeros(1)}
    write_two_shards(tmp_path, first, second, {"a": "1.safetensors", "b": "2.safetensors"}, "subblocks/")
    checkpoint = Checkpoint(tmp_path, ParentError)
    assert torch.equal(checkpoint.tensor("b"), second["b"])
    (tmp_path / "subblocks" / "2.safetensors").unlink()
    with pytest.raises(ParentError, match=r"lacks 1 of its 2 shards, the first being subblocks/2\.safetensors"):
        Checkpoint(tmp_path, ParentError)


def test_files_of_other_forms_are_left_alone_and_named_where_they_are_alone(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE)
    for name in ("consolidated.safetensors", "model.fp16.safetensors"):
        save_file({"a": torch.zeros(9)}, tmp_path / name)
    assert Checkpoint(tmp_path, ParentError).files == [tmp_path / SINGLE]
    (tmp_path / SINGLE).unlink()
    with pytest.raises(
        ParentError, match=r"neither .*; consolidated\.safetensors is not a name that transformers reads"
    ):
        Checkpoint(tmp_path, ParentError)


def test_a_file_that_vanishes_after_opening_is_named(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path, ParentError)
    (tmp_path / SINGLE).unlink()
    with pytest.raises(ParentError, match=r"cannot read 'a' from .*model\.safetensors"):
        checkpoint.tensor("a")


@pytest.mark.parametrize("error", [ParentError, ArtifactError])
def test_damage_raises_the_error_of_whose_checkpoint_it_is(tmp_path, error):
    write_checkpoint(tmp_path, TENSORS.items())
    checkpoint, shapes = Checkpoint(tmp_path, error), {name: tuple(t.shape) for name, t in TENSORS.items()}
    checkpoint.check(shapes)
    checkpoint.check({"a": (3,)}, names=["a"])
    for expected, message in (
        (
            shapes | {"f": (1,)},
            r"asks for 1 tensors .* lacks, the first being 'f' \(config \(1,\), checkpoint none",
        ),
        ({k: v for k, v in shapes.items() if k != "b"}, "holds 1 tensors .* no place for, the first being 'b'"),
        (shapes | {"c": (6,), "d": (61,)}, r"2 tensors have other shapes .*'c' \(config \(6,\), checkpoint \(5,\)\)"),
    ):
        with pytest.raises(error, match=message):
            checkpoint.check(expected)
    (tmp_path / SINGLE).write_bytes(b"")
    with pytest.raises(error, match="is truncated"):
        Checkpoint(tmp_path, error)


@pytest.mark.parametrize("named", ["../beside.safetensors", "{outside}"])
def test_an_index_cannot_name_shards_outside_its_directory(named, tmp_path):
    outside = tmp_path / "beside.safetensors"
    save_file(TENSORS, outside)
    inside = tmp_path / "checkpoint"
    inside.mkdir()
    weight_map = dict.fromkeys(TENSORS, named.format(outside=outside))
    (inside / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ParentError, match=r"names a shard outside its directory, '.*beside\.safetensors'"):
        Checkpoint(inside, ParentError)
