"""Texts in, packed windows out: disjoint, deterministic, and readable errors for what cannot be read."""

import bz2
import gzip
import json
import lzma
from random import Random

import pandas
import pytest
import torch
from safetensors.torch import load_file

from puzzle_core import data, text_sources
from puzzle_core.chats import as_text, as_texts
from puzzle_core.data import Place, Split, batch_rows, check_enough, document_start
from puzzle_core.errors import DataError
from puzzle_core.spec import DataSpec
from puzzle_core.text_files import Document
from puzzle_core.text_sources import (
    Texts,
    check_disjoint,
    digest_documents,
    read_documents,
    read_texts,
    stdlib_documents,
)
from puzzle_core.work import TokensWork

TEXTS = [f"{number:03d}" for number in range(200)]
DOCUMENTS = [Document(text, text) for text in TEXTS]
SPLITS = {"calibration": 40, "bld": 120, "gkd": 80}


@pytest.fixture
def tokenizer(parent):
    return parent.tokenizer()


def pack(documents, tokenizer, length, tokens, seed, **options):
    """The windows of splits by name; `tokens` has how many each needs."""
    splits = [Split(name, count, length) for name, count in tokens.items()]
    return dict(zip(tokens, (p.windows for p in data.pack(splits, documents, tokenizer, seed, **options)), strict=True))


def numbers(windows, tokenizer):
    """The documents whose every token made it into these windows."""
    found = tokenizer.decode(windows.flatten().tolist()).split("<s>")
    return {text for text in found if len(text) == 3}


def test_splits_share_no_document(tokenizer):
    packed = pack(DOCUMENTS, tokenizer, 8, SPLITS, seed=0)
    found = [numbers(windows, tokenizer) for windows in packed.values()]
    assert min(map(len, found)) > 5
    assert len(set.union(*found)) == sum(map(len, found))


