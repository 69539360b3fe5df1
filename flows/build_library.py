"""The block library of a parent and its scores: built once per parent, for all targets (docs/design.md)."""

import logging
from typing import Annotated

from prefect import flow
from prefect.futures import PrefectFuture, wait
from prefect.runtime import flow_run
from pydantic import Field

from flows.permissions import permitted
from flows.run_graph import call_flow, call_task, submit_task
from flows.services.orphaned_runs import inherited_tags, label_process
from flows.submit import ensure, ensure_tokens, plan_run, show_stored, side_by_side, submit, wait_all
from puzzle_core.architecture import Architecture, Option
from puzzle_core.device import device_memory_bytes
from puzzle_core.errors import PuzzleError
from puzzle_core.plan import LAYERS, Plan
from puzzle_core.resources import streamed_groups
from puzzle_core.scoring import SIDE_BY_SIDE
from puzzle_core.sizes import DTYPE_BYTES, LAYER_CACHE_BYTES, architecture_parameters
from puzzle_core.spec import RunSpec
from puzzle_core.target import ComputeDtype
from puzzle_core.work import AssembleWork, BldWork, ScoreWork
from tasks.announce import announce
from tasks.runtime.context import RunContext
from tasks.stage_progress import StageProgress
from tasks.stage_tasks import (
    capture_layer,
    capture_log_probabilities,
    drop_activations,
    measure_gradients,
    measure_importance,
    score_block,
    train_variant,
)
from tasks.tracking.lineage import record_library, record_trained
from tasks.tracking.tracking import tracked
from tasks.ui_artifacts import show_library, show_tracked

log = logging.getLogger("puzzle")
Layers = Annotated[str | None, Field(pattern=f"^{LAYERS}$", examples=["0-9"])]


def run_name() -> str:
    """The name of a run of `build_library`."""
    parameters = flow_run.get_parameters()
    layers = f", layers {parameters['layers']}" if parameters.get("layers") else ""
    return f"library of {parameters['spec'].name}{layers}"


@flow(
    name="build-library",
    flow_run_name=run_name,
    persist_result=False,
    result_serializer="json",
    on_running=[label_process],
)
@inherited_tags()
def build_library(spec: RunSpec, layers: Layers = None) -> None:
    """Train every missing variant of every layer (BLD), then score every missing block variant.

    Args:
        spec: The run specification; target, scenario, search, GKD and evaluation are not used.
        layers: The layers to train and score here: the first and the last one (0-9), or one; none for all.

    Raises:
        SpecError: the parent does not have these layers.
    """
    spec = permitted(spec)
    plan, context = plan_run(spec)
    build_planned_library.fn(plan.of_layers(layers), context)


@flow(
    name="build-library",
    flow_run_name="library of {plan.name}",
    persist_result=False,
    result_serializer="json",
    validate_parameters=False,
)
def build_planned_library(plan: Plan, context: RunContext) -> None:
    """As `build_library`, with the plan of the run that it is part of."""
    spec = plan.spec
    with tracked("library", spec) as run:
        show_tracked(plan, run)
        ensure_tokens(plan, context, "calibration", "bld", *plan.scoring_splits)
        importance = ensure(measure_importance, plan.importance(), context)
        with context.lock_activations(plan.tokens("bld").key, spec.bld.dtype):
            train = train_variants if spec.bld.source == "stored" else train_streamed
            train = side_by_side(train, context, _trainings_at_a_time(plan))
            call_flow(train, plan, context, after=[plan.tokens("bld").key, importance])
        trained = [work.key for work in plan.all_bld()]
        for split in plan.scoring_splits:
            tokens = plan.tokens(split).key
            with context.lock_activations(tokens, spec.scoring.dtype):
                score = side_by_side(score_variants, context, scores_at_a_time(plan, context))
                call_flow(score, plan, context, split=split, after=[tokens, *trained])
        if plan.part is None:
            record_library(plan, context, run)
        show_library(plan, context)


