"""One Prefect task per stage: it fetches inputs, calls the stage's function in puzzle_core and stores the artifact.

The key of a task's work is both its cache key in Prefect and the key of its artifact. The store decides what exists:
where it lacks an artifact, the flows run the task again even if Prefect has a cached result.
"""

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from puzzle_core import data, evaluation, fisher, influence, scoring
from puzzle_core.architecture import Architecture
from puzzle_core.benchmark_items import digest_items, read_items
from puzzle_core.chats import as_texts, check_template
from puzzle_core.cost import roofline
from puzzle_core.cost.engine_module import cost_module
from puzzle_core.cost.measuring import hardware_name
from puzzle_core.device import available_cores, default_device, fast_dtype, on_first, use_threads, visible_gpus
from puzzle_core.distill import bld, gkd, importance
from puzzle_core.distill.launch import GkdRequest, launch
from puzzle_core.distill.loop import OVER_BUDGET, Progress
from puzzle_core.errors import BudgetError, PuzzleError, SolveLimitError, SpecError
from puzzle_core.model import child
from puzzle_core.model.activations import Activations, drop_layer
from puzzle_core.model.surgery import load_weights
from puzzle_core.model.tokenizer import check_rows
from puzzle_core.plan import Inputs
from puzzle_core.records import digest_file
from puzzle_core.search.lazy import Place, lazy_scores, next_to_score
from puzzle_core.search.problem_builder import ProblemBuilder
from puzzle_core.search.record_tables import cost_table, score_table, unscored_table, with_long_scores
from puzzle_core.search.run_search import check_feasible, find_architecture
from puzzle_core.search.search_record import RefineRecord, SearchRecord
from puzzle_core.search.table_files import read_costs
from puzzle_core.search.tables import CostTable, ScoreTable
from puzzle_core.spec import BldSource, EvaluationSpec, RunSpec, TargetSpec
from puzzle_core.target import ComputeDtype
from puzzle_core.text_sources import Texts, read_texts
from puzzle_core.work import (
    AssembleWork,
    BldRecord,
    BldWork,
    CostRecord,
    CostWork,
    EvaluateWork,
    EvaluationRecord,
    GkdRecord,
    GkdWork,
    GradientsWork,
    ImportanceRecord,
    ImportanceWork,
    InfluenceRecord,
    InfluenceWork,
    RefineWork,
    ReportWork,
    ScoreRecord,
    ScoreWork,
    SearchWork,
    TimingWork,
    TokensRecord,
    TokensWork,
)
from tasks.runtime.budget import over_budget
from tasks.runtime.context import RunContext
from tasks.runtime.digest_cache import check_texts_disjoint, named_chat, parent_digest, texts_digest
from tasks.runtime.locks import gpu_lock, machine_lock
from tasks.runtime.named_inputs import (
    digest_folder,
    named_task_folder,
    read_named_benchmarks,
    read_named_costs,
    read_named_documents,
)
from tasks.runtime.opened_parent import hub_commit
from tasks.runtime.produce import produce
from tasks.stage_progress import StageProgress
from tasks.store.references import ancestors, read_keys
from tasks.store.stage_usage import usage_by_stage
from tasks.task_policies import stage_task, with_gpu, with_pinned_inputs, with_shared_gpu
from tasks.tracking.live_curve import HELD_BACK_KL, LiveCurve
from tasks.tracking.tracked_run import TrackedRun

log = logging.getLogger("puzzle")
NO_BENCHMARKS = EvaluationSpec()


