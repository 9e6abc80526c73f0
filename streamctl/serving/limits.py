"""What surrounds every request: body size, security headers, closing connections in a drain."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from streamctl.serving.metrics import REQUESTS
from streamctl.serving.problems import Problem

MAX_BODY = 1 << 20  # bytes
TOO_LARGE = f"the body is larger than {MAX_BODY} bytes"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Limits:
    """Refuses bodies over `MAX_BODY` before they are read whole, and sets the headers.

    Args:
        app: what it wraps.
        closing: says whether connections should end with their next answer (the drain).
        overloaded: the refusal that requests for recommendations get now, or None.
    """

    def __init__(
        self,
        app: ASGIApp,
        closing: Callable[[], bool],
        overloaded: Callable[[], Awaitable[Problem | None]],
    ):
        self.app, self.closing, self.overloaded = app, closing, overloaded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = self._with_headers(scope, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared[:20]) > MAX_BODY:
            await Problem(413, TOO_LARGE).response()(scope, receive, send)
            return
        if scope["method"] == "POST" and scope["path"].startswith("/v1/recommend"):
            refusal = await self.overloaded()
            if refusal is not None:
                await refusal.response()(scope, receive, send)
                return
        received = 0

        async def counting() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY:
                # Of all exceptions FastAPI lets only this one through while it reads a body.
                raise HTTPException(413, TOO_LARGE)
            return message

        await self.app(scope, counting, send)

    def _with_headers(self, scope: Scope, send: Send) -> Send:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Set by the router; a path that leads nowhere must not become a label.
                route = getattr(scope.get("route"), "path", "none")
                REQUESTS.labels(route, message["status"]).inc()
                headers = MutableHeaders(scope=message)
                headers.setdefault("Content-Security-Policy", PAGE_POLICY)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers["Cross-Origin-Resource-Policy"] = "same-origin"
                headers.setdefault("Cache-Control", "no-store")
                if self.closing():
                    headers["Connection"] = "close"
            await send(message)

        return sending