def captured(layer: int, tokens: str, dtype: ComputeDtype, base: AssembleWork | None = None) -> str:
    """The name, in the run's graph, of the states that leave a layer of the parent, or of a child."""
    return f"states of layer {layer} {tokens} {dtype} {base.key if base else 'parent'}"


def _trainings_at_a_time(plan: Plan) -> int:
    """Tasks under way at a time: all variants of a layer, those of the next one, and its capture.

    The variants of a layer share what they read. Those of the next layer compute where these leave a core or GPU idle.
    Streamed, all variants of a group of layers share what the parent computes.
    """
    variants = [len(plan.trained(layer)) for layer in plan.layers]
    options = [len(plan.trained_whole(layer)) for layer in plan.layers]
    if plan.spec.bld.source == "stored":
        return plan.spec.runtime.bld_side_by_side or max(variants) + max(*variants, *options) + 1
    memory = device_memory_bytes()
    groups = {False: streamed_groups(plan, memory), True: streamed_groups(plan, memory, whole=True)}
    return max(sum((variants, options)[whole][n] for n in group) for whole in groups for group in groups[whole])


def scores_at_a_time(plan: Plan, context: RunContext) -> int:
    """Scores under way at a time at least: they share layers where the parent does not fit into a process's memory."""
    shape, dtype = plan.inputs.shape, plan.spec.scoring.dtype
    parent_bytes = architecture_parameters(shape, Architecture.of_parent(shape)) * DTYPE_BYTES[dtype]
    return SIDE_BY_SIDE * context.devices if parent_bytes * context.devices > LAYER_CACHE_BYTES else 0


@flow(
    name="train-variants",
    flow_run_name="BLD of {plan.name}",
    persist_result=False,
    result_serializer="json",
    validate_parameters=False,
)
def train_variants(plan: Plan, context: RunContext) -> None:
    """Blockwise local distillation of the variants that the store lacks, layer by layer.

    The variants of a layer train side by side, from one read of its states. Options follow those of their last layer,
    from halves that are trained then. The parent's states are captured one layer ahead of the training, and a layer's
    states are dropped when its last variant is trained, or the last option that starts there. So scratch holds the
    states of at most three layers, and the output of the last of these; more where options span layers. No layer after
    the last one with a missing variant is captured. Where a variant fails, those of the next layer that are under way
    end first.
    """
    missing, options, done = _missing_variants(plan, context)
    total = len(plan.all_bld())
    reach = max((work.last_layer - work.layer for works in options.values() for work in works), default=0)
    untrained_layers = [layer for layer in plan.layers if missing[layer] or options[layer]]
    if not untrained_layers:
        return
    parent, tokens, dtype = plan.inputs.parent, plan.tokens("bld").key, plan.spec.bld.dtype
    states = context.activations_directory(parent, tokens, dtype)
    last, running = untrained_layers[-1], dict[int, list[PrefectFuture[str]]]()
    progress = StageProgress("bld", plan.name, done, shows_end=True)

    def finish(layer: int) -> int:
        """Wait for a layer's variants, train the options that end there, and return how many trainings are done."""
        futures, now = running.pop(layer), done
        wait_all("BLD", futures, now, total, progress)
        now += len(futures)
        after = [captured(layer, tokens, dtype)]
        wait_all("BLD", [submit(train_variant, work, context, after) for work in options[layer]], now, total, progress)
        now += len(options[layer])
        if layer >= reach:
            readers = [work.key for work in missing[layer - reach] + options[layer]] or after
            call_task(drop_activations, f"drop {layer}", readers, directory=states, layer=layer - reach)
        if now > done:
            log.info("BLD: layer %d done, %d of %d variants", layer, now, total)
        record_trained(missing[layer] + options[layer], context)
        return now

    def capture_next(layer: int) -> PrefectFuture[None]:
        before = captured(layer - 1, tokens, dtype) if layer else tokens
        return submit_task(
            capture_layer, captured(layer, tokens, dtype), [before], parent=parent, tokens=tokens, dtype=dtype,
            layer=layer, keep_post_attention=bool(missing[layer]), context=context,
        )  # fmt: skip

    capture = capture_next(0)
    try:
        for layer in range(last + 1):
            capture.result()
            if layer < last:
                capture = capture_next(layer + 1)
            after = [captured(layer, tokens, dtype)]
            running[layer] = [submit(train_variant, work, context, after) for work in missing[layer]]
            if layer:
                done = finish(layer - 1)
        finish(last)
    except PuzzleError:
        wait([future for futures in running.values() for future in futures])  # else the end of the flow stops them
        raise
    call_task(drop_activations, "drop", [f"drop {last}"], directory=states)


