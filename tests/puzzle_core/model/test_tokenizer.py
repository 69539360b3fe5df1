"""Tokens of a text are those of tokenizer.json, whatever class is named; tokens without a row are named before work."""

import base64
import functools
import json
import logging
import sys

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from puzzle_core.architecture import Architecture
from puzzle_core.errors import ParentError
from puzzle_core.export.gguf_file import export_gguf
from puzzle_core.export.gguf_tokenizer import gguf_vocabulary
from puzzle_core.export.hf import export_hf
from puzzle_core.export.source import Source
from puzzle_core.model.child import write_description
from puzzle_core.model.parent import Parent
from puzzle_core.model.tokenizer import check_rows, is_rebuilt
from puzzle_core.spec import ParentSpec
from puzzle_core.text_files import Document
from puzzle_core.text_sources import stdlib_documents

END = "<|endoftext|>"
DIGITS = pre_tokenizers.Digits(individual_digits=True)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "smollm": pre_tokenizers.Sequence([DIGITS, BYTES]),
    "gpt-2": BYTES,
    "smaug-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
TEXTS = [document.text[:20000] for document, _ in zip(stdlib_documents(held_out=False), range(12), strict=False)]


def opened(directory):
    return Parent(ParentSpec(path=str(directory)))


def describe(parent, directory):
    directory.mkdir()
    write_description(parent, Architecture.of_parent(parent.shape), "float32", directory)
    return directory


@functools.cache
def trained(split, size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = SPLITS[split], decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def write_tokenizer(directory, split, named, size, **settings):
    tokenizer = trained(split, size)
    tokenizer.save(str(directory / "tokenizer.json"))
    content = {"bos_token": END, "eos_token": END, "unk_token": END, "tokenizer_class": named} | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    return tokenizer


@pytest.mark.parametrize("named", ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizerFast", "CodeGenTokenizer", None])
@pytest.mark.parametrize("split", SPLITS)
def test_tokens_are_those_of_the_file_whatever_class_is_named(split, named, copy_of, tmp_path):
    directory = copy_of("llama")
    said = write_tokenizer(directory, split, named, 600)
    expected = [encoding.ids for encoding in said.encode_batch(TEXTS, add_special_tokens=False)]
    parent = opened(directory)
    child = describe(parent, tmp_path / "child")
    for tokenizer in (
        parent.tokenizer(),
        Source(directory).tokenizer,
        AutoTokenizer.from_pretrained(child),
        AutoTokenizer.from_pretrained(child, trust_remote_code=True),
    ):
        assert tokenizer(TEXTS, add_special_tokens=False)["input_ids"] == expected
    assert gguf_vocabulary(parent.tokenizer(), 600).pre == split
    assert parent.tokenizer().bos_token == END
    direct = AutoTokenizer.from_pretrained(directory)(TEXTS, add_special_tokens=False)["input_ids"]
    assert is_rebuilt(directory) == (direct != expected)


def test_the_digest_says_how_a_rebuilt_tokenizer_is_opened(copy_of, monkeypatch):
    directory = copy_of("llama")
    write_tokenizer(directory, "smollm", "GPT2Tokenizer", 600)
    digest = opened(directory).tokenizer_digest
    monkeypatch.setattr("puzzle_core.model.parent.is_rebuilt", lambda _: False)
    assert opened(directory).tokenizer_digest != digest


def test_options_with_which_the_file_is_not_followed_are_refused(copy_of):
    directory = copy_of("llama")
    write_tokenizer(directory, "gpt-2", "PreTrainedTokenizerFast", 600, split_special_tokens=True)
    with pytest.raises(ParentError, match=r"gives other tokens than its tokenizer\.json"):
        opened(directory).tokenizer()


def test_a_tokenizer_of_vocabulary_and_merges_gives_the_child_a_file(copy_of, tmp_path):
    directory = copy_of("llama")
    write_tokenizer(directory, "gpt-2", "GPT2Tokenizer", 600).model.save(str(directory))
    (directory / "tokenizer.json").unlink()
    parent = opened(directory)
    child = describe(parent, tmp_path / "child")
    expected = parent.tokenizer()(TEXTS)["input_ids"]
    assert AutoTokenizer.from_pretrained(child)(TEXTS)["input_ids"] == expected


def test_all_chat_templates_travel(copy_of, tmp_path):
    directory = copy_of("llama")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    child = describe(opened(directory), tmp_path / "child")
    (tmp_path / "hf").mkdir()
    export_hf(Source(directory), tmp_path / "hf", widths="any")
    for written in (child, tmp_path / "hf"):
        templates = AutoTokenizer.from_pretrained(written).chat_template
        assert templates == {"default": "{{ messages }}", "tool_use": "{{ tools }}"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n\x0e\n\x05<unk>", "the package sentencepiece, which reads it, is not installed: pip install"),
        (base64.b64encode(b"the") + b" 0\n", "is in tiktoken's format"),
    ],
    ids=["SentencePiece", "tiktoken"],
)
def test_a_model_file_alone_is_refused_with_what_is_missing(content, message, copy_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    directory = copy_of("llama")
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").write_bytes(content)
    with pytest.raises(ParentError, match=message):
        opened(directory).tokenizer()


@pytest.fixture
def too_many(copy_of):
    """A parent whose tokenizer has two tokens more than the embedding has rows."""
    directory = copy_of("llama")
    rows = opened(directory).shape.vocabulary
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([f"<|fill{n}|>" for n in range(rows - vocabulary)] + ["<|start|>", "<|end|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "<|end|>"}))
    return opened(directory)


def test_a_text_with_a_token_that_has_no_row_is_named(too_many):
    rows = too_many.shape.vocabulary
    message = rf"2 tokens .* {rows} rows lacks: '<\|start\|>' \({rows}\).*the text chat holds '<\|start\|>'"
    with pytest.raises(ParentError, match=message):
        check_rows(too_many.tokenizer(), rows, [], lambda: [Document("chat", "<|start|>user")])


def test_tokens_that_no_text_holds_are_a_warning(too_many, caplog):
    with caplog.at_level(logging.WARNING, logger="puzzle"):
        check_rows(too_many.tokenizer(), too_many.shape.vocabulary, [0], lambda: [Document("plain", "def f")])
    assert "no text of this run holds one" in caplog.text


def test_a_start_of_documents_without_a_row_is_refused(too_many):
    rows = too_many.shape.vocabulary
    with pytest.raises(ParentError, match=r"every document starts with '<\|start\|>'"):
        check_rows(too_many.tokenizer(), rows, [rows], list)


def test_exports_leave_out_tokens_without_a_row(too_many, tmp_path):
    source, rows = Source(too_many.directory), too_many.shape.vocabulary
    (tmp_path / "hf").mkdir()
    records = [export_hf(source, tmp_path / "hf", widths="any"), export_gguf(source, tmp_path / "x.gguf", "f32")]
    for record in records:
        assert f"tokens left out, as the embedding with its {rows} rows lacks them: '<|start|>' ({rows})" in str(
            record.remarks
        )
    written = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert max(written.get_vocab().values()) < rows
    assert written.pad_token is None
    assert max(written("<|start|>def f")["input_ids"]) < rows
