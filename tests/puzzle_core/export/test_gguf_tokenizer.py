"""Tokenizers for llama.cpp: what it has no equal of is refused by name (test_llama_cpp.py compares the tokens)."""

import pytest
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from puzzle_core.errors import ExportError
from puzzle_core.export.gguf_tokenizer import NO_MERGES, SPLITS, gguf_vocabulary

LLAMA3 = next(split for (split, ignore), name in SPLITS.items() if name == "llama-bpe")
BYTES = {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}


def byte_level(pre_tokenizer=None, normalizer=None, **options):
    """A byte-level tokenizer with three merges."""
    pieces = ["<s>", "a", "b", "c", "ab", "abc", "bc", "Ġ"]
    model = BPE(vocab={p: n for n, p in enumerate(pieces)}, merges=[("a", "b"), ("ab", "c"), ("b", "c")], **options)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer)


def wrapped(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def split_by(expression):
    parts = [
        pre_tokenizers.Split(Regex(expression), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(parts)


def sentencepiece(merges, pieces=("▁", "a", "b", "c", "ab", "abc", "bc")):
    """A tokenizer as those made from SentencePiece's BPE."""
    vocab = {"<unk>": 0, "<s>": 1, **BYTES} | {piece: 258 + number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<s>"])
    return wrapped(tokenizer)


ALL_SPLITS = [("a", "b"), ("a", "bc"), ("ab", "c"), ("b", "c")]


def test_a_byte_level_vocabulary():
    found = gguf_vocabulary(byte_level(), 10)
    assert found.tokens == ["<s>", "a", "b", "c", "ab", "abc", "bc", "Ġ", "[PAD8]", "[PAD9]"]
    normal, control, unused = map(int, (TokenType.NORMAL, TokenType.CONTROL, TokenType.UNUSED))
    assert found.types == [control] + [normal] * 7 + [unused] * 2
    assert (found.kind, found.pre, found.merges) == ("gpt2", "gpt-2", ["a b", "ab c", "b c"])
    assert (found.add_bos, found.add_eos, found.scores) == (False, False, [])


@pytest.mark.parametrize(("key", "name"), [item for item in SPLITS.items() if " " not in item[0][0][:9]])
def test_every_split_that_it_knows_has_its_name(key, name):
    expression, ignore_merges = key
    assert gguf_vocabulary(byte_level(split_by(expression), ignore_merges=ignore_merges), 8).pre == name


def test_single_digits_are_smollm():
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    assert gguf_vocabulary(byte_level(pre_tokenizers.Sequence(parts)), 8).pre == "smollm"


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Sequence([]),
        normalizers.Sequence([normalizers.Sequence([]), normalizers.NFC()]),
        normalizers.Strip(left=False, right=False),
        normalizers.Prepend(""),
        normalizers.Replace("a", "a"),
    ],
    ids=str,
)
def test_normalizers_that_do_nothing_are_none(normalizer):
    assert gguf_vocabulary(byte_level(normalizer=normalizer), 8).pre == "gpt-2"


def test_a_sequence_in_a_sequence_is_its_parts():
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    nested = pre_tokenizers.Sequence([pre_tokenizers.Sequence(parts)])
    assert gguf_vocabulary(byte_level(nested), 8).pre == "smollm"


def test_tokens_that_are_left_out_are_not_written():
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    whole = gguf_vocabulary(tokenizer, 10)
    assert "<|end|>" in whole.tokens
    assert "<|end|>" not in gguf_vocabulary(tokenizer, whole.tokens.index("<|end|>"), left_out={"<|end|>"}).tokens


def test_bos_and_eos_are_added_as_the_tokenizer_does():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A <s>", special_tokens=[("<s>", 0)]
    )
    found = gguf_vocabulary(tokenizer, 8)
    assert (found.add_bos, found.add_eos) == (True, True)


def test_added_tokens_are_control_or_user_defined():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    found = gguf_vocabulary(tokenizer, 10)
    assert found.tokens[8:] == ["<think>", "<|end|>"]
    assert found.types[8:] == [int(TokenType.USER_DEFINED), int(TokenType.CONTROL)]


def test_sentencepiece_scores_follow_the_merges():
    found = gguf_vocabulary(sentencepiece([("b", "c"), ("a", "bc"), ("ab", "c"), ("a", "b")]), 265)
    scores = dict(zip(found.tokens, found.scores, strict=True))
    assert (found.kind, found.add_space) == ("llama", True)
    assert scores["bc"] > scores["abc"] > scores["ab"] > scores["a"]
    assert found.types[:3] == [int(TokenType.UNKNOWN), int(TokenType.CONTROL), int(TokenType.BYTE)]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (lambda: wrapped(Tokenizer(WordLevel({"<s>": 0}, unk_token="<s>"))), "kind 'WordLevel'"),
        (lambda: byte_level(split_by(r"\d+|\D+")), r"splits text by '\\\\d.*ignore_merges False.*llama-bpe"),
        (lambda: byte_level(split_by(LLAMA3.replace("1,3", "1,2"))), "knows no tokenizer that splits"),
        (lambda: byte_level(ignore_merges=True), "ignore_merges True"),
        (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), r"parts \['ByteLevel'\]"),
        (lambda: byte_level(pre_tokenizers.Whitespace()), r"parts \['Whitespace'\]"),
        (lambda: byte_level(normalizer=normalizers.Lowercase()), r"normalises text \(Lowercase\)"),
        (lambda: sentencepiece(ALL_SPLITS[:1] + ALL_SPLITS[2:]), r"lack \('a', 'bc'\), by which.*'abc'"),
        (lambda: sentencepiece([("a", "bc"), ("a", "b"), ("ab", "c"), ("b", "c")]), "'abc' are not neighbours"),
    ],
)
def test_what_llama_cpp_has_no_equal_of_is_refused(tokenizer, message):
    with pytest.raises(ExportError, match=message):
        gguf_vocabulary(tokenizer(), 300)


def test_more_tokens_than_the_embedding_are_refused():
    with pytest.raises(ExportError, match="tokens up to 7, and the embedding 7 rows"):
        gguf_vocabulary(byte_level(), 7)


def test_other_tokens_than_bos_and_eos_are_refused():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("c $A", special_tokens=[("c", 3)])
    with pytest.raises(ExportError, match="adds other tokens than BOS and EOS"):
        gguf_vocabulary(tokenizer, 8)


def test_a_vocabulary_without_merges_gets_one_that_never_happens(parent):
    assert gguf_vocabulary(parent.tokenizer(), parent.shape.vocabulary).merges == NO_MERGES
