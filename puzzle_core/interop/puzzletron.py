"""A finished campaign of NVIDIA's Model-Optimizer (`puzzletron`), as tables that a search here takes.

Read is a puzzle directory of its version 1:

    replacement_library.json                                      a list: which blocks may replace which layers
    subblock_stats.json                                           costs (interop/puzzletron_stats.py)
    single_sequence_replacement_solutions--validation/            one file per scored replacement, `solution_N.json`,
                                                                  and the parent's own measures, `teacher.json`

Weights are not touched: this is for searching again, not for assembling. Formats as released/0.44 writes them, from
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

from puzzle_core.architecture import BlockVariant
from puzzle_core.errors import CoverageError, NonFiniteError, SpecError
from puzzle_core.formats.block_configs import block_of
from puzzle_core.formats.foreign_json import Foreign, parse_foreign, read_json
from puzzle_core.interop.puzzletron_stats import Costs, read_stats
from puzzle_core.records import write_text_atomic
from puzzle_core.search.tables import Option, ScoreTable

LIBRARY = "replacement_library.json"
STATS = "subblock_stats.json"
VALIDATION = "single_sequence_replacement_solutions--validation"
TEACHER = "teacher.json"
METRICS = ("kl_div", "kl_div_loss")
"""What is taken as the score unless another is asked for: the mean KL divergence from the parent, in nats per token."""
_DISTANCES = ("kl_div", "js_div", "tv_dist", "cosine_embedding_loss", "normalized_mse_loss", "mse_loss", "mae_loss")
"""How the names of measures start that are 0 for the parent itself."""

_SCENARIO_HEAD = (
    "# Costs hold for this name and these token counts: change limits, leave the rest, or take batch sizes out.\n"
)


@dataclass(frozen=True)
class Imported:
    """What an import wrote.

    Attributes:
        metric: the measure that became the score.
        parent: the parent's own block.
        scores: how many replacements were scored.
        costs: which costs were taken, and which were left.
        scenarios: one file per kind of traffic that there are costs for.
    """

    metric: str
    parent: BlockVariant
    scores: int
    costs: Costs
    scenarios: tuple[Path, ...]


class _Replacement(Foreign):
    parent_layer_indices: list[int]
    child_block_configs: list[dict[str, Any]]


class _Solution(Foreign):
    single_sequence_replacement: _Replacement
    chosen_replacements: list[_Replacement]


_Key = tuple[int, Option]


def import_puzzle_dir(
    directory: Path, out: Path, metric: str | None = None, stats: Mapping[str, str] | None = None
) -> Imported:
    """Write `scores.csv`, `costs.csv` and `scenarios/*.yaml` (limits are to be filled in) into `out`.

    Args:
        directory: the puzzle directory.
        metric: the measure to take as the score, such as `lm_loss`; the KL divergence unless given.
        stats: which costs to take, as values of `args` in the costs file, such as `{"weights_dtype": "torch.int8"}`.

    Raises:
        PuzzleError: a file is missing or damaged, holds what this project has no variant for, lacks a score or a cost,
            or leaves open which costs are meant; names the file and the place in it.
    """
    costs = read_stats(directory / STATS, stats or {})
    found = _Campaign(directory, costs.hidden, costs.heads, metric)
    scores = found.score_table()
    for layer, options in enumerate(scores.layers):
        for option in options:
            costs.check_covers(layer, option.block)
    out.mkdir(parents=True, exist_ok=True)
    rows = [_score_row(layer, option, found.metric, score) for layer, option, score in _flat(scores)]
    _write_csv(out / "scores.csv", rows)
    _write_csv(out / "costs.csv", list(costs.csv_rows()))
    return Imported(found.metric, scores.parent, len(found.scores), costs, _write_scenarios(costs, out / "scenarios"))


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
            raise SpecError(f"{self._place} holds no solution_N.json: the replacements of this campaign have no scores")
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
            raise CoverageError(f"no file in {self._place} tells the parent's own block of layers {missing}")
        parent, origin = self._parents[0]
        for layer, (block, place) in sorted(self._parents.items()):
            if block != parent:
                raise SpecError(
                    f"the parent's layer {layer} is {block} ({place}), and its layer 0 is {parent} ({origin}): parents "
                    "whose own layers differ cannot be searched here"
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
        return ScoreTable(parent, tuple(layers), self.metric)

    def _read_library(self, path: Path) -> set[_Key]:
        content = read_json(path, "the replacement library", list, dict)
        if isinstance(content, dict):
            raise SpecError(
                f"{path} is of version {content.get('version')!r}: read are libraries of version 1, which are a list"
            )
        places = {f"{path.name} entry {number}": entry for number, entry in enumerate(content)}
        return {self._key(parse_foreign(_Replacement, entry, place), place) for place, entry in places.items()}

    def _read_solution(self, file: Path) -> None:
        content = read_json(file, "the scores of one replacement", dict)
        solution = parse_foreign(_Solution, content.get("puzzle_solution"), f"{file.name}, puzzle_solution")
        key = self._key(solution.single_sequence_replacement, file.name)
        if key in self._scored_by:
            raise SpecError(f"{file.name}: layer {key[0]} {key[1]} was scored before, by {self._scored_by[key]}")
        if key not in self._library:
            raise SpecError(f"{file.name}: layer {key[0]} {key[1]} is not in {LIBRARY}: the two are of different runs")
        self._scored_by[key] = file.name
        self.scores[key] = _average(content, self.metric, file)
        for chosen in solution.chosen_replacements:
            if chosen != solution.single_sequence_replacement:
                self._note_parent(*self._key(chosen, file.name), file.name)

    def _note_parent(self, layer: int, option: Option, origin: str) -> None:
        """What a file leaves as it was is the parent's own."""
        block, before = self._parents.setdefault(layer, (option.block, origin))
        if option != Option(block):
            raise SpecError(
                f"{origin} keeps {option} in layer {layer} where {before} keeps {block}: the parent's own block is one "
                "of them, so the two are of different runs"
            )

    def _key(self, replacement: _Replacement, place: str) -> _Key:
        layers, blocks = replacement.parent_layer_indices, replacement.child_block_configs
        if not layers or layers != list(range(layers[0], layers[0] + len(layers))) or layers[0] < 0:
            raise SpecError(f"{place}: parent_layer_indices {layers} are no layers one after the other")
        if len(blocks) != 1:
            raise SpecError(
                f"{place}: {len(blocks)} child_block_configs replace layers {layers}; a search here takes one block in "
                "the place of one layer or several"
            )
        return layers[0], Option(block_of(blocks[0], self._hidden, self._heads, place), len(layers))

    def _default_metric(self, file: Path) -> str:
        there = _measures(read_json(file, "the scores of one replacement", dict))
        found = next((metric for metric in METRICS if metric in there), None)
        if found is None:
            known = ", ".join(there) or "none"
            raise SpecError(f"{file} has none of {', '.join(METRICS)}: say which of its measures is the score: {known}")
        return found

    def _read_parent_score(self) -> float:
        file = self._place / TEACHER
        content = read_json(file, "the parent's own measures", dict) if file.exists() else {}
        if self.metric in _measures(content):
            return _average(content, self.metric, file)
        if self.metric.startswith(_DISTANCES):
            return 0.0
        raise CoverageError(
            f"{file} has no {self.metric}, and the parent's own is not 0 by definition: evaluate the parent there, or "
            "take another measure"
        )


def _measures(content: Mapping[str, Any]) -> list[str]:
    return [name for name, value in content.items() if isinstance(value, dict) and "avg" in value]


def _average(content: Mapping[str, Any], metric: str, file: Path) -> float:
    there = _measures(content)
    if metric not in there:
        raise CoverageError(f"{file} has no {metric}; its measures are: {', '.join(there) or 'none'}")
    value = content[metric]["avg"]
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise SpecError(f"{file}: {metric}.avg is {value!r}; it must be a number")
    if not math.isfinite(value):
        raise NonFiniteError(f"{file}: {metric}.avg is {value}: score this replacement again")
    return float(value)


def _flat(scores: ScoreTable) -> list[tuple[int, Option, float]]:
    return [(layer, option, score) for layer, found in enumerate(scores.layers) for option, score in found.items()]


def _score_row(layer: int, option: Option, metric: str, score: float) -> dict[str, Any]:
    block = option.block
    halves = {"attention": str(block.attention), "ffn": str(block.ffn)}
    return {"layer": layer, **halves, "span": option.span, metric: score}


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic(path, text.getvalue())


def _write_scenarios(costs: Costs, place: Path) -> tuple[Path, ...]:
    """One scenario per kind of traffic, with all its batch sizes and no limits."""
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
