"""TOML files: `[service]`, and one `[vm.NAME]` table for each machine.

Invariant: nothing in a file is ignored. An unknown key, a wrong type or a value outside its limits is an
error that names the file, the key's path and what is allowed.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from rayos_vmm.config.host import check_shape
from rayos_vmm.config.settings import AuditConfig, ServiceConfig
from rayos_vmm.config.spec import FIRMWARE_BIOS, MAC_PATTERN, NAME_PATTERN, Tpm, VmSpec, is_name
from rayos_vmm.config.units import (
    RATE_PATTERN,
    RATE_UNITS,
    SIZE_PATTERN,
    SIZE_UNITS,
    TIME_PATTERN,
    TIME_UNITS,
)
from rayos_vmm.errors import Invalid

FILE_MAXIMUM_BYTES: Final = 1 << 20
_BOOT_CODE_BYTES: Final = 440  # of a master boot record, before the disk signature

# What msgspec says in terms of a pattern, said in terms of the user.
_IN_WORDS: Final = {
    SIZE_PATTERN: f'a size is a number and one of {", ".join(SIZE_UNITS)}, as in "256MiB"',
    RATE_PATTERN: f'a rate is a number and one of {", ".join(RATE_UNITS)}, as in "100Mbit/s"',
    TIME_PATTERN: f'a time is a number and one of {", ".join(TIME_UNITS)}, as in "1.5s"',
    NAME_PATTERN: "a name has 1 to 32 of a-z, 0-9 and -, and no - at the ends",
    MAC_PATTERN: 'a MAC is a lower-case unicast address, as in "52:59:00:00:00:01"',
}
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*?)`(?: - at `\$(.*)`)?$")
_WITH_PATH: Final = re.compile(r"(.*) - at `(key in )?\$(.*)`$", re.DOTALL)

#: A table of TOML, or an object of JSON, before its struct has checked it.
Table = dict[str, Any]
_Settings = TypeVar("_Settings", ServiceConfig, AuditConfig)


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of a configuration file."""

    service: ServiceConfig = ServiceConfig()
    audit: AuditConfig = AuditConfig()
    vms: dict[str, VmSpec] = {}


def _join(prefix: str, path: str) -> str:
    return (prefix + path).strip(".") if path else prefix


def explain(error: msgspec.ValidationError, prefix: str = "", data: Any = None) -> str:
    """msgspec's complaint as `key: what was wrong`, with the key's full path.

    Args:
        prefix: the path of the table that was converted, such as `vm.dev`.
        data: that table, so that the value that was seen can be shown.
    """
    text = str(error)
    unknown = _UNKNOWN.match(text)
    if unknown is not None:
        key = _join(_join(prefix, unknown[2] or ""), "." + unknown[1])
        return f"{key}: there is no such key"
    with_path = _WITH_PATH.match(text)
    message, path = (with_path[1], with_path[3]) if with_path else (text, "")
    for pattern, words in _IN_WORDS.items():
        if pattern in message:
            message = words
    seen = _lookup(data, path)
    shown = f" = {seen!r}" if isinstance(seen, str | int | float | bool) else ""
    return f"{_join(prefix, path) or 'configuration'}{shown}: {message[:1].lower()}{message[1:]}"


def _lookup(data: Any, path: str) -> Any:
    for name, index in re.findall(r"\.([A-Za-z_0-9-]+)|\[(\d+)\]", path):
        try:
            data = data[name] if name else data[int(index)]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def to_spec(name: str, table: Any, *, prefix: str) -> VmSpec:
    """A machine's table as its specification; `name` is the table's name.

    Raises:
        Invalid: with the key's path below `prefix`.
    """
    if not isinstance(table, dict):
        raise Invalid(f"{prefix}: a table is needed, as in [vm.{name}]")
    if table.get("name", name) != name:
        raise Invalid(f"{prefix}.name = {table['name']!r} differs from the table's name {name!r}")
    try:
        spec = msgspec.convert({**table, "name": name}, VmSpec)
    except msgspec.ValidationError as error:
        raise Invalid(explain(error, prefix, {**table, "name": name})) from None
    try:
        check_shape(spec)
    except Invalid as error:
        raise Invalid(f"{prefix}.{error.message}", hint=error.hint) from None
    return spec


