"""A finished campaign of NVIDIA's Model-Optimizer (`puzzletron`), as tables for a search.

The input is a puzzle directory of version 1:

    replacement_library.json                                      a list: which blocks may replace which layers
    subblock_stats.json                                           costs (interop/puzzletron_stats.py)
    single_sequence_replacement_solutions--validation/            one file per scored replacement, `solution_N.json`,
                                                                  and the parent's own measures, `teacher.json`

Weights are not read, so a child cannot be assembled. Formats as released/0.44 writes them, from
`build_replacement_library.py`, `validate_puzzle_with_multi_replacements.py` and `mip/run_puzzle.py` there.
"""

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from puzzle_core.architecture import Architecture, BlockVariant
from puzzle_core.errors import CoverageError, NonFiniteError, SpecError
from puzzle_core.formats.block_configs import block_of
from puzzle_core.formats.foreign_json import Foreign, parse_foreign, read_json
from puzzle_core.interop.puzzletron_stats import CampaignCosts, read_stats
from puzzle_core.records import make_directory, write_text_atomic
from puzzle_core.search.tables import Option, ScoreTable

LIBRARY = "replacement_library.json"
STATS = "subblock_stats.json"
VALIDATION = "single_sequence_replacement_solutions--validation"
TEACHER = "teacher.json"
METRICS = ("kl_div", "kl_div_loss")
"""The default scores: the mean KL divergence from the parent, in nats per token."""
_DISTANCES = ("kl_div", "js_div", "tv_dist", "cosine_embedding_loss", "normalized_mse_loss", "mse_loss", "mae_loss")
"""Prefixes of the measures that are 0 for the parent itself."""

_SCENARIO_HEAD = (
    "# Costs hold for this name and these token counts. Change the limits, remove batch sizes, and leave the rest.\n"
)


@dataclass(frozen=True)
class ImportSummary:
    """The result of an import.

    Attributes:
        metric: the measure that became the score.
        parent: the parent's own block.
        scores: number of replacements with a score.
        costs: the costs that were read.
        scenarios: one file per traffic that has costs.
    """

    metric: str
    parent: BlockVariant
    scores: int
    costs: CampaignCosts
    scenarios: tuple[Path, ...]


class _Replacement(Foreign):
    parent_layer_indices: list[int]
    child_block_configs: list[dict[str, Any]]


class _ScoredReplacement(Foreign):
    single_sequence_replacement: _Replacement
    chosen_replacements: list[_Replacement]


_Key = tuple[int, Option]


def import_puzzle_dir(
    directory: Path, out: Path, metric: str | None = None, stats: Mapping[str, str] | None = None
) -> ImportSummary:
    """Write `scores.csv`, `costs.csv` and `scenarios/*.yaml`, to which you add limits, into `out`.

    Args:
        directory: the puzzle directory.
        metric: the measure to take as the score, such as `lm_loss`; the KL divergence unless given.
        stats: which costs to take, as values of `args` in the costs file, such as `{"weights_dtype": "torch.int8"}`.

    Raises:
        PuzzleError: a file is missing or damaged, has a block that is no variant here, lacks a score or a cost, or has
            costs for several settings; names the file and the place in it.
    """
    costs = read_stats(directory / STATS, stats or {})
    campaign = _Campaign(directory, costs.hidden, costs.heads, metric)
    scores = campaign.score_table()
    for layer, options in enumerate(scores.layers):
        for option in options:
            costs.check_covers(layer, option.block)
    make_directory(out)
    rows = [_score_row(layer, option, campaign.metric, score) for layer, option, score in _flat(scores)]
    _write_csv(out / "scores.csv", rows)
    _write_csv(out / "costs.csv", list(costs.csv_rows()))
    return ImportSummary(
        campaign.metric,
        scores.parent.layers[0],
        len(campaign.scores),
        costs,
        _write_scenarios(costs, out / "scenarios"),
    )


