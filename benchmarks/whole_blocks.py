"""What halves that train together, and blocks in the place of several layers, add at equal cost, beside depth pruning.

    python -m benchmarks.whole_blocks SPEC --place DIRECTORY --set target=deployments/targets/l40s.yaml

Every row has a search within the limits of SPEC and a child with the same distillation. Rows share one store below
DIRECTORY, so a variant is trained once. The two last rows drop whole layers of the parent by their influence, as few as
the limits allow. Trained tokens are those of BLD: what a row's library took in all.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flows.services import prefect_server
from puzzle_core.architecture import EMPTY_BLOCK
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.report.units import count_text, number_text, percent_text
from puzzle_core.spec import DEPTH, RunSpec
from puzzle_core.spec_file import load_spec

if TYPE_CHECKING:
    from puzzle_core.search.search_record import FoundArchitecture
    from puzzle_core.work import EvaluationRecord

SETTINGS: dict[str, tuple[str, ...]] = {
    "decoupled": (),
    "coupled: linear and no-op": ("bld.coupled=linear_and_no_op",),
    "coupled: shortlist": ("bld.coupled=shortlist",),
    "spans of the parent's block": ("variants.spans=[2, 3]",),
    "both": ("bld.coupled=linear_and_no_op", "variants.spans=[2, 3]"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--place", type=Path, required=True, help="of the store; kept")
    parser.add_argument("--rows", nargs="*", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--span-blocks", default="[attn:kv4+ffn:i512]", help="blocks that may span layers")
    options = parser.parse_args()
    place = options.place.resolve()
    here = {"store": place / "store", "scratch": place / "scratch", "mlflow_uri": f"sqlite:///{place}/mlflow.db"}
    common = (*options.overrides, *(f"runtime.{name}={value}" for name, value in here.items()))
    common = (*common, f"search.baselines=[{', '.join(sorted(DEPTH))}]", f"variants.span_blocks={options.span_blocks}")
    specs = {name: load_spec(options.spec, (*common, *SETTINGS[name])) for name in options.rows}
    place.mkdir(parents=True, exist_ok=True)
    with prefect_server.prefect_api(place / "prefect"):
        rows = [row for name, spec in specs.items() for row in rows_of(name, spec, name == options.rows[-1])]
    columns = (
        "",
        "layers",
        "BLD tokens",
        "predicted score",
        "block time",
        "KL assembled",
        "KL after GKD",
        "top-1 kept",
    )
    first = next(iter(specs.values()))
    title = f"{first.name} within {', '.join(f'{k} {v}' for k, v in first.scenario.limits.by_name().items())}"
    sys.stdout.write(f"{format_text(Table(title, columns, tuple(rows)))}\n")


def rows_of(name: str, spec: RunSpec, with_depth: bool) -> list[tuple[str, ...]]:
    """The child of a setting, and with `with_depth` those of depth pruning."""
    from prefect import flow

    from flows.build_library import build_planned_library
    from flows.refine_search import evaluate_missing
    from flows.search_architecture import answering_plan, search_planned_architecture
    from flows.submit import ensure, ensure_tokens, plan_run
    from puzzle_core.search.search_record import SearchRecord
    from puzzle_core.work import EvaluationRecord
    from tasks import stage_tasks
    from tasks.tracking.tracking import tracked

    @flow(name="whole-blocks", persist_result=False)
    def compare() -> list[tuple[str, ...]]:
        plan, context = plan_run(spec)
        ensure_tokens(plan, context, *plan.splits)
        for work in plan.costs().values():
            ensure(stage_tasks.find_costs, work, context)
        build_planned_library(plan, context)
        search_planned_architecture(plan, context)
        answering = answering_plan(plan, context)
        store, evaluate = context.store(), answering.evaluate
        search = store.record(SearchRecord, answering.search().key)
        tokens = {work.key for one in (plan, answering) for work in one.all_bld()}
        found = {name: search.best}
        found |= {baseline.method: baseline for baseline in search.baselines if with_depth}
        made = {}
        with tracked("whole-blocks", spec) as run:
            for label, solution in found.items():
                assembling = answering.assemble(solution.architecture)
                ensure(stage_tasks.assemble_child, assembling, context, label=label)
                for split, work in answering.trainings(solution.architecture).items():
                    ensure(stage_tasks.distil_child, work, context, run=run, label=split)
                made[label] = [evaluate(assembling.key), evaluate(answering.gkd(solution.architecture).key)]
        works = {f"{label} {place}": work for label, pair in made.items() for place, work in enumerate(pair)}
        works["parent"] = evaluate(None)
        with context.lock_activations(plan.tokens("evaluation").key, spec.evaluation.dtype):
            evaluate_missing("evaluation", works, answering, context, spec.evaluation)
        quality = {label: store.record(EvaluationRecord, work.key) for label, work in works.items()}
        trained = len(tokens) * spec.bld.tokens * spec.bld.epochs
        return [
            _row(label, solution, search.parent.total_ms, trained * (label == name), quality)
            for label, solution in found.items()
        ]

    return compare()


def _row(
    label: str, found: "FoundArchitecture", parent_ms: float, trained: int, quality: dict[str, "EvaluationRecord"]
) -> tuple[str, ...]:
    assembled, distilled, parent = quality[f"{label} 0"], quality[f"{label} 1"], quality["parent"]
    options = found.architecture.options.values()
    return (
        label,
        str(sum(option.block != EMPTY_BLOCK for option in options)),
        count_text(trained),
        number_text(found.score),
        percent_text(found.prediction.total_ms / parent_ms),
        number_text(assembled.kl_nats_per_token),
        number_text(distilled.kl_nats_per_token),
        percent_text(distilled.top1_accuracy / parent.top1_accuracy),
    )


if __name__ == "__main__":
    main()
