"""Every step of the method as a Prefect task: cached by content, retried where a retry can help, named for the UI.

A task's cache key is its work's key, and so is the key of the artifact it makes. The store is the truth: flows ask for
a fresh run of a task whose artifact is gone, whatever Prefect remembers.
"""

import functools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from prefect import task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.task_engine import TaskRunTimeoutError
from prefect.tasks import exponential_backoff

from puzzle_core import data, evaluation, scoring
from puzzle_core.cost import latency, llama_cpp, roofline
from puzzle_core.cost.llama_engine import engine_version
from puzzle_core.device import available_cores, on_first, use_threads, visible_gpus
from puzzle_core.distill import bld, gkd, importance
from puzzle_core.distill.launch import GkdRequest, launch
from puzzle_core.distill.loop import Progress
from puzzle_core.errors import LostProcessError, MeasurementError
from puzzle_core.model import child
from puzzle_core.model.surgery import load_weights
from puzzle_core.plan import Inputs
from puzzle_core.records import Work, digest_file
from puzzle_core.search import run_search
from puzzle_core.search.problem_builder import ProblemBuilder
from puzzle_core.search.record_tables import cost_table, score_table, unscored_table
from puzzle_core.search.search_record import RefineRecord
from puzzle_core.search.table_files import read_costs
from puzzle_core.search.tables import CostTable
from puzzle_core.spec import DataSpec, Dtype, TargetSpec
from puzzle_core.text_sources import read_documents
from puzzle_core.work import (
    AssembleWork,
    BldWork,
    CostRecord,
    CostWork,
    EvaluateWork,
    GkdRecord,
    GkdWork,
    ImportanceWork,
    RefineWork,
    ReportWork,
    ScoreRecord,
    ScoreWork,
    SearchWork,
    TimingWork,
    TokensWork,
)
from tasks.runtime.context import RunContext
from tasks.runtime.locks import gpus, machine_lock
from tasks.store.cache import reading
from tasks.tracking.lineage import LiveCurve
from tasks.tracking.tracking import TrackedRun
from tasks.ui_artifacts import Bar

log = logging.getLogger("puzzle")


def _worth_retrying(_task: Any, _run: Any, state: Any) -> bool:
    """Storage hiccups, lost processes and noisy measurements may pass; timeouts, bad input and bad numbers do not."""
    try:
        state.result()
    except TaskRunTimeoutError:
        return False
    except (MeasurementError, LostProcessError, OSError):
        return True
    except Exception:
        return False
    return False


_RETRIES: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": exponential_backoff(backoff_factor=2),
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": _worth_retrying,
}


def cache_key(work: Work) -> str:
    """The key by which Prefect remembers the task of this work."""
    return work.key.replace("/", "-")


cached = functools.partial(
    task,
    cache_policy=CacheKeyFnPolicy(cache_key_fn=lambda _context, parameters: cache_key(parameters["work"])),
    persist_result=True,
    result_serializer="json",
    **_RETRIES,
)
uncached = functools.partial(task, persist_result=False, **_RETRIES)
P, T = ParamSpec("P"), TypeVar("T")


def at_work(act: Callable[P, T]) -> Callable[P, T]:
    """The body of a task that keeps what it reads in the cache until it ends; to be sent to other processes too."""

    @functools.wraps(act)
    def work(*args: P.args, **kwargs: P.kwargs) -> T:
        with reading():
            return act(*args, **kwargs)

    return work


def on_gpu(act: Callable[P, T]) -> Callable[P, T]:
    """As `at_work`, on a GPU that no other task of this machine has meanwhile, where there is one."""

    @functools.wraps(act)
    def work(*args: P.args, **kwargs: P.kwargs) -> T:
        with reading(), gpus() as numbers, on_first(numbers):
            return act(*args, **kwargs)

    return work


@uncached(name="open inputs", task_run_name="open inputs")
def open_inputs(context: RunContext, texts: DataSpec, target: TargetSpec) -> Inputs:
    """Open the parent and the texts, and say what they and the machine are; every kind of bad input ends here."""
    parent = context.open_parent()
    parent.tokenizer()
    inputs = Inputs(
        parent=context.parent_digest(),
        tokenizer=parent.tokenizer_digest,
        shape=parent.shape,
        train_texts=context.texts_digest(texts.train_texts),
        held_out_texts=context.texts_digest(texts.held_out_texts),
        hardware="",
    )
    return for_target(inputs, target)


