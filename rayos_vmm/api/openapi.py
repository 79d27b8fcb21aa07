"""The OpenAPI 3.1 document, made from the table and the structs that serve the requests.

Invariant: every status, media type, range and field that is taken or can come back stands in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from rayos_vmm.contract.answers import Error
from rayos_vmm.contract.asks import PATH_PARAMETERS
from rayos_vmm.contract.operation import BYTES, JSON, NDJSON, Operation
from rayos_vmm.contract.operations import CONSOLE_ATTACH, OPERATIONS
from rayos_vmm.policy.document import Document

REF_TEMPLATE: Final = "#/components/schemas/{name}"
Schema = dict[str, Any]
_CONSOLE: Final = (
    "Binary frames are the console's bytes, both ways. Text frames are JSON: from the server "
    '{"offset": N}, the position of the next byte; from the client {"columns": C, "rows": R}.'
)


class _Schemas:
    """The schemas of all types of the table, made at once: two structs of one name get names of their own."""

    def __init__(self, rows: Iterable[Operation[Any]]) -> None:
        bodies = (type_ for row in rows for type_ in (row.body, row.answer) if type_ not in (None, bytes))
        types = list(dict.fromkeys([Error, Document, *PATH_PARAMETERS.values(), *bodies]))
        found, components = msgspec.json.schema_components(types, ref_template=REF_TEMPLATE)
        self._found: dict[Any, Schema] = dict(zip(types, found, strict=True))
        self.components = dict(sorted(components.items()))

    def __getitem__(self, type_: Any) -> Schema:
        return self._found[type_]


def _content(media: str, schema: Schema) -> Schema:
    return {"content": {media: {"schema": schema}}}


def _query_parameters(type_: type[Any]) -> list[Schema]:
    found, components = msgspec.json.schema_components([type_], ref_template=REF_TEMPLATE)
    shape = components[found[0]["$ref"].rsplit("/", 1)[1]]
    return [
        {"name": name, "in": "query", "required": name in shape.get("required", ()), "schema": parameter}
        for name, parameter in shape["properties"].items()
    ]


def _success(row: Operation[Any], schemas: _Schemas) -> Schema:
    if row is CONSOLE_ATTACH:
        return {"101": {"description": "the WebSocket is open"}}
    if row.answer is None:
        return {"204": {"description": "done"}}
    if row.media == JSON:
        return {str(row.status): {"description": "done", **_content(JSON, schemas[row.answer])}}
    described: Schema = {"type": "string", "contentMediaType": row.media}
    if row.media == NDJSON and row.answer is not bytes:
        described = {"type": "string", "description": f"each line is JSON: {schemas[row.answer]}"}
    return {str(row.status): {"description": "done", **_content(row.media, described)}}


def _sentence(class_: type[Exception]) -> str:
    return (class_.__doc__ or "").split("\n")[0]


def _failures(row: Operation[Any], schemas: _Schemas) -> Schema:
    by_status: dict[int, list[str]] = {}
    for class_ in row.errors:
        by_status.setdefault(class_.status, []).append(_sentence(class_))
    body = _content(JSON, schemas[Error])
    return {
        str(status): {"description": " Or: ".join(dict.fromkeys(why)), **body}
        for status, why in sorted(by_status.items())
    }


def _operation_id(row: Operation[Any]) -> str:
    return row.command.replace(".", "_")


def _links(path: str, expression: str) -> Schema:
    """Every operation on what was made: `expression` tells the last name of the path, those before are the same."""
    *before, last = re.findall(r"{([a-z]+)}", path)
    names = {name: f"$request.path.{name}" for name in before} | {last: expression}
    return {
        _operation_id(row): {"operationId": _operation_id(row), "parameters": names}
        for row in OPERATIONS
        if row.path.startswith(path) and row.parameters == list(names)
    }


def _operation(row: Operation[Any], schemas: _Schemas) -> Schema:
    operation: Schema = {
        "operationId": _operation_id(row),
        "summary": row.summary,
        "tags": [row.command.split(".")[0]],
        "x-rayos-command": row.command,
        "responses": {**_success(row, schemas), **_failures(row, schemas)},
    }
    if row.makes is not None:
        operation["responses"][str(row.success)]["links"] = _links(*row.makes)
    if row is CONSOLE_ATTACH:
        operation["description"] = _CONSOLE
    if row.query is not None:
        operation["parameters"] = _query_parameters(row.query)
    if row.body is not None:
        operation["requestBody"] = {
            "required": not row.body_is_optional,
            **_content(JSON, schemas[row.body]),
        }
    elif row.takes == BYTES:
        operation["requestBody"] = {"required": True, **_content(BYTES, {"type": "string"})}
    return operation


def build(rows: Iterable[Operation[Any]], *, version: str) -> Schema:
    """The document: every row, the console's WebSocket among them, and every struct under `components`."""
    rows = list(rows)
    schemas = _Schemas(rows)
    paths: dict[str, Schema] = {}
    for row in rows:
        item = paths.setdefault(row.path, {})
        item[row.method.lower()] = _operation(row, schemas)
        item["parameters"] = [
            {"name": key, "in": "path", "required": True, "schema": schemas[PATH_PARAMETERS[key]]}
            for key in re.findall(r"{([a-z]+)}", row.path)
        ]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "RayOS VMM",
            "version": version,
            "description": "Virtual machines whose devices are ours.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": schemas.components},
    }
