"""The model card of a child: its layers, how to load it, which engines run it, its provenance and its quality."""

from itertools import groupby

from puzzle_core.architecture import Architecture
from puzzle_core.engines import obstacles
from puzzle_core.export.source import ExportRecord, Source
from puzzle_core.records import Record
from puzzle_core.sizes import kv_entries
from puzzle_core.work import EvaluationRecord

HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags: [puzzle, nemotron-nas, neural-architecture-search]
---
"""
ABOUT = (
    "A child of the parent below, whose layers were each chosen from a library of trained variants by Puzzle "
    "(arXiv 2411.19146).\n"
)
CHILD_LOADING = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

The code that travels along (`modeling_puzzle.py`) is for transformers. `puzzle export` writes the child for engines.
"""
LOADING = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(".")
```

`vllm serve . --trust-remote-code` where vLLM runs it (see below). Of the code that travels along, engines read
`configuration_decilm.py`; `modeling_decilm.py` is for transformers 5.
"""


class Provenance(Record):
    """The origin of a child according to the artifact store, and its figures on held-out tokens."""

    key: str
    made_by: str
    made_at: str
    parent: str
    distilled_tokens: int | None = None
    evaluation: EvaluationRecord | None = None
    parent_evaluation: EvaluationRecord | None = None


def model_card(name: str, source: Source, written: ExportRecord, provenance: Provenance | None) -> str:
    """README.md of an exported directory."""
    shape, entries = source.shape, kv_entries(source.shape, source.architecture, tokens=1)
    facts = [
        f"- parent: {shape.family}, {shape.layers} layers, hidden {shape.hidden}, {shape.heads} heads, "
        f"{shape.kv_heads} KV heads, FFN {shape.ffn_width}, vocabulary {shape.vocabulary:,}",
        f"- parameters: {written.parameters:,} in {written.dtype} ({written.bytes:,} bytes)",
        f"- KV cache: {entries:,} entries per token",
    ]
    sections = [
        f"{HEADER}\n# {name}\n",
        ABOUT,
        *facts,
        "\n## Loading\n",
        LOADING,
        "## Layers\n",
        *_layer_table(written.architecture),
        *(f"\n{remark}." for remark in written.remarks),
        "\n## Engines\n",
        *_engine_lines(written.architecture),
    ]
    if provenance:
        sections += ["\n## Quality\n", *_quality(provenance), "\n## Provenance\n", *_provenance(provenance)]
    return "\n".join(sections) + "\n"


def hub_card(name: str, architecture: Architecture, provenance: Provenance | None) -> str:
    """README.md of a child on a hub, in the format of this project."""
    sections = [
        f"{HEADER}\n# {name}\n",
        ABOUT,
        "## Loading\n",
        CHILD_LOADING.format(name=name),
        "## Layers\n",
        *_layer_table(architecture),
        "\n## Engines\n",
        *_engine_lines(architecture),
    ]
    if provenance:
        sections += ["\n## Quality\n", *_quality(provenance), "\n## Provenance\n", *_provenance(provenance)]
    return "\n".join(sections) + "\n"


def child_card(
    name: str, headline: str, architecture: Architecture, provenance: Provenance, descent: dict[str, str]
) -> str:
    """README.md of a child in tracking, before any export.

    Args:
        descent: the keys of the artifacts that the child was made from, by their kind.
    """
    sections = [
        f"# {name}\n",
        f"{headline}\n",
        f"Weights: artifact `{provenance.key}` of the store; `puzzle export {provenance.key}` writes them for engines.",
        "\n## Layers\n",
        *_layer_table(architecture),
        "\n## Engines\n",
        *_engine_lines(architecture),
        "\n## Quality\n",
        *_quality(provenance),
        "\n## Provenance\n",
        *_provenance(provenance),
        *(f"- {what}: `{key}`" for what, key in descent.items()),
    ]
    return "\n".join(sections) + "\n"


def _layer_table(architecture: Architecture) -> list[str]:
    """A table of the layers, in which consecutive equal layers share a row."""
    rows, layer = ["| layers | attention | FFN |", "|---|---|---|"], 0
    for block, group in groupby(architecture.layers):
        count = len(list(group))
        numbers = f"{layer}" if count == 1 else f"{layer} to {layer + count - 1}"
        rows.append(f"| {numbers} | `{block.attention}` | `{block.ffn}` |")
        layer += count
    return rows


def _engine_lines(architecture: Architecture) -> list[str]:
    return [f"- {engine}: {'; '.join(why) if why else 'runs it'}" for engine, why in obstacles(architecture).items()]


def _quality(provenance: Provenance) -> list[str]:
    child, parent = provenance.evaluation, provenance.parent_evaluation
    if child is None:
        return ["Not evaluated."]

    def row(name: str, values: list[float], form: str) -> str:
        child_text, *parent_text = [format(value, form) for value in values]
        return f"| {name} | {child_text} | {''.join(parent_text)} |"

    both = [child, *([parent] if parent else [])]
    return [
        f"On {child.tokens:,} held-out tokens:\n",
        "| | child | parent |",
        "|---|---:|---:|",
        row("perplexity", [e.perplexity for e in both], ".4f"),
        row("LM loss, nats per token", [e.lm_loss_nats_per_token for e in both], ".4f"),
        row("next token right", [e.top1_accuracy for e in both], ".2%"),
        row("same next token as the parent", [child.top1_agreement], ".2%"),
        row("KL to the parent, nats per token", [child.kl_nats_per_token], ".5f"),
        *(
            row(f"{tasks[0].name}, accuracy on {tasks[0].items:,} items", [task.accuracy for task in tasks], ".3f")
            for tasks in zip(*(e.tasks for e in both), strict=False)
        ),
    ]


def _provenance(provenance: Provenance) -> list[str]:
    lines = [
        f"- artifact: `{provenance.key}`, made by {provenance.made_by} at {provenance.made_at}",
        f"- parent's digest: `{provenance.parent}`",
    ]
    if provenance.distilled_tokens is not None:
        lines.append(f"- distilled from the parent on {provenance.distilled_tokens:,} tokens")
    return lines
