"""Exported children in serving engines, as a table of results: `python -m benchmarks.engines`.

The children have one variant of each kind in the first, middle or last layer, or a mix of variants, in several
families. Their parents have six layers and random weights. Each child is exported, runs in every installed engine, and
is compared with the child in memory. A cell is the largest error of a log-probability at float32 (prompt and decoded
tokens alike), or the engine's error. transformers and llama.cpp run in this environment, vLLM in another one (`--vllm
PYTHON`).
"""

import argparse
import functools
import importlib.metadata
import json
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from puzzle_core.architecture import Architecture
from puzzle_core.cost.llama_engine import engine_version
from puzzle_core.errors import PuzzleError, SpecError
from puzzle_core.export.gguf_file import export_gguf
from puzzle_core.export.hf import export_hf
from puzzle_core.export.source import Source
from puzzle_core.model.checkpoint import write_checkpoint
from puzzle_core.model.child import load_child, random_child, write_description
from puzzle_core.model.parent import Parent
from puzzle_core.spec import ParentSpec

EXAMPLE = Path(__file__).parent.parent / "deployments/parents/stdlib-2m"
LAYERS, OWN = 6, "attn:kv4+ffn:i768"


def _rope(kind: str, **settings: float) -> dict[str, Any]:
    base = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    return {"rope_parameters": base | settings}


KINDS = {
    "fewer KV heads": "attn:kv1+ffn:i768",
    "attention none": "attn:no_op+ffn:i768",
    "attention linear": "attn:linear+ffn:i768",
    "FFN narrower (256)": "attn:kv4+ffn:i256",
    "FFN of any width (100)": "attn:kv4+ffn:i100",
    "FFN none": "attn:kv4+ffn:no_op",
    "FFN linear": "attn:kv4+ffn:linear",
    "both none": "attn:no_op+ffn:no_op",
    "attention linear, FFN none": "attn:linear+ffn:no_op",
}
PLACES = {"first layer": 0, "middle": 3, "last layer": LAYERS - 1}
CASES = {
    f"{kind}, {place}": (OWN,) * layer + (block,) + (OWN,) * (LAYERS - 1 - layer)
    for kind, block in KINDS.items()
    for place, layer in PLACES.items()
}
NONE = ("attn:no_op+ffn:i256", "attn:kv4+ffn:no_op", "attn:no_op+ffn:no_op", "attn:kv1+ffn:i256")
CASES["mixed, no linear, attention first"] = (OWN, *NONE, OWN)
CASES["mixed, everything"] = (*NONE, "attn:kv2+ffn:linear", "attn:linear+ffn:no_op")
PARENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mistral": ("mistral", {"sliding_window": None}),
    "Qwen2": ("qwen2", {}),
    "biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "wide heads": ("llama", {"head_dim": 64}),
    "untied embeddings": ("llama", {"tie_word_embeddings": False}),
    "Llama 3 rotary": ("llama", _rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
    "linear rotary": ("llama", _rope("linear")),
    "YaRN": ("llama", _rope("yarn")),
}
CASES |= {f"{what}: mixed, no linear": CASES["mixed, no linear, attention first"] for what in PARENTS}
SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}
"""Of the parents; heads have 32 channels, since vLLM on a CPU wants as many."""
WELL = 1e-4
MARKS = ("<!-- matrix: python -m benchmarks.engines -->", "<!-- end of matrix -->")
VLLM = Path(__file__).with_name("engines_vllm.py")


class Reference(NamedTuple):
    """What the child in memory says: log-probabilities of these tokens (prompt and greedy), (T, vocabulary)."""

    ids: list[int]
    prompt: int
    logs: torch.Tensor


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between its marks in this file")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="interpreter of an environment with vLLM")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this in it")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("gguf").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    cases = {name: blocks for name, blocks in CASES.items() if options.only in name}
    with tempfile.TemporaryDirectory() as place:
        table = matrix(cases, Path(place), options.vllm)
    sys.stdout.write(table)
    if options.write:
        start, end = MARKS
        before, rest = options.write.read_text().split(start)
        options.write.write_text(f"{before}{start}\n{table}{end}{rest.split(end)[1]}")


def matrix(cases: dict[str, tuple[str, ...]], place: Path, vllm: Path | None) -> str:
    """The table in Markdown."""
    columns: dict[str, dict[str, str]] = {f"transformers {importlib.metadata.version('transformers')}": {}}
    runs: list[Callable[[Source, Reference, Path], float]] = [run_transformers]
    try:
        columns[engine_version()] = {}
        runs.append(run_llama_cpp)
    except SpecError:
        logging.info("llama.cpp is not installed: its column is left out")
    references: dict[str, Reference] = {}
    for number, (name, blocks) in enumerate(cases.items()):
        parent = write_parent(place / f"parent-{number}", *PARENTS.get(name.split(": ")[0], ("llama", {})))
        source = Source(write_child(parent, Architecture.parse(blocks), place / f"child-{number}"))
        references[name] = reference(source)
        for cells, run in zip(columns.values(), runs, strict=True):
            out = place / f"{number}-{run.__name__}"
            out.mkdir()
            cells[name] = said(functools.partial(run, source, references[name], out))
        logging.info("%s: %s", name, ", ".join(cells[name] for cells in columns.values()))
    if vllm:
        version, cells = run_vllm(vllm, [place / f"{n}-run_transformers" for n in range(len(cases))], references)
        columns[f"vLLM {version}"] = cells
    rows = [f"| {name} | {' | '.join(cells[name] for cells in columns.values())} |" for name in cases]
    head = ["variant", *columns]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows]) + "\n"