def test_windows_follow_from_seed_and_documents_alone(tokenizer):
    one, same, other = (pack(DOCUMENTS, tokenizer, 8, SPLITS, seed)["bld"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert (one.shape, one.dtype) == ((15, 8), torch.int32)


def test_a_split_does_not_depend_on_those_that_are_served_later(tokenizer):
    alone = pack(DOCUMENTS, tokenizer, 8, {"calibration": 40, "bld": 120}, seed=0)
    later = pack(DOCUMENTS, tokenizer, 8, SPLITS | {"gkd": 240}, seed=0)
    assert all(torch.equal(alone[split], later[split]) for split in alone)


def test_every_document_starts_with_the_begin_of_text_token(tokenizer):
    windows = pack(DOCUMENTS, tokenizer, 8, {"all": 160}, seed=0)["all"]
    assert windows.flatten()[::4].eq(tokenizer.bos_token_id).all()


def test_too_few_tokens_say_what_was_asked_and_what_is_there(tokenizer):
    message = (
        r"split 'gkd' needs 800 tokens \(100 windows of 8\), but the 200 documents of the texts gave only 760 after "
        r"the splits before it: ask for fewer tokens or add texts"
    )
    with pytest.raises(DataError, match=message):
        pack(DOCUMENTS, tokenizer, 8, {"bld": 40, "gkd": 800}, seed=0)


WORK = TokensWork(
    split="bld",
    tokens=120,
    earlier_splits=(("calibration", 40),),
    sequence_length=8,
    seed=0,
    cut_documents=True,
    document_start="auto",
    texts="t",
    tokenizer="t",
)


def test_stage_writes_one_split_as_if_all_were_packed(tokenizer, tmp_path):
    record = data.pack_split(WORK, DOCUMENTS, tokenizer, tmp_path)
    assert torch.equal(data.read_windows(tmp_path), pack(DOCUMENTS, tokenizer, 8, SPLITS, seed=0)["bld"])
    assert (record.windows, record.tokens, record.bytes_per_token) == (15, 120, 0.75)


@pytest.mark.parametrize("cut", [True, False])
def test_a_split_goes_on_where_the_one_before_it_ended(tokenizer, tmp_path, cut):
    documents = [Document(str(n), f"{n:03d} " * (n % 7)) for n in range(60)]
    work = WORK.model_copy(update={"cut_documents": cut})
    place = Place(*data.pack_split(work.before, documents, tokenizer, tmp_path).end)
    whole = data.pack_split(work, documents, tokenizer, tmp_path)
    windows, tokenized = data.read_windows(tmp_path), []

    class Counting:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, texts, **options):
            tokenized.extend(texts)
            return tokenizer(texts, **options)

    assert data.pack_split(work, documents, Counting(), tmp_path, place) == whole
    assert torch.equal(data.read_windows(tmp_path), windows)
    assert not {text for text in tokenized if len(text) > 4} & packed_before(documents, place)


def packed_before(documents, place):
    """The texts of the documents that end before a place."""
    order = list(range(len(documents)))
    Random(WORK.seed).shuffle(order)
    return {documents[number].text for number in order[: place.document]}


def test_documents_are_numbered_beside_the_tokens_where_the_work_asks(tokenizer, tmp_path):
    data.pack_split(WORK, DOCUMENTS, tokenizer, tmp_path)
    assert data.read_positions(tmp_path) is None
    place = Place(*data.pack_split(WORK.before, DOCUMENTS, tokenizer, tmp_path).end)
    data.pack_split(WORK.model_copy(update={"documents": True}), DOCUMENTS, tokenizer, tmp_path, place)
    documents = load_file(tmp_path / "tokens.safetensors")["documents"].flatten()
    starts = data.read_windows(tmp_path).flatten() == tokenizer.bos_token_id
    assert documents[0] == place.document + int(starts[0])
    assert torch.equal(documents.diff() == 1, starts[1:])
    assert data.read_positions(tmp_path)[0].tolist() == [0, 1, 2, 3] * 2


def test_a_split_knows_the_ones_before_it_and_their_lengths():
    splits = [("calibration", 40, 8), ("bld", 120, 4), ("gkd", 80, 8)]
    works = [WORK.after(splits[:n], *splits[n]) for n in range(3)]
    assert [work.before for work in works] == [None, *works[:2]]
    assert works[1].earlier_lengths == (8,)
    assert "earlier_lengths" not in WORK.model_dump()
    assert WORK.before.key == works[0].key


def test_too_few_tokens_are_found_without_tokenizing_many(tokenizer):
    check_enough(WORK, DOCUMENTS, tokenizer)
    with pytest.raises(DataError, match=r"split 'bld' needs 800 tokens .* the 200 documents of the texts gave only"):
        check_enough(WORK.model_copy(update={"tokens": 800}), DOCUMENTS, tokenizer)
    book = [Document("book", "0123 " * 2000)]
    check_enough(WORK, book, lambda *texts, **options: pytest.fail("tokenized"))
    with pytest.raises(DataError, match=r"the 1 documents of the texts gave only 0 after the splits before it"):
        check_enough(WORK.model_copy(update={"cut_documents": False}), book, tokenizer)


def epochs_of(batch, windows, seed, epochs=3):
    """The windows of the first epochs in the order of the steps, and what they are without shuffling."""
    steps = -(-windows * epochs // batch)
    read = [row for step in range(steps) for row in batch_rows(step, batch, windows, seed)]
    return [read[epoch * windows : (epoch + 1) * windows] for epoch in range(epochs)]


@pytest.mark.parametrize(("batch", "windows"), [(4, 40), (7, 40), (1, 12), (50, 12)])
def test_every_epoch_has_every_window_once_in_another_order(batch, windows):
    epochs = epochs_of(batch, windows, seed=0)
    assert all(sorted(epoch) == list(range(windows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(windows)]}) == len(epochs) + 1


def test_the_order_of_windows_follows_from_the_seed_and_not_from_the_batch():
    assert epochs_of(4, 40, seed=3) == epochs_of(10, 40, seed=3)
    assert epochs_of(4, 40, seed=3) != epochs_of(4, 40, seed=4)
    assert batch_rows(0, 6, 12, seed=0) == [2, 6, 0, 8, 9, 1]  # in every version of Python


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("texts.json", json.dumps(["one", {"text": "two"}])),
        ("texts.jsonl", '"one"\r\n\n{"text": "two"}\n'),
        ("texts.jsonl.gz", '"one"\n"two"'),
        ("TEXTS.JSON", '["one", " ", "two"]'),
    ],
)
def test_reads_lists_of_texts(tmp_path, name, content):
    encode = gzip.compress if name.endswith(".gz") else bytes
    (tmp_path / name).write_bytes(encode(content.encode()))
    assert [document.text for document in read_documents([str(tmp_path / name)])] == ["one", "two"]


