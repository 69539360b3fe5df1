"""Credentials in addresses: what a specification must not hold, what a form refuses, and what no log shows.

An address holds credentials as user information (`https://user:password@host`, also without `//`) or as a parameter of
its query (`?password=...`, `&token=...`, `&sig=...`). One pattern serves the validator, the schema and the redactor.
"""

import logging
import re
from collections.abc import Iterable
from typing import Any

_WORDS = ("pass", "pwd", "secret", "key", "credential", "signature", "auth")
_NAMES = ("sig", "sas", "jwt", "pw")
"""Whole names of parameters; `_WORDS` are parts of names, and so is `token`, but not `tokens`."""


def _spelled(words: Iterable[str]) -> str:
    """A pattern of these words in any case; a JSON schema has no flags."""
    return "|".join("".join(f"[{letter.upper()}{letter}]" for letter in word) for word in words)


_USER_URL = r"://[^/\s@]*@|://[^\s@:]*:[^\s@]*@"
_USER = r"[^\s/:@'\x22]+:[^\s/:@'\x22]+@[^\s/@]"
_NAMED = r"[^=&\s?/]*(?:" + _spelled(_WORDS) + "|" + _spelled(["token"]) + r"(?![Ss]))[^=&\s/]*"
_PARAMETER = rf"(?:^|[?&;#\s'\x22])(?:{_NAMED}|{_spelled(_NAMES)})="
_CREDENTIALS = re.compile(f"{_USER_URL}|{_USER}|{_PARAMETER}[^&\\s]")
SCHEMA_PATTERN = rf"^(?![\s\S]*(?:{_CREDENTIALS.pattern}))"
"""What JSON schemas ask of every text: a parameter that was sent is kept by Prefect, so a form refuses it before."""
_SHOWN = (
    (re.compile(r"://[^/\s@]*@|://[^\s@:]*:[^\s@]*@"), "://***@"),
    (re.compile(r"(?:[^\s/:@'\x22]+:)+[^\s/:@'\x22]+@(?=[^\s/@])"), "***@"),
    (re.compile(rf"({_PARAMETER})[^&\s'\x22]+"), r"\1***"),
    (re.compile(r"(authorization['\x22]?\s*[:=]\s*['\x22]?(?:bearer|basic)\s+)[^\s'\x22]+", re.IGNORECASE), r"\1***"),
)


def has_credentials(text: str) -> bool:
    """Whether a text is or holds an address with a user, a password or another secret."""
    return _CREDENTIALS.search(text) is not None


def redacted(text: str) -> str:
    """The text, with asterisks in the places of users, passwords and other secrets of addresses."""
    for pattern, shown in _SHOWN:
        text = pattern.sub(shown, text)
    return text


def refuse_in_schema(schema: dict[str, Any]) -> None:
    """Add SCHEMA_PATTERN to every text of a model's JSON schema that has no narrower pattern or list of choices."""
    if schema.get("type") == "string" and not schema.keys() & {"pattern", "enum", "const"}:
        schema["pattern"] = SCHEMA_PATTERN
    for name in ("properties", "anyOf", "prefixItems"):
        parts = schema.get(name, ())
        for part in parts.values() if isinstance(parts, dict) else parts:
            refuse_in_schema(part)
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            refuse_in_schema(schema[name])


def redact_logs() -> None:
    """Have every log record of this process, of any logger, redacted, with its traceback; may be called again.

    A filter of a logger does not see the records of the loggers below it, such as those of Prefect's runs.
    """
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def make_redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            text = record.getMessage()
        except (TypeError, ValueError):  # a wrong format, which its handler reports
            return record
        if redacted(text) != text:
            record.msg, record.args = redacted(text), ()
        if record.exc_info and record.exc_info[0]:
            traceback = logging.Formatter().formatException(record.exc_info)
            if redacted(traceback) != traceback:
                record.exc_text, record.exc_info = redacted(traceback), None
        return record

    make_redacted.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_redacted)
