"""Converts a Hugging Face tokenizer into one of llama.cpp's tokenizers that gives the same tokens.

Two of llama.cpp's kinds are used. `gpt2` is byte-level BPE, whose text is first split by a regular expression.
llama.cpp has a fixed list of these expressions, by name, so the tokenizer's expression must be one of them. `llama` is
SentencePiece's BPE, which has a score per token instead of merges: the pair whose union has the highest score is merged
first. Scores can replace a list of merges if all pairs that form the same token are neighbours in the list, and no pair
is missing. Source of names and flags: src/llama-vocab.cpp of llama.cpp.
"""

import json
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any

from gguf import TokenType

from puzzle_core.errors import ExportError

_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_CAPITALS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BYTE_LEVEL = "byte level"
DIGITS = "digits, byte level"
SPLITS: dict[tuple[str, bool], str] = {
    (BYTE_LEVEL, False): "gpt-2",
    (_GPT2, False): "gpt-2",
    (DIGITS, False): "smollm",
    (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_TAIL}", True): "llama-bpe",
    (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_TAIL}", False): "smaug-bpe",
    (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_TAIL}", False): "qwen2",
    (rf"{_CASED}|{_CAPITALS}|\p{{N}}|{_CASED_TAIL}", True): "tekken",
    (rf"{_CASED}{_CONTRACTIONS}?|{_CAPITALS}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_CASED_TAIL}", False): "gpt-4o",
}
"""llama.cpp's name of a split, by its expression and by whether words that are tokens skip the merges."""
NO_MERGES = ["no merges"]
"""llama.cpp requires a merge. This one joins two texts that are not single characters, so it is never applied."""


@dataclass(frozen=True)
class GgufVocabulary:
    """The values of `tokenizer.ggml.*`: `scores` for kind `llama`, `pre` and `merges` for kind `gpt2`."""

    kind: str
    tokens: list[str]
    types: list[int]
    add_bos: bool
    add_eos: bool
    pre: str | None = None
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    add_space: bool = False


def gguf_vocabulary(tokenizer: Any, size: int, left_out: Container[str] = ()) -> GgufVocabulary:
    """The vocabulary of a tokenizer of transformers.

    Args:
        size: rows of the embedding; tokens that the tokenizer lacks are written as unused.
        left_out: added tokens that are not written.

    Raises:
        ExportError: llama.cpp has no tokenizer that gives the same tokens; names what is missing.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            f"the tokenizer {type(tokenizer).__name__} is none of the `tokenizers` library: convert it first"
        )
    content = json.loads(backend.to_str())
    model = content["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ExportError(
            f"llama.cpp has no tokenizer of the kind {model['type']!r} with these options: BPE is supported"
        )
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in left_out]
    tokens, types = _tokens(content, size)
    add_bos, add_eos = _added(tokenizer)
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        return GgufVocabulary(
            kind="llama",
            tokens=tokens,
            types=types,
            scores=_scores(tokens, types, merges),
            add_bos=add_bos,
            add_eos=add_eos,
            add_space=_adds_space(content),
        )
    return GgufVocabulary(
        kind="gpt2",
        tokens=tokens,
        types=types,
        pre=_split_name(content),
        merges=[" ".join(merge) for merge in merges] or NO_MERGES,
        add_bos=add_bos,
        add_eos=add_eos,
    )


def _tokens(content: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Texts and types of all tokens, in the order of their numbers."""
    vocabulary: dict[str, int] = content["model"]["vocab"]
    added = {token["content"]: token for token in content["added_tokens"]}
    numbers = vocabulary | {text: token["id"] for text, token in added.items()}
    if max(numbers.values()) >= size:
        raise ExportError(f"the tokenizer has tokens up to {max(numbers.values())}, and the embedding {size} rows")
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for text, number in numbers.items():
        tokens[number], types[number] = text, int(_type(text, added.get(text), content["model"]))
    return tokens, types


def _type(text: str, added: dict[str, Any] | None, model: dict[str, Any]) -> TokenType:
    if text == model.get("unk_token"):
        return TokenType.UNKNOWN
    if added is not None:
        return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return TokenType.BYTE
    return TokenType.NORMAL


def _added(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before a text and EOS behind it."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a", add_special_tokens=True).input_ids
    for bos in (False, True):
        for eos in (False, True):
            if whole == [tokenizer.bos_token_id] * bos + plain + [tokenizer.eos_token_id] * eos:
                return bos, eos
    raise ExportError(
        f"the tokenizer adds other tokens than BOS and EOS ({whole} for {plain}): llama.cpp adds these only"
    )


