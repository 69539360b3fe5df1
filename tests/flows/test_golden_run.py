"""The numbers of one whole run, held by a golden: code that moves computes what it computed.

A golden of values and not of bytes: machines differ in the last digits. `python -m pytest` with `--write-golden` writes
it anew, after the `version` of the stage that changed was raised.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from puzzle_core import work

GOLDEN = Path(__file__).parents[1] / "goldens" / "pico_run.json"
TOLERANCE = 2e-3
WITHOUT_NUMBERS = {
    "cost": "measured on this machine; what a formula gives is held in tests/puzzle_core/cost",
    "gradients": "not in this run; tests/puzzle_core/test_fisher.py compares them with autograd",
    "influence": "not in this run; tests/puzzle_core/test_influence.py compares it with transformers",
    "timing": "measured on this machine",
    "refine": "not in this run; it holds numbers of evaluations and searches",
    "report": "pages of what the other stages hold",
}


def numbers(store: Path) -> dict[str, Any]:
    """What the records of a run hold, by stage version and by what they are of; times and names of runs left out."""
    found: dict[str, Any] = {}
    for file in sorted(store.glob("[!.]*/v*/*/record.json")):
        manifest = json.loads(file.read_text())
        stage = "/".join(manifest["key"].split("/")[:2])
        values = _numbers_of(stage.split("/")[0], manifest["work"], manifest["record"], _mean_sizes(file.parent))
        found.setdefault(stage, {}).update(values)
    for stage, values in found.items():
        if stage.startswith(
            "evaluation/"
        ):  # models have keys that depend on the parent's bytes, so they go by their KL
            found[stage] = {"models": sorted(values.values())}
    return found


def _mean_sizes(artifact: Path) -> list[float]:
    """The mean absolute value of every tensor of an artifact, by file and name."""
    tensors = [
        tensor for file in sorted(artifact.glob("*.safetensors")) for _, tensor in sorted(load_file(file).items())
    ]
    return [tensor.double().abs().mean().item() for tensor in tensors]


def _numbers_of(stage: str, work: dict[str, Any], record: dict[str, Any], sizes: list[float]) -> dict[str, Any]:
    match stage:
        case "tokens":
            return {work["split"]: [record["windows"], record["tokens"], record["bytes_per_token"], *sizes]}
        case "importance":
            return {"contributions": sizes}
        case "bld":
            return {f"{work['layer']} {work['variant']}": [record["initial_loss"], record["final_loss"], *sizes]}
        case "score":
            block = record["block"]
            values = [record["kl_nats_per_token"], record["lm_loss_increase_nats_per_token"], record["top1_agreement"]]
            return {f"{work['layer']} {block['attention']}+{block['ffn']}": values}
        case "gkd":
            held_back = [point["kl_nats_per_token"] for point in record["held_back"]]
            return {
                "losses": [list(step.values()) for step in record["curve"]],
                "held back": held_back,
                "weights": sizes,
            }
        case "evaluation":
            names = ("kl_nats_per_token", "lm_loss_nats_per_token", "top1_accuracy", "top1_agreement")
            return {str(work["child"]): [record[name] for name in names]}
        case "search":
            best = record["solutions"][0]
            layers = best["architecture"]["layers"]
            return {"score": best["score"], "layers": [f"{b['attention']}+{b['ffn']}" for b in layers]}
        case "child":
            return {f"{record['parameters']} parameters": [record["parameter_bytes"], *sizes]}
    return {}


def differences(golden: Any, found: Any, place: str = "") -> list[str]:
    """Where two nests of numbers and texts differ by more than the tolerance."""
    if isinstance(golden, dict) and isinstance(found, dict):
        names = sorted(golden.keys() | found.keys())
        return [d for n in names for d in differences(golden.get(n), found.get(n), f"{place}/{n}")]
    if isinstance(golden, list) and isinstance(found, list) and len(golden) == len(found):
        return [
            d for n, (a, b) in enumerate(zip(golden, found, strict=True)) for d in differences(a, b, f"{place}/{n}")
        ]
    if isinstance(golden, int | float) and isinstance(found, int | float):
        same = math.isclose(golden, found, rel_tol=TOLERANCE, abs_tol=1e-6)
        return [] if same else [f"{place}: {golden} became {found}"]
    return [] if golden == found else [f"{place}: {golden} became {found}"]


def test_a_run_computes_what_it_did(finished, request):
    found = numbers(Path(finished.content["runtime"]["store"]))
    if request.config.getoption("--write-golden"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
        pytest.skip("the golden is written anew")
    assert differences(json.loads(GOLDEN.read_text()), found) == []


def one_percent_more(value: Any) -> Any:
    """The same nest with every fraction a hundredth larger."""
    if isinstance(value, dict):
        return {name: one_percent_more(part) for name, part in value.items()}
    if isinstance(value, list):
        return [one_percent_more(part) for part in value]
    return value * 1.01 if isinstance(value, float) else value


def stages() -> dict[str, str]:
    """Every stage, with the version of what it computes."""
    works = [kind for kind in vars(work).values() if isinstance(kind, type) and "stage" in vars(kind)]
    return {kind.stage: f"{kind.stage}/v{kind.version}" for kind in works}


def test_every_stage_that_computes_is_held():
    assert {stages()[stage] for stage in stages().keys() - WITHOUT_NUMBERS.keys()} == {
        stage for stage, values in json.loads(GOLDEN.read_text()).items() if values
    }


@pytest.mark.parametrize("stage", sorted(stages().keys() - WITHOUT_NUMBERS.keys()))
def test_numbers_that_are_one_percent_off_are_seen(stage):
    golden, name = json.loads(GOLDEN.read_text()), stages()[stage]
    assert differences(golden, golden | {name: one_percent_more(golden[name])})