class _Campaign:
    """The scored replacements of a puzzle directory, checked against its library."""

    def __init__(self, directory: Path, hidden: int, heads: int, metric: str | None):
        self._place, self._hidden, self._heads = directory / VALIDATION, hidden, heads
        self._library = self._read_library(directory / LIBRARY)
        self._parents: dict[int, tuple[BlockVariant, str]] = {}
        self._scored_by: dict[_Key, str] = {}
        self.scores: dict[_Key, float] = {}
        files = sorted(self._place.glob("*solution*.json"), key=lambda file: (len(file.name), file.name))
        if not files:
            raise SpecError(f"{self._place} holds no solution_N.json: this campaign has no scores of replacements")
        self.metric = metric or self._default_metric(files[0])
        for file in files:
            self._read_solution(file)
        self._parent_score = self._read_parent_score()

    def score_table(self) -> ScoreTable:
        """Scores of all replacements, and the parent's own in every layer.

        Raises:
            CoverageError: a layer has no scores, or the library has replacements that were not scored.
            SpecError: the parent's layers differ.
        """
        count = 1 + max(*self._parents, *(layer + option.span - 1 for layer, option in self.scores))
        missing = [layer for layer in range(count) if layer not in self._parents]
        if missing:
            raise CoverageError(f"no file in {self._place} has the parent's own block of layers {missing}")
        parent, origin = self._parents[0]
        for layer, (block, place) in sorted(self._parents.items()):
            if block != parent:
                raise SpecError(
                    f"the parent's layer {layer} is {block} ({place}), and its layer 0 is {parent} ({origin}): a "
                    "parent whose own layers differ is not supported"
                )
        unscored = sorted((k for k in self._library if k not in self.scores and k[1] != Option(parent)), key=str)
        if unscored:
            named = ", ".join(f"layer {layer} {option}" for layer, option in unscored[:3])
            raise CoverageError(
                f"{len(unscored)} replacements of {LIBRARY} have no score in {self._place} ({named}, ...): finish the "
                f"scoring there, or take them out of {LIBRARY}"
            )
        layers: list[dict[Option, float]] = [{Option(parent): self._parent_score} for _ in range(count)]
        for (layer, option), score in self.scores.items():
            layers[layer][option] = score
        return ScoreTable(Architecture(layers=(parent,) * count), tuple(layers), self.metric)

    def _read_library(self, path: Path) -> set[_Key]:
        content = read_json(path, "the replacement library", list, dict)
        if isinstance(content, dict):
            raise SpecError(f"{path} has version {content.get('version')!r}; only version 1, a list, is supported")
        places = {f"{path.name} entry {number}": entry for number, entry in enumerate(content)}
        return {self._key(parse_foreign(_Replacement, entry, place), place) for place, entry in places.items()}

    def _read_solution(self, file: Path) -> None:
        content = read_json(file, "the scores of one replacement", dict)
        solution = parse_foreign(_ScoredReplacement, content.get("puzzle_solution"), f"{file.name}, puzzle_solution")
        key = self._key(solution.single_sequence_replacement, file.name)
        if key in self._scored_by:
            raise SpecError(f"{file.name}: layer {key[0]} {key[1]} has a score already, from {self._scored_by[key]}")
        if key not in self._library:
            raise SpecError(f"{file.name}: layer {key[0]} {key[1]} is not in {LIBRARY}: they are from different runs")
        self._scored_by[key] = file.name
        self.scores[key] = _average(content, self.metric, file)
        for chosen in solution.chosen_replacements:
            if chosen != solution.single_sequence_replacement:
                self._note_parent(*self._key(chosen, file.name), file.name)

    def _note_parent(self, layer: int, option: Option, origin: str) -> None:
        """Record the parent's own block of a layer, which every other file keeps."""
        block, before = self._parents.setdefault(layer, (option.block, origin))
        if option != Option(block):
            raise SpecError(
                f"{origin} keeps {option} in layer {layer} where {before} keeps {block}: the parent's own block is one "
                "of them, so the two are of different runs"
            )

    def _key(self, replacement: _Replacement, place: str) -> _Key:
        layers, blocks = replacement.parent_layer_indices, replacement.child_block_configs
        if not layers or layers != list(range(layers[0], layers[0] + len(layers))) or layers[0] < 0:
            raise SpecError(f"{place}: parent_layer_indices {layers} are not consecutive layers")
        if len(blocks) != 1:
            raise SpecError(
                f"{place}: {len(blocks)} child_block_configs replace layers {layers}; one block must replace "
                "one layer or several"
            )
        return layers[0], Option(block_of(blocks[0], self._hidden, self._heads, place), len(layers))

    def _default_metric(self, file: Path) -> str:
        measures = _measures(read_json(file, "the scores of one replacement", dict))
        default = next((metric for metric in METRICS if metric in measures), None)
        if default is None:
            known = ", ".join(measures) or "none"
            raise SpecError(f"{file} has none of {', '.join(METRICS)}: choose one of its measures: {known}")
        return default

    def _read_parent_score(self) -> float:
        file = self._place / TEACHER
        content = read_json(file, "the parent's own measures", dict) if file.exists() else {}
        if self.metric in _measures(content):
            return _average(content, self.metric, file)
        if self.metric.startswith(_DISTANCES):
            return 0.0
        raise CoverageError(
            f"{file} has no {self.metric}, and the parent's own is not 0 by definition: evaluate the parent, or take "
            "another measure"
        )


def _measures(content: Mapping[str, Any]) -> list[str]:
    return [name for name, value in content.items() if isinstance(value, dict) and "avg" in value]


def _average(content: Mapping[str, Any], metric: str, file: Path) -> float:
    measures = _measures(content)
    if metric not in measures:
        raise CoverageError(f"{file} has no {metric}; its measures are: {', '.join(measures) or 'none'}")
    value = content[metric]["avg"]
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise SpecError(f"{file}: {metric}.avg is {value!r}; it must be a number")
    if not math.isfinite(value):
        raise NonFiniteError(f"{file}: {metric}.avg is {value}: score this replacement again")
    return float(value)


def _flat(scores: ScoreTable) -> list[tuple[int, Option, float]]:
    return [(layer, option, score) for layer, options in enumerate(scores.layers) for option, score in options.items()]


def _score_row(layer: int, option: Option, metric: str, score: float) -> dict[str, Any]:
    block = option.block
    subblocks = {"attention": str(block.attention), "ffn": str(block.ffn)}
    return {"layer": layer, **subblocks, "span": option.span, metric: score}


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic(path, text.getvalue())


def _write_scenarios(costs: CampaignCosts, place: Path) -> tuple[Path, ...]:
    """One scenario per traffic, with all its batch sizes and no limits."""
    paths = []
    for traffic, batch_sizes in costs.batch_sizes.items():
        content = {
            "name": traffic.name,
            "prompt_tokens": traffic.prompt_tokens,
            "generated_tokens": traffic.generated_tokens,
            "batch_sizes": batch_sizes,
            "throughput_counts": "generated",
            "limits": {},
        }
        paths.append(place / f"{traffic.name}.yaml")
        write_text_atomic(paths[-1], _SCENARIO_HEAD + yaml.safe_dump(content, sort_keys=False))
    return tuple(paths)
