"""A process that lives longer than its parent's files."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from puzzle_core.errors import DataError, ParentError, SpecError
from puzzle_core.export.gguf_file import export_gguf
from puzzle_core.export.source import Source
from puzzle_core.gguf_import.import_gguf import import_gguf
from puzzle_core.model.checkpoint import SINGLE
from puzzle_core.model.parent import Parent
from puzzle_core.spec import ParentSpec
from puzzle_core.text_sources import Texts
from puzzle_core.work import ImportanceRecord, ImportanceWork, TokensWork
from tasks.runtime.digest_cache import parent_digest
from tasks.runtime.named_inputs import read_named_costs, read_named_documents
from tasks.runtime.opened_parent import hub_commit
from tasks.runtime.produce import produce
from tests.pico import edit_config, edit_tensors

CPU = torch.device("cpu")
NORM = "model.norm.weight"


def change_weights(directory):
    """Write other weights of the same size in place, with the time of modification that the file had."""
    file, changed = directory / SINGLE, directory.parent / "changed"
    shutil.copytree(directory, changed)
    edit_tensors(changed, lambda tensors: tensors[NORM].add_(1))
    before = file.stat()
    file.write_bytes((changed / SINGLE).read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    shutil.rmtree(changed)
    assert (before.st_size, before.st_mtime_ns) == (file.stat().st_size, file.stat().st_mtime_ns)


def norm_of(parent):
    return parent.outside(torch.float32, CPU).model.norm.weight


def work_of(parent):
    return ImportanceWork(parent=parent, tokens="tokens")


def test_a_parent_stays_open_until_its_files_change(context_of, copy_of):
    directory = copy_of("llama")
    context = context_of(directory)
    first = context.open_parent()
    norm, digest = norm_of(first).clone(), parent_digest(first, context.scratch)  # weights are mapped from their file
    assert context.open_parent() is first
    change_weights(directory)
    second = context.open_parent()
    assert torch.equal(norm_of(second), norm + 1)
    assert torch.equal(norm_of(second), load_file(directory / SINGLE)[NORM])
    assert parent_digest(second, context.scratch) == Parent(ParentSpec(path=str(directory))).digest != digest


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_parent_is_opened_again_after_a_change_of_another_file(context_of, copy_of, name):
    context = context_of(copy_of("llama"))
    before = context.open_parent()
    before_digests = before.digest, before.tokenizer_digest
    file = before.directory / name
    file.write_text(file.read_text() + "\n")
    after = context.open_parent()
    assert after is not before
    assert (after.digest == before_digests[0], after.tokenizer_digest == before_digests[1]) == (
        True,
        name == "config.json",
    )


def test_one_file_that_appears_beside_shards_is_read(context_of, copy_of, checkpoint_of):
    directory = copy_of("sharded")
    context = context_of(directory)
    assert len(context.open_parent().checkpoint.files) > 1
    shutil.copy(checkpoint_of("llama") / SINGLE, directory)
    assert context.open_parent().checkpoint.files == [directory / SINGLE]


def test_a_link_that_points_elsewhere_is_followed(context_of, copy_of, tmp_path):
    first = copy_of("llama")
    second = shutil.copytree(first, tmp_path / "second")
    link = tmp_path / "link"
    link.symlink_to(first)
    context = context_of(link)
    assert context.open_parent().directory == first
    link.unlink()
    link.symlink_to(second)
    assert context.open_parent().directory == second


def test_work_that_names_another_parent_is_refused_before_anything_is_computed(context_of, copy_of):
    directory = copy_of("llama")
    context = context_of(directory)
    old = parent_digest(context.open_parent(), context.scratch)
    change_weights(directory)
    new = parent_digest(context.open_parent(), context.scratch)
    computed = []
    with pytest.raises(ParentError, match=f"its digest was {old} when the run started, and is {new} here.*start the"):
        produce(work_of(old), context, computed.append)
    with pytest.raises(ParentError, match=f"its digest was {old}"):
        context.activations(old, "tokens", "float32")
    assert computed == []
    assert not context.store().keys()


def test_nothing_is_stored_of_a_parent_that_changes_while_it_is_used(context_of, copy_of):
    directory = copy_of("llama")
    context = context_of(directory)
    work = work_of(parent_digest(context.open_parent(), context.scratch))

    def compute(_):
        change_weights(directory)
        return ImportanceRecord(layers=1, tokens=1)

    with pytest.raises(ParentError, match=f"its digest was {work.parent}"):
        produce(work, context, compute)
    assert not context.store().has(work.key)


def test_work_that_names_another_tokenizer_is_refused(context_of):
    context = context_of()
    work = TokensWork(
        split="bld",
        tokens=1,
        earlier_splits=(),
        sequence_length=8,
        seed=0,
        texts="texts",
        tokenizer="another",
        cut_documents=False,
        document_start="auto",
    )
    found = context.open_parent().tokenizer_digest
    with pytest.raises(ParentError, match=f"the tokenizer of .* asks for another, and {found} was found"):
        produce(work, context, lambda _: None)


def test_texts_and_tables_that_changed_are_refused(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one")
    with pytest.raises(DataError, match=r"the texts .*text\.txt are not those of this run: their digest was before"):
        read_named_documents("before", Texts(sources=(str(text),)))
    table = tmp_path / "table.csv"
    table.write_text("block,memory_bytes,prefill_ms\nattn:kv4,1,1\n")
    with pytest.raises(SpecError, match=r"table\.csv is not that of this run: its digest was before"):
        read_named_costs("before", table)


def test_an_adapter_or_a_file_of_weights_with_another_name_is_refused(copy_of):
    directory = copy_of("llama")
    edit_config(directory, transformers_weights="other.safetensors")
    with pytest.raises(ParentError, match=r"transformers_weights = 'other.safetensors'"):
        Parent(ParentSpec(path=str(directory)))
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(ParentError, match=r"holds an adapter .*merge_and_unload"):
        Parent(ParentSpec(path=str(directory)))


def test_a_gguf_file_is_a_parent_with_the_keys_of_its_import(context_of, checkpoint_of, tmp_path):
    file, out = tmp_path / "model.gguf", tmp_path / "imported"
    export_gguf(Source(checkpoint_of("tied")), file, "f32")
    import_gguf(file, out)
    context = context_of(file)
    first = context.open_parent()
    digests = [
        (parent_digest(c.open_parent(), c.scratch), c.open_parent().tokenizer_digest)
        for c in (context, context_of(out))
    ]
    assert digests[0] == digests[1]
    assert context.open_parent() is context_of(file).open_parent()
    assert Parent(context.readable_parent).directory == first.directory
    assert hub_commit(context.parent, first) is None
    export_gguf(Source(checkpoint_of("llama")), file, "f32")
    assert parent_digest(context.open_parent(), context.scratch) != digests[0][0]


def test_a_gguf_file_of_an_installed_package_is_a_parent(context_of, checkpoint_of, tmp_path, monkeypatch):
    package = tmp_path / "site" / "package_with_a_parent"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    export_gguf(Source(checkpoint_of("tied")), package / "model.gguf", "f32")
    monkeypatch.syspath_prepend(tmp_path / "site")
    context = context_of("python-package:package_with_a_parent/model.gguf")
    opened = context.open_parent()
    assert opened.digest == context_of(package / "model.gguf").open_parent().digest
    assert context.open_parent().directory == opened.directory
    assert Parent(context.readable_parent).directory == opened.directory
    assert hub_commit(context.parent, opened) is None
