"""The registry of engines: one row per engine, read by specs, search, costs, bench and export. No torch.

A row says how an engine is called, which formats it reads, what it cannot run (each rule with its source), and which
modules measure costs and run benches in it. Modules are named by their dotted path and imported when they are used;
`cost/engine_module.py` lists the functions that they hold. CONTRIBUTING.md explains how to add an engine.

The tests of tests/puzzle_core/test_engines.py break every rule and compare the outcome with the engine's own, and
docs/engines.md shows what happened.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from puzzle_core.architecture import EMPTY_BLOCK, Architecture
from puzzle_core.variants.entries import WIDTH_GRID

Format = Literal["checkpoint", "hf", "gguf"]
"""What an engine reads: our own checkpoint, a DeciLM directory (export/hf.py), a GGUF file (export/gguf_file.py)."""
Device = Literal["cpu", "cuda"]
GgufType = Literal["f32", "f16", "bf16", "q8_0"]


class Restriction(NamedTuple):
    """Something that an engine cannot run.

    `broken` gives the part of a sentence that says how an architecture breaks it, or none. `constraints` are the values
    of a search's `constraints` under which no architecture breaks it. A restriction that excludes a whole kind of
    variants has none: the kind's row names it (`restricted_by`).
    """

    broken: Callable[[Architecture], str | None]
    constraints: dict[str, Any] = {}


class Rule(NamedTuple):
    """The name of a restriction, and how it is known that an engine has it."""

    restriction: str
    source: str


@dataclass(frozen=True)
class Engine:
    """One row: everything that differs between engines.

    `costs_module` and `bench_module` are dotted names of modules. An engine without a `costs_module` says in
    `not_measured` why, and what to do instead.
    """

    name: str
    title: str
    formats: tuple[Format, ...]
    rules: tuple[Rule, ...] = ()
    gguf_types: tuple[GgufType, ...] = ()
    devices: tuple[Device, ...] = ("cpu", "cuda")
    costs_module: str | None = None
    not_measured: str = ""
    bench_module: str | None = None

    def __post_init__(self) -> None:
        assert bool(self.costs_module) != bool(self.not_measured), f"{self.name}: one of costs_module and not_measured"
        assert all(rule.restriction in RESTRICTIONS and rule.source for rule in self.rules), self.name

    @property
    def reads_exports(self) -> bool:
        """Whether a child can be exported for it, so that a spec may name it in `engines`."""
        return self.formats != ("checkpoint",)


def _linear(architecture: Architecture) -> str | None:
    variants = [(n, v) for n, b in enumerate(architecture.layers) for v in b.subblocks]
    linear = [f"layer {layer} {variant}" for layer, variant in variants if "no_linear" in variant.row.restricted_by]
    return f"has no linear subblocks ({', '.join(linear)})" if linear else None


def _off_grid(architecture: Architecture) -> str | None:
    off_grid = [f"layer {n} {b.ffn}" for n, b in enumerate(architecture.layers) if b.ffn.ffn_width % WIDTH_GRID]
    return f"takes FFN widths in steps of {WIDTH_GRID} ({', '.join(off_grid)})" if off_grid else None


def _no_attention_first(architecture: Architecture) -> str | None:
    blocks = enumerate(architecture.layers)
    first = next(((n, b) for n, b in blocks if b != EMPTY_BLOCK), None)
    if first and not first[1].attention.is_empty:
        return None
    return f"fails where the first layer that is not empty (layer {first[0] if first else 0}) has no attention"


def _several_kv_heads(architecture: Architecture) -> str | None:
    kv_heads = sorted({block.attention.kv_heads for block in architecture.layers} - {0})
    listed = ", ".join(map(str, kv_heads))
    return f"wants one number of KV heads in all layers that attend (here {listed})" if len(kv_heads) > 1 else None


def _windows(architecture: Architecture) -> str | None:
    windows = [f"layer {n} {b.attention}" for n, b in enumerate(architecture.layers) if b.attention.window]
    return f"has no sliding windows in files of children ({', '.join(windows)})" if windows else None


RESTRICTIONS: dict[str, Restriction] = {
    "no_linear": Restriction(_linear),
    "no_windows": Restriction(_windows),
    "width_grid": Restriction(_off_grid, {"ffn_multiple_of": WIDTH_GRID}),
    "attention_first": Restriction(_no_attention_first, {"attention_first": True}),
    "one_kv_heads": Restriction(_several_kv_heads, {"uniform_kv_heads": True}),
}
_OWN_BENCHMARK = "measure with {title}'s own benchmark and set `costs: imported` with the `table` (docs/targets.md)"
_DECILM_WINDOWS = "a DeciLM directory gives the KV heads of an attention and no window"
_SGLANG = "SGLang 0.5.23's source, not run:"

ENGINES: dict[str, Engine] = {
    row.name: row
    for row in (
        Engine(
            name="torch",
            title="torch",
            formats=("checkpoint",),
            costs_module="puzzle_core.cost.latency",
            bench_module="puzzle_core.cost.latency",
        ),
        Engine(
            name="transformers",
            title="transformers",
            formats=("checkpoint", "hf"),
            not_measured="set `engine: torch`, which times the same modules",
        ),
        Engine(
            name="vllm",
            title="vLLM",
            formats=("hf",),
            rules=(
                Rule("no_linear", "vLLM 0.32.0 was run: heads // None in layers with replace_with_linear, a TypeError"),
                Rule("no_windows", _DECILM_WINDOWS),
                Rule("attention_first", "vLLM 0.32.0 was run: the first norm expects a residual, a ValueError"),
            ),
            not_measured=_OWN_BENCHMARK.format(title="vLLM"),
            bench_module="puzzle_core.bench.vllm_engine",
        ),
        Engine(
            name="sglang",
            title="SGLang",
            formats=("hf",),
            rules=(
                Rule("no_linear", f"{_SGLANG} replace_with_linear is not read, as in vLLM"),
                Rule("no_windows", _DECILM_WINDOWS),
                Rule("width_grid", f"{_SGLANG} widths come from ffn_mult alone, rounded up to the grid"),
                Rule("one_kv_heads", f"{_SGLANG} model_config.py raises for 'Variable GQA' of nemotron-nas"),
            ),
            not_measured=_OWN_BENCHMARK.format(title="SGLang"),
        ),
        Engine(
            name="tensorrt-llm",
            title="TensorRT-LLM",
            formats=("hf",),
            rules=(
                Rule("no_windows", _DECILM_WINDOWS),
                Rule(
                    "width_grid",
                    "TensorRT-LLM's PyTorch backend's source, not run: widths come from ffn_mult, rounded up",
                ),
            ),
            not_measured=_OWN_BENCHMARK.format(title="TensorRT-LLM"),
        ),
        Engine(
            name="llama.cpp",
            title="llama.cpp",
            formats=("gguf",),
            rules=(Rule("no_windows", "GGUF files of arch deci have no key for the windows of layers"),),
            gguf_types=("f32", "f16", "bf16", "q8_0"),
            devices=("cpu",),
            costs_module="puzzle_core.cost.llama_cpp",
            bench_module="puzzle_core.cost.llama_cpp",
        ),
    )
}


def engines_with(has: Callable[[Engine], Any]) -> list[str]:
    """Names of the engines whose row has something, in the order of the registry."""
    return [name for name, row in ENGINES.items() if has(row)]


@dataclass(frozen=True)
class EngineChoice:
    """Marks a text of a spec as the name of an engine whose row has something.

    The JSON schema lists the names at the time it is made, which gives Prefect's form its drop-down.
    """

    has: Callable[[Engine], Any]

    def check(self, name: str) -> str:
        """The name itself.

        Raises:
            ValueError: no such engine has this name; lists the names that there are.
        """
        known = engines_with(self.has)
        if name not in known:
            raise ValueError(f"no such engine; use one of: {', '.join(known)}")
        return name

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(schema) | {"enum": engines_with(self.has)}


TargetEngine = Annotated[str, EngineChoice(lambda _: True)]
"""An engine that a hardware target may name."""
ServingEngine = Annotated[str, EngineChoice(lambda row: row.reads_exports)]
"""An engine that a child may be searched for."""


def restrictions(engines: Sequence[str]) -> frozenset[str]:
    """Names of what at least one of these engines cannot run."""
    return frozenset(rule.restriction for engine in engines for rule in ENGINES[engine].rules)


def required_constraints(engines: Sequence[str]) -> dict[str, Any]:
    """Values of a search's `constraints` under which every one of these engines runs the child."""
    return {key: value for name in restrictions(engines) for key, value in RESTRICTIONS[name].constraints.items()}


def obstacles(architecture: Architecture, form: Format = "hf") -> dict[str, list[str]]:
    """By title of every engine that reads a format, why it does not run this architecture; empty where it does."""
    broken = {name: restriction.broken(architecture) for name, restriction in RESTRICTIONS.items()}
    return {
        row.title: [why for rule in row.rules if (why := broken[rule.restriction])]
        for row in ENGINES.values()
        if form in row.formats
    }
