"""The server that a command starts answers its own UI and local clients alone; every server here is on loopback."""

import asyncio
import base64
import json
import os
import urllib.error
import urllib.request

import psutil
import pytest
import websockets
from prefect.client.orchestration import get_client

from flows.cli.main import bypass_proxy
from flows.services.prefect_server import free_port, own_server
from flows.services.up import Ports, services
from tests.sockets import listening


def ask(api, path, body=None, **headers):
    """The status and the headers of the answer to one request, without Prefect's client."""
    data = None if body is None else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"{api}{path}", data, {"content-type": "application/json"} | named)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def port_of(api):
    return int(api.removesuffix("/api").rpartition(":")[2])


def test_a_foreign_page_gets_nothing_and_the_ui_all(prefect_server):
    port = port_of(prefect_server)
    assert ask(prefect_server, "/health")[0] == 200
    for own in (f"http://127.0.0.1:{port}", f"http://localhost:{port}"):
        status, headers, _ = ask(prefect_server, "/health", Origin=own)
        assert (status, headers.get("access-control-allow-origin")) == (200, own)
    for foreign in ("https://elsewhere.example", f"http://127.0.0.1:{port + 1}", "null", f"http://127.0.0.1:{port}.x"):
        status, headers, _ = ask(prefect_server, "/health", Origin=foreign)
        assert status == 403
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("host", ["elsewhere.example", "127.0.0.1.elsewhere.example", "127.0.0.1:1", "0.0.0.0"])
def test_a_foreign_host_is_refused(prefect_server, host):
    assert ask(prefect_server, "/health", Host=host)[0] == 403
    assert ask(prefect_server.removesuffix("/api"), "/ui-settings", Host=host)[0] == 403


def test_a_change_needs_a_token_which_clients_ask_for(prefect_server):
    everything = "/flow_runs/filter"
    assert ask(prefect_server, everything, {})[0] == 403
    token = json.loads(ask(prefect_server, "/csrf-token?client=me")[2])["token"]
    assert ask(prefect_server, everything, {}, Prefect_Csrf_Token=token, Prefect_Csrf_Client="me")[0] == 200
    settings = json.loads(ask(prefect_server.removesuffix("/api"), "/ui-settings")[2])
    assert settings["csrf_enabled"] is True
    with get_client(sync_client=True) as client:
        client.read_flow_runs()


def test_a_web_socket_of_a_foreign_page_is_refused(prefect_server):
    url = prefect_server.replace("http", "ws") + "/events/in"

    async def opens(origin):
        try:
            async with websockets.connect(url, origin=origin, proxy=None):
                return True
        except websockets.exceptions.InvalidStatus:
            return False

    assert asyncio.run(opens(None))
    assert not asyncio.run(opens("https://elsewhere.example"))


def test_a_server_with_a_login_runs_flows_of_who_knows_it(tmp_path, monkeypatch):
    from prefect import flow
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    @flow
    def guarded():
        return 1

    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "me:planted")
    with own_server(tmp_path / "home", free_port()) as api:
        assert ask(api, "/admin/version")[0] == 401
        known = {"Authorization": "Basic " + base64.b64encode(b"me:planted").decode()}
        assert ask(api, "/csrf-token?client=me")[0] == 401
        assert ask(api, "/csrf-token?client=me", **known)[0] == 200
        with temporary_settings({PREFECT_API_URL: api, PREFECT_API_AUTH_STRING: "me:planted"}):
            assert guarded() == 1
            with get_client(sync_client=True) as client:
                assert [run.state_type.value for run in client.read_flow_runs()] == ["COMPLETED"]
    assert (tmp_path / "home").stat().st_mode & 0o077 == 0
    assert all(file.stat().st_mode & 0o077 == 0 for file in (tmp_path / "home").glob("*.db"))


def get_client_of(api):
    """A plain HTTP client of an API, without a login."""
    import httpx

    return httpx.Client(base_url=api)


def test_prefects_server_listens_on_loopback_alone(prefect_server):
    children = psutil.Process().children(recursive=True)
    port = port_of(prefect_server)
    server = next(child for child in children if port in {address.port for address in listening([child])})
    assert {address.ip for address in listening([server, *server.children(recursive=True)])} == {"127.0.0.1"}


def test_the_s3_server_listens_on_loopback_alone(tmp_path):
    """The server is a thread of this process, in which other tests may have left sockets open."""
    pytest.importorskip("moto.server")
    from tests.s3_server import s3_server

    before = listening([psutil.Process()])
    with s3_server("moto", tmp_path) as server:
        opened = listening([psutil.Process()]) - before
        assert {(address.ip, address.port) for address in opened} == {
            ("127.0.0.1", int(server.endpoint.rpartition(":")[2]))
        }


def test_services_are_told_to_listen_on_loopback(tmp_path):
    prefect, mlflow, _ = services(tmp_path, Ports(1, 2))
    assert mlflow.command[mlflow.command.index("--host") + 1] == "127.0.0.1"
    assert prefect.environment["PREFECT_SERVER_API_HOST"] == "127.0.0.1"


@pytest.mark.parametrize("before", ["", "inside.example", "127.0.0.1"])
def test_loopback_is_asked_without_the_proxy_and_the_rest_with_it(monkeypatch, prefect_server, before):
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing answers there
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, before)
    bypass_proxy()
    assert not urllib.request.proxy_bypass("elsewhere.example")
    assert urllib.request.proxy_bypass("inside.example") == (before == "inside.example")
    assert all(urllib.request.proxy_bypass(host) for host in ("127.0.0.1", "localhost"))
    assert ask(prefect_server, "/health")[0] == 200
    with get_client_of(prefect_server) as client:
        assert client.get("/health").status_code == 200
    assert os.environ["no_proxy"].split(",").count("127.0.0.1") == 1
