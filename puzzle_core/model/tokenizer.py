"""A checkpoint's tokenizer: its files, and how they are opened.

The tokens of a text are those that `tokenizer.json` gives. Where `tokenizer_config.json` names a class such as
GPT2Tokenizer, transformers 5 takes only the vocabulary from `tokenizer.json`, and splits text by the rule of the class,
which may be another one (SmolLM splits digits first). So the class is ignored: `tokenizer.json` is opened as it is,
with the special tokens and the chat templates of the other files. A copy of the files names a class that does the same.
"""

import importlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from puzzle_core.errors import ParentError
from puzzle_core.records import write_text_atomic
from puzzle_core.text_files import Document

log = logging.getLogger("puzzle")

JSON_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
SENTENCEPIECE_FILE = "tokenizer.model"
PLAIN_CLASS, NEW_NAME = "PreTrainedTokenizerFast", "TokenizersBackend"
"""The class that opens `tokenizer.json` as it is, and its name in transformers 5, which version 4 does not know."""
TOKENIZER_FILES = (
    JSON_FILE,
    SETTINGS_FILE,
    SENTENCEPIECE_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
MORE_TEMPLATES = "additional_chat_templates"
"""Directory of the chat templates other than the first, one file each."""
PROBE_TEXTS = (
    "def f(x):\n    return  x**2 +\t0.5  # 1984, 12 and 2,048\r\n\n\n   y=3",
    "I'm sure they'll say it's WE'VE been 'there; don't (really)!? -- a/b\\c <tag>&amp; __init__ CamelCase",
    " leading blank,  two, trailing \n \n\t",
    "\u00e9t\u00e9 e\u0301te\u0301 \ufb01n \u00c5 \u212b \u00bd 10\u00b2 \u2014 \u201cquoted\u201d \u20ac5 \u2581x",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b \u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d",
    "\u0661\u0662\u0663 \u0928\u092e\u0938\u094d\u0924\u0947 \ud55c\uad6d",
    "\U0001f600 \U0001f469\u200d\U0001f4bb \u200b\u00a0\u3000 \x00\x7f",
)
ATOMS = (*" \n\t1.'/_<a\u00e9\u4e2d\u2581\u00a0\u0661", "  ", "\r\n", "23", "Bc", "'s", "'LL", "\U0001f600")
"""Short texts at whose boundaries rules of splitting differ."""
CHUNK_TOKENS = 10_000


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a checkpoint's tokenizer that exist."""
    files = [directory / name for name in TOKENIZER_FILES]
    return [file for file in (*files, *sorted((directory / MORE_TEMPLATES).glob("*.jinja"))) if file.is_file()]


def tokenizer_code(directory: Path) -> list[str]:
    """The classes in the checkpoint's own Python files that its tokenizer needs."""
    classes = (_settings(directory).get("auto_map") or {}).get("AutoTokenizer")
    return [name for name in (classes if isinstance(classes, list) else [classes]) if name]


def open_tokenizer(directory: Path, allow_code: bool = False) -> Any:
    """The tokenizer of a checkpoint.

    Args:
        directory: the checkpoint.
        allow_code: run the tokenizer's own code, if it has any. Its tokens are then those that the code gives.

    Raises:
        ParentError: the tokenizer gives other tokens than its files say, or a package is missing that reads them.
        Exception: whatever transformers and tokenizers raise of missing or damaged files.
    """
    if allow_code and tokenizer_code(directory):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=allow_code)
    if (directory / JSON_FILE).is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        differing = differing_text(Tokenizer.from_file(str(directory / JSON_FILE)), tokenizer)
        if differing is not None:
            raise ParentError(
                f"the tokenizer of {directory} gives other tokens than its {JSON_FILE}, for example for "
                f"{differing[:60]!r}: correct the options in its {SETTINGS_FILE} (such as split_special_tokens)"
            )
        return tokenizer
    if (directory / SENTENCEPIECE_FILE).is_file() and not (directory / "vocab.json").is_file():
        return _open_sentencepiece(directory)
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def is_rebuilt(directory: Path) -> bool:
    """Whether AutoTokenizer opens a directory with other tokens than those of its tokenizer.json.

    The model type of `config.json` counts, too: transformers has a class for it where no other one is named.
    """
    if not (directory / JSON_FILE).is_file() or tokenizer_code(directory):
        return False
    reference = Tokenizer.from_file(str(directory / JSON_FILE))
    try:
        return differing_text(reference, AutoTokenizer.from_pretrained(directory, trust_remote_code=False)) is not None
    except Exception:  # a class that cannot be made of these files gives no tokens at all
        return True


def differing_text(reference: Tokenizer, tokenizer: Any) -> str | None:
    """The first probe that the tokenizer splits in another way than the file says; none if there is none."""
    reference.no_truncation()
    reference.no_padding()
    for text in _probes(reference):
        ids = reference.encode(text, add_special_tokens=False).ids
        if tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] != ids:
            return text
    return None


def tokens_without_row(tokenizer: Any, rows: int) -> dict[str, int]:
    """The tokens whose numbers the embedding has no row for, by their texts."""
    rowless = {text: number for text, number in tokenizer.get_vocab().items() if number >= rows}
    return dict(sorted(rowless.items(), key=lambda item: item[1]))


