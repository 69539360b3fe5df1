"""Answers in the words of the request: why nothing fits, and what in an answer looks suspicious."""

import math
from collections.abc import Callable

from puzzle_core.architecture import EMPTY_BLOCK, Architecture
from puzzle_core.errors import InfeasibleError
from puzzle_core.search.infeasible import Conflict
from puzzle_core.search.problem_builder import BatchSizes, ProblemBuilder, ResolvedLimit
from puzzle_core.search.rules import AtMostDistinct
from puzzle_core.search.search_record import SearchRecord
from puzzle_core.search.tables import ScoreTable

EMPTY_SHARE = 0.5
"""More layers without any block than this: worth a sentence."""


def infeasible_text(error: InfeasibleError, instance: ProblemBuilder, batch_sizes: BatchSizes) -> str:
    """What was asked, and the least that can be had, as values that can be met when they are asked for."""
    asked = {limit.label: limit for limit in instance.asked(batch_sizes)}
    several = len(instance.request.scenarios) > 1 or instance.request.mix is not None
    parts = []
    for conflict in error.conflicts:
        if conflict.limit.name not in asked:  # a rule of form
            parts.append(_rule_text(conflict))
            continue
        limit = asked[conflict.limit.name]
        least = conflict.least_alone if conflict.least is None else conflict.least
        held = " with the others held" if len(error.conflicts) > 1 and conflict.least is not None else ""
        name = f"{limit.scenario}: {limit.name}" if several else limit.name
        parts.append(f"{name} was {limit.text}, and {_reachable(limit, least, instance, batch_sizes)} can be had{held}")
    if not parts:
        return str(error)
    return "; ".join(parts) + ": relax a limit, or add cheaper variants"


def batch_text(batch_sizes: BatchSizes) -> str:
    """Batch sizes for people."""
    if len(batch_sizes) == 1:
        return f"batch size {next(iter(batch_sizes.values()))}"
    return "batch sizes " + ", ".join(f"{size} ({scenario})" for scenario, size in batch_sizes.items())


def flags(record: SearchRecord, scores: ScoreTable) -> list[str]:
    """Sentences about what looks suspicious in the chosen architecture."""
    chosen, found = record.chosen, []
    empty = [layer for layer, block in enumerate(chosen.architecture.layers) if block == EMPTY_BLOCK]
    covered = sum(span - 1 for span in chosen.spans.values())
    if len(empty) - covered > EMPTY_SHARE * len(chosen.architecture.layers):
        found.append(f"{len(empty) - covered} of {len(chosen.architecture.layers)} layers are left empty.")
    if chosen.score > scores.largest:
        found.append(
            f"The score of {chosen.score:.4g} is above every score that was measured (at most {scores.largest:.4g}): "
            "that scores add up is least certain there; assemble and evaluate the child before it is trusted."
        )
    if not chosen.optimal:
        found.append(f"The time limit came before the proof: a better architecture may exist (gap {chosen.gap:.2%}).")
    return found


def _rule_text(conflict: Conflict) -> str:
    """A rule of form, which has no unit."""
    least = conflict.least_alone if conflict.least is None else conflict.least
    asked = conflict.limit.at_most if isinstance(conflict.limit, AtMostDistinct) else conflict.limit.capacity
    return f"{conflict.limit.name} were at most {asked:g}, and {least:g} would do"


def _reachable(asked: ResolvedLimit, least: float, instance: ProblemBuilder, batch_sizes: BatchSizes) -> str:
    """The least use by blocks as a value of the limit, rounded so that it can be met."""
    own = Architecture(layers=(instance.scores.parent,) * len(instance.layers))
    parent = next(use for use in instance.limit_uses(own, batch_sizes) if (use.scenario, use.name) == _key(asked))
    whole = least + asked.outside
    value = asked.in_terms(whole)
    if asked.tokens:
        return f"at most {math.floor(value):,} tok/s ({_tenths(value / parent.used, math.floor)}%)"
    percent = f"{_tenths(value / parent.used, math.ceil)}%"
    if asked.name.startswith("block_"):
        return f"at least {percent}"
    if asked.unit == "bytes":
        return f"at least {math.ceil(value / 2**10):,}KiB ({percent})"
    if asked.unit == "ms":
        return f"at least {math.ceil(1e3 * value) / 1e3:,}ms ({percent})"
    return f"at least {math.ceil(value):,} {asked.unit} ({percent})"


def _key(asked: ResolvedLimit) -> tuple[str, str]:
    return asked.scenario, asked.name


def _tenths(share: float, towards: Callable[[float], int]) -> float:
    """A share in percent, rounded to tenths towards what can be met."""
    return towards(1000 * share) / 10