@stage_task("open inputs", "open inputs", cached=False)
def open_inputs(context: RunContext, spec: RunSpec) -> Inputs:
    """Open parent, texts and benchmarks, and return their digests, the parent's shape and the hardware.

    Raises:
        PuzzleError: the parent, the texts, a benchmark, the target's device, engine or cost table cannot be used.
    """
    parent, evaluation = context.open_parent(), spec.evaluation
    tokenizer, train, held_out = parent.tokenizer(), spec.data.train, spec.data.held_out
    start = data.document_start(tokenizer, spec.data.document_start)
    for texts_of in () if tokenizer.chat_template else (train, held_out):
        if chat := named_chat(texts_of, context.scratch):
            check_template(tokenizer, chat)
    check_rows(
        tokenizer,
        parent.shape.vocabulary,
        start,
        lambda: as_texts([*read_texts(train), *read_texts(held_out)], tokenizer),
    )
    if evaluation.lm_eval.chat_template and not tokenizer.chat_template:
        raise SpecError(
            f"evaluation.lm_eval.chat_template is set, but the tokenizer of {context.parent.path} has no chat "
            "template: remove the option"
        )
    check_texts_disjoint(train, held_out, context.scratch)
    inputs = Inputs(
        parent=parent_digest(parent, context.scratch),
        tokenizer=parent.tokenizer_digest,
        dtype=parent.dtype,
        auto_dtype=fast_dtype(default_device()),
        shape=parent.shape,
        train_texts=texts_digest(train, context.scratch),
        held_out_texts=texts_digest(held_out, context.scratch),
        hardware="",
        benchmarks={task.name: digest_items(read_items(Path(task.file), task.limit)) for task in evaluation.tasks},
        lm_eval_folder=digest_folder(Path(folder)) if (folder := evaluation.lm_eval.task_folder) else None,
        parent_commit=hub_commit(context.parent, parent),
    )
    return for_target(inputs, spec.target)


def for_target(inputs: Inputs, target: TargetSpec) -> Inputs:
    """The same inputs, with the hardware and the cost table of this target.

    Raises:
        PuzzleError: the device or the engine is not on this machine, or the cost table cannot be read.
    """
    if target.costs == "measured":
        cost_module(target.engine).engine_version()
    if target.table:
        read_costs(Path(target.table))
    return inputs.model_copy(
        update={
            "hardware": _hardware(target),
            "cost_table": digest_file(Path(target.table)) if target.table else None,
        }
    )


@stage_task("tokens", "tokens {work.split}")
def pack_tokens(work: TokensWork, texts: Texts, context: RunContext) -> str:
    """Pack one split of the texts, from where the split before it ended if the store has that one."""
    tokenizer, store, before = context.open_parent().tokenizer(), context.store(), work.before
    end = store.record(TokensRecord, before.key).end if before and store.has(before.key) else None
    place = data.Place(*end) if end else None
    return produce(
        work, context, lambda out: data.pack_split(work, read_named_documents(work.texts, texts), tokenizer, out, place)
    )


@stage_task("importance", "importance")
@with_gpu
def measure_importance(work: ImportanceWork, context: RunContext) -> str:
    """Channel contributions of every FFN."""
    parent, tokens_dir = context.open_parent(), context.store().fetch(work.tokens)

    def measure(out: Path) -> ImportanceRecord:
        progress = StageProgress("importance", _short(work.key))
        return importance.measure_contributions(work, parent, tokens_dir, out, progress.show)

    return produce(work, context, measure)


@stage_task("capture layer", "capture layer {layer} ({tokens})", cached=False)
@with_shared_gpu
def capture_layer(
    parent: str,
    tokens: str,
    dtype: ComputeDtype,
    layer: int,
    keep_post_attention: bool,
    context: RunContext,
    base: AssembleWork | None = None,
) -> None:
    """Run one layer on its stored inputs and store its outputs.

    Args:
        parent: digest of the parent.
        tokens: key of the tokens artifact.
        dtype: what activations are computed and stored in.
        layer: its number; layer 0 also embeds the tokens.
        keep_post_attention: store the hidden states after attention, too; BLD and scores of this layer need them.
        context: the run's places.
        base: the child whose layer it is; the parent's where it is none.
    """
    with _capturing(parent, tokens, dtype, context, base) as activations, context.compute_slot:
        if layer == 0 and not activations.has_layer_input(0):
            activations.capture_embedding()
        activations.capture_layer(layer, keep_post_attention)


@stage_task("capture log-probabilities", "capture log-probabilities", cached=False)
@with_gpu
def capture_log_probabilities(parent: str, tokens: str, dtype: ComputeDtype, context: RunContext) -> None:
    """Store the parent's log-probabilities, which scores compare with, where they are small enough."""
    with _capturing(parent, tokens, dtype, context) as activations:
        activations.capture_log_probabilities()


@stage_task("capture parent", "capture parent ({tokens})", cached=False)
@with_gpu
def capture_parent(parent: str, tokens: str, dtype: ComputeDtype, context: RunContext) -> None:
    """Run the parent on tokens, and store what evaluations of all models compare with."""
    with _capturing(parent, tokens, dtype, context) as activations:
        evaluation.capture_parent(activations, StageProgress("parent's states", _short(tokens)).show)


