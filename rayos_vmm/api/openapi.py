"""The OpenAPI 3.1 document, made from the same endpoints and structs that serve the requests."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from rayos_vmm.api.endpoint import BYTES, JSON, Endpoint
from rayos_vmm.config.spec import Name
from rayos_vmm.contract.types import Error, StreamQuery

REF_TEMPLATE: Final = "#/components/schemas/{name}"
CONSOLE_PATH: Final = "/v1/vms/{name}/console"


def _content(media: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {media: {"schema": schema}}}


def _query_parameters(type_: type[Any]) -> list[dict[str, Any]]:
    (schema,), _ = msgspec.json.schema_components([type_], ref_template=REF_TEMPLATE)
    _, components = msgspec.json.schema_components([type_], ref_template=REF_TEMPLATE)
    shape = components[schema["$ref"].rsplit("/", 1)[1]]
    return [
        {"name": name, "in": "query", "required": name in shape.get("required", ()), "schema": parameter}
        for name, parameter in shape["properties"].items()
    ]


def _success(endpoint: Endpoint, schema: dict[str, Any] | None) -> dict[str, Any]:
    if schema is not None:
        return {str(endpoint.status): {"description": "done", **_content(JSON, schema)}}
    if endpoint.media is not None:
        binary = {"type": "string", "contentMediaType": endpoint.media}
        return {str(endpoint.status): {"description": "done", **_content(endpoint.media, binary)}}
    return {"204": {"description": "done"}}


def _operation_id(endpoint: Endpoint) -> str:
    words = re.findall(r"[a-z]+", endpoint.path.removeprefix("/v1/").replace("{name}", "one"))
    return "_".join([endpoint.method.lower(), *words])


def _operation(endpoint: Endpoint, schemas: dict[type[Any], dict[str, Any]]) -> dict[str, Any]:
    answers = endpoint.answers
    operation: dict[str, Any] = {
        "operationId": _operation_id(endpoint),
        "summary": endpoint.summary,
        "responses": {
            **_success(endpoint, None if answers is None else schemas.get(answers, {"type": "object"})),
            "default": {"description": "it failed", **_content(JSON, schemas[Error])},
        },
    }
    parameters = _query_parameters(endpoint.query) if endpoint.query is not None else []
    if parameters:
        operation["parameters"] = parameters
    if endpoint.body is not None:
        operation["requestBody"] = {
            "required": not endpoint.body_is_optional,
            **_content(JSON, schemas[endpoint.body]),
        }
    elif endpoint.body_media == BYTES:
        operation["requestBody"] = {"required": True, **_content(BYTES, {"type": "string"})}
    return operation


def build(endpoints: Iterable[Endpoint], *, version: str) -> dict[str, Any]:
    """The document: every endpoint, the console's WebSocket, every struct under `components`."""
    endpoints = list(endpoints)
    wanted = {Error} | {
        type_
        for endpoint in endpoints
        for type_ in (endpoint.body, endpoint.answers)
        if isinstance(type_, type) and issubclass(type_, msgspec.Struct)
    }
    ordered = sorted(wanted, key=lambda type_: type_.__name__)
    found, components = msgspec.json.schema_components(ordered, ref_template=REF_TEMPLATE)
    schemas = dict(zip(ordered, found, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, schemas)
    paths[CONSOLE_PATH] = {
        "get": {
            "operationId": "console",
            "summary": "A WebSocket to a console",
            "description": (
                "Binary frames are the console's bytes, both ways. Text frames are JSON: from the server "
                '{"offset": N}, the position of the next byte; from the client {"columns": C, "rows": R}.'
            ),
            "parameters": _query_parameters(StreamQuery),
            "responses": {
                "101": {"description": "the WebSocket is open"},
                "default": {"description": "it failed", **_content(JSON, schemas[Error])},
            },
        }
    }
    (name_schema,), _ = msgspec.json.schema_components([Name], ref_template=REF_TEMPLATE)
    for path, item in paths.items():
        item["parameters"] = [
            {
                "name": key,
                "in": "path",
                "required": True,
                "schema": name_schema if key == "name" else {"type": "string"},
            }
            for key in re.findall(r"{([a-z]+)}", path)
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
        "components": {"schemas": components},
    }
