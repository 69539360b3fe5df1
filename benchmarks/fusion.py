"""What FFN fusion costs and saves before any distillation: children with fewer and fewer attentions, fused and not.

    python -m benchmarks.fusion SPEC --attentions 6 4 2 [--set runtime.store=...]    # a spec whose library is there

For every number of layers that attend, the search chooses the best child by its scores alone. It is assembled twice,
plain and with its FFNs fused, and both are compared with the parent on held-out tokens and timed in turns on this CPU.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.planned import packed, planned
from puzzle_core.cost.latency import time_architectures
from puzzle_core.cost.roofline import roofline
from puzzle_core.data import read_windows
from puzzle_core.device import available_cores, default_device
from puzzle_core.evaluation import capture_parent, evaluate
from puzzle_core.fusible import fused
from puzzle_core.model.activations import Activations
from puzzle_core.model.child import assemble
from puzzle_core.model.parent import torch_dtype
from puzzle_core.report.report_tables import Table, format_text
from puzzle_core.search.problem_builder import ProblemBuilder
from puzzle_core.search.record_tables import cost_table, score_table
from puzzle_core.search.run_search import find_solutions
from puzzle_core.spec import LimitsSpec
from puzzle_core.spec_file import load_spec
from puzzle_core.target import TargetSpec, load_target
from puzzle_core.work import ScoreRecord, TimingWork, Traffic

TARGET = Path(__file__).parents[1] / "deployments" / "targets" / "l40s.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--attentions", type=int, nargs="+", required=True, help="layers that attend")
    options = parser.parse_args()
    torch.set_num_threads(available_cores())
    spec = load_spec(options.spec, tuple(options.overrides))
    plan, context = planned(spec)
    store = context.store()
    shape, variants, scenario = plan.inputs.shape, plan.variants, plan.spec.scenario
    records = list(store.records(ScoreRecord, [work.key for work in plan.all_scores()]).values())
    scores = score_table(records, plan.spec.scoring.composition, "kl", variants, shape)
    batch = max(scenario.batch_sizes)
    traffic = Traffic(
        prompt_tokens=scenario.prompt_tokens, generated_tokens=scenario.generated_tokens, batch_size=batch
    )
    offered = {v for layer in plan.layers for found in variants.of_layer(layer, shape) for v in found}
    costs = cost_table(
        variants, shape, {(scenario.name, batch): roofline(shape, offered, traffic, load_target(TARGET))}
    )
    ids_NT = read_windows(packed(plan, context, "evaluation"))
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        parent, dtype = context.open_parent(), torch_dtype(plan.spec.evaluation.dtype)
        activations = Activations(place / "states", parent, ids_NT, dtype, default_device())
        capture_parent(activations)
        for count in options.attentions:
            limits = scenario.model_copy(
                update={"limits": LimitsSpec(attention_layers=str(count)), "batch_sizes": (batch,)}
            )
            request = plan.spec.request.model_copy(update={"scenario": limits})
            chosen = find_solutions(ProblemBuilder(request, scores, costs)).solutions[0].architecture
            children = {"plain": chosen, "fused": fused(chosen)}
            target = TargetSpec(device="cpu", dtype="float32", rounds=7)
            asked = TimingWork(
                shape="", architectures=tuple(children.items()), traffic=traffic, target=target, hardware=""
            )
            times = time_architectures(asked, parent).models
            for name, architecture in children.items():
                work = plan.assemble(chosen, fuse_ffn=name == "fused")
                out = place / f"{count}-{name}"
                out.mkdir()
                directories = [{variant: store.fetch(key) for variant, key in layer} for layer in work.library]
                assemble(work, parent, directories, out)
                found = evaluate(plan.evaluate(work.key), activations, out)
                ms = times[name]
                rows.append(
                    (
                        str(count),
                        name,
                        str(len(architecture.options)),
                        str(max(block.ffn.ffn_width for block in architecture.layers)),
                        f"{found.kl_nats_per_token:.3f}",
                        f"{ms.prefill_ms:.1f} ms",
                        f"{ms.decode_ms:.0f} ms",
                    )
                )
    title = f"FFN fusion in children of {spec.parent.path}, assembled and not distilled, batch size {batch}"
    columns = ("attentions", "child", "layers", "widest FFN", "KL", "prefill", "decode")
    sys.stdout.write(f"{format_text(Table(title, columns, tuple(rows), text_columns=2))}\n")


if __name__ == "__main__":
    main()
