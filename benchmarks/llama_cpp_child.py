"""Speed in llama.cpp of children that were searched for it: `python -m benchmarks.llama_cpp_child`.

For the quickstart's parent and for one of 107M random parameters: costs of all variants measured in llama.cpp, a search
for half of the parent's decode time, and then parent and child whole, in turns. Printed are the predicted and the
measured speed-up, and how far they lie apart. Weights are random, on which times do not depend; scores are made up too
(the share of a block that is gone, times a random weight of its layer): the choice is one that a search makes, and says
nothing of quality.
"""

import argparse
import logging
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.engines import EXAMPLE
from puzzle_core.architecture import Architecture, BlockVariant, ModelShape
from puzzle_core.cost import llama_cpp
from puzzle_core.cost.measuring import hardware_name
from puzzle_core.model.parent import Parent
from puzzle_core.search.problem_builder import ProblemBuilder
from puzzle_core.search.record_tables import cost_table
from puzzle_core.search.run_search import find_architecture
from puzzle_core.search.search_record import FoundArchitecture, Prediction
from puzzle_core.search.tables import Option, ScoreTable
from puzzle_core.sizes import architecture_parameters, variant_size
from puzzle_core.spec import ParentSpec, SearchRequest, TargetSpec, VariantsSpec
from puzzle_core.work import CostWork, Timing, TimingWork, Traffic

SPACE = VariantsSpec(kv_heads=(2, 1), ffn_ratios=(0.75, 0.5, 0.25))
SIZES: dict[str, Any] = {
    "vocab_size": 16384,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 15,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}


def main() -> None:
    """Print a table for each parent."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=128, help="tokens (default %(default)s)")
    parser.add_argument("--generate", type=int, default=128, help="tokens (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences side by side (default %(default)s)")
    parser.add_argument("--type", default="f16", choices=llama_cpp.BYTES, help="of weights (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the scores (default %(default)s)")
    parser.add_argument("--only", choices=("quickstart", "107M"), help="one of the parents")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("gguf").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        parents = {"quickstart": lambda: EXAMPLE, "107M": lambda: write_parent(Path(place) / "parent")}
        for name, directory in parents.items():
            if options.only in (None, name):
                sys.stdout.write(compare(name, Parent(ParentSpec(path=str(directory()))), options))
                sys.stdout.flush()


def write_parent(out: Path) -> Path:
    """A Llama of random weights with the example's tokenizer, whose other tokens are never used."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES), dtype=torch.bfloat16)
    model.save_pretrained(out)
    for file in EXAMPLE.glob("token*"):
        shutil.copyfile(file, out / file.name)
    return out


def compare(name: str, parent: Parent, options: argparse.Namespace) -> str:
    """Search, run, and say how well the one foretold the other."""
    started = time.monotonic()
    shape, own = parent.shape, Architecture.of_parent(parent.shape)
    target = TargetSpec(engine="llama.cpp", gguf_type=options.type, rounds=options.rounds)
    traffic = Traffic(prompt_tokens=options.prompt, generated_tokens=options.generate, batch_size=options.batch)
    variants = {variant for found in SPACE.of_layer(0, shape) for variant in found if not variant.is_empty}
    work = CostWork(
        shape=shape.digest(), variants=tuple(sorted(variants)), traffic=traffic, target=target, hardware="here"
    )
    costs = llama_cpp.measure_costs(
        work, parent, lambda number, rounds: logging.info("costs: round %d of %d", number, rounds)
    )
    scenario = traffic.model_dump(exclude={"batch_size"}) | {"batch_sizes": [options.batch]}
    request = SearchRequest.model_validate(
        {
            "scenario": scenario | {"name": "chat", "limits": {"time_per_output_token": "50%"}},
            "engines": ["llama.cpp"],
            "search": {"baselines": [], "frontier_points": 2, "explain": False},
        }
    )
    table = cost_table(SPACE, shape, {("chat", options.batch): costs})
    found = find_architecture(ProblemBuilder(request, made_up_scores(shape, options.seed), table))
    child = found.best
    models = (("parent", own), ("child", child.architecture))
    timing = TimingWork(shape=shape.digest(), architectures=models, traffic=traffic, target=target, hardware="here")
    measured = llama_cpp.time_architectures(timing, parent).models
    parameters = [architecture_parameters(shape, architecture) for _, architecture in models]
    blocks = sorted({str(block) for block in child.architecture.layers})
    return (
        "\n".join(
            [
                f"\n{name}: {parameters[0]:,} parameters, child {parameters[1]:,}; {options.type}, "
                f"batch {options.batch}, {options.prompt} prompt and {options.generate} generated tokens; "
                f"{hardware_name(target)}, {costs.engine}, {time.monotonic() - started:.0f} s",
                f"child's blocks: {', '.join(blocks)}",
                f"spread of costs: {spread(costs.variants.values())}",
                *lines(found.parent, child, measured),
            ]
        )
        + "\n"
    )


def made_up_scores(shape: ModelShape, seed: int) -> ScoreTable:
    """The share of the parent's block that is gone, times a random weight of its layer."""
    chance, own = random.Random(seed), shape.largest_block
    whole = size_of(shape, own)

    def layer(number: int) -> dict[Option, float]:
        weight = chance.uniform(0.5, 2)
        return {
            Option(block): weight * chance.uniform(0.7, 1.3) * (1 - size_of(shape, block) / whole)
            for block in SPACE.blocks_of_layer(number, shape)
        }

    return ScoreTable(Architecture.of_parent(shape), tuple(layer(number) for number in range(shape.layers)))


def size_of(shape: ModelShape, block: BlockVariant) -> int:
    """Parameters of a block."""
    return sum(variant_size(shape, variant).parameters for variant in block.subblocks)


def spread(timings: Any) -> str:
    """Of prefill and decode over all variants: the median interquartile range over median, and the largest."""
    found = {phase: sorted(getattr(t, f"{phase}_spread") for t in timings) for phase in ("prefill", "decode")}
    return ", ".join(f"{phase} {v[len(v) // 2]:.0%} (at most {v[-1]:.0%})" for phase, v in found.items())


def lines(parent: Prediction, child: FoundArchitecture, measured: dict[str, Timing]) -> list[str]:
    """Predicted beside measured times and speed-ups."""
    head = f"{'':16}{'parent predicted':>18}{'measured':>10}{'child predicted':>18}{'measured':>10}"
    found = [head + f"{'speed-up predicted':>20}{'measured':>10}{'difference':>12}"]
    for phase in ("prefill_ms", "decode_ms", "end to end"):
        phases = ("prefill_ms", "decode_ms") if phase == "end to end" else (phase,)
        predicted = [sum(p.totals[name] for name in phases) for p in (parent, child.prediction)]
        real = [sum(getattr(measured[name], part) for part in phases) for name in ("parent", "child")]
        ratios = predicted[0] / predicted[1], real[0] / real[1]
        found.append(
            f"{phase.removesuffix('_ms'):16}{predicted[0]:15.2f} ms{real[0]:7.2f} ms{predicted[1]:15.2f} ms"
            f"{real[1]:7.2f} ms{ratios[0]:19.3f}x{ratios[1]:9.3f}x{ratios[1] / ratios[0] - 1:12.1%}"
        )
    return found


if __name__ == "__main__":
    main()
