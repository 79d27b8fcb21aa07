"""From a row of the table to a route: a handler is registered for its row, and made into an ASGI endpoint.

Invariant: a handler returns what its row says (a struct, bytes, None for 204) or a response that streams it. What it
raises becomes the one error body of `contract.answers.Error`, so no handler builds an answer or catches an error.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec
import trio
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import Receive

from rayos_vmm.api.body import JSON_MAXIMUM_BYTES, decode, read_limited
from rayos_vmm.api.http.limits import Sparing
from rayos_vmm.config.load import explain
from rayos_vmm.contract.answers import Error, ErrorBody
from rayos_vmm.contract.operation import JSON, Operation
from rayos_vmm.errors import Invalid, RayosError

if TYPE_CHECKING:
    from rayos_vmm.service.service import Service

log = logging.getLogger(__name__)
_failures: Final = Sparing(log, "A request failed with an error of ours")

A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class Call:
    """A handler's argument: the service, the path's names, the decoded query and body."""

    service: Service
    request: Request
    path: dict[str, str]
    query: Any
    body: Any

    @property
    def name(self) -> str:
        """The machine or zone of the path."""
        return self.path["name"]


Handler = Callable[[Call], Awaitable[Any]]
#: By command; filled by `serves` when the modules of this folder are imported.
HANDLERS: Final[dict[str, Handler]] = {}


def serves(
    row: Operation[A],
) -> Callable[[Callable[[Call], Awaitable[A | Response]]], Callable[[Call], Awaitable[A | Response]]]:
    """Registers the handler of a row, which returns what the row says.

    Raises:
        ValueError: the row has one.
    """

    if row.command in HANDLERS:
        raise ValueError(f"{row.command} has a handler: {HANDLERS[row.command]}")

    def register(
        handler: Callable[[Call], Awaitable[A | Response]],
    ) -> Callable[[Call], Awaitable[A | Response]]:
        HANDLERS[row.command] = handler
        return handler

    return register


def error_response(error: RayosError) -> Response:
    """The answer that carries an error."""
    body = Error(error=ErrorBody(code=error.code, message=error.message, hint=error.hint))
    return Response(msgspec.json.encode(body), error.status, media_type=JSON)


def as_rayos_error(error: BaseException) -> RayosError:
    """The error to report: ours as it is, also out of a nursery's group; anything else is our bug, and logged.

    Whoever finds such a bug may ask for ever: one traceback a minute is logged, and how many were left out.
    """
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, RayosError):
        return error
    _failures.error(type(error).__name__, error)
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


async def _run(row: Operation[Any], call: Call) -> Any:
    handler = HANDLERS[row.command]
    if not row.is_long:
        return await handler(call)
    result: Any = None
    async with trio.open_nursery() as nursery:

        async def leave() -> None:
            await _until_disconnect(call.request.receive)
            nursery.cancel_scope.cancel()

        nursery.start_soon(leave)
        result = await handler(call)
        nursery.cancel_scope.cancel()
    return result


async def _body(row: Operation[Any], request: Request) -> Any:
    if row.body is None:
        return None
    raw = await read_limited(request, JSON_MAXIMUM_BYTES)
    return row.body() if not raw and row.body_is_optional else decode(raw, row.body)


def to_asgi(row: Operation[Any], service: Service) -> Callable[[Request], Awaitable[Response]]:
    """The row's endpoint as Starlette wants it."""

    async def handle(request: Request) -> Response:
        try:
            query = decode_query(request, row.query or _NoQuery)
            call = Call(service, request, request.path_params, query, await _body(row, request))
            result = await _run(row, call)
        except Exception as error:  # the supervisor boundary of a request
            return error_response(as_rayos_error(error))
        if isinstance(result, Response):
            return result
        if result is None:
            return Response(status_code=204)
        if isinstance(result, bytes):
            return Response(result, row.status, media_type=row.media)
        return Response(msgspec.json.encode(result), row.status, media_type=JSON)

    return handle


class _NoQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass
