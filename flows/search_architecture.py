"""The best architecture for one target and scenario, from the library's scores and the target's costs."""

import logging

from prefect import flow

from flows.open_runs import sign
from flows.running import ensure, plan_run
from puzzle_core.errors import CoverageError
from puzzle_core.plan import Plan
from puzzle_core.spec import RunSpec
from puzzle_core.stages import ScoreWork
from tasks import stages
from tasks.artifacts import show_architecture, show_tracked
from tasks.lineage import record_architecture
from tasks.site import Site
from tasks.tracking import tracked

log = logging.getLogger("puzzle")


@flow(
    name="search-architecture",
    flow_run_name="search {spec.scenario.name} of {spec.name}",
    persist_result=False,
    on_running=[sign],
    result_serializer="json",
)
def search_architecture(spec: RunSpec) -> None:
    """Measure what the target costs, if it was not, and solve the mixed-integer program.

    Args:
        spec: The run specification; the library of its parent and variants must be in the store.
    """
    site = Site.of(spec)
    plan = plan_run(spec, site)
    with tracked("search", spec) as run:
        show_tracked(plan, run)
        measure_target(plan, site)
        there = site.store().keys(ScoreWork.stage)
        missing = [work for work in plan.all_scores() if work.key not in there]
        if missing:
            raise CoverageError(
                f"{len(missing)} scores are not in the store {spec.runtime.store}, the first being layer "
                f"{missing[0].layer} {missing[0].block}: run `puzzle build-library` with this spec first"
            )
        key = ensure(stages.search_architecture, plan.search(), site, target=spec.target)
        record_architecture(plan, site, run, key)
        show_architecture(plan, site, key)


def measure_target(plan: Plan, site: Site) -> None:
    """Costs of all scenarios and batch sizes, and a check that some architecture meets the limits."""
    for work in plan.costs().values():
        ensure(stages.find_costs, work, site)
    stages.check_limits(plan.search(), plan.spec.target, site)
