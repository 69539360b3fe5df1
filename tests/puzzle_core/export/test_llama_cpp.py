"""llama.cpp itself runs the files: the same logits, greedy tokens and tokenization as the child here.

It computes in float32 with `flash_attn` off and a float32 cache; its flash attention rounds to float16.
"""

import gzip
import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from puzzle_core.export.gguf_file import export_gguf
from puzzle_core.export.gguf_tokenizer import BYTE_LEVEL, DIGITS, SPLITS
from puzzle_core.export.source import Source
from puzzle_core.model.child import load_child
from tests.conftest import CPU
from tests.conftest import MIXED as PICO_MIXED
from tests.pico import Pico, write_pico
from tests.puzzle_core.export.conftest import CARRIED, CHILDREN, MIXED, ODD_WIDTHS, STDLIB

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make engines")
HARD_TEXTS = [
    "",
    " ",
    "a",
    "é ☃ 你好  \t\r\n\n 123456 x's I'LL",
    "HTMLParser aB\u00a0\u200b\u3000end ",
    "a/b//\n\n/c 12,345.6e7!!",
]
SHARED = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture
def engine_of(tmp_path):
    """llama.cpp with a source's file."""
    engines = []

    def load(source, kind="f32", vocab_only=False):
        file = tmp_path / f"{kind}.gguf"
        export_gguf(source, file, kind)
        engines.append(
            llama_cpp.Llama(
                str(file), n_ctx=256, n_batch=256, n_threads=1, n_threads_batch=1, logits_all=True, flash_attn=False,
                type_k=0, type_v=0, verbose=False, vocab_only=vocab_only,
            )
        )  # fmt: skip
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()


def logits(engine, ids):
    """Of all tokens at once, (T, vocabulary)."""
    engine.reset()
    engine.eval(ids)
    return torch.tensor(engine.scores[: len(ids)])


def greedy(engine, ids, steps):
    """Greedy tokens, one at a time with the cache."""
    engine.reset()
    engine.eval(ids)
    found = []
    for _ in range(steps):
        found.append(int(engine.scores[engine.n_tokens - 1].argmax()))
        engine.eval(found[-1:])
    return found


def assert_same(engine, directory, ids):
    """Log-probabilities within 1e-4 at float32, and the same greedy tokens."""
    child = load_child(directory, torch.float32, CPU).requires_grad_(False)
    expected = child(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(engine, ids).log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=1e-4)
    prompt = torch.tensor([ids])
    wanted = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = child.generate(prompt, attention_mask=torch.ones_like(prompt), **wanted)
    assert greedy(engine, ids, 16) == generated[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", CHILDREN)
def test_it_computes_every_child(name, stdlib_child, engine_of, text_ids):
    directory = stdlib_child(CHILDREN[name])
    assert_same(engine_of(Source(directory)), directory, text_ids[0].tolist())


@pytest.mark.parametrize("blocks", [ODD_WIDTHS, ("attn:linear+ffn:i31",) * 8, ("attn:no_op+ffn:no_op",) * 8])
def test_it_computes_what_no_other_engine_does(blocks, stdlib_child, engine_of, text_ids):
    directory = stdlib_child(blocks)
    assert_same(engine_of(Source(directory)), directory, text_ids[0].tolist())


@pytest.mark.parametrize("name", CARRIED)
def test_every_option_of_a_parent_is_carried(name, assemble, engine_of, ids_NT):
    directory = assemble(name, PICO_MIXED)
    assert_same(engine_of(Source(directory)), directory, ids_NT[:4].flatten().tolist())


@pytest.mark.parametrize(("kind", "most"), [("f16", 1e-4), ("bf16", 1e-2), ("q8_0", 2e-2)])
def test_smaller_types_stay_near(kind, most, stdlib_child, engine_of, logits_of, text_ids):
    directory = stdlib_child(MIXED)
    found = logits(engine_of(Source(directory), kind), text_ids[0].tolist()).log_softmax(-1)
    expected = logits_of(directory).log_softmax(-1)
    assert 0 < (expected.exp() * (expected - found)).sum(-1).mean() < most


def test_its_perplexity_is_ours(stdlib_child, engine_of, logits_of, text_ids):
    directory, ids = stdlib_child(MIXED), text_ids[0]
    losses = [
        torch.nn.functional.cross_entropy(x[:-1], ids[1:]).item()
        for x in (logits(engine_of(Source(directory)), ids.tolist()), logits_of(directory))
    ]
    assert math.exp(losses[0]) == pytest.approx(math.exp(losses[1]), rel=1e-5)


def same_tokens(engine, source, texts):
    """How many tokens the texts have; asserts that both tokenizers give the same."""
    total = 0
    for text in texts:
        expected = source.tokenizer(text).input_ids
        found = engine.tokenize(text.encode(), add_bos=True, special=False)
        assert found == expected, text[:80]
        total += len(expected)
    return total


def test_it_tokenizes_python_as_the_parent_does(stdlib_child, engine_of):
    source = Source(STDLIB)
    texts = [Path(module.__file__).read_text()[:20_000] for module in (json, gzip, statistics)]
    texts += HARD_TEXTS
    assert same_tokens(engine_of(source, vocab_only=True), source, texts) > 10_000


def byte_level_tokenizer(split, ignore_merges, texts):
    """One that splits text in this way, trained on these texts."""
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in (BYTE_LEVEL, DIGITS))
    first = pre_tokenizers.Digits(True) if split == DIGITS else pre_tokenizers.Split(Regex(split), "isolated")
    tokenizer = Tokenizer(BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = whole if split == BYTE_LEVEL else pre_tokenizers.Sequence([first, whole])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, BpeTrainer(vocab_size=700, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


@pytest.mark.parametrize(("split", "ignore_merges"), SPLITS, ids=SPLITS.values())
def test_it_splits_text_as_its_name_says(split, ignore_merges, engine_of, tmp_path):
    texts = [Path(json.__file__).read_text()[:9_000], Path(statistics.__file__).read_text()[:9_000], *HARD_TEXTS]
    directory = write_pico(tmp_path / "parent", Pico(config={"vocab_size": 700}))
    byte_level_tokenizer(split, ignore_merges, texts).save_pretrained(directory)
    source = Source(directory)
    assert same_tokens(engine_of(source, vocab_only=True), source, texts) > 3_000


@pytest.mark.parametrize("name", ["stories260K", "babyllama361"])
def test_it_tokenizes_stories_as_their_parents_do(name, engine_of):
    directory = SHARED / "parents" / name
    if not directory.is_dir():
        pytest.skip("shared/data is not there")
    source = Source(directory)
    stories = json.loads((SHARED / "tinystories" / "heldout.json").read_text())[:100]
    assert same_tokens(engine_of(source, vocab_only=True), source, [*stories, "é ☃ 你好  two  blanks\n\nx"]) > 10_000


@pytest.mark.parametrize("name", ["stories260K", "babyllama361"])
def test_it_computes_parents_of_others(name, engine_of):
    directory = SHARED / "parents" / name
    if not directory.is_dir():
        pytest.skip("shared/data is not there")
    source = Source(directory)
    ids = source.tokenizer("Once upon a time, there was a little girl named Lily.").input_ids
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(directory)(input_ids=torch.tensor([ids])).logits[0]
    found = logits(engine_of(source), ids)
    torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=1e-4)