def for_target(inputs: Inputs, target: TargetSpec) -> Inputs:
    """The same inputs for this target.

    Raises:
        PuzzleError: a device or an engine that is not here, or a cost table that cannot be read.
    """
    if (target.engine, target.costs) == ("llama.cpp", "measured"):
        engine_version()
    if target.table:
        read_costs(Path(target.table))
    return inputs.model_copy(
        update={
            "hardware": target.hardware.device if target.hardware else latency.hardware_name(target),
            "cost_table": digest_file(Path(target.table)) if target.table else None,
        }
    )


@cached(name="tokens", task_run_name="tokens {work.split}")
def pack_tokens(work: TokensWork, sources: tuple[str, ...], context: RunContext) -> str:
    """Pack one split of the texts."""
    tokenizer = context.open_parent().tokenizer()
    return context.produce(work, lambda out: data.run(work, read_documents(sources), tokenizer, out))


@cached(name="importance", task_run_name="importance")
@on_gpu
def measure_importance(work: ImportanceWork, context: RunContext) -> str:
    """Channel contributions of every FFN."""
    return context.produce(
        work, lambda out: importance.run(work, context.open_parent(), context.store().fetch(work.tokens), out)
    )


@uncached(task_run_name="capture layer {layer} ({tokens})")
@on_gpu
def capture_layer(
    tokens: str,
    dtype: Dtype,
    layer: int,
    keep_post_attention: bool,
    context: RunContext,
    base: AssembleWork | None = None,
) -> None:
    """Run one layer of the parent, or of a child, on its stored inputs and keep what leaves it."""
    use_threads(context.threads_per_task)
    activations = context.activations(tokens, dtype, base)
    with machine_lock(alone=False):
        if layer == 0 and not activations.has_layer_input(0):
            activations.capture_embedding()
        activations.capture_layer(layer, keep_post_attention)


@uncached(name="capture log-probabilities", task_run_name="capture log-probabilities")
@on_gpu
def capture_log_probabilities(tokens: str, dtype: Dtype, context: RunContext) -> None:
    """Keep the parent's own predictions for the scores to compare with, where they are small enough."""
    use_threads(context.threads_per_task)
    with machine_lock(alone=False):
        context.activations(tokens, dtype).capture_log_probabilities()


@uncached(name="drop activations", task_run_name="drop activations")
def drop_activations(
    tokens: str, dtype: Dtype, layer: int | None, context: RunContext, base: AssembleWork | None = None
) -> None:
    """Drop the states that only this layer's tasks needed, or all of them."""
    activations = context.activations(tokens, dtype, base)
    if layer is None:
        shutil.rmtree(activations.directory, ignore_errors=True)
    else:
        activations.release(layer)


@cached(name="bld", task_run_name="bld layer {work.layer} {work.variant}")
@on_gpu
def train_variant(work: BldWork, context: RunContext) -> str:
    """Blockwise local distillation of one variant of one layer."""
    use_threads(context.threads_per_task)
    activations, checkpoints = context.activations(work.tokens, work.spec.dtype), context.checkpoints(work)
    contributions = context.store().fetch(work.contributions) if work.contributions else None
    return context.produce(work, lambda out: bld.run(work, activations, contributions, out, checkpoints))


@cached(name="score", task_run_name="score layer {work.layer} {work.block}")
@on_gpu
def score_block(work: ScoreWork, context: RunContext) -> str:
    """Replace-1-block score of one block variant in one layer."""
    use_threads(context.threads_per_task)
    halves = ((str(work.block.attention), work.attention), (str(work.block.ffn), work.ffn))
    weights = {variant: load_weights(context.store().fetch(key)) for variant, key in halves if key}
    activations = context.activations(work.tokens, work.dtype, work.base)
    return context.produce(work, lambda _: scoring.run(work, activations, weights))


@cached(name="cost", tags=["measuring"], task_run_name="cost {work.target.name} batch {work.traffic.batch_size}")
def find_costs(work: CostWork, context: RunContext) -> str:
    """Prefill and decode times of every distinct variant for one traffic: measured, or from the target's figures."""
    if work.target.costs == "roofline":
        shape = context.open_parent().shape
        return context.produce(
            work, lambda _: roofline.roofline(shape, work.variants, work.traffic, work.target), alone=None
        )
    measure = llama_cpp.run if work.target.engine == "llama.cpp" else latency.run
    return context.produce(
        work, lambda _: measure(work, context.open_parent(), _log_rounds("measuring costs")), alone=True
    )


@uncached(name="check limits", task_run_name="check limits")
def check_limits(work: SearchWork, target: TargetSpec, context: RunContext) -> None:
    """Refuse limits that no architecture can meet, before anything is trained."""
    run_search.check_feasible(
        ProblemBuilder(work.request, unscored_table(work.variants, work.shape), _costs(work, target, context))
    )


