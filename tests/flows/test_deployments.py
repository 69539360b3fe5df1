"""`prefect.yaml`: every flow is deployed, and the form of its parameters is whole and refuses nonsense."""

from pathlib import Path

import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import is_valid_schema, validate
from prefect.utilities.schema_tools.validation import ValidationError

from flows.fan_out_library import BUILD_LAYERS
from puzzle_core.spec import parse_spec
from puzzle_core.spec_file import load_spec
from tests.workflow import merged

ROOT = Path(__file__).parents[2]
FILE = yaml.safe_load((ROOT / "prefect.yaml").read_text())
DEPLOYMENTS = {deployment["name"]: deployment for deployment in FILE["deployments"]}
FLOWS = {"puzzle", "build-library", "fan-out-library", "search-architecture", "train-child", "research-targets"}
FLOWS |= {"add-target"}
OF_FLOWS = {"build-layers": "build-library"}
"""Deployments that are called otherwise than their flow."""
NONSENSE = {
    "unknown key": ({"bdl": {"tokens": 5}}, "'bdl' was unexpected"),
    "unknown key inside": ({"bld": {"batch_token": 5}}, "'batch_token' was unexpected"),
    "out of range": ({"bld": {"tokens": 0}}, "spec.bld.tokens.*0 is less than or equal to the minimum of 0"),
    "share above 1": ({"variants": {"ffn_ratios": [1.5]}}, "1.5 is greater than the maximum of 1"),
    "no choice of ours": ({"target": {"device": "tpu"}}, r"'tpu' is not one of \['auto', 'cpu', 'cuda'\]"),
    "unit of another kind": ({"scenario": {"limits": {"latency": "5GB"}}}, "spec.scenario.limits.latency.*'5GB'"),
    "no unit": ({"scenario": {"limits": {"memory": "80"}}}, "spec.scenario.limits.memory.*'80'"),
    "wrong type": ({"gkd": {"tokens": "many"}}, "'many' is not of type 'integer'"),
    "credentials in the store": ({"runtime": {"store": "s3://me:hidden@bucket"}}, "spec.runtime.store"),
    "credentials of MLflow": ({"runtime": {"mlflow_uri": "http://me:hidden@host"}}, "spec.runtime.mlflow_uri"),
    "name of a run": ({"name": "two/words"}, "spec.name.*'two/words'"),
}


def form_of(deployment):
    return parameter_schema(load_flow_from_entrypoint(deployment["entrypoint"])).model_dump_for_openapi()


def properties(form):
    """Every field of the form, by the record it is in, its own schema and that of the record it refers to as one."""
    for record, definition in form["definitions"].items():
        for name, field in definition.get("properties", {}).items():
            refers = [field, *field.get("anyOf", ())]
            about = [form["definitions"][r["$ref"].rpartition("/")[2]] for r in refers if "$ref" in r]
            said = field.get("description") or "".join(whole.get("description", "") for whole in about)
            yield f"{record}.{name}", field | {"description": said}


def test_every_flow_is_deployed_by_its_module_path():
    assert DEPLOYMENTS.keys() == FLOWS | OF_FLOWS.keys()
    for name, deployment in DEPLOYMENTS.items():
        assert ":" not in deployment["entrypoint"]
        assert load_flow_from_entrypoint(deployment["entrypoint"]).name == OF_FLOWS.get(name, name)


def test_ranges_of_layers_run_beside_each_other_and_their_deployment_is_the_one_that_is_started():
    flow, _, name = BUILD_LAYERS.partition("/")
    assert OF_FLOWS[name] == flow
    free = [name for name, deployment in DEPLOYMENTS.items() if "concurrency_limit" not in deployment]
    assert free == [name, "add-target"]


def test_the_form_asks_for_a_specification_and_for_no_plan():
    fields = {name: set(form_of(deployment)["properties"]) for name, deployment in DEPLOYMENTS.items()}
    assert fields.pop("research-targets") == {"spec", "targets"}
    assert fields.pop("build-library") == fields.pop("build-layers") == {"spec", "layers"}
    assert fields.pop("add-target") == {"target", "scenario", "store", "replace"}
    assert fields.pop("fan-out-library") == {"spec", "ranges", "deployment"}
    assert set(map(frozenset, fields.values())) == {frozenset({"spec"})}


def test_the_form_starts_from_the_quickstart():
    quickstart = load_spec(ROOT / "deployments/specs/quickstart.yaml")
    for name, deployment in DEPLOYMENTS.items():
        given = deployment["parameters"].get("spec", DEPLOYMENTS["puzzle"]["parameters"]["spec"])
        parent = ROOT / given["parent"]["path"]
        assert parse_spec(merged(given, {"parent": {"path": str(parent)}}), name) == quickstart


def test_no_deployment_names_a_place_of_one_machine():
    assert not [value for value in yaml.safe_dump(FILE).split() if value.startswith(("/", "~", "http"))]


def test_new_targets_are_looked_for_by_schedule():
    schedules = DEPLOYMENTS["research-targets"]["schedules"]
    assert [schedule["active"] for schedule in schedules] == [False]  # the first run that finds a library resumes it
    assert (ROOT / DEPLOYMENTS["research-targets"]["parameters"]["targets"]).is_dir()
    assert [name for name, deployment in DEPLOYMENTS.items() if "schedules" in deployment] == ["research-targets"]


def test_every_field_of_the_form_is_explained():
    form = form_of(DEPLOYMENTS["research-targets"])
    assert is_valid_schema(form) is None
    fields = dict(properties(form))
    assert len(fields) > 100
    assert [name for name, field in fields.items() if not field["description"] and "PeakRates" not in name] == []


def test_the_form_has_choices_ranges_and_defaults():
    fields = dict(properties(form_of(DEPLOYMENTS["puzzle"])))
    assert fields["ScoringSpec.composition"]["enum"] == ["pairs", "subblocks"]
    assert fields["DataSpec.sequence_length"]["minimum"] == 8
    assert fields["DataSpec.sequence_length"]["default"] == 256
    assert fields["SearchSpec.alpha"]["exclusiveMaximum"] == 1
    assert fields["LimitsSpec.memory"]["anyOf"][0]["examples"] == ["80GiB", "60%"]


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_parameters_of_a_deployment_fit_its_form(name):
    asks = name == "add-target"  # the form has a part that the person fills in
    validate(DEPLOYMENTS[name]["parameters"], form_of(DEPLOYMENTS[name]), raise_on_error=True, ignore_required=asks)


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused_in_the_form(name):
    change, said = NONSENSE[name]
    deployment = DEPLOYMENTS["puzzle"]
    wrong = merged(deployment["parameters"], {"spec": change})
    with pytest.raises(ValidationError, match=said):
        validate(wrong, form_of(deployment), raise_on_error=True)
