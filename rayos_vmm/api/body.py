"""Request bodies: JSON that means one thing only, of a bounded size.

Invariant: what passes has been read the same way by every JSON reader (RFC 8259, 4 and 8): UTF-8 without
lone surrogates, no name twice in an object, no NaN or Infinity, nesting of at most `DEPTH_MAXIMUM`.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, NoReturn, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from rayos_images.guest.protocol import MAX_DATA
from rayos_vmm.config.load import explain
from rayos_vmm.errors import Invalid, Malformed, TooLarge

JSON_MAXIMUM_BYTES: Final = 1 << 20
FILE_MAXIMUM_BYTES: Final = MAX_DATA  # of the guest's agent
DEPTH_MAXIMUM: Final = 64
#: A high half without its low one, or a low one without its high (RFC 8259, 8.2).
_LONE_SURROGATE: Final = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)

T = TypeVar("T")


async def read_limited(request: Request, maximum_bytes: int) -> bytes:
    """The whole body.

    Raises:
        TooLarge: it announces, or turns out to have, more than `maximum_bytes`; the rest is not read.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 19 or int(announced) > maximum_bytes):
        raise TooLarge(f"a body of {announced[:19]} bytes exceeds the {maximum_bytes} that are allowed here")
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > maximum_bytes:
                raise TooLarge(f"the body exceeds the {maximum_bytes} bytes that are allowed here")
    except ClientDisconnect:
        why = "the client left, or stopped sending, before its body was complete"
        raise Malformed(why) from None
    return bytes(body)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Malformed(f"the name {twice[:80]!r} appears more than once in an object")
    return seen


def _not_a_number(constant: str) -> NoReturn:
    raise Malformed(f"{constant} is not JSON")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH_MAXIMUM):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise Malformed(f"the JSON is nested deeper than {DEPTH_MAXIMUM} levels")


def _whole(value: Any) -> Any:
    """The same value with 1.0 as 1: JSON Schema's integers are numbers without a fraction, however they are written."""
    if isinstance(value, dict):
        return {key: _whole(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_whole(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53 else value


def decode(body: bytes, type_: type[T]) -> T:
    """The body as `type_`.

    Raises:
        Malformed: not JSON, or ambiguous.
        Invalid: JSON of another shape; the message has the key's path.
    """
    try:
        data = json.loads(body.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_not_a_number)
        _check_depth(data)
        # Not from `data`: its strings may hold lone surrogates and its numbers infinities; these bytes may not.
        try:
            return msgspec.json.decode(body, type=type_)
        except msgspec.ValidationError:
            if (whole := _whole(data)) == data and repr(whole) == repr(data):
                raise
            msgspec.json.decode(body)  # all of it, before it is looked at again
            return msgspec.convert(whole, type_)
    except UnicodeDecodeError as error:
        raise Malformed(f"byte {error.start} of the body is not UTF-8") from None
    except RecursionError:
        raise Malformed(f"the JSON is nested deeper than {DEPTH_MAXIMUM} levels") from None
    except msgspec.ValidationError as error:
        raise Invalid(explain(error, data=data)) from None
    except (ValueError, msgspec.DecodeError) as error:
        if found := _LONE_SURROGATE.search(body):
            half = found[0].decode("ascii")
            raise Malformed(f"a string of the body holds {half}, half of a surrogate pair") from None
        # ValueError: json.JSONDecodeError, and integers longer than Python converts.
        raise Malformed(f"the body is not JSON: {error}") from None
