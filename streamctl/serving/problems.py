"""Errors as answers: problem+json (RFC 9457) with the field at fault."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from streamctl.errors import StreamctlError
from streamctl.serving.store import Refused

MEDIA_TYPE = "application/problem+json"
_TYPE = re.compile(r"(constrained-|literal\[|function-|list\[)")


class FieldError(BaseModel):
    """One thing wrong in a request."""

    field: str = Field(description="JSON pointer into the body, or the parameter's name.")
    detail: str


class ProblemDetails(BaseModel):
    """RFC 9457 problem details."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[FieldError] = []


class Problem(Exception):
    """An answer that is not a success.

    Args:
        status: the HTTP status.
        detail: what happened and what would put it right.
        errors: (field, detail) of each field at fault.
        retry_after: seconds after which a try may succeed.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        errors: Sequence[tuple[str, str]] = (),
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(detail)
        self.status, self.detail, self.errors = status, detail, list(errors)
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))

    def response(self) -> Response:
        body = {  # by hand: pydantic takes no lone surrogates, which a request may hold
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "errors": [{"field": field, "detail": detail} for field, detail in self.errors],
        }
        # In ASCII: UTF-8 cannot carry lone surrogates either.
        return Response(json.dumps(body), self.status, self.headers, MEDIA_TYPE)


def described(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` argument of a route that may answer with these problems."""
    schema = {"$ref": "#/components/schemas/ProblemDetails"}
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {MEDIA_TYPE: {"schema": schema}},
        }
        for status in statuses
    }


def install(app: FastAPI) -> None:
    """Answer every error of the application with problem+json."""

    async def answer(request: Request, error: Exception) -> Response:
        problem = _as_problem(error)
        if problem.status in (404, 405) and problem.detail == HTTPStatus(problem.status).phrase:
            problem.detail += f": {request.method} {request.url.path}; /docs describes the API"
        return problem.response()

    kinds = Problem, Refused, StreamctlError, RequestValidationError, HTTPException, Exception
    for kind in kinds:
        app.add_exception_handler(kind, answer)


def _as_problem(error: Exception) -> Problem:
    match error:
        case Problem():
            return error
        case Refused(kind=kind, field=field, detail=detail):
            status = {"invalid": 422, "unknown": 404, "taken": 409}[kind]
            return Problem(status, f"{field}: {detail}", errors=[(field, detail)])
        case StreamctlError():
            return Problem(503, str(error))
        case HTTPException(status_code=status):
            return Problem(status, str(error.detail), headers=error.headers)
        case RequestValidationError():
            found: dict[str, list[str]] = {}
            for one in error.errors()[:20]:
                field, text = _field_error(one)
                found.setdefault(field, []).append(text)
            # One value that is none of several types is at fault once.
            errors = [(field, ", or ".join(texts)) for field, texts in found.items()]
            detail = "; ".join(f"{field}: {text}" for field, text in errors[:3])
            return Problem(422, detail, errors=errors)
    return Problem(500, "the server failed; its log has the traceback")


def _field_error(error: dict[str, Any]) -> tuple[str, str]:
    """The pointer to a value at fault and what is wrong with it."""
    kind, location = error["type"], error["loc"]
    if kind == "json_invalid":
        return "/", f"not JSON at character {location[-1]}: {error['ctx']['error']}"
    text = error["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        text = "there is no such field"
    if kind == "model_attributes_type" and location == ("body",):
        text = "a JSON object, sent with `Content-Type: application/json`, is expected"
    return _pointer(location), text


def _pointer(location: Sequence[str | int]) -> str:
    """`("body", "history", 3)` as `/history/3`; a parameter as its name."""
    where, *rest = location
    # Which of several types was tried is pydantic's business.
    rest = [part for part in rest if not _TYPE.match(str(part))]
    if where == "body":
        return "/" + "/".join(str(part) for part in rest)
    return str(rest[0]) if rest else str(where)