def check_rows(tokenizer: Any, rows: int, start: list[int], read: Callable[[], Iterable[Document]]) -> None:
    """Check that no text gives a token that the embedding has no row for; warn of such tokens where none does.

    Args:
        tokenizer: of the parent.
        rows: of the embedding.
        start: the tokens in front of every document.
        read: gives the documents; called only where such tokens exist.

    Raises:
        ParentError: names the tokens, the number of rows, and where one of them is used.
    """
    tokens = tokens_without_row(tokenizer, rows)
    if not tokens:
        return
    listed = ", ".join(f"{text!r} ({number})" for text, number in list(tokens.items())[:5])
    what = f"the tokenizer has {len(tokens):,} tokens that the embedding with its {rows:,} rows lacks: {listed}"
    what += ", ..." if len(tokens) > 5 else ""
    advice = "give a checkpoint whose embedding was resized for them (resize_token_embeddings)"
    if ordinary := tokens.keys() - tokenizer.get_added_vocab().keys():
        raise ParentError(f"{what}; any text may give {min(ordinary)!r}: {advice}")
    for text, number in tokens.items():
        if number in start:
            raise ParentError(f"{what}; every document starts with {text!r}: {advice}, or set data.document_start")
    for document in read():
        for text in tokens:
            if text in document.text:
                raise ParentError(f"{what}; the text {document.name} holds {text!r}: {advice}, or texts without them")
    log.warning("%s; no text of this run holds one", what)


def copy_tokenizer(files: Iterable[Path], directory: Path, out_dir: Path, allow_code: bool = False) -> None:
    """Copy files of a checkpoint, so that AutoTokenizer gives the same tokens in the new directory.

    A tokenizer without tokenizer.json gets one, as other model types may read the other files in another way.

    Args:
        files: the tokenizer's files, and others.
        directory: the checkpoint, which the files lie in.
        out_dir: a directory that has a config.json.
        allow_code: the tokenizer's own code is among the files.
    """
    for file in files:
        target = out_dir / file.relative_to(directory)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    if allow_code and tokenizer_code(directory):
        return
    if not (out_dir / JSON_FILE).is_file() and tokenizer_files(out_dir):
        open_tokenizer(directory).backend_tokenizer.save(str(out_dir / JSON_FILE))
    if (out_dir / JSON_FILE).is_file() and _settings(out_dir).get("tokenizer_class") not in (PLAIN_CLASS, NEW_NAME):
        settings = _settings(out_dir) | {"tokenizer_class": PLAIN_CLASS}
        write_text_atomic(out_dir / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")


def leave_out(directory: Path, tokens: dict[str, int]) -> None:
    """Remove added tokens from the tokenizer's files in a directory."""
    if not tokens or not (directory / JSON_FILE).is_file():
        return
    content = json.loads((directory / JSON_FILE).read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in tokens]
    (directory / JSON_FILE).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    for name in (SETTINGS_FILE, "special_tokens_map.json", "added_tokens.json"):
        if (file := directory / name).is_file():
            remaining = _without(json.loads(file.read_text(encoding="utf-8")), tokens)
            file.write_text(json.dumps(remaining, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _without(content: Any, tokens: dict[str, int]) -> Any:
    """JSON without these tokens, whether they are texts, objects with a `content`, or the names of numbers."""

    def is_one(value: Any) -> bool:
        text = value.get("content") if isinstance(value, dict) else value
        return isinstance(text, str) and text in tokens

    if isinstance(content, dict):
        return {k: _without(v, tokens) for k, v in content.items() if not is_one(v) and k not in tokens}
    if isinstance(content, list):
        return [_without(value, tokens) for value in content if not is_one(value)]
    return content


def _open_sentencepiece(directory: Path) -> Any:
    """The tokenizer of a SentencePiece model, whose tokens are compared with SentencePiece's own."""
    file = directory / SENTENCEPIECE_FILE
    if _is_tiktoken(file):
        raise ParentError(
            f"{file} is in tiktoken's format and the checkpoint has no {JSON_FILE}: fetch the {JSON_FILE} that its "
            "publisher has beside the Hugging Face weights"
        )
    try:
        sentencepiece = importlib.import_module("sentencepiece")
    except ImportError as error:
        raise ParentError(
            f"the tokenizer of {directory} is a SentencePiece model ({file.name}) without a {JSON_FILE}, and the "
            "package sentencepiece, which reads it, is not installed: pip install sentencepiece"
        ) from error
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    for text in PROBE_TEXTS:
        if tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] != processor.encode(text):
            raise ParentError(
                f"transformers opens {file} with other tokens than SentencePiece itself, for example for "
                f"{text[:60]!r}: give the checkpoint a {JSON_FILE} that its publisher has made"
            )
    return tokenizer


def _is_tiktoken(file: Path) -> bool:
    """Whether a file has lines of a token in base 64 and its number."""
    with file.open("rb") as opened:
        return re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+", opened.readline(1000).strip()) is not None


def _probes(reference: Tokenizer) -> Iterator[str]:
    """The probe texts, all added tokens, all triples of atoms, and the texts of all tokens between atoms."""
    yield from PROBE_TEXTS
    for token in reference.get_added_tokens_decoder().values():
        yield f"a{token.content}b {token.content} c"
    for first in ATOMS:
        yield "".join(f"{first}{second}{third}" for second in ATOMS for third in ATOMS)
    texts = [reference.decode([number]) for number in sorted(reference.get_vocab(with_added_tokens=False).values())]
    for start in range(0, len(texts), CHUNK_TOKENS):
        numbered = enumerate(texts[start : start + CHUNK_TOKENS])
        yield "".join(f"{text}{ATOMS[place % len(ATOMS)]}" for place, text in numbered)
    for text in [text for text in texts if not any(map(str.isalpha, text))][:CHUNK_TOKENS]:
        yield "".join(f"{atom}{text}{atom}" for atom in ATOMS)


def _settings(directory: Path) -> dict[str, Any]:
    file = directory / SETTINGS_FILE
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return settings