@flow(
    name="train-streamed",
    flow_run_name="BLD of {plan.name}",
    persist_result=False,
    result_serializer="json",
    validate_parameters=False,
)
def train_streamed(plan: Plan, context: RunContext) -> None:
    """Blockwise local distillation of the variants that the store lacks, while the parent runs.

    The variants of a group of layers train at the same time. The parent computes each batch once for all of them, from
    the embedding to the last of these layers. Options follow, in groups of their own. Nothing lies in scratch.
    """
    missing, options, done = _missing_variants(plan, context)
    total = len(plan.all_bld())
    progress = StageProgress("bld", plan.name, done, shows_end=True)
    for whole, untrained in {False: missing, True: options}.items():
        for group in streamed_groups(plan, device_memory_bytes(), whole):
            works = [work for works in untrained.values() for work in works if work.layer in group]
            futures = [submit(train_variant, work, context, source="streamed") for work in works]
            wait_all("BLD", futures, done, total, progress)
            done += len(futures)
            if futures:
                log.info("BLD: layers %d to %d done, %d of %d variants", group.start, group.stop - 1, done, total)
            record_trained(works, context)


Trainings = dict[int, list[BldWork]]


def _missing_variants(plan: Plan, context: RunContext) -> tuple[Trainings, Trainings, int]:
    """The trainings that the store lacks, and how many it has; these are shown as cached.

    Returns:
        Trainings of variants by their layer, those of options by their last layer, and the number of stored ones.
    """
    works, stored_keys = plan.all_bld(), context.store().keys(BldWork.stage)
    variants, options = ({layer: list[BldWork]() for layer in plan.layers} for _ in range(2))
    for work in works:
        if work.key not in stored_keys:
            (options if isinstance(work.variant, Option) else variants)[work.last_layer].append(work)
    done = sum(work.key in stored_keys for work in works)
    log.info("block library: %d variants, %d in the store, %d to train", len(works), done, len(works) - done)
    show_stored("bld", train_variant, [work for work in works if work.key in stored_keys], plan, context)
    return variants, options, done


@flow(
    name="score-variants",
    flow_run_name="scores of {plan.name}",
    persist_result=False,
    result_serializer="json",
    validate_parameters=False,
)
def score_variants(plan: Plan, context: RunContext, child: Architecture | None = None, split: str = "scoring") -> None:
    """Replace-1-block scores on one split that the store lacks, in the parent or in a child.

    The states of the parent, and then of the child, are captured once, through the last layer. Where scores are
    estimates, one task measures the gradients that all of them are made from.
    """
    works, stored_keys = plan.all_scores(child, split), context.store().keys(ScoreWork.stage)
    base = plan.assemble(child) if child else None
    missing = [work for work in works if work.key not in stored_keys]
    done = len(works) - len(missing)
    log.info("scores: %d block variants, %d in the store, %d to score", len(works), done, len(missing))
    show_stored("scores", score_block, [work for work in works if work.key in stored_keys], plan, context)
    if not missing:
        return
    tokens, dtype = plan.tokens(split).key, plan.spec.scoring.dtype
    first = min(work.layer for work in missing)
    capture_layers(plan, context, first if base is None else len(plan.layers), split=split)
    gradients = None if base else plan.gradients()
    if gradients:
        ensure(measure_gradients, gradients, context, [captured(plan.layers[-1], tokens, dtype)])
    else:
        _capture_log_probabilities(plan, context, split)
    if base:
        capture_layers(plan, context, first, base, split)
    progress = StageProgress("scores", plan.name, done, shows_end=True)
    futures = [submit(score_block, work, context, _read_by(work)) for work in missing]
    wait_all("scores", futures, done, len(works), progress)
    for model in (None, base) if base else (None,):
        directory = context.activations_directory(plan.inputs.parent, tokens, dtype, model)
        call_task(drop_activations, "drop", [work.key for work in missing], directory=directory)
    if child is None and plan.part is None:
        announce_library(plan)


