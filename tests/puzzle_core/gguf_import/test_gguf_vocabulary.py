"""Tokenizers of GGUF files: the export of a tokenizer, read back, gives its tokens."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from puzzle_core.export.gguf_tokenizer import SPLITS, gguf_vocabulary
from puzzle_core.gguf_import.gguf_metadata import GgufFile
from puzzle_core.gguf_import.gguf_vocabulary import tokenizer_json
from puzzle_core.model.tokenizer import PROBE_TEXTS, differing_text, open_tokenizer
from tests.puzzle_core.export.test_gguf_tokenizer import ALL_SPLITS, sentencepiece, split_by

STORIES = Path(__file__).parents[4] / "shared" / "data" / "parents" / "stories260K"
DIGITS = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
SPLITTERS = {name: split_by(key[0]) for key, name in SPLITS.items()}
SPLITTERS |= {"gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False), "smollm": pre_tokenizers.Sequence(DIGITS)}
IGNORE_MERGES = {name for (_, ignore), name in SPLITS.items() if ignore}


def trained(name):
    """A byte-level tokenizer that learnt from the probe texts, and puts BOS before a text."""
    tokenizer = Tokenizer(BPE(ignore_merges=name in IGNORE_MERGES))
    tokenizer.pre_tokenizer, tokenizer.decoder = SPLITTERS[name], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROBE_TEXTS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>")


@pytest.fixture
def read_back(write_gguf):
    """A tokenizer exported into a GGUF file and read from it."""

    def read(tokenizer, **changes):
        found = gguf_vocabulary(tokenizer, len(tokenizer) + 2)
        values = {"model": found.kind, "pre": found.pre, "tokens": found.tokens, "token_type": found.types}
        values |= {"merges": found.merges or None, "scores": found.scores or None}
        values |= {"add_bos_token": found.add_bos, "add_eos_token": found.add_eos}
        values |= {"add_space_prefix": found.add_space, "unknown_token_id": tokenizer.unk_token_id} | changes
        file = write_gguf("llama", "llama", changes={f"tokenizer.ggml.{key}": value for key, value in values.items()})
        content, special = tokenizer_json(GgufFile(file), len(found.tokens))
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **special)

    return read


@pytest.mark.parametrize("name", SPLITTERS)
def test_byte_level_tokens_of_every_split(name, read_back):
    tokenizer = trained(name)
    found = read_back(tokenizer)
    if name == "qwen2":  # published tokenizers of this name normalise text, and the name is all that the file has
        assert found("e\u0301")["input_ids"] == tokenizer("\u00e9")["input_ids"]
        found.backend_tokenizer.normalizer = None
    assert differing_text(tokenizer.backend_tokenizer, found) is None
    text = "<|end|>x <s>12"
    assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert found.decode(found(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert found.get_vocab() == tokenizer.get_vocab()


def test_another_name_gives_other_tokens(read_back):
    """The comparison can fail: a split by another rule is seen."""
    tokenizer = trained("smollm")
    assert differing_text(tokenizer.backend_tokenizer, read_back(tokenizer, pre="gpt-2")) is not None


def test_other_names_and_the_default_split(read_back):
    tokenizer = trained("smollm")
    assert differing_text(tokenizer.backend_tokenizer, read_back(tokenizer, pre="starcoder")) is None
    splits = read_back(tokenizer, pre=None).backend_tokenizer.pre_tokenizer.pre_tokenize_str("a12345!")
    assert [text for text, _ in splits] == ["a", "123", "45", "!"]


@pytest.mark.parametrize("adds_space", [True, False])
def test_sentencepiece_tokens(adds_space, read_back):
    tokenizer = sentencepiece([("b", "c"), *ALL_SPLITS[:3]])
    if not adds_space:
        tokenizer.backend_tokenizer.normalizer = tokenizer.backend_tokenizer.normalizer.__getitem__(1)
    found = read_back(tokenizer)
    for text in ("abc bc ab", "cab\u00e9 abcabc", "", "a  bc\n"):
        ids = tokenizer(text)["input_ids"]
        assert found(text)["input_ids"] == ids
    assert found.backend_tokenizer.decode(found("abc bc")["input_ids"]) == "abc bc"


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the shared parent stories260K")
def test_a_real_sentencepiece_tokenizer(read_back):
    tokenizer = open_tokenizer(STORIES)
    found = read_back(tokenizer, bos_token_id=tokenizer.bos_token_id)
    for text in (*PROBE_TEXTS, "Once upon a time, there was a little girl named Lily."):
        assert found(text)["input_ids"] == tokenizer(text)["input_ids"], text
