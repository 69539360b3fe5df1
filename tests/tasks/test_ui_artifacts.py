"""What the UI shows is a view: nothing that goes wrong with it stops a run."""

import logging

from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.services.prefect_server import free_port
from tasks.ui_artifacts import ProgressArtifact, show_architecture, show_library
from tests.workflow import plan_of


def test_what_cannot_be_shown_is_logged(spec_of, prefect_server, caplog):
    plan, context = plan_of(spec_of())
    with caplog.at_level(logging.WARNING):
        show_library(plan, context)
        show_architecture(plan, context, "search/v1/" + "0" * 40)
    assert caplog.text.count("the run goes on") == 2
    assert "show_library" in caplog.text


def test_without_a_server_there_is_only_a_warning(caplog):
    nowhere = f"http://127.0.0.1:{free_port()}/api"
    with (
        temporary_settings({PREFECT_API_URL: nowhere, PREFECT_CLIENT_MAX_RETRIES: 0}),
        caplog.at_level(logging.WARNING),
    ):
        ProgressArtifact("bld", "pico").show(50, "1 of 2")
    assert "did not take an artifact" in caplog.text


def test_progress_is_one_artifact_that_is_updated(prefect_server):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    artifact = ProgressArtifact("bld", "Progress of this test")
    for done in range(5):
        artifact.show(25 * done, f"{done} of 4")
    mine = ArtifactFilter(key=ArtifactFilterKey(any_=["progress-bld-progress-of-this-test"]))
    with get_client(sync_client=True) as client:
        (found,) = client.read_artifacts(artifact_filter=mine)
    assert float(found.data) == 100
    assert found.description == "bld of Progress of this test: 4 of 4"
