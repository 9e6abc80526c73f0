"""The HTTP application: routes, keys, limits and answers."""

from __future__ import annotations

import contextlib
import ipaddress
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi import Path as PathParameter
from fastapi import Query as Parameter
from fastapi.responses import FileResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from streamctl.config import MAX_K
from streamctl.serving import metrics, problems, schemas
from streamctl.serving.problems import Problem, described
from streamctl.serving.service import Service, Settings

MAX_BODY = 1 << 20  # bytes
PAGE = Path(__file__).parent / "page"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_bearer = HTTPBearer(auto_error=False, description="An API key.")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
Id = Annotated[str, PathParameter(min_length=1, max_length=200)]
Words = Annotated[str, Parameter(max_length=200, description="Words, or their beginnings.")]
Limit = Annotated[int, Parameter(ge=1, le=100)]
Few = Annotated[int, Parameter(ge=1, le=MAX_K, description="Items wanted.")]


def create_app(settings: Settings) -> FastAPI:
    """The application.

    Raises:
        StreamctlError: the key file is wrong.
    """
    service = Service(settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="streamctl",
        version=version("streamctl"),
        description="Recommendations by slow thinking, and the thoughts behind them.",
        lifespan=lifespan,
        redoc_url=None,
        docs_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    problems.install(app)
    app.add_middleware(Limits, service=service)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )
    _add_operations(app, service)
    _add_recommend(app, service)
    _add_catalogue(app, service)
    _add_changes(app, service)
    _add_page(app)
    _describe(app)
    return app


class Limits:
    """What surrounds every request: the size of its body, a full queue, the headers."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = self._with_headers(scope, send)
        if scope["method"] == "POST" and scope["path"].startswith("/v1/recommend"):
            refusal = self.service.refusal()
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
                raise HTTPException(413, f"the body is larger than {MAX_BODY} bytes")
            return message

        await self.app(scope, counting, send)

    def _with_headers(self, scope: Scope, send: Send) -> Send:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Set by the router; a path that leads nowhere must not become a label.
                route = getattr(scope.get("route"), "path", "none")
                metrics.REQUESTS.labels(route, message["status"]).inc()
                headers = MutableHeaders(scope=message)
                headers.setdefault("Content-Security-Policy", PAGE_POLICY)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers["Cross-Origin-Resource-Policy"] = "same-origin"
                headers.setdefault("Cache-Control", "no-store")
                if self.service.closing:
                    headers["Connection"] = "close"
            await send(message)

        return sending


def _guard(needed: str) -> Callable[..., Awaitable[None]]:
    """What lets a request pass that may read, or write."""

    async def authorize(request: Request, credentials: Credentials) -> None:
        service: Service = request.app.state.service
        if needed == "read" and not service.keys.guards_reading:
            # Without keys a page from elsewhere must not reach us under a name of its own.
            if service.settings.open_to_all or is_loopback(request.url.hostname or ""):
                return
            raise Problem(421, "without API keys only requests to localhost are answered")
        if credentials is None and not service.keys.guards_reading:
            raise Problem(403, "changes are made only with a write key, and none is set")
        asked = {"WWW-Authenticate": "Bearer"}
        if credentials is None:
            raise Problem(401, "an API key is needed: Authorization: Bearer KEY", headers=asked)
        right = service.keys.right_of(credentials.credentials)
        if right is None:
            raise Problem(401, "unknown API key", headers=asked)
        if needed == "write" and right != "write":
            raise Problem(403, "this API key may read only")

    return authorize


def is_loopback(host: str) -> bool:
    """Whether an address or name means this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


READ, WRITE = ([Depends(_guard(right))] for right in ("read", "write"))


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", tags=["operations"], response_model=schemas.Health)
    async def alive() -> dict[str, Any]:
        """The process answers."""
        return {"status": "draining" if service.draining else "ok"}

    @app.get(
        "/readyz", tags=["operations"], response_model=schemas.Health, responses=described(503)
    )
    async def ready() -> dict[str, Any]:
        """A model is loaded and warm, and the server is not about to stop."""
        if not service.ready:
            raise Problem(503, "draining" if service.draining else "loading", retry_after=1)
        return _health(service)

    @app.get(
        "/metrics",
        tags=["operations"],
        dependencies=READ,
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **described(401, 421)},
    )
    async def prometheus() -> Response:
        """Counters and histograms for Prometheus."""
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


def _health(service: Service) -> dict[str, Any]:
    about = service.served.about
    return {"status": "ok", **{key: about[key] for key in ("model", "method", "methods")}}


