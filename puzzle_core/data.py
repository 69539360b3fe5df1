"""Packs texts into token batches: splits for calibration, BLD, GKD, scoring and evaluation.

Documents are shuffled once with a fixed seed, each gets a start token (`document_start`), and all are cut into
windows of `sequence_length` tokens. A split records where it ended, and the next one goes on from there. Trainings read
the windows of a split in a random order that seed and epoch determine. The step number therefore determines the tokens
of a step: training can resume at any step.

Legend: N windows, T tokens per window.
"""

import functools
import itertools
import random
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import load_file, save_file

from puzzle_core.chats import ChatTokenizer, as_text
from puzzle_core.errors import DataError
from puzzle_core.text_files import Document
from puzzle_core.work import TokensRecord, TokensWork

TOKENS = "tokens.safetensors"
DOCUMENTS_AT_A_TIME = 16
SURELY_ENOUGH = 32
"""Characters per token that no text has on average."""
START_OF_PRETRAINING = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>")
"""Tokens that pretraining puts between documents, for tokenizers that add no token at the start of a text."""
CHAT_MARKERS = frozenset(
    [
        "<|im_start|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|end|>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<|user|>",
        "<|assistant|>",
    ]
)
"""Tokens that mark a chat turn. A document starts with one only if the specification names it."""


class Tokenizer(ChatTokenizer, Protocol):
    """The part of a Hugging Face tokenizer that packing needs."""

    bos_token: str | None
    eos_token: str | None

    def __call__(self, text: list[str], **options: Any) -> Any: ...

    def decode(self, ids: list[int], **options: Any) -> str: ...

    def get_vocab(self) -> dict[str, int]: ...


def document_start(tokenizer: Tokenizer, choice: str = "auto") -> list[int]:
    """Ids at the start of every document.

    Args:
        choice: `none`, a token of the vocabulary, or `auto`. `auto` takes the first that exists: the tokens that the
            tokenizer adds at the start of a text, the token that pretraining puts between documents, the
            begin-of-text or end-of-text token if it is not a chat marker. Otherwise it adds nothing.

    Raises:
        DataError: the vocabulary has no token `choice`.
    """
    vocabulary = tokenizer.get_vocab()
    if choice == "none":
        return []
    if choice != "auto":
        if choice not in vocabulary:
            raise DataError(
                f"data.document_start is {choice!r}, which is no token of the parent's vocabulary: name one of its "
                "tokens, or say 'auto' or 'none'"
            )
        return [vocabulary[choice]]
    [whole], [text] = (
        tokenizer(["a"], add_special_tokens=special, verbose=False)["input_ids"] for special in (True, False)
    )
    prefix = next((list(whole[:n]) for n in range(1, len(whole)) if whole[n : n + len(text)] == text), [])
    if prefix:
        return prefix
    candidates = [*START_OF_PRETRAINING, tokenizer.bos_token, tokenizer.eos_token]
    usable = [token for token in candidates if token in vocabulary and token not in CHAT_MARKERS]
    return [vocabulary[token] for token in usable[:1] if token]


class Split(NamedTuple):
    """A split to pack: its name, how many tokens it needs at least, and tokens per window."""

    name: str
    tokens: int
    sequence_length: int


class Place(NamedTuple):
    """A place in the shuffled documents: the next token is token `token` of document `document`, counted from 0."""

    document: int
    token: int


BEGIN = Place(0, 0)


class Packed(NamedTuple):
    """A packed split.

    Attributes:
        windows: its tokens, int32 (N, T) with N = ceil(tokens / T).
        parts: its documents by number, in order, and how many of its tokens each gave.
        end: the place where the next split starts.
    """

    windows: torch.Tensor
    parts: list[tuple[int, int]]
    end: Place

    def documents(self) -> torch.Tensor:
        """The number of the document of every token, int32 (N, T)."""
        numbers, counts = torch.tensor(self.parts).unbind(1)
        return torch.repeat_interleave(numbers.int(), counts).view_as(self.windows)


