"""The plan of a run and the searches of all targets, as text: `puzzle check` and `puzzle targets`."""

from collections.abc import Sequence
from pathlib import Path

from flows.research_targets import find_searches
from flows.search_architecture import known_plan
from flows.task_runners.choice import check_packages
from puzzle_core.architecture import Architecture
from puzzle_core.batching import reserved_tokens
from puzzle_core.cost.serving import cache_bytes, weight_bytes
from puzzle_core.plan import Plan
from puzzle_core.records import Work
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.report.units import NONE, bytes_text, number_text, percent_text
from puzzle_core.resources import resources
from puzzle_core.spec import RunSpec
from puzzle_core.target import TargetSpec
from tasks.runtime.context import RunContext
from tasks.runtime.digest_cache import check_texts_enough
from tasks.stage_tasks import open_inputs


def describe_targets(spec: RunSpec, directory: Path) -> str:
    """Every target file, and its search if the store has it, as text.

    Raises:
        PuzzleError: the specification, the parent or the texts are invalid, or there are no target files.
    """
    context = RunContext.of(spec)
    plan = Plan(spec, open_inputs.fn(context, spec))
    rows = []
    for search in find_searches(plan, context, directory):
        if search.plan is None:
            rows.append((search.target, NONE, NONE, NONE, "error: " + search.error.replace("\n", " "), NONE, NONE))
            continue
        target, record = search.plan.spec.target, search.record
        about = search.target, target.costs, _parent_fits(search.plan), _error(target)
        if record is None:
            rows.append((*about, "no", NONE, NONE))
            continue
        share = record.best.prediction.total_ms / record.parent.total_ms
        rows.append((*about, "yes", number_text(record.best.score), percent_text(share)))
    return (
        format_text(
            Table(
                title=f"Targets of {spec.parent.path}, scenario {spec.scenario.name}",
                columns=("target", "costs", "parent in memory", "error", "searched", "score", "time to the parent's"),
                rows=tuple(rows),
                text_columns=5,
                note="Parent in memory: at the smallest batch size, of what the devices have for weights and KV cache. "
                "Error: of computed throughput, in the mean over measurements that were held out.",
            )
        )
        + "\n"
    )


def _parent_fits(plan: Plan) -> str:
    """Whether the parent fits on the target at the scenario's smallest batch size, with what it takes."""
    hardware, shape, scenario = plan.spec.target.hardware, plan.inputs.shape, plan.spec.scenario
    if hardware is None:
        return NONE
    held = reserved_tokens(hardware.serving.reservation, scenario.prompt_tokens, scenario.generated_tokens)
    parent = Architecture.of_parent(shape)
    needed = weight_bytes(shape, parent, hardware)
    needed += min(scenario.batch_sizes) * cache_bytes(shape, parent, hardware, held)
    of = f"{bytes_text(needed)} of {bytes_text(hardware.usable_bytes)}"
    return of if needed <= hardware.usable_bytes else f"does not fit: {of}"


def _error(target: TargetSpec) -> str:
    """The error of the fit behind computed costs."""
    if target.hardware is None:
        return NONE
    return percent_text(target.fit.mean_error) if target.fit else "not compared"


def describe_plan(spec: RunSpec) -> str:
    """The plan as text: stored and missing artifacts of every stage, and the disk space and tokens of the whole run.

    Raises:
        PuzzleError: the specification, the parent or the texts are invalid, or a package is not installed.
    """
    context = RunContext.of(spec)
    check_packages(spec, context)
    plan = known_plan(Plan(spec, open_inputs.fn(context, spec)), context)
    shape, needed, store = plan.inputs.shape, resources(plan), context.store()
    for last in ("calibration", plan.gkd_splits[-1], [*plan.splits][-1]):
        if not store.has(plan.tokens(last).key):
            check_texts_enough(plan.tokens(last), plan.texts(last), context.open_parent(), context.scratch)
    gradients = plan.gradients()
    stages: dict[str, Sequence[Work]] = {
        "tokens": [plan.tokens(split) for split in plan.splits],
        "importance": [plan.importance()],
        "costs": list(plan.costs().values()),
        "BLD": plan.all_bld(),
        **({"gradients": [gradients]} if gradients else {}),
        "scores": [*plan.all_scores(), *plan.long_scores()],
        "search": [plan.search()],
    }
    at_most = "at most " if shape.blocks else ""
    lines = [
        f"{spec.name}: {spec.parent.path} ({shape.family}, {shape.layers} layers, hidden {shape.hidden}, "
        f"{shape.heads} heads, {at_most}{shape.kv_heads} KV heads, FFN {at_most}{shape.ffn_width}, vocabulary "
        f"{shape.vocabulary})",
        f"target {spec.target.name} ({plan.inputs.hardware}), scenario {spec.scenario.name}, "
        f"child in {plan.target.served_dtype}",
        f"store {spec.runtime.store}",
        *([f"round 1 of {len(spec.rounds) + 1}; what the others need follows from its child"] if spec.rounds else []),
        "",
        f"{'stage':<12}{'in store':>10}{'to do':>8}",
    ]
    for name, works in stages.items():
        stored_keys = store.keys(works[0].stage) if works else set()
        stored = sum(work.key in stored_keys for work in works)
        lines.append(f"{name:<12}{stored:>10}{len(works) - stored:>8}")
    searched = store.has(plan.search().key)
    lines.append(f"{'child':<12}{'see `puzzle run`' if searched else 'after the search':>18}")
    lines += [
        "",
        "if nothing were in the store:",
        f"  scratch disk: {needed.scratch_bytes / 2**20:,.0f} MiB",
        f"  store: {needed.store_bytes / 2**20:,.0f} MiB",
        f"  tokens: {needed.trained_tokens:,} trained on, {needed.score_tokens:,} scored",
    ]
    return "\n".join(lines) + "\n"
