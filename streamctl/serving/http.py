"""The HTTP application: routes, keys and answers. What is computed is the engine's business."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi import Path as PathParameter
from fastapi import Query as Parameter
from fastapi.responses import FileResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles

from streamctl.serving import metrics, problems, schemas
from streamctl.serving.closing import FIRST_REQUEST_S
from streamctl.serving.limits import Limits
from streamctl.serving.problems import Problem, described
from streamctl.serving.service import Service, Settings

ORPHAN_S = 10  # a worker that nobody tells to stop goes on for so much longer
PAGE = Path(__file__).parent / "page"
_bearer = HTTPBearer(auto_error=False, description="An API key.")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
Id = Annotated[str, PathParameter(min_length=1, max_length=200)]
Words = Annotated[str, Parameter(max_length=200, description="Words, or their beginnings.")]
Limit = Annotated[int, Parameter(ge=1, le=100)]


def create_app(settings: Settings) -> FastAPI:
    """The application of one worker.

    Raises:
        StreamctlError: the key file is wrong.
    """
    service = Service(settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with _draining(service):
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
    app.add_middleware(
        Limits, closing=lambda: service.draining, overloaded=lambda: service.overloaded()
    )
    _add_operations(app, service)
    _add_recommend(app, service)
    _add_catalogue(app, service)
    _add_changes(app, service)
    _add_page(app)
    _describe(app)
    return app


async def _reader(request: Request, credentials: Credentials) -> None:
    _authorize(request, credentials, "read")


async def _writer(request: Request, credentials: Credentials) -> None:
    _authorize(request, credentials, "write")


def _authorize(request: Request, credentials: Credentials, needed: str) -> None:
    service: Service = request.app.state.service
    if needed == "read" and not service.keys.guards_reading:
        _check_host(request, service.settings)
        return
    if credentials is None:
        if not service.keys.guards_reading:
            raise Problem(403, "changes are made only with a write key, and none is set")
        headers = {"WWW-Authenticate": "Bearer"}
        raise Problem(401, "an API key is needed: Authorization: Bearer KEY", headers=headers)
    right = service.keys.right_of(credentials.credentials)
    if right is None:
        raise Problem(401, "unknown API key", headers={"WWW-Authenticate": "Bearer"})
    if needed == "write" and right != "write":
        raise Problem(403, "this API key may read only")


def _check_host(request: Request, settings: Settings) -> None:
    """Without keys a page from elsewhere must not reach us under a name of its own."""
    if settings.open_to_all or is_loopback(request.url.hostname or ""):
        return
    raise Problem(421, "without API keys only requests to localhost are answered")


def is_loopback(host: str) -> bool:
    """Whether an address or name means this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


READ = [Depends(_reader)]
WRITE = [Depends(_writer)]
COMMON = (400, 401, 413, 421, 422, 503)


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", tags=["operations"], response_model=schemas.Health)
    async def alive() -> dict[str, Any]:
        """The process answers."""
        return {"status": "draining" if service.draining else "ok"}

    @app.get(
        "/readyz", tags=["operations"], response_model=schemas.Health, responses=described(503)
    )
    async def ready() -> dict[str, Any]:
        """The model is loaded and warm, and the server is not about to stop."""
        if not service.ready:
            raise Problem(503, "draining" if service.draining else "loading", retry_after=1)
        return _served(service)

    @app.get(
        "/metrics",
        tags=["operations"],
        dependencies=READ,
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **described(401, 421)},
    )
    async def prometheus() -> Response:
        """Counters and histograms for Prometheus."""
        body, kind = metrics.exposition()
        return Response(body, media_type=kind)


def _served(service: Service) -> dict[str, Any]:
    stream = service.engine.stream
    return {"status": "ok", "model": stream.model, "think": stream.think, "most": stream.most}


def _add_recommend(app: FastAPI, service: Service) -> None:
    failures = described(*COMMON, 429, 504)

    @app.post(
        "/v1/recommend",
        tags=["recommend"],
        dependencies=READ,
        response_model=schemas.Answer,
        responses=failures,
    )
    async def recommend(query: schemas.Query) -> Response:
        """The items a user is likely to take next, and with `explain` the reasoning."""
        [(job, timed)] = await service.recommend([query], time.monotonic())
        return _json(_answer(job, timed))

    @app.post(
        "/v1/recommend/batch",
        tags=["recommend"],
        dependencies=READ,
        response_model=schemas.BatchAnswer,
        responses=failures,
    )
    async def recommend_batch(batch: schemas.Batch) -> Response:
        """Several questions at once, answered in their order."""
        pairs = await service.recommend(batch.requests, time.monotonic())
        return _json({"answers": [_answer(job, timed) for job, timed in pairs]})


def _json(content: dict[str, Any]) -> Response:
    """Answers are made of our own values: they need no second validation on the way out."""
    import json

    return Response(json.dumps(content), media_type="application/json")