@stage_task("drop activations", "drop activations", cached=False)
def drop_activations(directory: Path, layer: int | None = None) -> None:
    """Remove the activations in a directory that only this layer's tasks read, or the whole directory."""
    if layer is None:
        shutil.rmtree(directory, ignore_errors=True)
    else:
        drop_layer(directory, layer)


@stage_task("bld", "bld layer {work.layer} {work.variant}")
@with_shared_gpu
def train_variant(work: BldWork, context: RunContext, source: BldSource = "stored") -> str:
    """Blockwise local distillation of one variant or option, on captured states or on those that it computes."""
    use_threads(context.threads_per_task)
    activations, checkpoints = context.activations(work.parent, work.tokens, work.spec.dtype), context.checkpoints(work)
    inputs = (work.contributions, *(work.halves or (None, None)))
    contributions, *halves = (context.store().fetch(key) if key else None for key in inputs)
    slot = context.compute_slot

    def train(out: Path) -> BldRecord:
        return bld.train_variant(
            work, activations, contributions, out, checkpoints, slot=slot, source=source, halves=(halves[0], halves[1])
        )

    return produce(work, context, train)


@stage_task("gradients", "gradients")
@with_gpu
def measure_gradients(work: GradientsWork, context: RunContext) -> str:
    """Gradients of the parent, which scores are estimated from."""
    use_threads(context.threads_per_task)
    activations = context.activations(work.parent, work.tokens, work.dtype)
    return produce(work, context, lambda out: fisher.measure_gradients(work, activations, out))


@stage_task("influence", "influence")
@with_gpu
def measure_influence(work: InfluenceWork, context: RunContext) -> str:
    """The influence of the parent's layers, which baselines drop layers by."""
    use_threads(context.threads_per_task)
    activations = context.activations(work.parent, work.tokens, work.dtype)
    return produce(work, context, lambda _: influence.measure_influence(work, activations))


@stage_task("score", "score layer {work.layer} {work.option}")
@with_shared_gpu
def score_block(work: ScoreWork, context: RunContext) -> str:
    """Replace-1-block score of one block variant in one layer: exact, or estimated where it names gradients."""
    use_threads(context.threads_per_task)
    weights = {name: load_weights(context.store().fetch(key)) for name, key in work.trained.items()}
    activations = context.activations(work.parent, work.tokens, work.dtype, work.base)
    gradients = context.store().fetch(work.gradients) if work.gradients else None

    def score(_: Path) -> ScoreRecord:
        if gradients is None:
            return scoring.score_block(work, activations, weights, context.compute_slot)
        with context.compute_slot:
            return fisher.estimate_score(work, activations, weights, gradients)

    return produce(work, context, score)


@stage_task("cost", "cost {work.target.name} batch {work.traffic.batch_size}", tags=["measuring"])
def find_costs(work: CostWork, context: RunContext) -> str:
    """Prefill and decode times of every distinct variant for one traffic: measured, or from a roofline model."""
    if work.target.costs == "roofline":
        shape = context.open_parent().shape
        return produce(
            work, context, lambda _: roofline.roofline(shape, work.variants, work.traffic, work.target), lock=None
        )
    measure, parent = cost_module(work.target.engine).measure_costs, context.open_parent()
    use_threads(available_cores())
    return produce(
        work,
        context,
        lambda _: measure(work, parent, StageProgress("costs", work.target.name).show),
        lock="exclusive",
    )


@stage_task("check limits", "check limits", cached=False)
def check_limits(work: SearchWork, target: TargetSpec, context: RunContext) -> None:
    """Check before anything is trained that some architecture can meet the limits.

    Raises:
        InfeasibleError: no architecture can.
    """
    scores = unscored_table(work.variants, work.shape, _reference(work))
    check_feasible(ProblemBuilder(work.request, scores, _costs(work, target, context)))


@stage_task("ask for scores", "ask for exact scores", cached=False)
def ask_for_scores(work: SearchWork, target: TargetSpec, context: RunContext, exact: tuple[str, ...]) -> list[Place]:
    """The blocks that a search over estimates should score exactly next, with these exact scores so far."""
    known = context.store().records(ScoreRecord, exact).values()
    places = {(score.layer, score.option) for score in known}
    scores, costs = _scores(work, context, exact), _costs(work, target, context)
    return next_to_score(work.request, scores, costs, work.composition, places)


