"""Chats as texts: their messages through the chat template of a tokenizer."""

import json
from collections.abc import Iterable
from typing import Any, Protocol

from jinja2 import TemplateError

from puzzle_core.errors import DataError
from puzzle_core.text_files import Document

FIXED_DAY = """{%- macro strftime_now(format) -%}
{{ format | replace("%d", "26") | replace("%B", "July") | replace("%b", "Jul") | replace("%m", "07") \
| replace("%Y", "2024") }}
{%- endmacro %}"""
"""Stands before a template that writes today's date, so that equal chats have equal tokens on every day."""


class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that chats need."""

    chat_template: Any

    def get_chat_template(self) -> str: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


def as_texts(documents: Iterable[Document], tokenizer: ChatTokenizer) -> list[Document]:
    """The documents, chats as the tokenizer's template writes them.

    Raises:
        DataError: as `as_text`.
    """
    return [document._replace(text=as_text(document, tokenizer), is_chat=False) for document in documents]


def as_text(document: Document, tokenizer: ChatTokenizer) -> str:
    """The text of a document; of a chat, what the tokenizer's template writes, control tokens included.

    Raises:
        DataError: the tokenizer has no chat template, or the template refuses the messages.
    """
    if not document.is_chat:
        return document.text
    check_template(tokenizer, document.name)
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = FIXED_DAY + template
    try:
        text: str = tokenizer.apply_chat_template(json.loads(document.text), chat_template=template, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(
            f"the tokenizer's chat template refuses {document.name} ({error}): mend its messages, or leave it out"
        ) from error
    return text


def check_template(tokenizer: ChatTokenizer, name: str) -> None:
    """Refuse chats, of which `name` is one, under a tokenizer without a chat template.

    Raises:
        DataError: it has none.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{name} is a chat ('messages'), and the parent's tokenizer has no chat template: add the "
            "chat_template.jinja of its publisher to the parent's directory, or write the chats as 'text'"
        )
