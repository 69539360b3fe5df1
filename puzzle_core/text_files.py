"""Documents of one file: text, a JSON list, JSON Lines or Parquet, plain or compressed."""

import bz2
import contextlib
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from puzzle_core.errors import DataError

_JSON_LINES = (".jsonl", ".ndjson", ".jl")
DATA_SUFFIXES = (".json", ".parquet", *_JSON_LINES)
_DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
_COMPRESSION = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz"}
_NOT_TEXT = {
    b"PAR1": "is a Parquet file: give it the ending .parquet",
    b"\x1f\x8b": "is compressed by gzip: give it the ending .gz",
    b"BZh": "is compressed by bzip2: give it the ending .bz2",
    b"\xfd7zXZ": "is compressed by xz: give it the ending .xz",
    b"\x28\xb5\x2f\xfd": "is compressed by zstandard, which is not read here: decompress it (`unzstd`)",
    b"PK\x03\x04": "is a ZIP archive, which is not read here: unpack it",
    b"ARROW1": "is an Arrow file, which is not read here: write the data set as Parquet or JSON Lines",
    b"\xff\xff\xff\xff": "is an Arrow stream, which is not read here: write the data set as Parquet or JSON Lines",
    b"%PDF": "is a PDF document, which is not read here: extract its text",
}
"""What a file is that starts with these bytes, and what to do."""
_HEAD_BYTES = 4096
_LOOK_CHARACTERS = 1 << 20


class Document(NamedTuple):
    """One text and its name in error messages; of a chat, the text is its messages as JSON (puzzle_core/chats.py)."""

    name: str
    text: str
    is_chat: bool = False


def read_file(path: Path) -> Iterator[Document]:
    """The documents of one file; blank ones are among them.

    Raises:
        DataError: the file is not whole, not UTF-8 or of an unknown format, or an entry is neither text nor a chat.
    """
    items: Iterable[Any]
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".parquet"]:
        items = _parquet_items(path)
    else:
        text = read_text(path)
        items = _json_items(path, text, whole=".json" in suffixes[-2:], lines={*_JSON_LINES} & {*suffixes[-2:]})
    for number, item in enumerate(items):
        body, is_chat = item.get("text") if isinstance(item, dict) else item, False
        if body is None and isinstance(item, dict) and "messages" in item:
            body, is_chat = _chat(item["messages"], f"{path}, entry {number}"), True
        if not isinstance(body, str):
            raise DataError(
                f"{path}, entry {number}: neither a string nor an object with a string under 'text' or a chat under "
                "'messages'; name the files that hold text, or write it under one of these"
            )
        try:
            body.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{path}, entry {number}: character {error.start} is \\u{ord(body[error.start]):04x}, half of a "
                f"surrogate pair and no text: repair or drop this entry"
            ) from error
        yield Document(f"{path}#{number}", body, is_chat)


def _chat(messages: Any, entry: str) -> str:
    """The messages of a chat as JSON: a role and a content each, in this order.

    Other keys may be there if they are empty, as columns of Parquet files are that other rows use.

    Raises:
        DataError: names what is no message.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{entry}: 'messages' is no list of messages: give a list of objects with 'role' and 'content'")
    for number, message in enumerate(messages):
        found = {k: v for k, v in message.items() if v not in (None, "", [], {})} if isinstance(message, dict) else {}
        texts = [message.get(name) if isinstance(message, dict) else None for name in ("role", "content")]
        if more := sorted(found.keys() - {"role", "content"}):
            raise DataError(
                f"{entry}, message {number} has {', '.join(more)} beside 'role' and 'content', which chats are not "
                "read with here: drop these rows, or write them as text"
            )
        if not all(isinstance(text, str) for text in texts) or not texts[0]:
            raise DataError(
                f"{entry}, message {number} is {json.dumps(message, ensure_ascii=False)[:80]}: every message is an "
                "object whose 'role' and 'content' are strings"
            )
    return json.dumps(
        [{name: message[name] for name in ("role", "content")} for message in messages], ensure_ascii=False
    )


def read_text(path: Path) -> str:
    """The text of a file, decompressed if its suffix names a compression.

    Raises:
        DataError: the file is not whole, or not UTF-8.
    """
    return _text_of(path, _plain_bytes(path))


def _plain_bytes(path: Path) -> bytes:
    """The bytes of a file, decompressed if its suffix names a compression."""
    suffix = path.suffix.lower()
    content = path.read_bytes()
    if suffix not in _DECOMPRESS:
        return content
    try:
        return _DECOMPRESS[suffix](content)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is not a whole {_COMPRESSION[suffix]} file ({error}): replace it") from error


def _text_of(path: Path, content: bytes) -> str:
    """UTF-8 text without a leading byte order mark."""
    for start, what in _NOT_TEXT.items():
        if content.startswith(start):
            raise DataError(f"{path} {what}")
    if b"\0" in content[:_HEAD_BYTES]:
        raise DataError(
            f"{path} has NUL bytes, so it is no UTF-8 text: unpack it if it is an archive, convert it if it is UTF-16 "
            "(`iconv -f utf-16 -t utf-8`), or leave it out if it holds no text"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{content[error.start]:02x}): convert it, for instance "
            f"with `iconv -t utf-8`, or leave it out if it holds no text"
        ) from error


def _json_items(path: Path, text: str, whole: bool, lines: Collection[str]) -> list[Any]:
    """The entries of a text file: a JSON list, JSON Lines under any suffix, or the whole text."""
    if not whole and not lines and not _looks_like_json_lines(text):
        return [text]
    if not text.strip():
        return []
    try:
        if whole:
            with contextlib.suppress(json.JSONDecodeError):
                items = json.loads(text)
                if isinstance(items, list):
                    return items
                if _is_entry(items):
                    return [items]
                raise DataError(
                    f"{path} holds a JSON {type(items).__name__}: a list of strings, a list of objects with a string "
                    "under 'text' or a chat under 'messages', or one such object per line is wanted; leave the file "
                    "out if it holds no text"
                )
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON, nor JSON Lines ({error})") from error


def _looks_like_json_lines(text: str) -> bool:
    """Whether the first two lines are JSON objects with a text or a chat."""
    first = [line for line in text[:_LOOK_CHARACTERS].lstrip().split("\n", 2)[:2] if line.strip()]
    for line in first if text.lstrip().startswith("{") else ():
        try:
            item = json.loads(line)
        except json.JSONDecodeError:
            return False
        if not _is_entry(item):
            return False
    return bool(first) and text.lstrip().startswith("{")


def _is_entry(item: Any) -> bool:
    """Whether a JSON value is an object with a string under `text` or a list under `messages`."""
    return isinstance(item, dict) and (isinstance(item.get("text"), str) or isinstance(item.get("messages"), list))


def _parquet_items(path: Path) -> Iterator[Any]:
    """The column `text` of a Parquet file, or else its column `messages`, batch by batch."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            column = next((name for name in ("text", "messages") if name in columns), None)
            if column is None:
                raise DataError(
                    f"{path} is a Parquet file without a column 'text' or 'messages' (it has "
                    f"{', '.join(columns) or 'none'}): rename the column that holds the text or the chats"
                )
            for batch in file.iter_batches(columns=[column]):
                yield from ({column: value} for value in batch.column(0).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a whole Parquet file ({error}): replace it") from error
