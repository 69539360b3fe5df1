"""Resources of a run by formula (puzzle_core/resources.py): beside those of a finished run, or for any parent size.

    python -m benchmarks.scale SPEC [--set runtime.store=...]    # a spec whose run is in its store: formula and run
    python -m benchmarks.scale --shape llama-70b                 # deployments/kubernetes/prefect.yaml, by formula alone

A rate (`--tflops`, of one GPU, effective) turns operations into GPU-hours; it is an assumption, not a measurement.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from puzzle_core.architecture import Architecture, BlockVariant
from puzzle_core.cost.measurements import shape_of
from puzzle_core.plan import Inputs, Plan
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.resources import resources
from puzzle_core.search.search_record import SearchRecord
from puzzle_core.spec import parse_spec
from puzzle_core.spec_file import load_spec
from puzzle_core.work import BldRecord, ChildRecord, GkdRecord, ScoreRecord

KUBERNETES = Path("deployments/kubernetes/prefect.yaml")
SHAPES = {"llama-8b": shape_of("llama3-8b"), "llama-70b": shape_of("llama3-70b")}


class FinishedRun(NamedTuple):
    """What a finished run took: counts by the names of `Resources`, the child, and seconds of BLD and GKD."""

    counts: dict[str, int]
    architecture: Architecture
    bld_seconds: float
    gkd_seconds: float


def found_of(plan: Plan, store: Any) -> FinishedRun:
    """What lies in the store of a finished run."""
    bld = store.manifests(work.key for work in plan.all_bld()).values()
    trained = [BldRecord.model_validate(manifest.record) for manifest in bld]
    scores = store.manifests(work.key for work in plan.all_scores()).values()
    chosen = SearchRecord.model_validate(store.manifest(plan.search().key).record).best.architecture
    child = ChildRecord.model_validate(store.manifest(plan.assemble(chosen).key).record)
    gkd = GkdRecord.model_validate(store.manifest(plan.gkd(chosen).key).record)
    weights = [store.fetch(manifest.key) / "weights.safetensors" for manifest in bld]
    counts = {
        "bld_tasks": len(trained),
        "score_tasks": len(scores),
        "bld_tokens": sum(record.tokens for record in trained),
        "score_tokens": sum(ScoreRecord.model_validate(manifest.record).tokens for manifest in scores),
        "gkd_tokens": gkd.tokens,
        "library_bytes": sum(map(_tensor_bytes, weights)),
        "child_bytes": child.parameter_bytes,
    }
    return FinishedRun(counts, chosen, sum(record.seconds for record in trained), gkd.seconds)


def _tensor_bytes(file: Path) -> int:
    """Bytes of a safetensors file without its header."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


def compare(spec_file: Path, overrides: tuple[str, ...]) -> str:
    """A finished run beside the formulas."""
    from tasks.runtime.context import RunContext
    from tasks.stage_tasks import open_inputs

    spec = load_spec(spec_file, overrides)
    context = RunContext.of(spec)
    plan = Plan(spec, open_inputs.fn(context, spec))
    found = found_of(plan, context.store())
    expected = resources(plan, found.architecture)
    rows = [(name, f"{expected._asdict()[name]:,}", f"{count:,}") for name, count in found.counts.items()]
    rows.append(("BLD, GFLOP/s of a task", "", f"{expected.bld_flops / found.bld_seconds / 1e9:.1f}"))
    rows.append(("GKD, GFLOP/s", "", f"{expected.gkd_flops / found.gkd_seconds / 1e9:.1f}"))
    title = f"{spec.name}: by formula, and in the finished run"
    return format_text(Table(title=title, columns=("", "by formula", "run"), rows=tuple(rows), text_columns=1))


def by_formula(
    name: str, tflops: float, processes: int, changes: dict[str, dict[str, Any]], device_bytes: float
) -> str:
    """What a parent takes with the Kubernetes deployments' budgets; its child has half the widths and 2 KV heads."""
    content, shape = yaml.safe_load(KUBERNETES.read_text())["definitions"]["spec"] | {"name": name}, SHAPES[name]
    for part, values in changes.items():
        content[part] |= values
    spec = parse_spec(content, str(KUBERNETES))
    inputs = {name: name for name in ("parent", "tokenizer", "train_texts", "held_out_texts", "hardware")}
    plan = Plan(spec, Inputs(shape=shape, **inputs))
    block = BlockVariant.parse(f"attn:kv2+ffn:i{shape.ffn_width // 2}")
    child = Architecture(layers=(block,) * shape.layers)
    expected = resources(plan, child, processes, device_bytes=device_bytes)
    rows = [(name, _words(name, value, tflops)) for name, value in expected._asdict().items()]
    title = f"{spec.name} at an effective {tflops:g} TFLOP/s per GPU, GKD in {processes} processes"
    return format_text(Table(title=title, columns=("", "by formula"), rows=tuple(rows), text_columns=1))


def _words(name: str, value: float, tflops: float) -> str:
    if name.endswith("_bytes"):
        return f"{value / 2**30:,.1f} GiB"
    if name.endswith("_flops"):
        return f"{value:.3g} FLOP = {value / tflops / 1e12 / 3600:,.0f} GPU-hours"
    return f"{value:,}"


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path, nargs="?")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--tflops", type=float, default=400, help="of one GPU (default %(default)s)")
    parser.add_argument("--processes", type=int, default=32, help="that share GKD (default %(default)s)")
    parser.add_argument("--bld-tokens", type=int, help="per variant (default as the deployments' spec says)")
    parser.add_argument("--streamed", action="store_true", help="bld.source: streamed")
    parser.add_argument("--gpus", type=int, default=8, help="of 80 GB that train variants (default %(default)s)")
    parser.add_argument("--method", choices=["exact", "lazy", "fisher"], default="exact", help="of scoring")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if bool(options.spec) == bool(options.shape):
        parser.error("give a spec or --shape")
    changes: dict[str, dict[str, Any]] = {"bld": {}, "scoring": {"method": options.method}}
    if options.streamed:
        changes["bld"]["source"] = "streamed"
    if options.bld_tokens:
        changes["bld"]["tokens"] = options.bld_tokens
    text = (
        compare(options.spec, tuple(options.overrides))
        if options.spec
        else by_formula(options.shape, options.tflops, options.processes, changes, options.gpus * 80e9)
    )
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