def _add_recommend(app: FastAPI, service: Service) -> None:
    options = {
        "tags": ["recommend"],
        "dependencies": READ,
        "responses": described(400, 401, 413, 421, 422, 429, 503, 504),
    }

    @app.post("/v1/recommend", response_model=schemas.Answer, **options)
    async def recommend(query: schemas.Query) -> Response:
        """The items a user is likely to take next, and with `explain` the reasoning."""
        [answer] = await service.recommend([query])
        return _json(answer)

    @app.post("/v1/recommend/batch", response_model=schemas.BatchAnswer, **options)
    async def recommend_batch(batch: schemas.Batch) -> Response:
        """Several questions at once, answered in their order."""
        return _json({"answers": await service.recommend(batch.requests, "/requests")})


def _json(content: dict[str, Any]) -> Response:
    """Answers are made of our own values: they need no second validation on the way out."""
    return Response(json.dumps(content), media_type="application/json")


def _add_catalogue(app: FastAPI, service: Service) -> None:
    options = {"tags": ["catalogue"], "dependencies": READ}
    some, one = described(401, 421, 422, 503), described(401, 404, 421, 422, 503)

    @app.get("/v1/items", response_model=schemas.Found, responses=some, **options)
    def search(q: Words = "", limit: Limit = 20) -> dict[str, Any]:
        """Search by title; without words, the items that most users took."""
        return service.served.slow.search(q, limit)

    @app.get(
        "/v1/items/{id:path}/similar", response_model=schemas.Similar, responses=one, **options
    )
    async def similar(id: Id, k: Few = 10) -> dict[str, Any]:
        """Items whose texts are most alike."""
        store = service.served.store
        found = await service.served.ask("similar", item=store.present(id), k=k)
        names = store.names([item for item, _ in found])
        return {"items": [{**names[item], "score": score} for item, score in found]}

    @app.get("/v1/items/{id:path}", response_model=schemas.Item, responses=one, **options)
    async def item(id: Id) -> dict[str, Any]:
        """One item and its codes."""
        return service.served.store.item(id)

    @app.get("/v1/users", response_model=schemas.Users, responses=some, **options)
    def users(q: Words = "", limit: Limit = 20) -> dict[str, Any]:
        """Users whose id begins with `q`; without it, some spread over all of them."""
        return service.served.slow.users(q, limit)

    @app.get("/v1/users/{id:path}", response_model=schemas.User, responses=one, **options)
    async def user(id: Id) -> dict[str, Any]:
        """What the model reads of one user."""
        return service.served.store.described_user(id, service.served.about["history"])

    @app.get("/v1/run", responses=described(401, 421, 503), **options)
    async def run() -> dict[str, Any]:
        """The run: its stages, the metrics table, training curves, and how codes are used."""
        return await service.served.ask("report")


def _add_changes(app: FastAPI, service: Service) -> None:
    options = {"tags": ["changes"], "dependencies": WRITE}
    failures = (400, 401, 403, 413, 422, 503, 507)
    there = {"status_code": 204, "responses": described(*failures, 404), **options}

    @app.post(
        "/v1/items",
        status_code=201,
        response_model=schemas.Item,
        responses=described(*failures, 409),
        **options,
    )
    async def add(new: schemas.NewItem) -> dict[str, Any]:
        """Add an item: it gets codes from its text and can be recommended at once."""
        return await service.add(new)

    @app.delete("/v1/items/{id:path}", **there)
    async def remove(id: Id) -> None:
        """Take an item out; histories that hold it stay valid."""
        await service.change("remove", id)

    @app.post(
        "/v1/interactions",
        status_code=201,
        response_model=schemas.User,
        responses=described(*failures),
        **options,
    )
    async def take(taken: schemas.Taken) -> dict[str, Any]:
        """Add what a user took: to the history that is read, and to the evidence for others."""
        return await service.take(taken)

    @app.delete("/v1/users/{id:path}", **there)
    async def forget(id: Id) -> None:
        """Forget a user: what came while serving is deleted, the log's history is not read."""
        await service.change("forget", id)

    @app.post(
        "/v1/reload",
        response_model=schemas.Health,
        responses=described(400, 401, 403, 409, 413, 422, 503),
        **options,
    )
    async def reload(which: schemas.Reload) -> dict[str, Any]:
        """Serve another run, or the present one as it is on the disk now."""
        await service.reload(which.run)
        return _health(service)


def _add_page(app: FastAPI) -> None:
    async def index() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    async def docs() -> FileResponse:
        return FileResponse(PAGE / "docs.html")

    app.get("/", include_in_schema=False)(index)
    app.get("/docs", include_in_schema=False)(docs)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")


def _describe(app: FastAPI) -> None:
    """Put the problem's schema into the OpenAPI."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            models = original()["components"]["schemas"]
            template = "#/components/schemas/{model}"
            problem = problems.ProblemDetails.model_json_schema(ref_template=template)
            models.update(problem.pop("$defs"), ProblemDetails=problem)
        return app.openapi_schema

    app.openapi = openapi
