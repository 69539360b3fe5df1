"""`puzzle calibrate`: the factors of a target, fitted to measured serving speeds."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import ExistingFile

from puzzle_core.errors import SpecError


def calibrate(
    target: Annotated[ExistingFile, Parameter(help="The target's YAML file, with `hardware`.")],
    /,
    *,
    measurements: Annotated[
        ExistingFile | None,
        Parameter(metavar="FILE", help="CSV of measured serving speeds (docs/targets.md has its columns)."),
    ] = None,
    spec: Annotated[
        ExistingFile | None, Parameter(metavar="SPEC", help="Or a specification whose measured costs the store has.")
    ] = None,
    device: Annotated[str | None, Parameter(metavar="NAME", help="Only rows of this device.")] = None,
    table: Annotated[str | None, Parameter(metavar="NAME", help="Only rows of this table.")] = None,
    version: Annotated[str | None, Parameter(metavar="NAME", help="Only rows of this version of the engine.")] = None,
    write: Annotated[bool, Parameter(help="Put the fit into the target's file, beside those of others.")] = False,
) -> None:
    """Fit a target's factors to measured serving speeds (half of the rows; the others tell the error), or to costs.

    Raises:
        SpecError: there are neither measurements nor a specification, or both.
    """
    from puzzle_core.target import load_target

    if (measurements is None) == (spec is None):
        raise SpecError("give --measurements FILE, or --spec SPEC of measured costs: one of them")
    if spec is not None:
        _calibrate_to_costs(target, spec, write)
        return
    from puzzle_core.cost.fit_file import fit_content, fit_rows, write_fit
    from puzzle_core.cost.measurements import read_measurements
    from puzzle_core.yaml_file import yaml_text

    assert measurements is not None
    rows = read_measurements(measurements)
    fit = fit_rows(load_target(target), rows, device=device, table=table, version=version)
    sys.stdout.write(yaml_text({"fits": [fit_content(fit)]}))
    sys.stdout.write(
        f"\nheld out: {fit.held_out_rows} rows, mean error {fit.mean_error:.1%}, largest {fit.largest_error:.1%}\n"
    )
    if write:
        write_fit(target, fit)
        sys.stdout.write(f"written to {target}\n")


def _calibrate_to_costs(target: Path, spec: Path, write: bool) -> None:
    """Fit to the measured costs of a specification, which all count."""
    from puzzle_core.architecture import Variant
    from puzzle_core.cost.calibrate import calibrate, mean_error
    from puzzle_core.cost.fit_file import factors_content, write_efficiency
    from puzzle_core.cost.roofline import roofline
    from puzzle_core.plan import Plan
    from puzzle_core.spec_file import load_spec
    from puzzle_core.target import load_target
    from puzzle_core.work import CostRecord
    from puzzle_core.yaml_file import yaml_text
    from tasks.runtime.context import RunContext
    from tasks.stage_tasks import open_inputs

    run_spec, sheet = load_spec(spec), load_target(target)
    if sheet.hardware is None:
        raise SpecError(f"target {sheet.name} has no figures to fit: give it `costs: roofline` and `hardware`")
    if run_spec.target.costs != "measured":
        raise SpecError(f"{spec} has a target whose costs are {run_spec.target.costs}: measured ones are needed")
    context = RunContext.of(run_spec)
    plan, store = Plan(run_spec, open_inputs.fn(context, run_spec)), context.store()
    works = [work for work in plan.costs().values() if store.has(work.key)]
    if not works:
        raise SpecError(f"the store {run_spec.runtime.store} has no costs of {spec}: run `puzzle search {spec}` first")
    shape = plan.inputs.first.shape
    measured = [(work.traffic, store.record(CostRecord, work.key)) for work in works]
    hardware = calibrate(sheet.hardware, shape, measured)
    fitted = sheet.model_copy(update={"hardware": hardware.model_copy(update={"fits": ()})})
    errors = [
        mean_error(roofline(shape, map(Variant.parse, record.variants), traffic, fitted), record)
        for traffic, record in measured
    ]
    sys.stdout.write(yaml_text({"efficiency": factors_content(hardware.efficiency)}))
    sys.stdout.write(
        f"\nfitted to {len(works)} cost records, mean error {sum(errors) / len(errors):.1%}; none held out\n"
    )
    if write:
        write_efficiency(target, hardware.efficiency)
        sys.stdout.write(f"written to {target}\n")
