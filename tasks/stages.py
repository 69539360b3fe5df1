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
from puzzle_core.distill import bld, gkd
from puzzle_core.distill.launch import GkdRequest, launch
from puzzle_core.distill.loop import Progress
from puzzle_core.errors import LostProcessError, MeasurementError
from puzzle_core.model import child
from puzzle_core.model.surgery import load_weights
from puzzle_core.plan import Inputs
from puzzle_core.records import Work, digest_file
from puzzle_core.search import choose
from puzzle_core.search.files import read_costs
from puzzle_core.search.inputs import cost_table, score_table, unscored_table
from puzzle_core.search.instance import Instance
from puzzle_core.search.tables import CostTable
from puzzle_core.spec import DataSpec, Dtype, TargetSpec
from puzzle_core.stages import (
    AssembleWork,
    BldWork,
    CostRecord,
    CostWork,
    EvaluateWork,
    GkdRecord,
    GkdWork,
    ImportanceWork,
    RefineRecord,
    RefineWork,
    ReportWork,
    ScoreRecord,
    ScoreWork,
    SearchWork,
    TimingWork,
    TokensWork,
)
from puzzle_core.variants import importance
from tasks.artifacts import Bar
from tasks.lineage import LiveCurve
from tasks.site import Site
from tasks.store_cache import reading
from tasks.tracking import TrackedRun
from tasks.turns import gpus, turn

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
def open_inputs(site: Site, texts: DataSpec, target: TargetSpec) -> Inputs:
    """Open the parent and the texts, and say what they and the machine are; every kind of bad input ends here."""
    parent = site.open_parent()
    parent.tokenizer()
    inputs = Inputs(
        parent=site.parent_digest(),
        tokenizer=parent.tokenizer_digest,
        shape=parent.shape,
        train_texts=site.texts_digest(texts.train_texts),
        held_out_texts=site.texts_digest(texts.held_out_texts),
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
def pack_tokens(work: TokensWork, sources: tuple[str, ...], site: Site) -> str:
    """Pack one split of the texts."""
    tokenizer = site.open_parent().tokenizer()
    return site.produce(work, lambda out: data.run(work, data.read_documents(sources), tokenizer, out))


@cached(name="importance", task_run_name="importance")
@on_gpu
def measure_importance(work: ImportanceWork, site: Site) -> str:
    """Channel contributions of every FFN."""
    return site.produce(
        work, lambda out: importance.run(work, site.open_parent(), site.store().fetch(work.tokens), out)
    )


@uncached(task_run_name="capture layer {layer} ({tokens})")
@on_gpu
def capture_layer(
    tokens: str, dtype: Dtype, layer: int, keep_middle: bool, site: Site, base: AssembleWork | None = None
) -> None:
    """Run one layer of the parent, or of a child, on its stored inputs and keep what leaves it."""
    use_threads(site.threads_per_task)
    activations = site.activations(tokens, dtype, base)
    with turn(alone=False):
        if layer == 0 and not activations.has_entry(0):
            activations.capture_embedding()
        activations.capture_layer(layer, keep_middle)


@uncached(name="capture log-probabilities", task_run_name="capture log-probabilities")
@on_gpu
def capture_log_probabilities(tokens: str, dtype: Dtype, site: Site) -> None:
    """Keep the parent's own predictions for the scores to compare with, where they are small enough."""
    use_threads(site.threads_per_task)
    with turn(alone=False):
        site.activations(tokens, dtype).capture_log_probabilities()


@uncached(name="drop activations", task_run_name="drop activations")
def drop_activations(
    tokens: str, dtype: Dtype, layer: int | None, site: Site, base: AssembleWork | None = None
) -> None:
    """Drop the states that only this layer's tasks needed, or all of them."""
    activations = site.activations(tokens, dtype, base)
    if layer is None:
        shutil.rmtree(activations.directory, ignore_errors=True)
    else:
        activations.release(layer)


@cached(name="bld", task_run_name="bld layer {work.layer} {work.variant}")
@on_gpu
def train_variant(work: BldWork, site: Site) -> str:
    """Blockwise local distillation of one variant of one layer."""
    use_threads(site.threads_per_task)
    activations, checkpoints = site.activations(work.tokens, work.spec.dtype), site.checkpoints(work)
    contributions = site.store().fetch(work.contributions) if work.contributions else None
    return site.produce(work, lambda out: bld.run(work, activations, contributions, out, checkpoints))


@cached(name="score", task_run_name="score layer {work.layer} {work.block}")
@on_gpu
def score_block(work: ScoreWork, site: Site) -> str:
    """Replace-1-block score of one block variant in one layer."""
    use_threads(site.threads_per_task)
    halves = ((str(work.block.attention), work.attention), (str(work.block.ffn), work.ffn))
    weights = {variant: load_weights(site.store().fetch(key)) for variant, key in halves if key}
    activations = site.activations(work.tokens, work.dtype, work.base)
    return site.produce(work, lambda _: scoring.run(work, activations, weights))


@cached(name="cost", tags=["measuring"], task_run_name="cost {work.target.name} batch {work.traffic.batch_size}")
def find_costs(work: CostWork, site: Site) -> str:
    """Prefill and decode times of every distinct variant for one traffic: measured, or from the target's figures."""
    if work.target.costs == "roofline":
        shape = site.open_parent().shape
        return site.produce(
            work, lambda _: roofline.roofline(shape, work.variants, work.traffic, work.target), alone=None
        )
    measure = llama_cpp.run if work.target.engine == "llama.cpp" else latency.run
    return site.produce(work, lambda _: measure(work, site.open_parent(), _log_rounds("measuring costs")), alone=True)


@uncached(name="check limits", task_run_name="check limits")
def check_limits(work: SearchWork, target: TargetSpec, site: Site) -> None:
    """Refuse limits that no architecture can meet, before anything is trained."""
    choose.check_feasible(Instance(work.request, unscored_table(work.variants, work.shape), _costs(work, target, site)))


@cached(name="search", task_run_name="search {work.request.scenario.name} on {work.target}")
def search_architecture(work: SearchWork, target: TargetSpec, site: Site) -> str:
    """Solve the mixed-integer program, and what it is compared with."""
    store = site.store()
    records = [ScoreRecord.model_validate(found.record) for found in store.manifests(work.scores).values()]
    base, objective = work.base.architecture if work.base else None, work.request.search.objective
    scores = score_table(records, work.composition, objective, work.variants, work.shape, base)
    return site.produce(work, lambda _: choose.run(Instance(work.request, scores, _costs(work, target, site))))


@cached(name="refine", task_run_name="refine")
def keep_refined(work: RefineWork, record: RefineRecord, site: Site) -> str:
    """Keep which candidate measured best."""
    return site.produce(work, lambda _: record)


@cached(name="assemble", task_run_name="assemble {label}")
@at_work
def assemble_child(work: AssembleWork, label: str, site: Site) -> str:
    """Put library blocks into a child's checkpoint."""
    directories = [{variant: site.store().fetch(key) for variant, key in layer} for layer in work.library]
    return site.produce(work, lambda out: child.run(work, site.open_parent(), directories, out))


@cached(name="gkd", task_run_name="gkd")
@at_work
def distil_child(work: GkdWork, run: TrackedRun, site: Site) -> str:
    """Global knowledge distillation of the child, on all cores: nothing else runs meanwhile."""
    parent, checkpoints = site.open_parent(), site.checkpoints(work)
    inputs = site.store().fetch(work.child), site.store().fetch(work.tokens)
    bar, curve = Bar("gkd", f"child {work.key.rpartition('/')[2][:8]}"), LiveCurve(run, "gkd")

    def report_progress(progress: Progress) -> None:
        bar.show(progress.step, progress.steps)
        terms = progress.terms if len(progress.terms) > 1 else {}
        curve.add(progress.step, {"loss": progress.loss} | terms, last=progress.step == progress.steps)
        if progress.step % max(1, progress.steps // 20) == 0:
            log.info("GKD: step %d of %d, loss %.4f", progress.step, progress.steps, progress.loss)

    def distil(out: Path) -> GkdRecord:
        if how := site.launch:
            request = GkdRequest(
                work=work,
                parent=site.parent,
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

    with gpus(site.runtime.gkd_processes) as numbers:
        return site.produce(work, distil)


@cached(name="evaluate", task_run_name="evaluate {label}")
@on_gpu
def evaluate_model(work: EvaluateWork, label: str, site: Site) -> str:
    """Quality of one model on held-out tokens."""
    use_threads(site.threads_per_task)
    store, parent = site.store(), site.open_parent()
    child_dir = store.fetch(work.child) if work.child else None
    return site.produce(work, lambda _: evaluation.run(work, parent, child_dir, store.fetch(work.tokens)))


@cached(name="timing", tags=["measuring"], task_run_name="timing")
def time_models(work: TimingWork, site: Site) -> str:
    """Parent and children timed end to end, in turns."""
    measure = llama_cpp.run_timing if work.target.engine == "llama.cpp" else latency.run_timing
    return site.produce(work, lambda _: measure(work, site.open_parent(), _log_rounds("timing models")), alone=True)


@cached(name="report", task_run_name="report")
def write_report(work: ReportWork, site: Site) -> str:
    """Tables and figures of the whole run."""
    from puzzle_core.report import collect, report

    inputs = collect.collect(work, lambda key: site.store().manifest(key).record)
    return site.produce(work, lambda out: report.run(inputs, out))


def _costs(work: SearchWork, target: TargetSpec, site: Site) -> CostTable:
    if target.table:
        return read_costs(Path(target.table))
    store = site.store()
    records = {
        (scenario, batch): CostRecord.model_validate(store.manifest(key).record) for scenario, batch, key in work.costs
    }
    return cost_table(work.variants, work.shape, records)


def _log_rounds(what: str) -> Callable[[int, int], None]:
    def log_round(number: int, rounds: int) -> None:
        log.info("%s: round %d of %d", what, number, rounds)

    use_threads(available_cores())
    return log_round