def pack(
    splits: Iterable[Split],
    documents: list[Document],
    tokenizer: Tokenizer,
    seed: int,
    cut_documents: bool = True,
    start: str = "auto",
    place: Place = BEGIN,
) -> Iterator[Packed]:
    """Cut documents into packed windows, one split after the other; no token is in two splits.

    Args:
        seed: of the order of the documents.
        cut_documents: the next split starts with the rest of a split's last document. If false, that rest is dropped,
            and no two splits share a document.
        start: the argument `choice` of `document_start`.
        place: where the first split starts.

    Raises:
        DataError: the documents hold fewer tokens than the splits need, the vocabulary has no token `start`, or a
            document is a chat that the tokenizer has no template for.
    """
    stream = _Stream(documents, tokenizer, seed, document_start(tokenizer, start), place)
    for split in splits:
        windows = -(-split.tokens // split.sequence_length)
        needed, first = windows * split.sequence_length, stream.place
        tokens, parts = stream.read(needed)
        if len(tokens) < needed:
            advice = "tokens or add texts" if cut_documents else "tokens, add texts, or say `cut_documents: true`"
            after = "" if first == BEGIN else " after the splits before it"
            raise DataError(
                f"split {split.name!r} needs {needed:,} tokens ({windows:,} windows of {split.sequence_length}), but "
                f"the {len(documents):,} documents of the texts gave only {len(tokens):,}{after}: ask for fewer "
                f"{advice}"
            )
        if not cut_documents:
            stream.next_document()
        windows_NT = torch.frombuffer(tokens, dtype=torch.int32).view(windows, split.sequence_length)
        yield Packed(windows_NT, parts, stream.place)


class _Stream:
    """The tokens of shuffled documents, one after the other, from a place on. Documents are tokenized as they come."""

    def __init__(self, documents: list[Document], tokenizer: Tokenizer, seed: int, start: list[int], place: Place):
        order = list(range(len(documents)))
        random.Random(seed).shuffle(order)
        self._following = _token_ids((documents[i] for i in order[place.document :]), tokenizer, start)
        self._ids: array[int] = next(self._following, array("i"))
        self.place = place

    def read(self, count: int) -> "tuple[array[int], list[tuple[int, int]]]":
        """The next `count` tokens, or fewer where the texts end; and their documents by number, with their tokens."""
        tokens, parts = array("i"), list[tuple[int, int]]()
        while len(tokens) < count:
            document, first = self.place
            part = self._ids[first : first + count - len(tokens)]
            tokens += part
            parts += [(document, len(part))] if part else []
            self.place = Place(document, first + len(part))
            if len(tokens) < count and not self.next_document():
                break
        return tokens, parts

    def next_document(self) -> bool:
        """Go to the start of the next document; whether there is one."""
        ids = next(self._following, None)
        self._ids, self.place = ids or array("i"), Place(self.place.document + 1, 0)
        return ids is not None


def check_enough(work: TokensWork, documents: list[Document], tokenizer: Tokenizer) -> None:
    """Refuse documents that hold fewer tokens than a split and those before it need.

    Documents that may be cut and have many more characters than tokens are asked for are not tokenized.

    Raises:
        DataError: as `pack`.
    """
    splits = _splits(work)
    characters = sum(len(document.text) for document in documents)
    if not work.cut_documents or characters < SURELY_ENOUGH * sum(split.tokens for split in splits):
        for _ in pack(splits, documents, tokenizer, work.seed, work.cut_documents, work.document_start):
            pass


def _splits(work: TokensWork) -> list[Split]:
    """All splits up to that of a work."""
    before = _splits(work.before) if work.before else []
    return [*before, Split(work.split, work.tokens, work.sequence_length)]


def _token_ids(documents: Iterator[Document], tokenizer: Tokenizer, start: list[int]) -> Iterator["array[int]"]:
    """The ids of each document in order. Documents are tokenized in small batches, which is faster.

    A chat whose template writes the start of a document gets no second one.
    """
    while batch := list(itertools.islice(documents, DOCUMENTS_AT_A_TIME)):
        texts = [as_text(document, tokenizer) for document in batch]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for document, ids in zip(batch, encoded, strict=True):
            has_start = document.is_chat and ids[: len(start)] == start
            yield array("i", ids if has_start else start + ids)


def batch_rows(step: int, batch_windows: int, windows: int, seed: int) -> list[int]:
    """The windows of step `step`. Every epoch has all `windows` once, in an order of its own; a batch may span two."""
    first = step * batch_windows
    places = (divmod(place, windows) for place in range(first, first + batch_windows))
    return [_order(windows, seed, epoch)[place] for epoch, place in places]


@functools.lru_cache(maxsize=8)
def _order(windows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of the windows in one epoch: a permutation that Python keeps the same in all its versions."""
    order = list(range(windows))
    random.Random(f"order of windows, seed {seed}, epoch {epoch}").shuffle(order)
    return tuple(order)


def pack_split(
    work: TokensWork, documents: list[Document], tokenizer: Tokenizer, out_dir: Path, place: Place | None = None
) -> TokensRecord:
    """Pack one split and write `tokens.safetensors`: `tokens`, and `documents` where the work asks for them.

    Both are int32 (N, T); documents are numbered in the order of packing.

    Args:
        place: where the split before this one ended, if there is one and its end is known: this one goes on there, and
            tokenizes no document before it.
    """
    splits = _splits(work)[-1:] if place else _splits(work)
    packed = pack(splits, documents, tokenizer, work.seed, work.cut_documents, work.document_start, place or BEGIN)
    last = deque(packed, maxlen=1).pop()
    windows_NT = last.windows
    tensors = {"tokens": windows_NT} | ({"documents": last.documents()} if work.documents else {})
    save_file(tensors, out_dir / TOKENS)
    sample = tokenizer.decode(windows_NT[:64].flatten().tolist(), skip_special_tokens=True)
    return TokensRecord(
        windows=len(windows_NT),
        tokens=windows_NT.numel(),
        bytes_per_token=len(sample.encode()) / min(windows_NT.numel(), 64 * work.sequence_length),
        end=tuple(last.end),
    )


def read_windows(directory: Path) -> torch.Tensor:
    """The packed windows of a tokens artifact, int32 (N, T)."""
    return load_file(directory / TOKENS)["tokens"]


def read_positions(directory: Path) -> torch.Tensor | None:
    """The positions of the tokens of an artifact that has documents, int32 (N, T); None where it has none."""
    documents_NT = load_file(directory / TOKENS).get("documents")
    return None if documents_NT is None else positions_in(documents_NT)


def positions_in(documents_NT: torch.Tensor) -> torch.Tensor:
    """Positions that start at 0 in every window and at every document within it, int32 (N, T).

    transformers takes them as several sequences in one window: where positions do not go on, attention does not reach
    back.
    """
    places_T = torch.arange(documents_NT.shape[1], dtype=torch.int32)
    begins_NT = documents_NT.diff(dim=1, prepend=documents_NT[:, :1] - 1) != 0
    return places_T - (begins_NT * places_T).cummax(dim=1).values
