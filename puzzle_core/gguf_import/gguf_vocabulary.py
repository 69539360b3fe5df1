"""A tokenizer.json from the vocabulary of a GGUF file: the reverse of puzzle_core/export/gguf_tokenizer.py.

Two of llama.cpp's kinds are read. `gpt2` is byte-level BPE; `tokenizer.ggml.pre` names the rule that text is split by.
`llama` is SentencePiece's BPE, whose scores give the order of merges. Source of names and rules: src/llama-vocab.cpp of
llama.cpp.
"""

import json
from pathlib import Path
from typing import Any

from gguf import TokenType

from puzzle_core.errors import ParentError
from puzzle_core.export.gguf_tokenizer import BYTE_LEVEL, DIGITS, NO_MERGES, SPLITS
from puzzle_core.gguf_import.gguf_metadata import GgufFile
from puzzle_core.model.tokenizer import JSON_FILE, MORE_TEMPLATES, PLAIN_CLASS, SETTINGS_FILE

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_ADDED = {TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN}
_SAME_SPLIT = {
    "gpt-2": "phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum modern-bert mpt olmo jais",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    "qwen2": "deepseek-r1-qwen stablelm2 hunyuan kormo megrez",
    "gpt-4o": "llama4",
    "smaug-bpe": "dbrx",
}
"""llama.cpp's other names of the same split."""
_DEFAULT_SPLITS = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
_NORMALISED = {"qwen2"}
"""Tokenizers of these names normalise text to NFC, which llama.cpp leaves to its caller."""
_STARTS_WITH_BOS = {"llama-bpe", "tekken"}


