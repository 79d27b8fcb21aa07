"""A machine's TPM: what it measured, quotes and policies for others to check, its storage and its secret."""

from __future__ import annotations

import argparse
import hashlib
import os
import secrets
import shlex
from base64 import b64decode
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import msgspec

from rayos_tpm import files, verify
from rayos_tpm.errors import TpmError
from rayos_tpm.event_log import Log
from rayos_tpm.nv import POLICY_SIZE as NV_BYTES
from rayos_tpm.policy import Policy
from rayos_tpm.protocol import Attestation
from rayos_vmm.cli.completion import add_name
from rayos_vmm.cli.output import Output
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.errors import Invalid, RayosError

_NONCE_BYTES: Final = 32
_NONCE_MAXIMUM: Final = 64  # TPM2B_DATA: a digest's length and what names its algorithm

FILE_LIMIT_BYTES: Final = 1 << 30


class NotVerified(RayosError):
    """A launch is not what it should be; the message has the findings."""

    code = "not_verified"


def add_tpm(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    status = verbs.add_parser("status", help="the TPM at a glance")
    registers = verbs.add_parser("pcr", help="the registers as they are now")
    log = verbs.add_parser("log", help="what changed the registers since the last reset")
    explained = verbs.add_parser(
        "explain", help="each change of a register and who caused it, then the values"
    )
    quoted = verbs.add_parser(
        "quote", help="write a quote and its log as files, for tpm2_checkquote and others"
    )
    extended = verbs.add_parser("extend", help="extend the register of launch events by one more")
    nv = verbs.add_parser("nv", help="show or write the 256 bytes that the guest can only read")
    device = verbs.add_parser("device", help="the TPM's vendor, firmware and limits")
    unsealed = verbs.add_parser("unseal", help="write out the secret, if the registers still match")
    policy = verbs.add_parser("policy", help="write the policy that accepts exactly this launch")
    of_a_machine = (status, registers, log, explained, quoted, extended, nv, device, unsealed, policy)
    for sub in of_a_machine:
        add_name(sub)
    extended.add_argument("description", metavar="TEXT", help="what happened, up to 256 characters")
    extended.add_argument(
        "--file", type=Path, metavar="FILE", help="what is measured (default: the text itself)"
    )
    nv.add_argument("--write", type=Path, metavar="FILE", help="replace it by this file, up to 256 bytes")
    for sub in (unsealed, policy):
        sub.add_argument("--out", type=Path, metavar="FILE", required=True, help="a new file")
    for sub in (registers, explained, quoted):
        sub.add_argument("--pcr", metavar="LIST", help="only these registers, such as 0,4,8-11")
    quoted.add_argument(
        "--nonce", type=_nonce, metavar="HEX", help="up to 64 bytes (default: 32 random ones)"
    )
    quoted.add_argument("--out", type=Path, metavar="DIR", help="where to (default: NAME-quote)")
    checked = verbs.add_parser("verify", help="appraise the files of a quote; asks no daemon")
    checked.add_argument("directory", type=Path, metavar="DIR", help="what `rayos tpm quote` wrote")
    checked.add_argument("--nonce", type=_nonce, metavar="HEX", required=True, help="as it was sent")
    checked.add_argument(
        "--ak", type=Path, metavar="FILE", help="the key that you trust (default: DIR/ak.pem)"
    )
    checked.add_argument(
        "--policy", type=Path, metavar="FILE", help="the expected events, by `python -m tpm policy`"
    )
    for sub in (*of_a_machine, checked):
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


def _nonce(text: str) -> str:
    try:
        size = len(bytes.fromhex(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not hexadecimal") from None
    if size > _NONCE_MAXIMUM:
        raise argparse.ArgumentTypeError(f"{size} bytes; a nonce has up to {_NONCE_MAXIMUM}")
    return bytes.fromhex(text).hex()


async def _ask(args: argparse.Namespace, method: str, what: str, body: Any = None) -> bytes:
    query = {"pcrs": args.pcr} if method == "GET" and getattr(args, "pcr", None) is not None else None
    path = f"/vms/{quote(args.name, safe='')}/tpm{what}"
    return await the_daemon().request(method, path, query=query, body=body)


async def run_tpm(args: argparse.Namespace, out: Output) -> None:
    match args.verb:
        case "status":
            status: dict[str, Any] = msgspec.json.decode(await _ask(args, "GET", ""))
            rows = [(key.replace("_", " "), str(value) or "-") for key, value in status.items()]
            out.table(status, ("TPM", args.name), rows)
        case "pcr":
            pcrs = msgspec.json.decode(await _ask(args, "GET", "/pcrs"))["pcrs"]
            out.table(pcrs, ("PCR", "SHA-256"), list(pcrs.items()))
        case "log":
            log = msgspec.json.decode(await _ask(args, "GET", "/log"), type=Log)
            changes = [
                (
                    str(entry.pcr),
                    entry.source,
                    entry.phase or "-",
                    entry.digest.hex() or "reset",
                    entry.description,
                )
                for entry in log.entries
            ]
            out.table(log, ("PCR", "SOURCE", "PHASE", "SHA-256", "WHAT"), changes)
        case "explain":
            lines = msgspec.json.decode(await _ask(args, "GET", "/explain"))["lines"]
            out.result({"lines": lines}, "\n".join(lines))
        case "device":
            device = msgspec.json.decode(await _ask(args, "GET", "/device"))
            rows = [(key.replace("_", " "), str(value)) for key, value in device.items()]
            out.table(device, ("TPM", args.name), rows)
        case "extend":
            await _extend(args, out)
        case "nv":
            await _nv(args, out)
        case "unseal":
            secret = b64decode(msgspec.json.decode(await _ask(args, "POST", "/unseal"))["secret"])
            _write_new(args.out, secret)
            out.result({"file": str(args.out), "bytes": len(secret)}, f"{args.out}: {len(secret)} bytes")
        case "policy":
            policy = msgspec.json.decode(await _ask(args, "GET", "/policy"), type=Policy)
            _write_new(args.out, policy.to_json())
            said = f"{args.out}: {len(policy.events)} events, profile {policy.profile}"
            out.result({"file": str(args.out), "policy": policy}, said)
        case "quote":
            await _quote(args, out)
        case _:
            _verify(args, out)


async def _extend(args: argparse.Namespace, out: Output) -> None:
    data = args.description.encode() if args.file is None else _read(args.file)
    digest = hashlib.sha256(data)
    body = {"description": args.description, "digest": digest.digest()}
    pcr = msgspec.json.decode(await _ask(args, "POST", "/extend", body))["pcr"]
    said = f"PCR {pcr} extended by {digest.hexdigest()}"
    out.result({"pcr": pcr, "sha256": digest.hexdigest()}, said)


async def _nv(args: argparse.Namespace, out: Output) -> None:
    if args.write is not None:
        data = _read(args.write, NV_BYTES)
        await _ask(args, "PUT", "/nv", {"data": data})
    stored = b64decode(msgspec.json.decode(await _ask(args, "GET", "/nv"))["data"])
    rows = [(f"{at:02x}", stored[at : at + 16].hex(" ")) for at in range(0, len(stored), 16)]
    out.table({"data": stored.hex()}, ("AT", "BYTES"), rows)


def _read(path: Path, limit_bytes: int = FILE_LIMIT_BYTES) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        raise Invalid(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > limit_bytes:
        raise Invalid(f"{path}: longer than the {limit_bytes} bytes that are allowed")
    return data


def _write_new(path: Path, data: bytes) -> None:
    """For its owner alone; never over a file that is there."""
    try:
        with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(data)
    except OSError as error:
        raise Invalid(f"{path}: cannot be written: {error.strerror}") from None


async def _quote(args: argparse.Namespace, out: Output) -> None:
    nonce = secrets.token_hex(_NONCE_BYTES) if args.nonce is None else args.nonce
    answer = await _ask(args, "POST", "/quote", {"nonce": nonce, "pcrs": args.pcr})
    directory = args.out or Path(f"{args.name}-quote")
    try:
        written = files.write_quote(directory, msgspec.json.decode(answer, type=Attestation))
    except OSError as error:
        raise RayosError(f"cannot write {error.filename or directory}: {error.strerror}") from None
    place = shlex.quote(str(directory))
    out.result(
        {"directory": str(directory), "nonce": nonce, "files": [str(path) for path in written]},
        f"{directory}: {', '.join(path.name for path in written)}\n"
        f"rayos tpm verify {place} --nonce {nonce}\n"
        f"cd {place} && tpm2_checkquote -u ak.pem -m quote.msg -s quote.sig -f pcrs.tpm2 -q {nonce}",
    )


def _verify(args: argparse.Namespace, out: Output) -> None:
    directory: Path = args.directory
    options = argparse.Namespace(
        log=directory / "log.json",
        quote=directory / "quote.msg",
        sig=directory / "quote.sig",
        pcrs=directory / "pcrs.bin",
        ak=args.ak or directory / "ak.pem",
        nonce=args.nonce,
        policy=args.policy,
    )
    try:
        findings = verify.verify(options)
    except (TpmError, ValueError) as error:
        raise Invalid(str(error), hint="the files are those that `rayos tpm quote` writes") from None
    if findings:
        raise NotVerified("; ".join(findings))
    out.result({"verified": True, "findings": []}, "verified")