def said(run: Callable[[], float]) -> str:
    """The error that a run has, or what went wrong in one line."""
    try:
        return graded(run())
    except PuzzleError as error:
        return f"refused: {str(error).split(': ', 1)[-1]}"
    except Exception as error:  # whatever an engine raises is the finding
        return f"fails: {type(error).__name__}"


def graded(error: float) -> str:
    """An error in words."""
    return f"ok ({error:.0e})" if error < WELL else f"WRONG ({error:.0e})"


def write_parent(out: Path, family: str, options: dict[str, Any]) -> Parent:
    """A parent of random weights, with the example's tokenizer."""
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | options))).save_pretrained(out)
    for file in EXAMPLE.glob("token*"):
        shutil.copyfile(file, out / file.name)
    return Parent(ParentSpec(path=str(out)))


def write_child(parent: Parent, architecture: Architecture, out: Path) -> Path:
    """A child with random weights whose logits are far from uniform."""
    torch.manual_seed(0)
    model = random_child(parent, architecture, torch.float32, torch.device("cpu"))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("bias"):
            parameter.normal_(std=parent.shape.hidden**-0.5)
    out.mkdir()
    tensors = dict(model.state_dict())
    if parent.shape.tied_embeddings:
        del tensors["lm_head.weight"]
    write_checkpoint(out, tensors.items())
    write_description(parent, architecture, "float32", out)
    return out


def reference(source: Source, prompt: int = 24, steps: int = 12) -> Reference:
    """The child's greedy continuation of random tokens, run whole."""
    child = load_child(source.directory, torch.float32, torch.device("cpu")).requires_grad_(False)
    ids = torch.randint(1, source.shape.vocabulary, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    for _ in range(steps):
        ids.append(int(child(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return Reference(ids, prompt, child(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1))


def run_transformers(source: Source, wanted: Reference, out: Path) -> float:
    """The exported directory with its own code: the prompt at once, the rest token by token with the cache."""
    export_hf(source, out, widths="any")
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    cache, found = None, []
    for tokens in (wanted.ids[: wanted.prompt], *([token] for token in wanted.ids[wanted.prompt :])):
        with torch.no_grad():
            output = model(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True)
        cache, _ = output.past_key_values, found.append(output.logits[0])
    return _error(torch.cat(found).log_softmax(-1), wanted)


def run_llama_cpp(source: Source, wanted: Reference, out: Path) -> float:
    """The GGUF in llama.cpp, without flash attention (float16 inside) and with a float32 cache."""
    import llama_cpp

    export_gguf(source, out / "child.gguf", "f32")
    settings: dict[str, Any] = {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, "logits_all": True}
    settings |= {"flash_attn": False, "type_k": 0, "type_v": 0, "verbose": False}
    engine = llama_cpp.Llama(str(out / "child.gguf"), **settings)
    for tokens in (wanted.ids[: wanted.prompt], *([token] for token in wanted.ids[wanted.prompt :])):
        engine.eval(tokens)
    found = torch.tensor(engine.scores[: len(wanted.ids)])
    engine.close()
    return _error(found.log_softmax(-1), wanted)


def run_vllm(python: Path, directories: list[Path], references: dict[str, Reference]) -> tuple[str, dict[str, str]]:
    """Every exported directory in vLLM: log-probabilities of the prompt and of its own greedy tokens."""
    asked = [
        {"directory": str(directory), "ids": wanted.ids[: wanted.prompt], "steps": len(wanted.ids) - wanted.prompt}
        for directory, wanted in zip(directories, references.values(), strict=True)
    ]
    with tempfile.TemporaryDirectory() as place:
        answer = Path(place) / "answer.json"
        subprocess.run([python, VLLM, answer], input=json.dumps(asked), text=True, check=True, capture_output=True)
        version, *answers = json.loads(answer.read_text())
    cells = {}
    for (name, wanted), found in zip(references.items(), answers, strict=True):
        if "error" in found:
            cells[name] = f"fails: {found['error']}"
            continue
        expected = [float(wanted.logs[place, token]) for place, token in enumerate(wanted.ids[1:])]
        errors = [abs(a - b) for a, b in zip(found["logs"], expected, strict=True)]
        cells[name] = graded(max(errors)) if found["ids"] == wanted.ids[wanted.prompt :] else "WRONG tokens"
    return version, cells


def _error(logs: torch.Tensor, wanted: Reference) -> float:
    return float((logs - wanted.logs).abs().max())


if __name__ == "__main__":
    main()