def announce_library(plan: Plan) -> None:
    """Emit the event that a library has all its scores, which may start re-searches."""
    announce("library.built", plan.spec.name, {"parent": plan.spec.parent.path, "store": plan.spec.runtime.store})


def capture_layers(
    plan: Plan, context: RunContext, kept_from: int, base: AssembleWork | None = None, split: str = "scoring"
) -> None:
    """Capture all layers of the parent, or of a child, on the tokens of a split.

    Args:
        plan: of the run.
        context: its places.
        kept_from: the first layer whose states after attention are stored, too.
        base: the child.
        split: of the tokens.
    """
    tokens, dtype = plan.tokens(split).key, plan.spec.scoring.dtype
    progress = StageProgress("capture", plan.name)
    for layer in plan.layers:
        before = [captured(layer - 1, tokens, dtype, base)] if layer else [tokens, *([base.key] if base else [])]
        call_task(
            capture_layer, captured(layer, tokens, dtype, base), before, parent=plan.inputs.parent, tokens=tokens,
            dtype=dtype, layer=layer, keep_post_attention=layer >= kept_from, context=context, base=base,
        )  # fmt: skip
        progress.show(layer + 1, len(plan.layers))


def _capture_log_probabilities(plan: Plan, context: RunContext, split: str = "scoring") -> None:
    """Store the parent's log-probabilities on the tokens of a split."""
    tokens, dtype = plan.tokens(split).key, plan.spec.scoring.dtype
    call_task(
        capture_log_probabilities, f"log-probabilities {tokens} {dtype}", [captured(plan.layers[-1], tokens, dtype)],
        parent=plan.inputs.parent, tokens=tokens, dtype=dtype, context=context,
    )  # fmt: skip


def _read_by(work: ScoreWork) -> list[str]:
    """The names of the captured states that a score reads."""
    states = captured(work.layer, work.tokens, work.dtype, work.base)
    return [states] if work.gradients else [states, f"log-probabilities {work.tokens} {work.dtype}"]


@flow(
    name="score-exactly",
    flow_run_name="exact scores of {plan.spec.name}",
    persist_result=False,
    result_serializer="json",
    validate_parameters=False,
)
def score_exactly(plan: Plan, context: RunContext, works: list[ScoreWork]) -> None:
    """Exact scores in the parent that a search over estimates asks for, as far as the store lacks them.

    The states of all layers are captured and stay, since the search may ask again for scores in any layer.
    """
    stored_keys = context.store().keys(ScoreWork.stage)
    missing = [work for work in works if work.key not in stored_keys]
    show_stored("exact scores", score_block, [work for work in works if work.key in stored_keys], plan, context)
    if not missing:
        return
    capture_layers(plan, context, 0)
    _capture_log_probabilities(plan, context)
    progress = StageProgress("exact scores", plan.name)
    futures = [submit(score_block, work, context, _read_by(work)) for work in missing]
    wait_all("exact scores", futures, progress=progress)
