"""Keys of the shipped specifications, held by a golden: a library that exists stays valid when code moves.

A change of a stage's numerics raises that stage's `version`, and this golden is then written anew on purpose:

    python -m tests.puzzle_core.test_keys
"""

import hashlib
import json
from pathlib import Path

import pytest

from puzzle_core.architecture import Architecture, BlockVariant, ModelShape
from puzzle_core.installed_file import PREFIX
from puzzle_core.model.parent import Parent
from puzzle_core.model.parent_config import read_config, shape_of
from puzzle_core.plan import Inputs, Plan
from puzzle_core.spec import ParentSpec, RunSpec
from puzzle_core.spec_file import load_spec
from puzzle_core.work import ReportWork

ROOT = Path(__file__).parents[2]
SPECS = sorted((ROOT / "deployments" / "specs").glob("*.yaml"))
GOLDEN = ROOT / "tests" / "goldens" / "keys.json"
QUICKSTART = ROOT / "deployments" / "specs" / "quickstart.yaml"
SMOLLM2 = ROOT / "tests" / "goldens" / "smollm2"
INPUTS = ("parent", "tokenizer", "train_texts", "held_out_texts", "hardware")


def shape_of_parent(parent: ParentSpec) -> ModelShape:
    """The parent's shape. SmolLM2's is that of a stored config: its package need not be installed."""
    if parent.path.startswith(PREFIX):
        return shape_of(read_config(SMOLLM2).config, SMOLLM2)
    return Parent(parent).shape


def keys(file: Path) -> dict[str, dict[str, str | int]]:
    """By stage: the prefix of its keys, how many works the plan has, and one digest of all their keys."""
    spec = load_spec(file)
    shape = shape_of_parent(spec.parent)
    spec = spec.model_copy(update={"parent": ParentSpec(path="parent")})
    plan = Plan(spec, Inputs(shape=shape, **{name: name for name in INPUTS}))
    block = BlockVariant.parse(f"attn:kv4+ffn:i{shape.ffn_width // 2}")
    child = Architecture.of_parent(shape).replace(1, block).replace(2, BlockVariant.parse("attn:linear+ffn:no_op"))
    report = ReportWork(
        spec=plan.spec_of_content(), shape=shape, search="search", bld=(), scores=(), refine=None, costs=None,
        gkd="gkd", timing=None, models=(),
    )  # fmt: skip
    lazy = Plan(spec.model_copy(update={"scoring": spec.scoring.model_copy(update={"method": "lazy"})}), plan.inputs)
    works = {
        "tokens": [plan.tokens(split) for split in ("calibration", "bld", "gkd", "scoring", "evaluation")],
        "importance": [plan.importance()],
        "bld": plan.all_bld(),
        "score": [*plan.all_scores(), *plan.all_scores(child)],
        "gradients": [work for work in [lazy.gradients()] if work],
        "estimated score": lazy.all_scores(),
        "lazy search": [lazy.search()],
        "cost": list(plan.costs().values()),
        "search": [plan.search(), plan.search(child)],
        "child": [plan.assemble(child)],
        "gkd": [plan.gkd(child)],
        "evaluation": [plan.evaluate(None), plan.evaluate("child"), plan.measure(child)],
        "timing": [work for work in [plan.timing({"child": child}, 1)] if work],
        "report": [report],
    }
    return {
        stage: {
            "works": len(found),
            "prefix": found[0].key.rpartition("/")[0] if found else "",
            "digest": hashlib.sha256(" ".join(work.key for work in found).encode()).hexdigest()[:40],
        }
        for stage, found in works.items()
    }


@pytest.mark.parametrize("file", SPECS, ids=lambda file: file.stem)
def test_keys_are_those_of_before(file):
    assert keys(file) == json.loads(GOLDEN.read_text())[file.stem]


def test_a_report_has_one_key_however_its_places_are_spelled():
    spec = load_spec(QUICKSTART)
    inputs = Inputs(shape=Parent(spec.parent).shape, **{name: name for name in INPUTS})
    elsewhere = {
        "parent": ParentSpec(path="elsewhere", revision="main"),
        "data": spec.data.model_copy(update={"train_texts": ("a.txt", "b.txt"), "held_out_texts": ("c.txt",)}),
    }
    first, second = (Plan(each, inputs).spec_of_content() for each in (spec, spec.model_copy(update=elsewhere)))
    assert first == second
    split = spec.model_copy(update={"data": spec.data.model_copy(update={"held_out_share": 0.1})})
    assert RunSpec.model_validate_json(Plan(split, inputs).spec_of_content().model_dump_json()) == first
    other = inputs.model_copy(update={"train_texts": "others"})
    assert Plan(spec, other).spec_of_content() != first


def test_another_number_of_tokens_changes_the_golden(tmp_path):
    """The golden can fail: one changed setting changes keys of all stages that hang on it."""
    text = QUICKSTART.read_text().replace("../parents", str(ROOT / "deployments" / "parents"))
    changed = tmp_path / QUICKSTART.name
    changed.write_text(text.replace("tokens: 196608", "tokens: 196607"))
    before, after = json.loads(GOLDEN.read_text())[QUICKSTART.stem], keys(changed)
    assert {stage for stage in before if before[stage] != after[stage]} >= {"tokens", "bld", "score", "child", "gkd"}


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({file.stem: keys(file) for file in SPECS}, indent=1) + "\n")
