"""Prefect's server for loopback, which answers requests for this machine's own names and from its own UI alone.

Prefect checks neither the `Host` header (a page can give its own name this machine's address) nor the `Origin` of a
WebSocket or of a plain form. This module wraps Prefect's application in these two checks and serves it.

    python -m flows.services.server_app PORT
"""

import os
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from puzzle_core.start_up import lasting_imports

HOSTS = ("127.0.0.1", "localhost")
Message = MutableMapping[str, Any]  # as ASGI defines its scopes and messages
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


def origins(port: int) -> list[str]:
    """The origins of the UI of a server on this port."""
    return [f"http://{host}:{port}" for host in HOSTS]


class LocalOnly:
    """An ASGI application that refuses foreign hosts and origins with status 403."""

    def __init__(self, app: Application, port: int):
        self._app = app
        self._hosts = {name.encode() for host in HOSTS for name in (host, f"{host}:{port}")}
        self._origins = {origin.encode() for origin in origins(port)}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Check a request, and pass it on or refuse it."""
        if scope["type"] == "lifespan" or self._is_local(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send(
                {"type": "http.response.body", "body": b"This server answers its own UI and clients here alone."}
            )

    def _is_local(self, scope: Message) -> bool:
        hosts = [value.lower() for name, value in scope["headers"] if name == b"host"]
        origins_sent = [value.lower() for name, value in scope["headers"] if name == b"origin"]
        return len(hosts) == 1 and hosts[0] in self._hosts and self._origins.issuperset(origins_sent)


def main() -> None:
    """Serve until a signal."""
    os.environ["PREFECT__SERVER_FINAL"] = "1"  # as `prefect server start` sets it
    with lasting_imports():
        import uvicorn
        from prefect.server.api.server import create_app

        app = create_app()
    port = int(sys.argv[1])
    uvicorn.run(
        LocalOnly(app, port),  # type: ignore[arg-type]
        host="127.0.0.1",
        port=port,
        timeout_keep_alive=5,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
