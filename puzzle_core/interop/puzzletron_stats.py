"""The costs of a puzzletron campaign, `subblock_stats.json`, as rows of a cost table.

The file is a list of profiles. Each profile is for one batch size, prompt length, generation length and set of
precisions (`args`). It has the costs of every subblock in every layer, and outside the blocks (`non_block`). Memory is
in MiB for the whole batch, times are in ms for the whole batch and generation:

    memory_mib                     memory_bytes         weights and KV cache of the batch at its full context
    kv_cache_memory_mib            kv_bytes_per_token   over (batch_size + prefill_queue_size) * sequence length
    num_params, active_params      parameters, active_parameters
    runtime_ms                     runtime_ms
    prefill_, decode_runtime_ms    prefill_ms, decode_ms
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from puzzle_core.architecture import BlockVariant
from puzzle_core.errors import CoverageError, SpecError
from puzzle_core.formats.block_configs import variant_of
from puzzle_core.formats.foreign_json import Foreign, parse_foreign, read_json
from puzzle_core.search.tables import OUTSIDE, CostRow, CostTable
from puzzle_core.variants.kinds import Subblock

MIB = 2**20
_TIMES = {"runtime_ms": "runtime_ms", "prefill_runtime_ms": "prefill_ms", "decode_runtime_ms": "decode_ms"}
_DTYPES = ("weights_dtype", "activations_dtype", "kv_cache_dtype")
_SUBBLOCKS: dict[str, tuple[str, Subblock]] = {"AttentionConfig": ("attention", "attn"), "FFNConfig": ("ffn", "ffn")}
_MAY_DIFFER = {"batch_size", "prefill_seq_len", "generation_seq_len"}


class TrafficLengths(NamedTuple):
    """Tokens of one request."""

    prompt_tokens: int
    generated_tokens: int

    @property
    def name(self) -> str:
        """The name of the scenario."""
        return f"{self.prompt_tokens}-in-{self.generated_tokens}-out"


class _Args(Foreign):
    batch_size: int
    prefill_seq_len: int
    generation_seq_len: int
    prefill_queue_size: int = 0
    n_embd: int
    n_head: int


class _Costs(Foreign):
    memory_mib: float
    num_params: float
    active_params: float | None = None
    kv_cache_memory_mib: float = 0.0
    runtime_ms: float | None = None
    prefill_runtime_ms: float | None = None
    decode_runtime_ms: float | None = None


class _SubblockCosts(_Costs):
    subblock_config_class: Literal["AttentionConfig", "FFNConfig"]
    subblock_config: dict[str, Any]
    parent_layer_index: int


class _Profile(Foreign):
    args: dict[str, Any]
    non_block: _Costs
    subblocks: list[_SubblockCosts]


@dataclass(frozen=True)
class CampaignCosts:
    """The costs of the profiles that were read.

    Attributes:
        table: the costs, for a search.
        batch_sizes: by the lengths of the traffic.
        hidden, heads: hidden width and query heads of the parent.
        precision: types of weights, activations and KV cache.
        left: number of profiles of the file that were not read.
    """

    table: CostTable
    batch_sizes: Mapping[TrafficLengths, list[int]]
    hidden: int
    heads: int
    precision: str
    left: int

    def check_covers(self, layer: int, block: BlockVariant) -> None:
        """Check that this block has every column, in every traffic and at every batch size.

        Raises:
            CoverageError: one is missing; names the subblock, the column and the place.
        """
        for traffic, batch_sizes in self.batch_sizes.items():
            for batch_size in batch_sizes:
                for column in self.table.columns:
                    self.table.block(column, layer, block, traffic.name, batch_size)

    def csv_rows(self) -> Iterator[dict[str, Any]]:
        """The rows of `costs.csv`."""
        for row in self.table.rows:
            subblock = row.part.partition(":")[0]
            variant = "" if row.part == OUTSIDE else row.part
            where = {"scenario": row.scenario, "batch_size": row.batch_size, "layer": row.layer}
            yield {"subblock": subblock, "variant": variant, **where, **row.values}


def read_stats(path: Path, wanted: Mapping[str, str]) -> CampaignCosts:
    """The costs of a campaign.

    Args:
        path: the file.
        wanted: values of `args`, by key, that a profile must have. Without a precision among them, profiles that are
            all bfloat16 come first: the campaign times no other precision.

    Raises:
        PuzzleError: the file is damaged or has subblocks other than attention and FFN, no profile matches `wanted`, or
            matching profiles differ in more than batch size and sequence lengths.
    """
    profiles = read_json(path, "the costs", list)
    named = {f"{path.name} profile {number}": content for number, content in enumerate(profiles)}
    parsed = {place: parse_foreign(_Profile, content, place) for place, content in named.items()}
    matching = _matching(path, parsed, wanted)
    args = {place: parse_foreign(_Args, profile.args, f"{place}, args") for place, profile in matching.items()}
    batch_sizes: dict[TrafficLengths, list[int]] = {}
    for place, arguments in args.items():
        lengths = TrafficLengths(arguments.prefill_seq_len, arguments.generation_seq_len)
        sizes = batch_sizes.setdefault(lengths, [])
        if arguments.batch_size in sizes:
            raise SpecError(f"{place}: an earlier profile has the same batch size and sequence lengths")
        sizes.append(arguments.batch_size)
    rows = [row for place, profile in matching.items() for row in _rows(profile, args[place], place)]
    first, precision = next(iter(args.values())), next(iter(matching.values())).args
    return CampaignCosts(
        table=CostTable(tuple(rows)),
        batch_sizes={traffic: sorted(sizes) for traffic, sizes in sorted(batch_sizes.items())},
        hidden=first.n_embd,
        heads=first.n_head,
        precision=", ".join(f"{key.removesuffix('_dtype')} {_text(precision.get(key))}" for key in _DTYPES),
        left=len(parsed) - len(matching),
    )


def _matching(path: Path, profiles: Mapping[str, _Profile], wanted: Mapping[str, str]) -> dict[str, _Profile]:
    """The profiles with the wanted values, which may differ in batch size and sequence lengths only."""
    matching = {
        place: profile
        for place, profile in profiles.items()
        if all(_text(profile.args.get(key)) == _text(value) for key, value in wanted.items())
    }
    if not matching:
        values = ", ".join(f"{key}={value}" for key, value in wanted.items()) or "any"
        raise SpecError(f"none of the {len(profiles)} profiles in {path} has {values}; there are: {_values(profiles)}")
    bfloat16 = {
        p: profile for p, profile in matching.items() if {_text(profile.args.get(k)) for k in _DTYPES} == {"bfloat16"}
    }
    if bfloat16 and not wanted.keys() & set(_DTYPES):
        matching = bfloat16
    if differing := _values(matching):
        raise SpecError(
            f"{path} holds costs for several settings ({differing}), and a search takes one: choose with "
            f"--stats {differing.split(',')[0].replace(' ', '')}"
        )
    return matching


def _values(profiles: Mapping[str, _Profile]) -> str:
    """Every key of `args` that should be equal in all profiles and is not, with its values."""
    keys = sorted({key for profile in profiles.values() for key in profile.args} - _MAY_DIFFER)
    values_of = {key: sorted({_text(profile.args.get(key)) for profile in profiles.values()}) for key in keys}
    return "; ".join(f"{key}={', '.join(values)}" for key, values in values_of.items() if len(values) > 1)


def _text(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _rows(profile: _Profile, args: _Args, place: str) -> Iterator[CostRow]:
    scenario = TrafficLengths(args.prefill_seq_len, args.generation_seq_len).name
    context = (args.batch_size + args.prefill_queue_size) * (args.prefill_seq_len + args.generation_seq_len)
    for number, costs in enumerate(profile.subblocks):
        origin = f"{place} subblock {number}"
        key, subblock = _SUBBLOCKS[costs.subblock_config_class]
        variant = variant_of(costs.subblock_config, subblock, args.n_embd, args.n_head, f"{origin}, {key}")
        layer = costs.parent_layer_index if costs.parent_layer_index >= 0 else None
        values = _values_of(costs) | {"kv_bytes_per_token": costs.kv_cache_memory_mib * MIB / context}
        yield CostRow(str(variant), values, layer, args.batch_size, scenario, origin)
    outside = _values_of(profile.non_block)
    for column in _TIMES.values():
        if column not in outside and any(column in _values_of(costs) for costs in profile.subblocks):
            raise CoverageError(f"{place} times its subblocks, and its non_block has no {column}")
    yield CostRow(OUTSIDE, outside, None, args.batch_size, scenario, f"{place} non_block")


def _values_of(costs: _Costs) -> dict[str, float]:
    active = costs.num_params if costs.active_params is None else costs.active_params
    values = {"memory_bytes": costs.memory_mib * MIB, "parameters": costs.num_params, "active_parameters": active}
    times = {column: getattr(costs, name) for name, column in _TIMES.items()}
    return values | {column: value for column, value in times.items() if value is not None}
