"""One operation of the API as data: the routes and the OpenAPI document are both made from these.

Invariant: a handler returns a struct (JSON), bytes, or None (204); whatever it raises becomes the one
error body of `types.Error`. So no handler builds a response or catches an error.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec
import trio
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import Receive

from rayos_vmm.api.body import JSON_MAXIMUM_BYTES, decode, read_limited
from rayos_vmm.config.load import explain
from rayos_vmm.contract.types import Error, ErrorBody
from rayos_vmm.errors import Invalid, RayosError

if TYPE_CHECKING:
    from rayos_vmm.service.service import Service

log = logging.getLogger(__name__)

JSON: Final = "application/json"
BYTES: Final = "application/octet-stream"
PNG: Final = "image/png"
NDJSON: Final = "application/x-ndjson"


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of a handler: the service, the path's name, the decoded query and body."""

    service: Service
    request: Request
    name: str
    query: Any
    body: Any


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An operation.

    Args:
        answers: the struct that comes back as JSON, or None (then `media` is what comes back, or nothing).
        body_media: BYTES where the handler reads the body itself.
        is_long: it may wait for the guest; a client that leaves cancels it.
    """

    method: str
    path: str
    handler: Callable[[Call], Awaitable[Any]]
    summary: str
    query: type[Any] | None = None
    body: type[Any] | None = None
    body_media: str = JSON
    body_is_optional: bool = False
    answers: type[Any] | None = None
    media: str | None = None
    status: int = 200
    is_long: bool = False

    @property
    def command(self) -> str:
        """The name in tokens and in the record, such as `policy.grant`."""
        module = self.handler.__module__.rpartition(".")[2]
        return f"{_NOUNS.get(module, module)}.{self.handler.__name__.strip('_')}"


#: Modules that are named as their paths are, and their commands as they always were.
_NOUNS: Final = {"grant": "policy", "policy": "hierarchy"}


def error_response(error: RayosError) -> Response:
    """The answer that carries an error."""
    body = Error(error=ErrorBody(code=error.code, message=error.message, hint=error.hint))
    return Response(msgspec.json.encode(body), error.status, media_type=JSON)


def as_rayos_error(error: BaseException) -> RayosError:
    """The error to report: ours as it is, also out of a nursery's group; anything else is our bug, and logged."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, RayosError):
        return error
    log.error("A request failed with an error of ours", exc_info=error)
    return RayosError(
        f"the service failed: {type(error).__name__}: {error}",
        hint="this is a bug in rayos; the daemon's log has the traceback",
        code="internal",
    )


def decode_query(connection: HTTPConnection, type_: type[Any]) -> Any:
    """The query string as `type_`.

    Raises:
        Invalid: a parameter is unknown, given twice, or wrong.
    """
    items = connection.query_params.multi_items()
    data = dict(items)
    if len(data) != len(items):
        raise Invalid("a query parameter is given more than once")
    try:
        return msgspec.convert(data, type_, strict=False)
    except msgspec.ValidationError as error:
        raise Invalid(explain(error, "query", data)) from None


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _run(endpoint: Endpoint, call: Call) -> Any:
    if not endpoint.is_long:
        return await endpoint.handler(call)
    result: Any = None
    async with trio.open_nursery() as nursery:

        async def leave() -> None:
            await _until_disconnect(call.request.receive)
            nursery.cancel_scope.cancel()

        nursery.start_soon(leave)
        result = await endpoint.handler(call)
        nursery.cancel_scope.cancel()
    return result


def to_asgi(endpoint: Endpoint, service: Service) -> Callable[[Request], Awaitable[Response]]:
    """The handler as Starlette wants it."""

    async def handle(request: Request) -> Response:
        try:
            query = decode_query(request, endpoint.query or _NoQuery)
            body = None
            if endpoint.body is not None:
                raw = await read_limited(request, JSON_MAXIMUM_BYTES)
                body = (
                    endpoint.body() if not raw and endpoint.body_is_optional else decode(raw, endpoint.body)
                )
            call = Call(service, request, request.path_params.get("name", ""), query, body)
            result = await _run(endpoint, call)
        except Exception as error:  # the supervisor boundary of a request
            return error_response(as_rayos_error(error))
        if isinstance(result, Response):
            return result
        if result is None:
            return Response(status_code=204)
        if isinstance(result, bytes):
            return Response(result, endpoint.status, media_type=endpoint.media)
        return Response(msgspec.json.encode(result), endpoint.status, media_type=JSON)

    return handle


class _NoQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass
