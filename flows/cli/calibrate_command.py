"""`puzzle calibrate`: the factors of a target, fitted to measured serving speeds."""

import sys
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import ExistingFile


def calibrate(
    target: Annotated[ExistingFile, Parameter(help="The target's YAML file, with `hardware`.")],
    /,
    *,
    measurements: Annotated[
        ExistingFile, Parameter(metavar="FILE", help="CSV of measured speeds (docs/targets.md has its columns).")
    ],
    device: Annotated[str | None, Parameter(metavar="NAME", help="Only rows of this device.")] = None,
    table: Annotated[str | None, Parameter(metavar="NAME", help="Only rows of this table.")] = None,
    version: Annotated[str | None, Parameter(metavar="NAME", help="Only rows of this version of the engine.")] = None,
    write: Annotated[bool, Parameter(help="Put the fit into the target's file, beside those of others.")] = False,
) -> None:
    """Fit a target's factors to measured serving speeds: half of the rows, the others tell the error."""
    from puzzle_core.cost.fit_file import fit_content, fit_rows, write_fit
    from puzzle_core.cost.measurements import read_measurements
    from puzzle_core.target import load_target
    from puzzle_core.yaml_file import yaml_text

    rows = read_measurements(measurements)
    fit = fit_rows(load_target(target), rows, device=device, table=table, version=version)
    sys.stdout.write(yaml_text({"fits": [fit_content(fit)]}))
    sys.stdout.write(
        f"\nheld out: {fit.held_out_rows} rows, mean error {fit.mean_error:.1%}, largest {fit.largest_error:.1%}\n"
    )
    if write:
        write_fit(target, fit)
        sys.stdout.write(f"written to {target}\n")
