"""Serving speeds that others measured: a table of rows, and the shapes of the public models that it names. No torch.

A row has `model`, `device`, `engine`, `version`, `tensor_parallel`, `precision`, `batching`, `concurrency` (`max`: as
many as fit), `input_tokens`, `output_tokens`, and what was measured: `quantity` and `value`, or a column by the name of
each quantity. `table`, `source`, `engine` and `version` may be left out.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from puzzle_core.architecture import ModelShape
from puzzle_core.errors import SpecError
from puzzle_core.records import Record
from puzzle_core.target import Positive

Quantity = Literal[
    "output_tokens_per_s", "output_tokens_per_s_per_gpu", "time_to_first_token_ms", "inter_token_latency_ms"
]
QUANTITIES: tuple[Quantity, ...] = (
    "output_tokens_per_s",
    "output_tokens_per_s_per_gpu",
    "time_to_first_token_ms",
    "inter_token_latency_ms",
)
RATES = QUANTITIES[:2]


class Measurement(Record):
    """One measured figure of a model on a device: milliseconds, or generated tokens per second.

    `concurrency` is None for as many sequences as fit.
    """

    table: str = ""
    model: str
    device: str
    engine: str = ""
    version: str = ""
    tensor_parallel: Positive = 1
    precision: str
    batching: Literal["static", "continuous"] = "continuous"
    concurrency: Positive | None = None
    input_tokens: Positive
    output_tokens: Positive
    quantity: Quantity
    value: float
    source: str = ""


def read_measurements(path: Path) -> list[Measurement]:
    """The rows of a CSV file.

    Raises:
        SpecError: the file is missing, or a row lacks a column or has a value that is none; names line and column.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read the measurements {path}: {error}") from error
    found = [row for line, content in enumerate(rows, start=2) for row in _of_line(content, f"{path}, line {line}")]
    if not found:
        raise SpecError(f"{path} holds no measurements: give it rows with {', '.join(QUANTITIES)}")
    return found


def _of_line(content: dict[str, str], where: str) -> Iterator[Measurement]:
    fields = {name: text.strip() for name, text in content.items() if name and text and text.strip()}
    if fields.get("concurrency") == "max":
        del fields["concurrency"]
    values: dict[str, str] = {name: fields.pop(name) for name in QUANTITIES if name in fields}
    if "quantity" in fields:
        values[fields.pop("quantity")] = fields.pop("value", "")
    if not values:
        raise SpecError(f"{where}: nothing was measured: give quantity and value, or a column {', '.join(QUANTITIES)}")
    for quantity, value in values.items():
        try:
            row = Measurement.model_validate(fields | {"quantity": quantity, "value": value})
        except ValueError as error:
            raise SpecError(f"{where}: {error}") from error
        if not row.value > 0:
            raise SpecError(f"{where}: {quantity} is {value}: a measured figure is above 0")
        yield row


def _llama(layers: int, hidden: int, heads: int, kv_heads: int, ffn_width: int, vocabulary: int) -> ModelShape:
    return ModelShape(
        family="llama",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        ffn_width=ffn_width,
        vocabulary=vocabulary,
        tied_embeddings=False,
        qkv_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
        qk_norm=False,
        max_positions=131_072,
    )


SHAPES = {
    "llama2-7b": _llama(32, 4096, 32, 32, 11_008, 32_000),
    "llama2-70b": _llama(80, 8192, 64, 8, 28_672, 32_000),
    "llama3-8b": _llama(32, 4096, 32, 8, 14_336, 128_256),
    "llama3-70b": _llama(80, 8192, 64, 8, 28_672, 128_256),
    "llama3-405b": _llama(126, 16_384, 128, 8, 53_248, 128_256),
    "mistral-7b": _llama(32, 4096, 32, 8, 14_336, 32_000),
}
"""Of the models that public tables measure, from their published `config.json`."""


def shape_of(model: str) -> ModelShape:
    """The shape of a public model.

    Raises:
        SpecError: no such model is known here.
    """
    if model not in SHAPES:
        raise SpecError(f"the shape of model {model!r} is not known here: use one of {', '.join(SHAPES)}")
    return SHAPES[model]