@cached(name="search", task_run_name="search {work.request.scenario.name} on {work.target}")
def search_architecture(work: SearchWork, target: TargetSpec, context: RunContext) -> str:
    """Solve the mixed-integer program, and what it is compared with."""
    store = context.store()
    records = [ScoreRecord.model_validate(found.record) for found in store.manifests(work.scores).values()]
    base, objective = work.base.architecture if work.base else None, work.request.search.objective
    scores = score_table(records, work.composition, objective, work.variants, work.shape, base)
    return context.produce(
        work, lambda _: run_search.run(ProblemBuilder(work.request, scores, _costs(work, target, context)))
    )


@cached(name="refine", task_run_name="refine")
def keep_refined(work: RefineWork, record: RefineRecord, context: RunContext) -> str:
    """Keep which candidate measured best."""
    return context.produce(work, lambda _: record)


@cached(name="assemble", task_run_name="assemble {label}")
@at_work
def assemble_child(work: AssembleWork, label: str, context: RunContext) -> str:
    """Put library blocks into a child's checkpoint."""
    directories = [{variant: context.store().fetch(key) for variant, key in layer} for layer in work.library]
    return context.produce(work, lambda out: child.assemble(work, context.open_parent(), directories, out))


@cached(name="gkd", task_run_name="gkd")
@at_work
def distil_child(work: GkdWork, run: TrackedRun, context: RunContext) -> str:
    """Global knowledge distillation of the child, on all cores: nothing else runs meanwhile."""
    parent, checkpoints = context.open_parent(), context.checkpoints(work)
    inputs = context.store().fetch(work.child), context.store().fetch(work.tokens)
    bar, curve = Bar("gkd", f"child {work.key.rpartition('/')[2][:8]}"), LiveCurve(run, "gkd")

    def report_progress(progress: Progress) -> None:
        bar.show(progress.step, progress.steps)
        terms = progress.terms if len(progress.terms) > 1 else {}
        curve.add(progress.step, {"loss": progress.loss} | terms, last=progress.step == progress.steps)
        if progress.step % max(1, progress.steps // 20) == 0:
            log.info("GKD: step %d of %d, loss %.4f", progress.step, progress.steps, progress.loss)

    def distil(out: Path) -> GkdRecord:
        if how := context.launch:
            request = GkdRequest(
                work=work,
                parent=context.parent,
                child_dir=str(inputs[0].resolve()),
                tokens_dir=str(inputs[1].resolve()),
                out_dir=str(out.resolve()),
                checkpoint=str(checkpoints.file.resolve()),
                checkpoint_seconds=checkpoints.least_seconds,
            )
            file = checkpoints.file.resolve().with_name(f"gkd-{work.digest()[:16]}.json")
            return launch(request, how, file, report_progress, visible_gpus(numbers))
        threads = 1 if numbers else available_cores()
        with on_first(numbers):
            return gkd.run(work, parent, *inputs, out, checkpoints, report_progress, threads)

    with gpus(context.runtime.gkd_processes) as numbers:
        return context.produce(work, distil)


@cached(name="evaluate", task_run_name="evaluate {label}")
@on_gpu
def evaluate_model(work: EvaluateWork, label: str, context: RunContext) -> str:
    """Quality of one model on held-out tokens."""
    use_threads(context.threads_per_task)
    store, parent = context.store(), context.open_parent()
    child_dir = store.fetch(work.child) if work.child else None
    return context.produce(work, lambda _: evaluation.run(work, parent, child_dir, store.fetch(work.tokens)))


@cached(name="timing", tags=["measuring"], task_run_name="timing")
def time_models(work: TimingWork, context: RunContext) -> str:
    """Parent and children timed end to end, in turns."""
    measure = llama_cpp.run_timing if work.target.engine == "llama.cpp" else latency.run_timing
    return context.produce(
        work, lambda _: measure(work, context.open_parent(), _log_rounds("timing models")), alone=True
    )


@cached(name="report", task_run_name="report")
def write_report(work: ReportWork, context: RunContext) -> str:
    """Tables and figures of the whole run."""
    from puzzle_core.report import collect, report

    inputs = collect.collect(work, lambda key: context.store().manifest(key).record)
    return context.produce(work, lambda out: report.run(inputs, out))


def _costs(work: SearchWork, target: TargetSpec, context: RunContext) -> CostTable:
    if target.table:
        return read_costs(Path(target.table))
    store = context.store()
    records = {
        (scenario, batch): CostRecord.model_validate(store.manifest(key).record) for scenario, batch, key in work.costs
    }
    return cost_table(work.variants, work.shape, records)


def _log_rounds(what: str) -> Callable[[int, int], None]:
    def log_round(number: int, rounds: int) -> None:
        log.info("%s: round %d of %d", what, number, rounds)

    use_threads(available_cores())
    return log_round