def _answer(job: Any, timed: Any) -> dict[str, Any]:
    return {
        **timed.answer,
        "think": job.think,
        "mode": job.mode,
        "model": job.model,
        "timing": {
            "queue_ms": round(timed.queue_s * 1e3, 2),
            "compute_ms": round(timed.compute_s * 1e3, 2),
            "batch": timed.batch,
        },
    }


def _add_catalogue(app: FastAPI, service: Service) -> None:
    options = {"tags": ["catalogue"], "dependencies": READ}

    @app.get(
        "/v1/items",
        response_model=schemas.Found,
        responses=described(401, 421, 422, 503),
        **options,
    )
    async def search(q: Words = "", limit: Limit = 20) -> dict[str, Any]:
        """Search by title; without words, some items."""
        return service.engine.catalogue.search(q, limit)

    @app.get(
        "/v1/items/{id:path}",
        response_model=schemas.Item,
        responses=described(401, 404, 421, 422, 503),
        **options,
    )
    async def item(id: Id) -> dict[str, Any]:
        """One item and its codes."""
        return service.engine.catalogue.item(id)

    @app.get(
        "/v1/users",
        response_model=schemas.Users,
        responses=described(401, 421, 422, 503),
        **options,
    )
    async def users(q: Words = "", limit: Limit = 20) -> dict[str, Any]:
        """Users whose id begins with `q`; without it, some spread over all of them."""
        return service.engine.users.beginning(q, limit)

    @app.get(
        "/v1/users/{id:path}",
        response_model=schemas.User,
        responses=described(401, 404, 421, 422, 503),
        **options,
    )
    async def user(id: Id) -> dict[str, Any]:
        """What the model reads of one user."""
        return service.engine.user(id)

    @app.get("/v1/run", responses=described(401, 421, 503), **options)
    async def run() -> schemas.RunReport:
        """The run: its stages, the metrics table, training curves, and how codes are used."""
        return service.engine.report()


def _add_changes(app: FastAPI, service: Service) -> None:
    options = {"tags": ["changes"], "dependencies": WRITE}
    failures = (400, 401, 403, 413, 422, 503)

    @app.post(
        "/v1/items",
        status_code=201,
        response_model=schemas.Item,
        responses=described(*failures, 409, 507),
        **options,
    )
    async def add(new: schemas.NewItem) -> dict[str, Any]:
        """Add an item: it gets codes from its text and can be recommended at once."""
        return await service.add(new)

    @app.delete(
        "/v1/items/{id:path}", status_code=204, responses=described(*failures, 404, 507), **options
    )
    async def remove(id: Id) -> None:
        """Take an item out; histories that hold it stay valid."""
        await service.remove(id)

    @app.post(
        "/v1/interactions",
        status_code=201,
        response_model=schemas.User,
        responses=described(*failures, 507),
        **options,
    )
    async def take(taken: schemas.Taken) -> dict[str, Any]:
        """Add what a user took: to the history that is read."""
        return await service.take(taken)

    @app.post(
        "/v1/reload",
        response_model=schemas.Health,
        responses=described(*failures, 409),
        **options,
    )
    async def reload(which: schemas.Reload) -> dict[str, Any]:
        """Serve another run, or the present one as it is on the disk now."""
        await service.reload(which.run)
        return _served(service)


def _add_page(app: FastAPI) -> None:
    async def index() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    async def docs() -> FileResponse:
        return FileResponse(PAGE / "docs.html")

    app.get("/", include_in_schema=False)(index)
    app.get("/docs", include_in_schema=False)(docs)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")


def _describe(app: FastAPI) -> None:
    """Put the problem's schema into the OpenAPI, in the place of FastAPI's own error models."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = original()
            models = document["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                models.pop(name, None)
            template = "#/components/schemas/{model}"
            problem = problems.ProblemDetails.model_json_schema(ref_template=template)
            models.update(problem.pop("$defs"))
            models["ProblemDetails"] = problem
        return app.openapi_schema

    app.openapi = openapi


@contextlib.contextmanager
def _draining(service: Service) -> Iterator[None]:
    """On SIGTERM or SIGINT go on answering for `drain_s`, not ready, then let the server stop.

    One of several workers goes on for longer: it is its parent that says when all stop, and it
    stops by itself only if the parent is gone. A signal to the whole process group reaches it and
    its parent, which passes it on: what comes before the parent can mean the end is no second word.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stops = {sign: signal.getsignal(sign) for sign in (signal.SIGTERM, signal.SIGINT)}
    several = service.settings.workers > 1
    earliest = 0.0  # that the parent can mean the end

    def drain(sign: int, frame: Any) -> None:
        nonlocal earliest
        if service.draining or not service.ready:
            if time.monotonic() >= earliest:
                stops[sign](sign, frame)
            return
        service.draining = True
        seconds = service.settings.drain_s + (ORPHAN_S if several else 0)
        if several:
            earliest = time.monotonic() + service.settings.drain_s + FIRST_REQUEST_S / 2
        timer = threading.Timer(seconds, os.kill, (os.getpid(), sign))
        timer.daemon = True
        timer.start()

    for sign in stops:
        signal.signal(sign, drain)
    try:
        yield
    finally:
        for sign, stop in stops.items():
            signal.signal(sign, stop)
