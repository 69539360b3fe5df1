"""Packs texts into token batches: splits for calibration, BLD, GKD, scoring and evaluation.

Documents are shuffled once with a fixed seed, each gets a start token (`document_start`), and all are cut into
windows of `sequence_length` tokens. Trainings read the windows of a split in a random order that seed and epoch
determine. The step number therefore determines the tokens of a step: training can resume at any step.

Legend: N windows, T tokens per window.
"""

import functools
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from puzzle_core.errors import DataError
from puzzle_core.text_sources import Document
from puzzle_core.work import TokensRecord, TokensWork

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


class Tokenizer(Protocol):
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


def pack(
    documents: list[Document],
    tokenizer: Tokenizer,
    sequence_length: int,
    tokens: dict[str, int],
    seed: int,
    cut_documents: bool = True,
    start: str = "auto",
) -> dict[str, torch.Tensor]:
    """Cut documents into packed windows; no token is in two splits.

    Args:
        tokens: number of tokens of each split, in the order in which they are packed.
        cut_documents: the next split starts with the rest of a split's last document. If false, that rest is dropped,
            and no two splits share a document.
        start: the argument `choice` of `document_start`.

    Returns:
        For each split an int32 tensor (N, T) with N = ceil(tokens / T).

    Raises:
        DataError: the documents hold fewer tokens than the splits need, or the vocabulary has no token `start`.
    """
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    remaining = _token_ids((documents[i] for i in order), tokenizer, document_start(tokenizer, start))
    packed: dict[str, torch.Tensor] = {}
    rest: list[int] = []
    for split, split_tokens in tokens.items():
        windows = -(-split_tokens // sequence_length)
        needed = windows * sequence_length
        stream, rest = rest, []
        while len(stream) < needed:
            ids = next(remaining, None)
            if ids is None:
                others = f" after serving {', '.join(packed)}" if packed else ""
                advice = "tokens or add texts" if cut_documents else "tokens, add texts, or say `cut_documents: true`"
                raise DataError(
                    f"split {split!r} needs {needed:,} tokens ({windows:,} windows of {sequence_length}), but the "
                    f"{len(documents):,} documents of the texts gave only {len(stream):,}{others}: ask "
                    f"for fewer {advice}"
                )
            stream += ids
        if cut_documents:
            rest = stream[needed:]
        packed[split] = torch.tensor(stream[:needed], dtype=torch.int32).view(windows, sequence_length)
    return packed


def check_enough(work: TokensWork, documents: list[Document], tokenizer: Tokenizer) -> None:
    """Refuse documents that hold fewer tokens than a split and those before it need.

    Documents that may be cut and have many more characters than tokens are asked for are not tokenized.

    Raises:
        DataError: as `pack`.
    """
    tokens = dict(work.earlier_splits) | {work.split: work.tokens}
    characters = sum(len(document.text) for document in documents)
    if not work.cut_documents or characters < SURELY_ENOUGH * sum(tokens.values()):
        pack(documents, tokenizer, work.sequence_length, tokens, work.seed, work.cut_documents, work.document_start)


def _token_ids(documents: Iterator[Document], tokenizer: Tokenizer, start: list[int]) -> Iterator[list[int]]:
    """The ids of each document in order. Documents are tokenized in small batches, which is faster."""
    while texts := [document.text for document in itertools.islice(documents, DOCUMENTS_AT_A_TIME)]:
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            yield start + ids


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


def pack_split(work: TokensWork, documents: list[Document], tokenizer: Tokenizer, out_dir: Path) -> TokensRecord:
    """Pack one split and write `tokens.safetensors`, int32 (N, T)."""
    tokens = dict(work.earlier_splits) | {work.split: work.tokens}
    packed = pack(
        documents, tokenizer, work.sequence_length, tokens, work.seed, work.cut_documents, work.document_start
    )
    windows_NT = packed[work.split]
    save_file({"tokens": windows_NT}, out_dir / "tokens.safetensors")
    sample = tokenizer.decode(windows_NT[:64].flatten().tolist(), skip_special_tokens=True)
    return TokensRecord(
        windows=len(windows_NT),
        tokens=windows_NT.numel(),
        bytes_per_token=len(sample.encode()) / min(windows_NT.numel(), 64 * work.sequence_length),
    )


def read_windows(directory: Path) -> torch.Tensor:
    """The packed windows of a tokens artifact, int32 (N, T)."""
    return load_file(directory / "tokens.safetensors")["tokens"]
