"""Digests are computed once, and again when a file changes."""

import pytest

from puzzle_core import text_sources
from puzzle_core.errors import DataError, NonFiniteError
from puzzle_core.model.parent import Parent
from puzzle_core.spec import ParentSpec
from puzzle_core.text_sources import Texts
from tasks.runtime import digest_cache
from tasks.runtime.digest_cache import named_chat, parent_digest, texts_digest
from tasks.runtime.software import software
from tests.pico import edit_tensors
from tests.workflow import plan_of


def digest_of_parent(context):
    return parent_digest(context.open_parent(), context.scratch)


def digest_of_texts(context, source):
    return texts_digest(Texts(sources=(str(source),)), context.scratch)


def test_weights_are_looked_at_once_and_again_when_they_change(context_of, copy_of, monkeypatch):
    directory, looks, check = copy_of("llama"), [], Parent.check_finite
    monkeypatch.setattr(Parent, "check_finite", lambda parent: looks.append(1) or check(parent))
    first = digest_of_parent(context_of(directory))
    assert digest_of_parent(context_of(directory)) == first == Parent(ParentSpec(path=str(directory))).digest
    assert len(looks) == 1
    edit_tensors(directory, lambda tensors: tensors["model.norm.weight"][0].fill_(float("inf")))
    with pytest.raises(NonFiniteError, match=r"'model.norm.weight' has 1 NaN or infinite"):
        digest_of_parent(context_of(directory))
    with pytest.raises(NonFiniteError):  # what was refused is not remembered as seen
        digest_of_parent(context_of(directory))
    assert len(looks) == 3


def test_texts_are_read_once_and_again_when_they_change(context_of, tmp_path, monkeypatch):
    texts, looks, read = tmp_path / "texts", [], text_sources.read_texts
    monkeypatch.setattr("tasks.runtime.digest_cache.read_texts", lambda texts: looks.append(1) or read(texts))
    texts.mkdir()
    (texts / "a.txt").write_text("one")
    first = digest_of_texts(context_of(), texts)
    assert (
        digest_of_texts(context_of(), texts)
        == first
        == text_sources.digest_documents(read(Texts(sources=(str(texts),))))
    )
    assert len(looks) == 1
    (texts / "b.txt").write_text("two")
    second = digest_of_texts(context_of(), texts)
    (texts / "b.txt").write_text("three")
    assert len({first, second, digest_of_texts(context_of(), texts)}) == len(looks) == 3
    (texts / "b.txt").write_bytes(b"caf\xe9")
    for _ in range(2):  # what was refused is not remembered as read
        with pytest.raises(DataError, match="is not UTF-8"):
            digest_of_texts(context_of(), texts)
    with pytest.raises(DataError, match="does not exist"):
        digest_of_texts(context_of(), tmp_path / "nothing")


def test_what_another_version_has_seen_is_looked_at_again(context_of, tmp_path, monkeypatch):
    """Another transformers may see another config, and other code of this project other documents."""
    text = tmp_path / "a.txt"
    text.write_text("one")
    context, own = context_of(), software()
    seen = digest_of_parent(context), digest_of_texts(context, text)
    monkeypatch.setattr(text_sources, "read_documents", lambda _: [text_sources.Document("a", "read in another way")])
    monkeypatch.setitem(vars(context.open_parent()), "digest", "of another config")
    assert (digest_of_parent(context), digest_of_texts(context, text)) == seen
    other = own.model_copy(update={"code": "other", "versions": own.versions | {"transformers": "other"}})
    monkeypatch.setattr(digest_cache, "software", lambda: other)
    assert digest_of_parent(context) == "of another config"
    assert digest_of_texts(context, text) != seen[1]


def test_chats_are_refused_before_any_work_where_the_tokenizer_has_no_template(spec_of, context_of, tmp_path):
    chats, plain = tmp_path / "chats.jsonl", tmp_path / "plain.jsonl"
    plain.write_text('{"text": "one"}\n')
    chats.write_text('{"text": "one"}\n{"messages": [{"role": "user", "content": "two"}]}\n')
    found = [named_chat(Texts(sources=(str(file),)), context_of().scratch) for file in (plain, chats)]
    assert found == ["", f"{chats}#1"]
    with pytest.raises(DataError, match=r"chats\.jsonl#1 is a chat \('messages'\), and the parent's tokenizer has no"):
        plan_of(spec_of(data={"held_out_texts": [str(chats)]}))
