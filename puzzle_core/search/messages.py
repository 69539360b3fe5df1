"""Messages of a search in the terms of the request: batch sizes, and why no architecture meets the limits."""

import math
from collections.abc import Callable

from puzzle_core.errors import InfeasibleError
from puzzle_core.search.infeasible import Conflict
from puzzle_core.search.problem_builder import BatchSizes, ProblemBuilder, ResolvedLimit
from puzzle_core.search.rules import AtMostDistinct


def infeasible_text(error: InfeasibleError, builder: ProblemBuilder, batch_sizes: BatchSizes) -> str:
    """Each limit in conflict with its least reachable value, rounded so that a limit of that value can be met."""
    limits = {limit.label: limit for limit in builder.limits(batch_sizes)}
    several = len(builder.request.scenarios) > 1 or builder.request.mix is not None
    parts = []
    for conflict in error.conflicts:
        if conflict.limit.name not in limits:
            parts.append(_rule_text(conflict))
            continue
        limit = limits[conflict.limit.name]
        least = conflict.least_alone if conflict.least is None else conflict.least
        held = " with the others held" if len(error.conflicts) > 1 and conflict.least is not None else ""
        name = f"{limit.scenario}: {limit.name}" if several else limit.name
        parts.append(f"{name} was {limit.text}, and {_reachable(limit, least, builder, batch_sizes)} can be had{held}")
    if not parts:
        return str(error)
    return "; ".join(parts) + ": relax a limit, or add cheaper variants"


def batch_text(batch_sizes: BatchSizes) -> str:
    """Batch sizes as a phrase: `batch size 8`, `batch sizes 8 (chat), 4 (rag)`."""
    if len(batch_sizes) == 1:
        return f"batch size {next(iter(batch_sizes.values()))}"
    return "batch sizes " + ", ".join(f"{size} ({scenario})" for scenario, size in batch_sizes.items())


def _rule_text(conflict: Conflict) -> str:
    """The sentence for a rule, which has no unit."""
    least = conflict.least_alone if conflict.least is None else conflict.least
    at_most = conflict.limit.at_most if isinstance(conflict.limit, AtMostDistinct) else conflict.limit.capacity
    return f"{conflict.limit.name} were at most {at_most:g}, and {least:g} can be had"


def _reachable(limit: ResolvedLimit, least: float, builder: ProblemBuilder, batch_sizes: BatchSizes) -> str:
    """The least use by blocks as a value of the limit, rounded so that it can be met."""
    uses = {(use.scenario, use.name): use for use in builder.limit_uses(builder.reference, batch_sizes)}
    value = limit.in_terms(least + limit.outside)
    own = uses[limit.scenario, limit.name].usage
    if value == math.inf:
        return "any rate"
    share = value / own if own else math.inf
    if limit.tokens:
        percent = f" ({_tenths(share, math.floor)}%)" if share < math.inf else ""
        return f"at most {math.floor(value):,} tok/s{percent}"
    percent = f"{_tenths(share, math.ceil)}%" if share < math.inf else "the parent has 0"
    if limit.name.startswith("block_"):
        return f"at least {percent}"
    if limit.unit == "bytes":
        return f"at least {math.ceil(value / 2**10):,}KiB ({percent})"
    if limit.unit == "ms":
        return f"at least {math.ceil(1e3 * value) / 1e3:,}ms ({percent})"
    return f"at least {math.ceil(value):,} {limit.unit} ({percent})"


def _tenths(share: float, rounded: Callable[[float], int]) -> float:
    """A share in percent, rounded to tenths by `math.floor` or `math.ceil`."""
    return rounded(1000 * share) / 10