def write_tokenizer(source: GgufFile, rows: int, max_length: int, directory: Path) -> int:
    """Write tokenizer.json, tokenizer_config.json and the chat templates; return the number of tokens.

    Args:
        source: the GGUF file.
        rows: of the embedding.
        max_length: context length in tokens.
        directory: of the checkpoint.

    Raises:
        ParentError: the file has no tokenizer, one of another kind, or one that contradicts itself.
    """
    content, special = tokenizer_json(source, rows)
    settings = {"tokenizer_class": PLAIN_CLASS, **special, "clean_up_tokenization_spaces": False}
    settings["model_max_length"] = max_length
    _write(directory / JSON_FILE, json.dumps(content, ensure_ascii=False))
    _write(directory / SETTINGS_FILE, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    if template := source.get(_TEMPLATE, str):
        _write(directory / "chat_template.jinja", template)
    for name in source.get("tokenizer.chat_templates", list, []):
        if Path(name).name != name:
            raise ParentError(f"{source.file} has a chat template named {name!r}, which is no file name")
        _write(directory / MORE_TEMPLATES / f"{name}.jinja", source.require(f"{_TEMPLATE}.{name}", str))
    return len(content["model"]["vocab"])


def tokenizer_json(source: GgufFile, rows: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The content of tokenizer.json, and the special tokens by their names in tokenizer_config.json.

    Raises:
        ParentError: as `write_tokenizer`.
    """
    kind = source.require(f"{_PREFIX}model", str)
    if kind not in ("gpt2", "llama"):
        raise ParentError(f"{source.file} has a tokenizer of kind {kind!r}; gpt2 and llama can be imported")
    tokens, types = _tokens(source, rows)
    vocabulary = {text: number for number, text in enumerate(tokens) if types[number] != TokenType.UNUSED}
    added = [
        {
            "id": number,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[number] != TokenType.USER_DEFINED,
        }
        for text, number in vocabulary.items()
        if types[number] in _ADDED
    ]
    special = {f"{name}_token": _special(source, tokens, key) for name, key in _SPECIAL.items()}
    parts = _byte_level(source, vocabulary) if kind == "gpt2" else _sentencepiece(source, tokens, types, vocabulary)
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts}
    content["post_processor"] = _post_processor(source, tokens, kind)
    return content, {name: text for name, text in special.items() if text is not None}


def _tokens(source: GgufFile, rows: int) -> tuple[list[str], list[int]]:
    """Texts and types of all tokens."""
    tokens: list[str] = source.require(f"{_PREFIX}tokens", list)
    types: list[int] = source.require(f"{_PREFIX}token_type", list)
    if len(tokens) > rows or len(types) != len(tokens):
        raise ParentError(
            f"{source.file} has {len(tokens)} tokens and {len(types)} types of tokens for {rows} rows of the embedding"
        )
    seen: dict[str, int] = {}
    for number, text in enumerate(tokens):
        if types[number] != TokenType.UNUSED and seen.setdefault(text, number) != number:
            raise ParentError(f"{source.file} has the token {text!r} twice, as {seen[text]} and {number}")
    return tokens, types


def _special(source: GgufFile, tokens: list[str], key: str) -> str | None:
    """The text of a special token."""
    number: int | None = source.get(f"{_PREFIX}{key}_token_id", int)
    if number is None:
        return None
    if not 0 <= number < len(tokens):
        raise ParentError(f"{source.file}: {_PREFIX}{key}_token_id is {number}, and there are {len(tokens)} tokens")
    return tokens[number]


def split_name(source: GgufFile) -> str:
    """Name of the split in SPLITS, or `default`.

    Raises:
        ParentError: no split of this name is known here.
    """
    split: str = source.get(f"{_PREFIX}pre", str, "default")
    known = {other: name for name, others in _SAME_SPLIT.items() for other in others.split()}
    name = known.get(split, split)
    if name != "default" and name not in SPLITS.values():
        names = ", ".join(sorted({"default", *SPLITS.values(), *known}))
        raise ParentError(f"{source.file}: {_PREFIX}pre is {split!r}, a split that is not known here; known: {names}")
    return name


def _byte_level(source: GgufFile, vocabulary: dict[str, int]) -> dict[str, Any]:
    """Parts of a byte-level tokenizer."""
    name = split_name(source)
    split, ignore_merges = next((key for key, other in SPLITS.items() if other == name), ("", False))
    splitters: list[dict[str, Any]] = []
    expressions = _DEFAULT_SPLITS if name == "default" else () if split in (BYTE_LEVEL, DIGITS) else (split,)
    if split == DIGITS:
        splitters.append({"type": "Digits", "individual_digits": True})
    for expression in expressions:
        pattern = {"Regex": expression}
        splitters.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not expressions}
    merges: list[str] = source.require(f"{_PREFIX}merges", list)
    pairs = [] if merges == NO_MERGES else [_pair(source, merge, vocabulary) for merge in merges]
    return {
        "normalizer": {"type": "NFC"} if name in _NORMALISED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splitters, byte_level]} if splitters else byte_level,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _model(vocabulary, pairs, ignore_merges=ignore_merges),
    }


def _pair(source: GgufFile, merge: str, vocabulary: dict[str, int]) -> list[str]:
    """The two texts of a merge, which are joined by the first blank behind the first character."""
    at = merge.find(" ", 1)
    pair = [merge[:at], merge[at + 1 :]]
    lacking = [text for text in (*pair, "".join(pair)) if text not in vocabulary]
    if at < 0 or lacking:
        raise ParentError(f"{source.file} has the merge {merge!r}, whose token {(lacking or [merge])[0]!r} it lacks")
    return pair


def _sentencepiece(source: GgufFile, tokens: list[str], types: list[int], vocabulary: dict[str, int]) -> dict[str, Any]:
    """Parts of a SentencePiece tokenizer."""
    scores: list[float] = source.require(f"{_PREFIX}scores", list)
    if len(scores) != len(tokens):
        raise ParentError(f"{source.file} has {len(tokens)} tokens and {len(scores)} scores")
    normal = {text: scores[number] for text, number in vocabulary.items() if types[number] == TokenType.NORMAL}
    merges: list[list[str]] = []
    for text in sorted(normal, key=lambda text: (-normal[text], vocabulary[text])):
        splits = [[text[:i], text[i:]] for i in range(1, len(text)) if text[:i] in normal and text[i:] in normal]
        merges += sorted(splits, key=lambda pair: [vocabulary[part] for part in pair])
    byte_fallback = types.count(TokenType.BYTE) == 256
    adds_space = source.get(f"{_PREFIX}add_space_prefix", bool, True)
    blank: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizers = [{"type": "Prepend", "prepend": "▁"}, blank] if adds_space else [blank]
    decoders: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if adds_space else []
    unknown = _special(source, tokens, "unknown")
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _model(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback),
    }


def _model(vocabulary: dict[str, int], merges: list[list[str]], **options: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
    }
    plain |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **plain, **options, "vocab": vocabulary, "merges": merges}


def _post_processor(source: GgufFile, tokens: list[str], kind: str) -> dict[str, Any] | None:
    """Adds BOS and EOS as the file says, or by llama.cpp's default for this kind of tokenizer."""
    starts = kind == "llama" or split_name(source) in _STARTS_WITH_BOS
    sides = []
    for name, default in (("bos", starts), ("eos", False)):
        text = _special(source, tokens, name)
        add = source.get(f"{_PREFIX}add_{name}_token", bool, default and text is not None)
        if add and text is None:
            raise ParentError(f"{source.file}: {_PREFIX}add_{name}_token is set, and {_PREFIX}{name}_token_id is not")
        sides.append(text if add else None)
    if sides == [None, None]:
        return None

    def template(sequence: str, number: int) -> list[dict[str, Any]]:
        bos, eos = ([{"SpecialToken": {"id": text, "type_id": number}}] if text else [] for text in sides)
        return [*bos, {"Sequence": {"id": sequence, "type_id": number}}, *eos]

    used = {text: {"id": text, "ids": [tokens.index(text)], "tokens": [text]} for text in sides if text}
    single = template("A", 0)
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, *template("B", 1)],
        "special_tokens": used,
    }


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")
