"""From an architecture to a trained, evaluated and timed child."""

import logging

from prefect import flow

from flows.refine_search import find_answer
from flows.running import ensure, ensure_tokens, plan_run, side_by_side, submit, wait_all
from puzzle_core.architecture import Architecture
from puzzle_core.plan import Plan
from puzzle_core.spec import RunSpec
from puzzle_core.stages import SearchRecord
from tasks import stages
from tasks.artifacts import show_tracked
from tasks.lineage import record_child
from tasks.site import Site
from tasks.tracking import tracked

log = logging.getLogger("puzzle")
PARENT, ASSEMBLED, TRAINED = "parent", "child after assembly", "child after GKD"


@flow(name="train-child", flow_run_name="child of {spec.name}", persist_result=False, result_serializer="json")
def train_child(spec: RunSpec) -> None:
    """Assemble the chosen architecture, distil it (GKD), and evaluate it beside the parent and the baselines.

    Args:
        spec: The run specification; its search must be in the store.
    """
    site = Site.of(spec)
    plan = plan_run(spec, site)
    found = find_answer(plan, site)
    with tracked("child", spec) as run:
        show_tracked(plan, run)
        ensure_tokens(plan, site, "gkd", "evaluation")
        architectures = children(found)
        for label, architecture in architectures.items():
            ensure(stages.assemble_child, plan.assemble(architecture), site, label=label)
        distilled = ensure(stages.distil_child, plan.gkd(found.chosen.architecture), site, run=run)
        if timing := plan.timing(timed(plan, found), found.chosen.prediction.batch_size):
            ensure(stages.time_models, timing, site)
        side_by_side(evaluate_models, site)(spec, plan, site)
        record_child(plan, site, run, distilled, found.chosen)


@flow(
    name="evaluate-models",
    flow_run_name="evaluation of {spec.name}",
    persist_result=False,
    result_serializer="json",
    validate_parameters=False,
)
def evaluate_models(spec: RunSpec, plan: Plan, site: Site) -> None:
    """Quality of the parent, the child before and after GKD, and the baselines, on the same held-out tokens."""
    evaluations = {label: plan.evaluate(key) for label, key in evaluated(plan, find_answer(plan, site)).items()}
    missing = {label: work for label, work in evaluations.items() if not site.store().has(work.key)}
    wait_all("evaluation", [submit(stages.evaluate_model, work, site, label=label) for label, work in missing.items()])


def children(found: SearchRecord) -> dict[str, Architecture]:
    """The chosen architecture and the baselines, by label."""
    return {ASSEMBLED: found.chosen.architecture} | {other.method: other.architecture for other in found.baselines}


def timed(plan: Plan, found: SearchRecord) -> dict[str, Architecture]:
    """The architectures that are timed beside the parent."""
    return {PARENT: Architecture.of_parent(plan.inputs.shape)} | children(found)


def evaluated(plan: Plan, found: SearchRecord) -> dict[str, str | None]:
    """Artifact keys of all evaluated models by label; none for the parent."""
    assembled = {label: plan.assemble(architecture).key for label, architecture in children(found).items()}
    return {PARENT: None, TRAINED: plan.gkd(found.chosen.architecture).key, **assembled}