def _split_name(content: dict[str, Any]) -> str:
    """llama.cpp's name of the split that the tokenizer uses.

    Raises:
        ExportError: llama.cpp has no such split.
    """
    changing = {step["type"] for step in _steps(content.get("normalizer")) if _changes_text(step)}
    if changing - {"NFC"}:  # llama.cpp leaves text as it is; most text is NFC already
        raise ExportError(
            f"the tokenizer normalises text ({', '.join(sorted(changing))}), which llama.cpp's byte-level BPE does not"
        )
    split, ignore_merges = _split(content.get("pre_tokenizer")), bool(content["model"].get("ignore_merges"))
    name = SPLITS.get((split, ignore_merges))
    if name is None:
        raise ExportError(
            f"llama.cpp knows no tokenizer that splits text by {split!r} with ignore_merges {ignore_merges}; it knows "
            f"{', '.join(sorted(set(SPLITS.values())))}"
        )
    return name


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The normalizers or pre-tokenizers that are applied, in their order; sequences may hold sequences."""
    if not part:
        return []
    if part["type"] != "Sequence":
        return [part]
    inner = part["normalizers"] if "normalizers" in part else part["pretokenizers"]
    return [step for each in inner for step in _steps(each)]


def _changes_text(step: dict[str, Any]) -> bool:
    """Whether a normalizer can change a text; some have options with which they do nothing."""
    match step["type"]:
        case "Strip":
            return bool(step["strip_left"] or step["strip_right"])
        case "Prepend":
            return bool(step["prepend"])
        case "Replace":
            return bool(step["pattern"] != {"String": step["content"]})
        case "BertNormalizer":
            options = ("clean_text", "handle_chinese_chars", "lowercase")
            return any(step[name] for name in options) or bool(step.get("strip_accents"))
        case "Precompiled":
            return bool(step.get("precompiled_charsmap"))
        case _:
            return True


def _split(pre_tokenizer: dict[str, Any] | None) -> str:
    """The expression that a byte-level tokenizer splits by, or a name of its combination of parts."""
    parts = _steps(pre_tokenizer)
    kinds = [part["type"] for part in parts]
    if not kinds or kinds[-1] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        return f"parts {kinds}"
    if parts[-1].get("use_regex", True):
        digits = kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"]
        return BYTE_LEVEL if len(kinds) == 1 else DIGITS if digits else f"parts {kinds}"
    if kinds != ["Split", "ByteLevel"] or parts[0]["behavior"] != "Isolated" or parts[0]["invert"]:
        return f"parts {kinds}"
    return str(parts[0]["pattern"].get("Regex", parts[0]["pattern"]))


def _adds_space(content: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a blank before the text; blanks must be written as "▁"."""
    steps = [step for step in _steps(content.get("normalizer")) if _changes_text(step)]
    splitters = _steps(content.get("pre_tokenizer"))
    splitter = splitters[0] if len(splitters) == 1 else None
    if not steps and splitter and splitter["type"] == "Metaspace" and not splitter.get("split", True):
        return bool(splitter["prepend_scheme"] != "never")
    kinds = [step["type"] for step in steps]
    blanks = steps and kinds[-1] == "Replace" and steps[-1]["pattern"] == {"String": " "}
    if not splitters and blanks and steps[-1]["content"] == "▁" and kinds in (["Replace"], ["Prepend", "Replace"]):
        return "Prepend" in kinds
    raise ExportError(f"llama.cpp has no SentencePiece tokenizer that prepares text by {kinds or splitters}")


def _scores(tokens: list[str], types: list[int], merges: Iterable[tuple[str, ...]]) -> list[float]:
    """Scores with which SentencePiece merges in the order of the list: minus the place of a token in it.

    Raises:
        ExportError: no scores give this order.
    """
    pairs_of: dict[str, set[tuple[str, ...]]] = {}
    last = None
    for pair in merges:
        formed = "".join(pair)
        if formed != last and formed in pairs_of:
            raise ExportError(
                f"the merges that form {formed!r} are not neighbours in the list, so no score per token replaces them"
            )
        pairs_of.setdefault(formed, set()).add(pair)
        last = formed
    normal = {text for text, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL}
    for text in normal:
        splits = {(text[:i], text[i:]) for i in range(1, len(text)) if {text[:i], text[i:]} <= normal}
        if lacking := splits - pairs_of.get(text, set()):
            raise ExportError(f"the merges lack {sorted(lacking)[0]}, by which llama.cpp would form {text!r}")
    place = {text: number for number, text in enumerate(pairs_of)}
    return [float(-place.get(text, len(place))) for text in tokens]