def test_both_halves_of_a_surrogate_pair_are_one_character(tmp_path):
    (tmp_path / "whole.json").write_bytes(rb'["a\ud83d\ude00"]')
    assert [document.text for document in read_documents([str(tmp_path / "whole.json")])] == ["a\N{GRINNING FACE}"]


def test_reads_plain_files_whole_and_directories_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("two\nlines")
    (tmp_path / "a.jsonl").write_text('"one"')
    (tmp_path / ".hidden").write_text("no")
    assert [document.text for document in read_documents([str(tmp_path)])] == ["one", "two\nlines"]


def test_line_separators_of_unicode_do_not_end_a_line_of_jsonl(tmp_path):
    text = "one\u2028still one\x85still"
    (tmp_path / "texts.jsonl").write_text(json.dumps(text, ensure_ascii=False) + "\n")
    assert [document.text for document in read_documents([str(tmp_path / "texts.jsonl")])] == [text]


def spoilt_gzip():
    """Compressed text with a few bytes in its middle changed."""
    whole = gzip.compress(" ".join(TEXTS).encode())
    return whole[:60] + b"\xff" * 20 + whole[80:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b" \n", "empty.txt' holds no text"),
        ("empty.json", b"", "empty.json' holds no text"),
        ("latin.txt", b"caf\xe9", r"latin\.txt is not UTF-8 \(byte 3 is 0xe9\)"),
        ("bad.json", b'["one", ', r"bad\.json is not valid JSON"),
        ("bad.jsonl", b'"one"\n{', r"bad\.jsonl is not valid JSON"),
        ("object.json", b'{"texts": ["one"]}', "holds a JSON dict: a list of strings"),
        ("other.jsonl", b'"one"\n{"body": "two"}', r"other\.jsonl, entry 1: neither a string nor an object"),
        ("cut.txt.gz", gzip.compress(b"one" * 99, mtime=0)[:-9], r"cut\.txt\.gz is not a whole gzip file"),
        ("plain.gz", b"one", r"plain\.gz is not a whole gzip file"),
        ("spoilt.gz", spoilt_gzip(), r"spoilt\.gz is not a whole gzip file"),
        ("texts", gzip.compress(b"one", mtime=0), r"texts is compressed by gzip: give it the ending \.gz"),
        ("texts.zst", b"\x28\xb5\x2f\xfd\x00", r"texts\.zst is compressed by zstandard, .*: decompress it"),
        ("texts.zip", b"PK\x03\x04\x14", r"texts\.zip is a ZIP archive, .*: unpack it"),
        ("data-00000-of-00001.arrow", b"\xff\xff\xff\xff\x78", "is an Arrow stream, .* as Parquet or JSON Lines"),
        ("utf-16.txt", "one".encode("utf-16-le"), r"utf-16\.txt has NUL bytes, .*iconv -f utf-16"),
        (
            "texts.tar.gz",
            gzip.compress(b"a.txt".ljust(512, b"\0") + b"one", mtime=0),
            r"texts\.tar\.gz has NUL bytes, .*unpack",
        ),
        ("half.json", rb'["one", "a\ud83d"]', r"half\.json, entry 1: character 1 is \\ud83d, half of a surrogate pair"),
        ("half.jsonl", b'"one"\n{"text": "\\udc00"}', r"half\.jsonl, entry 1: character 0 is \\udc00, half of a"),
    ],
)
def test_refuses_and_says_why(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_documents([str(tmp_path / name)])


def test_a_source_that_is_nothing_is_named():
    with pytest.raises(DataError, match="'/no/such/file' does not exist"):
        read_documents(["/no/such/file"])
    with pytest.raises(DataError, match="use 'python-stdlib:train' or 'python-stdlib:held-out'"):
        read_documents(["python-stdlib"])


def test_digest_follows_texts_and_order_and_not_names():
    documents = [Document("a", "one"), Document("b", "two")]
    assert digest_documents(documents) == digest_documents([Document("x", "one"), Document("y", "two")])
    assert digest_documents(documents) != digest_documents(documents[::-1])
    assert digest_documents([Document("a", "onetwo")]) != digest_documents(documents)


@pytest.fixture
def stdlib(tmp_path, monkeypatch):
    """A standard library of two hundred modules, and of files that are left out."""
    modules = [f"package/module_{number}.py" for number in range(200)]
    for name in [*modules, "test/test_ast.py", "site-packages/numpy.py", "encodings/cp1252.py", "readme.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "package/latin.py").write_bytes(b"caf\xe9")
    monkeypatch.setattr(text_sources.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return set(modules)


def test_held_out_standard_library_shares_no_module_with_the_rest(stdlib):
    train, held_out = ({document.name for document in stdlib_documents(split)} for split in (False, True))
    assert train | held_out == stdlib
    assert not train & held_out
    assert 10 < len(held_out) < 40
    assert read_documents(["python-stdlib:held-out"]) == list(stdlib_documents(held_out=True))


def test_test_modules_of_the_standard_library_are_there_for_the_asking(stdlib):
    names = {d.name for split in (False, True) for d in stdlib_documents(split, include_tests=True)}
    assert names == stdlib | {"test/test_ast.py"}


def test_one_long_document_serves_every_split_and_no_token_twice(tokenizer):
    text = " ".join(f"{number:04d}" for number in range(300))
    packed = pack([Document("book", text)], tokenizer, 8, SPLITS, seed=0)
    served = torch.cat([windows.flatten() for windows in packed.values()]).tolist()
    assert (
        served
        == pack([Document("book", text)], tokenizer, 8, {"all": sum(SPLITS.values())}, seed=0)["all"].flatten().tolist()
    )
    with pytest.raises(DataError, match=r"the 1 documents of the texts gave only 0 after the splits before it"):
        pack([Document("book", text)], tokenizer, 8, SPLITS, seed=0, cut_documents=False)


def test_without_cutting_no_document_is_in_two_splits(tokenizer):
    documents = [Document(str(n), f"{n:03d} " * 7) for n in range(60)]
    for cut, shared in ((False, False), (True, True)):
        packed = pack(documents, tokenizer, 8, SPLITS, seed=0, cut_documents=cut)
        found = [
            set(tokenizer.decode(windows.flatten().tolist()).replace("<s>", " ").split()) for windows in packed.values()
        ]
        found = [{word for word in words if len(word) == 3} for words in found]
        assert bool((found[0] & found[1]) | (found[1] & found[2])) == shared


class ChatTokenizer:
    """A tokenizer by characters whose begin and end of text are those that a test names."""

    def __init__(self, in_front=(), vocabulary=(), bos=None, eos=None):
        self.vocabulary = {token: 1000 + n for n, token in enumerate(vocabulary)}
        self.in_front, self.bos_token, self.eos_token = in_front, bos, eos

    def get_vocab(self):
        return self.vocabulary

    def __call__(self, texts, add_special_tokens=True, **options):
        front = [self.vocabulary[token] for token in self.in_front] if add_special_tokens else []
        return {"input_ids": [front + [ord(c) for c in text] for text in texts]}


CHAT = ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize(
    ("tokenizer", "choice", "token"),
    [
        (ChatTokenizer(in_front=["<bos>"], vocabulary=["<bos>", "<|endoftext|>"]), "auto", "<bos>"),
        (ChatTokenizer(vocabulary=[*CHAT, "<|endoftext|>"], bos=CHAT[0], eos=CHAT[1]), "auto", "<|endoftext|>"),
        (ChatTokenizer(vocabulary=[*CHAT, "<|endoftext|>"], eos=CHAT[1]), "auto", "<|endoftext|>"),
        (ChatTokenizer(vocabulary=["<s>", "</s>"], bos="<s>", eos="</s>"), "auto", "<s>"),
        (ChatTokenizer(vocabulary=["</s>"], eos="</s>"), "auto", "</s>"),
        (ChatTokenizer(vocabulary=CHAT, bos=CHAT[0], eos=CHAT[1]), "auto", None),
        (ChatTokenizer(vocabulary=CHAT, bos=CHAT[0], eos=CHAT[1]), "<|im_end|>", "<|im_end|>"),
        (ChatTokenizer(in_front=["<bos>"], vocabulary=["<bos>"]), "none", None),
    ],
)
def test_what_stands_in_front_of_a_document(tokenizer, choice, token):
    assert document_start(tokenizer, choice) == ([tokenizer.vocabulary[token]] if token else [])


def test_a_start_that_is_no_token_is_refused_by_name(tokenizer):
    with pytest.raises(DataError, match=r"data\.document_start is '<start>', which is no token"):
        document_start(tokenizer, "<start>")


def test_held_out_texts_that_are_trained_on_are_refused():
    train, held_out = [Document("a", "one"), Document("b", "two")], [Document("c", "three"), Document("d", " two\n")]
    check_disjoint(train, held_out[:1])
    with pytest.raises(DataError, match=r"d of data\.held_out_texts is also in data\.train_texts \(b\)"):
        check_disjoint(train, held_out)


LINES = "\n".join(json.dumps({"text": text, "url": "https://example.com"}) for text in ("one", "two", "three")) + "\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c4-train.00000-of-01024.json.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("lines.json", LINES.encode()),
        ("lines.txt", LINES.encode()),
        ("lines", LINES.encode()),
        ("lines.ndjson", LINES.encode()),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("windows.jsonl", LINES.replace("\n", "\r\n").encode()),
        ("list.json", json.dumps([{"text": "one"}, {"text": "two"}, "three"], indent=1).encode()),
        ("lines.jsonl.bz2", bz2.compress(LINES.encode())),
        ("lines.jsonl.xz", lzma.compress(LINES.encode())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_forms_in_which_public_corpora_come(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [document.text for document in read_documents([str(tmp_path / name)])] == ["one", "two", "three"]


def test_a_parquet_file_is_read_by_its_text_column_and_refused_without_one(tmp_path):
    pandas.DataFrame({"text": ["one", "two"], "url": "u"}).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    assert [document.text for document in read_documents([str(tmp_path)])] == ["one", "two"]
    pandas.DataFrame({"content": ["one"]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(
        DataError, match=r"other\.parquet is a Parquet file without a column 'text' or 'messages' \(it has content"
    ):
        read_documents([str(tmp_path)])
    (tmp_path / "other.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"other\.parquet is not a whole Parquet file"):
        read_documents([str(tmp_path)])


CHAT_ROWS = [
    [{"role": "user", "content": "one"}, {"role": "assistant", "content": "é"}],
    [{"role": "user", "content": "2"}],
]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize("name", ["chats.parquet", "chats.jsonl", "chats.txt", "chats.json"])
def test_chats_are_texts_through_the_tokenizers_template(tmp_path, tokenizer, name):
    file = tmp_path / name
    if name.endswith(".parquet"):
        pandas.DataFrame({"id": [0, 1], "messages": CHAT_ROWS}).to_parquet(file)
    elif name == "chats.json":
        file.write_text(json.dumps([{"messages": rows} for rows in CHAT_ROWS]))
    else:
        file.write_text("".join(json.dumps({"id": 0, "messages": rows}) + "\n" for rows in CHAT_ROWS))
    chats = read_documents([str(file)])
    with pytest.raises(DataError, match=rf"{name}#0 is a chat \('messages'\), and the parent's tokenizer has no chat"):
        as_texts(chats, tokenizer)
    tokenizer.chat_template = TEMPLATE
    assert [document.text for document in as_texts(chats, tokenizer)] == [
        "<s><user>one\n<assistant>é\n",
        "<s><user>2\n",
    ]
    windows = pack(chats[1:], tokenizer, 8, {"all": 8}, seed=0)["all"]
    assert tokenizer.decode(windows.flatten().tolist()).count("<s>") == 1  # the template's own
    assert digest_documents(chats) != digest_documents([document._replace(is_chat=False) for document in chats])


def test_a_template_that_writes_the_date_gives_equal_texts_on_every_day(tokenizer):
    chat = Document("chat", json.dumps(CHAT_ROWS[1]), is_chat=True)
    tokenizer.chat_template = "\n{% macro day() %}{{ strftime_now('%d %b %Y') }}{% endmacro %} {{ day() }} " + TEMPLATE
    assert as_text(chat, tokenizer).strip().startswith("26 Jul 2024")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"entry 0: 'messages' is no list of messages"),
        ("hello", r"entry 0: 'messages' is no list of messages"),
        (["hello"], r"entry 0, message 0 is \"hello\": every message is an object whose 'role' and 'content'"),
        ([{"role": "user"}], r"entry 0, message 0 is .*: every message is an object whose 'role' and 'content'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"entry 0, message 0 is .*: every message is an object"),
        ([{"from": "human", "value": "a"}], r"entry 0, message 0 has from, value beside 'role' and 'content'"),
        ([{"role": "tool", "content": "a", "tool_calls": [1]}], r"message 0 has tool_calls beside 'role' and"),
    ],
)
def test_rows_that_are_no_messages_are_refused_by_entry(tmp_path, messages, message):
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}))
    with pytest.raises(DataError, match=message):
        read_documents([str(tmp_path)])


def test_a_chat_that_the_template_refuses_is_named(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"template refuses chats#3 \(roles must alternate\)"):
        as_text(Document("chats#3", json.dumps(CHAT_ROWS[0]), is_chat=True), tokenizer)


def test_a_directory_of_a_hub_is_read_without_what_describes_it(tmp_path):
    (tmp_path / "train.jsonl").write_text(LINES)
    for name in ("dataset_infos.json", "README.md", "LICENSE", ".gitattributes"):
        (tmp_path / name).write_text("{}")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "lines.jsonl").write_text(LINES)
    assert len(read_documents([str(tmp_path)])) == 3
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "dataset_infos.json").unlink()
    (tmp_path / "notes.txt").write_text("a note")
    assert len(read_documents([str(tmp_path)])) == 3  # without files of data, a README is a text like others


def test_text_that_begins_like_json_is_text(tmp_path):
    (tmp_path / "code.txt").write_text('{"a": 1}\n{"text": "x"}\n')
    assert [document.text for document in read_documents([str(tmp_path)])] == ['{"a": 1}\n{"text": "x"}\n']


def test_one_source_is_split_by_document(tmp_path):
    lines = [f"text {number % 40}" + " " * (number // 40) for number in range(50)]  # ten are there twice
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    spec = DataSpec(train_texts=(str(tmp_path / "texts.jsonl"),), held_out_share=0.2)
    train, held_out = read_texts(spec.train), read_texts(spec.held_out)
    assert sorted(document.text for document in (*train, *held_out)) == sorted(lines)
    check_disjoint(train, held_out)
    assert len({document.text.strip() for document in held_out}) == 8
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, reversed(lines))))
    assert [document.text for document in read_texts(spec.held_out)] == [document.text for document in held_out][::-1]


def test_few_documents_leave_some_on_each_side(tmp_path):
    texts = Texts(sources=(str(tmp_path / "texts.json"),), held_out_share=0.01, held_out=True)
    (tmp_path / "texts.json").write_text(json.dumps(["one", "two"]))
    assert len(read_texts(texts)) == 1
    assert len(read_texts(texts.model_copy(update={"held_out": False, "held_out_share": 0.99}))) == 1
    (tmp_path / "texts.json").write_text(json.dumps(["one", "one "]))
    with pytest.raises(DataError, match=r"splits the texts by document, and .*texts\.json hold one document"):
        read_texts(texts)


def test_held_out_texts_and_a_share_are_not_both_given():
    with pytest.raises(ValueError, match="leave out held_out_share or held_out_texts"):
        DataSpec(held_out_texts=("a.txt",), held_out_share=0.1)