@stage_task("search", "search {work.request.scenario.name} on {work.target}")
def choose_architecture(work: SearchWork, target: TargetSpec, context: RunContext, exact: tuple[str, ...] = ()) -> str:
    """Solve the mixed-integer program, and compute the baselines that its solution is compared with.

    Args:
        work: what is searched.
        target: the hardware target.
        context: the run's places.
        exact: the keys of those scores that are exact, where the work's scores are estimates.

    Raises:
        SolveLimitError: the clock cut a solve at `search.time_limit_s`; such an answer is not stored.
    """
    scores = _scores(work, context, exact)
    layers = context.store().record(InfluenceRecord, work.influence).influence if work.influence else None

    def find(_: Path) -> SearchRecord:
        builder = ProblemBuilder(work.request, scores, _costs(work, target, context))
        record = find_architecture(builder, influence=layers)
        record = record.model_copy(update={"exact_scores": exact})
        if record.met_time_limit:
            best = record.best
            raise SolveLimitError(
                f"a solve met search.time_limit_s ({work.request.search.time_limit_s:g} s), so this answer (score "
                f"{best.score:.6g}, gap {best.gap:.1%}) depends on this machine's speed, and is not stored as that of "
                "the request. Raise search.time_limit_s, or leave it out and lower search.node_limit "
                f"({work.request.search.node_limit:,}): solves then end at the same answer everywhere"
            )
        return record

    return produce(work, context, find)


@stage_task("refine", "refine")
def store_refinement(work: RefineWork, record: RefineRecord, context: RunContext) -> str:
    """Store the measured candidates and which of them is best; the flow has measured them."""
    return produce(work, context, lambda _: record)


@stage_task("assemble", "assemble {label}")
@with_pinned_inputs
def assemble_child(work: AssembleWork, label: str, context: RunContext) -> str:
    """Assemble a child's checkpoint from library blocks and the parent."""
    directories = [{variant: context.store().fetch(key) for variant, key in layer} for layer in work.library]
    return produce(work, context, lambda out: child.assemble(work, context.open_parent(), directories, out))


@stage_task("gkd", "{label}")
@with_pinned_inputs
def distil_child(work: GkdWork, run: TrackedRun, context: RunContext, label: str = "gkd") -> str:
    """Global knowledge distillation (GKD) of the child, on all cores or on `runtime.gkd_processes` GPUs.

    `label` is the split that it reads, and names its losses in MLflow.
    """
    parent, checkpoints = context.open_parent(), context.checkpoints(work)
    child_dir, tokens_dir = context.store().fetch(work.child), context.store().fetch(work.tokens)
    shown = StageProgress(label, f"child {_short(work.key)}", shows_end=True)
    curve = LiveCurve(run, label)

    def report_progress(progress: Progress) -> None:
        shown.show(progress.step, progress.steps, f"loss {progress.loss:.4f}")
        terms = progress.terms if len(progress.terms) > 1 else {}
        if progress.held_back is not None:
            terms = terms | {HELD_BACK_KL: progress.held_back}
            log.info("GKD: KL on held-back windows %.4f after step %d", progress.held_back, progress.step)
        if context.launch and over_budget():
            raise BudgetError(OVER_BUDGET)
        curve.add(progress.step, {"loss": progress.loss} | terms, last=progress.step == progress.steps)

    def distil(out: Path) -> GkdRecord:
        if processes := context.launch:
            request = GkdRequest(
                work=work,
                parent=context.readable_parent,
                child_dir=str(child_dir.resolve()),
                tokens_dir=str(tokens_dir.resolve()),
                out_dir=str(out.resolve()),
                checkpoint=str(checkpoints.file.resolve()),
                checkpoint_seconds=checkpoints.least_seconds,
            )
            file = checkpoints.file.resolve().with_name(f"gkd-{work.digest()[:16]}.json")
            return launch(request, processes, file, report_progress, visible_gpus(numbers))
        threads, recompute = 1 if numbers else available_cores(), context.runtime.gkd_recompute
        use_threads(available_cores())
        with on_first(numbers):
            return gkd.distil(
                work, parent, child_dir, tokens_dir, out, checkpoints, report_progress, threads, recompute=recompute
            )

    with gpu_lock(context.runtime.gkd_processes) as numbers:
        return produce(work, context, distil, devices=len(numbers) * context.runtime.gkd_machines or None)


