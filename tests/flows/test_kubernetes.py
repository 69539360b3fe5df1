"""Kubernetes, as far as it can be seen without a cluster: the template, what it makes of each deployment, the image."""

import asyncio
import json
import re
import shlex
import uuid
from pathlib import Path

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import Flow, FlowRun
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.schema_tools import validate
from prefect.utilities.schema_tools.validation import ValidationError
from prefect.utilities.templating import apply_values

from flows.fan_out_library import BUILD_LAYERS
from puzzle_core.spec import RuntimeSpec, parse_spec

ROOT = Path(__file__).parents[2]
TEMPLATE = json.loads((ROOT / "deployments/kubernetes/base-job-template.json").read_text())
FILE = yaml.safe_load((ROOT / "deployments/kubernetes/prefect.yaml").read_text())
DEPLOYMENTS = {deployment["name"]: deployment for deployment in FILE["deployments"]}
KUBERNETES = "1.31"
CHECKPOINTS = "/scratch/puzzle/checkpoints"
SECRET = re.compile(r"key|secret|password|token|auth", re.IGNORECASE)


def placeholders(value):
    """Names of all variables in a template."""
    return set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(value)))


def variables(deployment):
    return deployment["work_pool"]["job_variables"]


def check(values):
    validate(values, TEMPLATE["variables"], raise_on_error=True, ignore_required=False)


def test_the_server_takes_the_template_and_every_variable_is_used(prefect_server):
    declared = TEMPLATE["variables"]["properties"]
    assert placeholders(TEMPLATE["job_configuration"]) == declared.keys()
    assert [name for name, variable in declared.items() if not variable.get("description")] == []
    with get_client(sync_client=True) as client:
        asked = WorkPoolCreate(name=f"test-{uuid.uuid4().hex}", type="kubernetes", base_job_template=TEMPLATE)
        assert client.create_work_pool(asked).base_job_template == TEMPLATE


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_every_deployment_loads_and_fits_the_template(name):
    deployment = DEPLOYMENTS[name]
    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    assert name.startswith(flow.name) or name == "build-layers"
    check(variables(deployment))
    assert variables(deployment).keys() <= TEMPLATE["variables"]["properties"].keys()
    parameters = deployment["parameters"]
    runtime = parse_spec(parameters["spec"], name).runtime if "spec" in parameters else RuntimeSpec(**parameters)
    assert runtime.store.startswith("s3://")
    assert runtime.gkd_processes <= max(1, variables(deployment).get("gpus", 0))
    if "spec" in parameters:
        assert f"{runtime.scratch}/checkpoints" == CHECKPOINTS
        assert all(path.startswith("/inputs/") for path in parameters["spec"]["data"]["train_texts"])


def test_every_flow_of_the_other_deployments_has_one_here_and_events_find_theirs():
    shipped = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    flows = [{deployment["entrypoint"] for deployment in file} for file in (shipped, FILE["deployments"])]
    assert flows[0] == flows[1]
    assert "concurrency_limit" not in DEPLOYMENTS[BUILD_LAYERS.partition("/")[2]]
    assert "research-targets" in DEPLOYMENTS  # deployments/automations/new-work.yaml


def test_manifests_fit_the_schemas_of_kubernetes():
    validate_manifest = pytest.importorskip("kubernetes_validate").validate
    for claim in yaml.safe_load_all((ROOT / "deployments/kubernetes/volumes.yaml").read_text()):
        validate_manifest(claim, KUBERNETES, strict=True)
    defaults = {name: variable.get("default") for name, variable in TEMPLATE["variables"]["properties"].items()}
    for name, deployment in DEPLOYMENTS.items():
        values = {"name": name, "command": ["prefect", "flow-run", "execute"], "env": [{"name": "A", "value": "b"}]}
        job = apply_values(TEMPLATE["job_configuration"]["job_manifest"], defaults | values | variables(deployment))
        job["metadata"]["labels"] = job["metadata"]["annotations"] = {"puzzle": name}
        validate_manifest(without_nulls(job), KUBERNETES, strict=True)


def without_nulls(value):
    """What the worker sends: variables without a value are left out."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def test_variables_that_make_no_sense_are_refused():
    for wrong, message in (({"image": "i", "gpus": -1}, "minimum"), ({"gpus": 1}, "'image' is a required")):
        with pytest.raises(ValidationError, match=message):
            check(wrong)


def test_credentials_come_from_a_secret_and_from_nowhere_else():
    pod = TEMPLATE["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "{{ secret_name }}"}}]
    defaults = {name: variable.get("default") for name, variable in TEMPLATE["variables"]["properties"].items()}
    assert not defaults["env"]
    for deployment in DEPLOYMENTS.values():
        named = [name for name in variables(deployment) if SECRET.search(name)]
        assert set(named) <= {"secret_name"}
        assert "env" not in variables(deployment)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_job_of_every_deployment(name, prefect_server):
    worker = pytest.importorskip("prefect_kubernetes.worker", reason="prefect-kubernetes is not installed here")
    deployment = DEPLOYMENTS[name]
    asked = variables(deployment)
    flow = Flow(id=uuid.uuid4(), name="flow")

    async def prepare():
        made = await worker.KubernetesWorkerJobConfiguration.from_template_and_values(TEMPLATE, asked)
        made.prepare_for_flow_run(FlowRun(id=uuid.uuid4(), name="brave-run", flow_id=flow.id), flow=flow)
        return made

    job = asyncio.run(prepare()).job_manifest
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert placeholders(job) == set()
    assert (job["apiVersion"], job["kind"], pod["restartPolicy"]) == ("batch/v1", "Job", "Never")
    assert container["image"] == asked["image"]
    assert container["args"] == ["prefect", "flow-run", "execute"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == asked.get("gpus", 0)
    assert container["envFrom"] == [{"secretRef": {"name": "puzzle"}}]
    assert [entry["name"] for entry in container["env"] if SECRET.search(entry["name"]) and entry.get("value")] == []
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted.pop("inputs") == "/inputs"
    assert mounted.pop("checkpoints") == CHECKPOINTS
    assert mounted == {"scratch": "/scratch", "shared-memory": "/dev/shm"}
    assert {volume["name"] for volume in pod["volumes"]} == {"inputs", "checkpoints", *mounted}
    assert pod["securityContext"]["runAsUser"] == 10001


def test_the_image_has_what_it_copies_and_runs_as_the_jobs_user():
    lines = (ROOT / "deployments/Dockerfile").read_text().splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [source for step, rest in steps if step == "COPY" for source in shlex.split(rest)[:-1]]
    assert set(copied) == let_in
    assert all((ROOT / source).exists() for source in copied)
    assert {"puzzle_core", "tasks", "flows", "constraints.txt"} <= set(copied)
    order = [step for step, _ in steps]
    assert order.index("USER") > max(number for number, step in enumerate(order) if step in ("RUN", "COPY"))
    assert any("--uid 10001" in rest for step, rest in steps if step == "RUN")
