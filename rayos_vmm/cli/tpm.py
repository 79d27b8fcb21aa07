"""A machine's TPM: what it measured, quotes for others to check, and checking them with files alone."""

from __future__ import annotations

import argparse
import secrets
import shlex
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import msgspec

from rayos_vmm.cli.completion import add_name
from rayos_vmm.cli.daemon import the_daemon
from rayos_vmm.cli.output import Output
from rayos_vmm.errors import Invalid, RayosError
from tpm import files, verify
from tpm.errors import TpmError
from tpm.event_log import Log
from tpm.protocol import Attestation

_NONCE_BYTES: Final = 32
_NONCE_MAXIMUM: Final = 64  # TPM2B_DATA: a digest's length and what names its algorithm


class NotVerified(RayosError):
    """A launch is not what it should be; the message has the findings."""

    code = "not_verified"


def add_tpm(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="status|pcr|log|explain|quote|verify", required=True)
    status = verbs.add_parser("status", help="the TPM at a glance")
    registers = verbs.add_parser("pcr", help="the registers as they are now")
    log = verbs.add_parser("log", help="what changed the registers since the last reset")
    explained = verbs.add_parser(
        "explain", help="each change of a register and who caused it, then the values"
    )
    quoted = verbs.add_parser(
        "quote", help="write a quote and its log as files, for tpm2_checkquote and others"
    )
    for sub in (status, registers, log, explained, quoted):
        add_name(sub)
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
    for sub in (status, registers, log, explained, quoted, checked):
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


def _nonce(text: str) -> str:
    try:
        size = len(bytes.fromhex(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not hexadecimal") from None
    if size > _NONCE_MAXIMUM:
        raise argparse.ArgumentTypeError(f"{size} bytes; a nonce has up to {_NONCE_MAXIMUM}")
    return bytes.fromhex(text).hex()


async def _get(name: str, what: str, args: argparse.Namespace) -> bytes:
    query = {"pcrs": args.pcr} if getattr(args, "pcr", None) is not None else None
    return await the_daemon().request("GET", f"/vms/{quote(name, safe='')}/tpm{what}", query=query)


async def run_tpm(args: argparse.Namespace, out: Output) -> None:
    match args.verb:
        case "status":
            status: dict[str, Any] = msgspec.json.decode(await _get(args.name, "", args))
            rows = [(key.replace("_", " "), str(value) or "-") for key, value in status.items()]
            out.table(status, ("TPM", args.name), rows)
        case "pcr":
            pcrs = msgspec.json.decode(await _get(args.name, "/pcrs", args))["pcrs"]
            out.table(pcrs, ("PCR", "SHA-256"), list(pcrs.items()))
        case "log":
            log = msgspec.json.decode(await _get(args.name, "/log", args), type=Log)
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
            lines = msgspec.json.decode(await _get(args.name, "/explain", args))["lines"]
            out.result({"lines": lines}, "\n".join(lines))
        case "quote":
            await _quote(args, out)
        case _:
            _verify(args, out)


async def _quote(args: argparse.Namespace, out: Output) -> None:
    nonce = secrets.token_hex(_NONCE_BYTES) if args.nonce is None else args.nonce
    path = f"/vms/{quote(args.name, safe='')}/tpm/quote"
    answer = await the_daemon().request("POST", path, body={"nonce": nonce, "pcrs": args.pcr})
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