@stage_task("evaluate", "evaluate {label}")
@with_gpu
def evaluate_model(work: EvaluateWork, label: str, context: RunContext, spec: EvaluationSpec = NO_BENCHMARKS) -> str:
    """Quality of one model on held-out tokens, and on benchmarks, whose files `spec` names."""
    use_threads(context.threads_per_task)
    child_dir = context.store().fetch(work.child) if work.child else None
    benchmarks = read_named_benchmarks(work, spec)
    folder = named_task_folder(work, spec)

    def evaluate(_: Path) -> EvaluationRecord:
        activations = context.activations(work.parent, work.tokens, work.dtype)
        progress = StageProgress("evaluation", label)
        return evaluation.evaluate(work, activations, child_dir, benchmarks, folder, progress.show)

    return produce(work, context, evaluate)


@stage_task("timing", "timing", tags=["measuring"])
def time_models(work: TimingWork, context: RunContext) -> str:
    """Time the parent and the children end to end, alternating between them."""
    measure, parent = cost_module(work.target.engine).time_architectures, context.open_parent()
    use_threads(available_cores())
    return produce(
        work,
        context,
        lambda _: measure(work, parent, StageProgress("timing", work.target.name).show),
        lock="exclusive",
    )


@stage_task("report", "report")
def write_report(work: ReportWork, context: RunContext) -> str:
    """Write the tables and figures of the whole run."""
    from puzzle_core.report import collect
    from puzzle_core.report.report import render_report

    inputs = collect.collect(work, lambda key: context.store().manifest(key).record, context.parent.path)
    read = ancestors(context.store(), read_keys(work))
    inputs = inputs.model_copy(update={"usages": usage_by_stage(context.store(), read)})
    return produce(work, context, lambda out: render_report(inputs, out))


@contextlib.contextmanager
def _capturing(
    parent: str, tokens: str, dtype: ComputeDtype, context: RunContext, base: AssembleWork | None = None
) -> Iterator[Activations]:
    """Activations to capture, by the arguments of `capture_layer`, beside other tasks of the machine.

    They are removed where the parent is no longer the one of this digest.

    Raises:
        ParentError: the parent changed within the block.
    """
    use_threads(context.threads_per_task)
    activations = context.activations(parent, tokens, dtype, base)
    with machine_lock("shared"):
        yield activations
        try:
            context.parent_of(parent)
        except PuzzleError:
            shutil.rmtree(activations.directory, ignore_errors=True)
            raise


def _hardware(target: TargetSpec) -> str:
    """What costs hold for: the measured machine, or the device of the figures; the target of an imported table."""
    if target.costs == "measured":
        return hardware_name(target)
    return target.hardware.device if target.hardware else target.name


def _scores(work: SearchWork, context: RunContext, exact: tuple[str, ...]) -> ScoreTable:
    """The scores that a search uses; with `exact` keys, the others are estimates, calibrated by these."""
    store = context.store()
    records = list(store.records(ScoreRecord, work.scores).values())
    if work.long_scores:
        longs = store.records(ScoreRecord, work.long_scores).values()
        records = with_long_scores(records, list(longs), work.long_weight)
    if work.exact:
        records = lazy_scores(records, list(store.records(ScoreRecord, exact).values()))
    base, objective = work.base.architecture if work.base else None, work.request.search.objective
    return score_table(records, work.composition, objective, work.variants, work.shape, base, _reference(work))


def _reference(work: SearchWork) -> Architecture | None:
    """The first parent, whose values shares in limits are of, where the parent is a child of it."""
    return Architecture.of_parent(work.first) if work.first else None


def _costs(work: SearchWork, target: TargetSpec, context: RunContext) -> CostTable:
    """The costs that a search uses: the target's own table, or what the store has for its variants."""
    if target.table:
        return read_named_costs(work.cost_table, Path(target.table))
    store = context.store()
    records = {(scenario, batch): store.record(CostRecord, key) for scenario, batch, key in work.costs}
    request_tokens = {s.name: s.prompt_tokens + s.generated_tokens for s in work.request.scenarios}
    return cost_table(work.variants, work.first or work.shape, records, request_tokens)


def _short(key: str) -> str:
    """The start of a key's digest, to tell artifacts apart in Prefect's UI."""
    return key.rpartition("/")[2][:8]
