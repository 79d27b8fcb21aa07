"""The reference of every configuration key, made from the structs that read it: `python -m rayos_vmm.config.reference`.

A key's type, default and limits come from its annotation, its note from the comment beside it in the source.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, Final

import msgspec
from msgspec import inspect as shapes

from rayos_vmm.config.settings import AuditConfig, ServiceConfig
from rayos_vmm.config.spec import VmSpec

HEAD: Final = """\
# Configuration

Every key of a TOML file for `rayos run --config FILE` and `rayos serve --config FILE`. The same structs are the JSON
bodies of the API and the keywords of `guest_factory`. An unknown key, a wrong type or a value outside its limits is an
error that names the key and what is allowed. [example.toml](example.toml) is a file that our tests load.

This page is made by `python -m rayos_vmm.config.reference` from `rayos_vmm/config/`; a test keeps it current.
"""


def _comments(source: str) -> dict[int, str]:
    """Comments of a class by line: the one on a line, or those directly above it."""
    found: dict[int, str] = {}
    above: list[str] = []
    for number, line in enumerate(source.splitlines(), 1):
        text = line.strip()
        if text.startswith("#"):
            above.append(text.lstrip("#: "))
            continue
        beside = re.search(r"\s#:? (.*)$", line)
        found[number] = " ".join([*above, *([beside[1]] if beside else [])])
        above = []
    return found


def notes(struct: type[Any]) -> dict[str, str]:
    """Returns the comment beside each field of a struct, empty where there is none."""
    source = textwrap.dedent(inspect.getsource(struct))
    comments = _comments(source)
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    result = {}
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            lines = range(field.lineno, (field.end_lineno or field.lineno) + 1)
            result[field.target.id] = " ".join(filter(None, (comments.get(line, "") for line in lines)))
    return result


def _code(value: object) -> str:
    return f"`{value}`"


def _bounds(type_: Any) -> str:
    low, high = getattr(type_, "ge", None), getattr(type_, "le", None)
    if low is not None and high is not None:
        return f" {low} to {high}"
    return f" from {low}" if low is not None else f" up to {high}" if high is not None else ""


def _words(type_: shapes.Type) -> str:
    """The type of a value, as a person writes it."""
    match type_:
        case shapes.Metadata(type=inner, extra_json_schema=extra):
            described = (extra or {}).get("description")
            examples = [f"`{example}`" for example in (extra or {}).get("examples", ())]
            return ", ".join([described or _words(inner), *examples])
        case shapes.BoolType():
            return "`true` or `false`"
        case shapes.IntType():
            return "whole number" + _bounds(type_)
        case shapes.FloatType():
            return "number" + _bounds(type_)
        case shapes.StrType(pattern=pattern, max_length=most):
            text = "text" if most is None else f"text, up to {most} characters"
            return text if pattern is None else f"{text}, as `{pattern.replace('|', chr(92) + '|')}`"
        case shapes.LiteralType(values=values):
            return ", ".join(_code(value) for value in values)
        case shapes.UnionType(types=types):
            return " or ".join(_words(one) for one in types if not isinstance(one, shapes.NoneType))
        case (
            shapes.ListType(item_type=item, max_length=most)
            | shapes.VarTupleType(item_type=item, max_length=most)
        ):
            return f"list of {_words(item)}" + ("" if most is None else f", at most {most}")
        case shapes.DictType(value_type=value):
            return f"table of names, each {_words(value)}"
        case shapes.StructType(cls=cls):
            return f"table, see [{cls.__name__}](#{cls.__name__.lower()})"
        case _:
            return type(type_).__name__


def _default(field: shapes.Field) -> str:
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if value is None:
        return "–"
    if isinstance(value, msgspec.Struct):
        return "its defaults"
    if isinstance(value, bool):
        return _code(str(value).lower())
    if isinstance(value, str):
        return _code(f'"{value}"')
    if isinstance(value, list | tuple):
        return _code("[" + ", ".join(f'"{one}"' if isinstance(one, str) else str(one) for one in value) + "]")
    return _code(value)


def _structs(type_: shapes.Type) -> Iterator[shapes.StructType]:
    """The structs inside a type, outermost first."""
    match type_:
        case shapes.StructType():
            yield type_
        case (
            shapes.Metadata(type=inner)
            | shapes.ListType(item_type=inner)
            | shapes.VarTupleType(item_type=inner)
        ):
            yield from _structs(inner)
        case shapes.DictType(value_type=inner):
            yield from _structs(inner)
        case shapes.UnionType(types=types):
            for one in types:
                yield from _structs(one)


def _section(title: str, struct: shapes.StructType) -> str:
    beside = notes(struct.cls)
    rows = [
        f"| `{field.encode_name}` | {_words(field.type)} | {_default(field)} | {beside.get(field.name, '')} |"
        for field in struct.fields
    ]
    text = inspect.getdoc(struct.cls) or ""
    return "\n".join(
        [f"## {title}", "", text, "", "| key | value | default | |", "| --- | --- | --- | --- |", *rows, ""]
    )


def render() -> str:
    """Returns the whole page as Markdown."""
    parts = [HEAD]
    queue = [("`[service]`", ServiceConfig), ("`[audit]`", AuditConfig), ("`[vm.NAME]`", VmSpec)]
    seen: set[type[Any]] = set()
    while queue:
        title, cls = queue.pop(0)
        if cls in seen:
            continue
        seen.add(cls)
        struct = shapes.type_info(cls)
        assert isinstance(struct, shapes.StructType)
        parts.append(_section(title, struct))
        queue += [
            (inner.cls.__name__, inner.cls) for field in struct.fields for inner in _structs(field.type)
        ]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(render())
