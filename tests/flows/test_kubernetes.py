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

from puzzle_core.spec import parse_spec

ROOT = Path(__file__).parents[2]
TEMPLATE = json.loads((ROOT / "deployments/kubernetes/base-job-template.json").read_text())
FILE = yaml.safe_load((ROOT / "deployments/kubernetes/prefect.yaml").read_text())
DEPLOYMENTS = {deployment["name"]: deployment for deployment in FILE["deployments"]}
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
    assert name.startswith(flow.name)
    spec = parse_spec(deployment["parameters"]["spec"], name)
    check(variables(deployment))
    assert variables(deployment).keys() <= TEMPLATE["variables"]["properties"].keys()
    assert spec.runtime.store.startswith("s3://")
    assert spec.runtime.scratch.startswith("/scratch/")
    assert spec.runtime.gkd_processes <= max(1, variables(deployment)["gpus"])


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
    assert container["resources"]["limits"]["nvidia.com/gpu"] == asked["gpus"]
    assert container["envFrom"] == [{"secretRef": {"name": "puzzle"}}]
    assert [entry["name"] for entry in container["env"] if SECRET.search(entry["name"]) and entry.get("value")] == []
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"scratch": "/scratch", "shared-memory": "/dev/shm"}
    assert {volume["name"] for volume in pod["volumes"]} == mounted.keys()
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