def _settings(name: str, data: Table, type_: type[_Settings]) -> _Settings:
    table = data.get(name, {})
    try:
        return msgspec.convert(table, type_)
    except msgspec.ValidationError as error:
        raise Invalid(explain(error, name, table)) from None


def parse(text: str) -> Config:
    """The configuration in a TOML text.

    Raises:
        Invalid: it is not TOML, or not ours.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Invalid(f"not TOML: {error}") from None
    for key in data:
        if key not in ("service", "audit", "vm"):
            raise Invalid(f"{key}: there is no such table; allowed are [service], [audit] and [vm.NAME]")
    service = _settings("service", data, ServiceConfig)
    audit = _settings("audit", data, AuditConfig)
    _ = service.network_address, audit.segment_bytes
    tables = data.get("vm", {})
    if not isinstance(tables, dict):
        raise Invalid("vm: tables are needed, as in [vm.dev]")
    vms: dict[str, VmSpec] = {}
    for name, table in tables.items():
        if not is_name(name):
            raise Invalid(f"vm.{name}: {_IN_WORDS[NAME_PATTERN]}")
        vms[name] = to_spec(name, table, prefix=f"vm.{name}")
    return Config(service=service, audit=audit, vms=vms)


def load(path: Path) -> Config:
    """The configuration in a file; relative paths in it are meant from the file's directory.

    Raises:
        Invalid: the file cannot be read or is wrong; the message starts with its path.
    """
    try:
        if path.stat().st_size > FILE_MAXIMUM_BYTES:
            raise Invalid(f"{path}: {path.stat().st_size} bytes; at most {FILE_MAXIMUM_BYTES} are allowed")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise Invalid(f"{path}: cannot be read: {error.strerror}", code="file_missing") from None
    except UnicodeDecodeError:
        raise Invalid(f"{path}: is not UTF-8 text") from None
    try:
        config = parse(text)
    except Invalid as error:
        raise Invalid(f"{path}: {error.message}", hint=error.hint) from None
    base = path.absolute().parent
    vms = {name: resolve_paths(spec, base) for name, spec in config.vms.items()}
    return Config(service=config.service, audit=config.audit, vms=vms)


def resolve_paths(spec: VmSpec, base: Path) -> VmSpec:
    """The specification with every relative path made absolute from `base`, and what its disk implies.

    A machine of a single disk image with boot code, and of nothing else to boot, boots from that by BIOS.
    """

    def absolute(text: str | None) -> str | None:
        return None if text is None else str(base / Path(text).expanduser())

    def modules(text: str | None) -> str | None:
        if text is None or "," not in text or (base / Path(text).expanduser()).exists():
            return absolute(text)
        return ",".join(str(absolute(part)) for part in text.split(","))

    def tpm(asked: bool | Tpm) -> bool | Tpm:
        if isinstance(asked, bool):
            return asked
        secret = asked.secret and msgspec.structs.replace(asked.secret, path=absolute(asked.secret.path))
        return msgspec.structs.replace(asked, policy=absolute(asked.policy), secret=secret)

    firmware = spec.firmware if spec.firmware == FIRMWARE_BIOS else absolute(spec.firmware)
    if spec.is_our_guest and spec.disks and _has_boot_code(absolute(spec.disks[0].path)):
        firmware = FIRMWARE_BIOS
    return msgspec.structs.replace(
        spec,
        kernel=absolute(spec.kernel),
        initrd=modules(spec.initrd),
        firmware=firmware,
        cdrom=absolute(spec.cdrom),
        tpm=tpm(spec.tpm),
        disks=[
            msgspec.structs.replace(disk, path=absolute(disk.path), directory=absolute(disk.directory))
            for disk in spec.disks
        ],
    )


def _has_boot_code(path: str | None) -> bool:
    """Whether a disk image starts with a boot sector that has code; one that was only partitioned has none."""
    if path is None:
        return False
    try:
        with Path(path).open("rb") as file:
            sector = file.read(512)
    except OSError:
        return False  # the service says what is wrong with it
    return sector[510:] == b"\x55\xaa" and any(sector[:_BOOT_CODE_BYTES])
