"""Texts in, packed token batches out: disjoint splits for calibration, BLD, scoring, GKD and evaluation.

Documents are shuffled once with a fixed seed, joined with the tokenizer's begin-of-text token, and cut into
windows of `sequence_length` tokens. Batches are consecutive windows, so a step number alone says which tokens
it sees: data order is deterministic, and training resumes anywhere.

Legend: N windows, T tokens per window.
"""

import random
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from puzzle_core.errors import DataError
from puzzle_core.text_sources import Document
from puzzle_core.work import TokensRecord, TokensWork


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that packing needs."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: list[str], **options: Any) -> Any: ...

    def decode(self, ids: list[int], **options: Any) -> str: ...


def pack(
    documents: list[Document], tokenizer: Tokenizer, sequence_length: int, tokens: dict[str, int], seed: int
) -> dict[str, torch.Tensor]:
    """Cut documents into packed windows, one disjoint set of documents per split.

    Args:
        tokens: how many tokens each split asks for, in the order in which they are served.

    Returns:
        For each split an int32 tensor (N, T) with N = ceil(tokens / T).

    Raises:
        DataError: the documents hold fewer tokens than asked.
    """
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    remaining = iter(order)
    packed: dict[str, torch.Tensor] = {}
    for split, asked in tokens.items():
        windows = -(-asked // sequence_length)
        wanted = windows * sequence_length
        stream: list[int] = []
        while len(stream) < wanted:
            chunk = [documents[i].text for _, i in zip(range(16), remaining, strict=False)]
            if not chunk:
                raise DataError(
                    f"split {split!r} asks for {wanted:,} tokens ({windows:,} windows of {sequence_length}), but the "
                    f"texts gave only {len(stream):,} after serving {', '.join(packed) or 'no other split'}: "
                    f"ask for fewer tokens or add texts"
                )
            for ids in tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]:
                stream += _with_start(ids, tokenizer)
        packed[split] = torch.tensor(stream[:wanted], dtype=torch.int32).view(windows, sequence_length)
    return packed


def batch_rows(step: int, batch_windows: int, windows: int) -> slice | list[int]:
    """Which windows step `step` sees: consecutive, starting over at the end."""
    start = step * batch_windows % windows
    if start + batch_windows <= windows:
        return slice(start, start + batch_windows)
    return [(start + i) % windows for i in range(batch_windows)]


def _with_start(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return ids if start is None else [start, *ids]


def run(work: TokensWork, documents: list[Document], tokenizer: Tokenizer, out_dir: Path) -> TokensRecord:
    """Pack one split and write `tokens.safetensors`, int32 (N, T)."""
    asked = dict(work.earlier_splits) | {work.split: work.tokens}
    windows_NT = pack(documents, tokenizer, work.sequence_length, asked, work.seed)[work.split]
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
