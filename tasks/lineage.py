"""What each flow notes in MLflow: figures of its stage, and the models that it used and made.

Noted from manifests, never from inside a cached task: a run that finds its work in the store has the same lineage.
Parent, library, architecture and child are logged models; each names the artifacts it lies in.
"""

import hashlib
from typing import TypeVar

from puzzle_core.plan import Plan
from puzzle_core.records import Record
from puzzle_core.stages import BldRecord, EvaluationRecord, Found, GkdRecord, RefineRecord, ScoreRecord, SearchRecord
from tasks.site import Site
from tasks.tracking import TrackedRun

R = TypeVar("R", bound=Record)


def record_library(plan: Plan, site: Site, run: TrackedRun) -> None:
    """Final BLD loss per variant and KL per block variant, by layer; the library, made from the parent."""
    metrics = []
    site.store().pack(work.key for work in (*plan.all_bld(), *plan.all_scores()))  # read here, and for later runs
    for bld in plan.all_bld():
        trained = _record(BldRecord, bld.key, site)
        metrics.append((f"bld_loss/{trained.variant}", trained.final_loss, trained.layer))
    for score in plan.all_scores():
        scored = _record(ScoreRecord, score.key, site)
        metrics.append((f"kl/{scored.block}", scored.kl_nats_per_token, scored.layer))
    run.metrics(metrics)
    run.uses(_parent(plan, run))
    _library(plan, run)


def record_architecture(plan: Plan, site: Site, run: TrackedRun, key: str) -> None:
    """The search's answer; the architecture, made from the library."""
    chosen = _record(SearchRecord, key, site).chosen
    run.metrics([("score", chosen.score, 0), ("gap", chosen.gap, 0), ("batch_size", chosen.prediction.batch_size, 0)])
    run.metrics([(f"limit/{limit.name}", limit.used / limit.allowed, 0) for limit in chosen.limits])
    run.uses(_library(plan, run))
    _architecture(plan, run, chosen)


def record_refined(run: TrackedRun, record: RefineRecord) -> None:
    """Predicted and measured KL of every candidate, in the order they were found."""
    for step, candidate in enumerate(record.candidates):
        run.metrics([("kl_predicted", candidate.found.score, step), ("kl_measured", candidate.measured_kl, step)])


def record_child(plan: Plan, site: Site, run: TrackedRun, child: str, chosen: Found) -> None:
    """The child's quality; the child, made from the parent, the library and the architecture."""
    curve = _record(GkdRecord, child, site).curve
    run.metrics([(f"gkd/{name}", value, step) for step, terms in enumerate(curve, 1) for name, value in terms.items()])
    quality = _record(EvaluationRecord, plan.evaluate(child).key, site)
    own = _record(EvaluationRecord, plan.evaluate(None).key, site)
    metrics = [
        ("kl_nats_per_token", quality.kl_nats_per_token, 0),
        ("perplexity", quality.perplexity, 0),
        ("top1_accuracy", quality.top1_accuracy, 0),
    ]
    if own.top1_accuracy:
        metrics.append(("top1_kept", quality.top1_accuracy / own.top1_accuracy, 0))
    run.metrics(metrics)
    run.uses(_parent(plan, run), _library(plan, run), _architecture(plan, run, chosen))
    run.makes("child", f"child-{plan.spec.name}", child, {"store": site.runtime.store} | _lineage(plan))


def record_report(plan: Plan, site: Site, run: TrackedRun, key: str) -> None:
    """The report and its figures, and its headline as metrics."""
    headline = site.store().manifest(key).record["headline"]
    run.metrics([(name, value, 0) for name, value in headline.items()])
    run.artifacts(site.store().fetch(key), "report")


def _parent(plan: Plan, run: TrackedRun) -> str | None:
    about = {"path": plan.spec.parent.path} | plan.inputs.shape.model_dump()
    return run.makes("parent", "parent", f"parent/{plan.inputs.parent}", about)


def _library(plan: Plan, run: TrackedRun) -> str | None:
    about = {"parent": plan.inputs.parent, "variants": len(plan.all_bld()), "scores": len(plan.all_scores())}
    return run.makes("block-library", "block-library", _library_key(plan), about)


def _architecture(plan: Plan, run: TrackedRun, chosen: Found) -> str | None:
    about = {"library": _library_key(plan), "score": chosen.score}
    about |= {f"layer.{layer}": str(block) for layer, block in enumerate(chosen.architecture.layers)}
    return run.makes("architecture", f"architecture-{plan.spec.name}", plan.search().key, about)


def _lineage(plan: Plan) -> dict[str, str]:
    return {"parent": plan.inputs.parent, "library": _library_key(plan), "architecture": plan.search().key}


def _library_key(plan: Plan) -> str:
    keys = [work.key for work in (*plan.all_bld(), *plan.all_scores())]
    return f"library/{hashlib.sha256(' '.join(keys).encode()).hexdigest()[:40]}"


def _record(kind: type[R], key: str, site: Site) -> R:
    return kind.model_validate(site.store().manifest(key).record)
