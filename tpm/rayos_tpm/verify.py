"""Verify a launch with files alone: `python -m tpm verify`, `policy` and `explain`.

    python -m tpm policy --kernel K --initrd I --append A --event launch=TEXT > policy.json
    python -m tpm verify --log log.json --quote quote.msg --sig quote.sig --pcrs pcrs.bin --nonce HEX \\
        --ak ak.pem --policy policy.json
    python -m tpm explain --log log.json [--firmware-log binary_bios_measurements]

Exit status: 0 it holds, 1 it does not (each finding on a line), 2 files or arguments are wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from rayos_tpm import appraisal, event_log, files, pcr, signature
from rayos_tpm.authority import check_certificate
from rayos_tpm.errors import MalformedMessage, TpmError
from rayos_tpm.event_log import Log
from rayos_tpm.explain import explain
from rayos_tpm.measurement import Measurement, of_bytes, of_command_line, of_descriptor
from rayos_tpm.phase import PROFILES, Phase
from rayos_tpm.policy import Policy


def load_key(data: bytes) -> ec.EllipticCurvePublicKey:
    """An attestation key from PEM, or from a TPMT_PUBLIC; MalformedMessage for anything else."""
    if not data.startswith(b"-----"):
        return signature.public_key(data)
    try:
        key = load_pem_public_key(data)
    except ValueError as error:
        raise MalformedMessage(f"the attestation key is no public key in PEM: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise MalformedMessage("the attestation key is not an ECC key")
    return key


def _measure(phase: Phase, path: Path) -> Measurement:
    try:
        with path.open("rb") as file:
            return of_descriptor(phase, f"{phase} {path.name}", file.fileno())
    except OSError as error:
        raise TpmError(f"cannot read {path}: {error.strerror}") from None


def make_policy(options: argparse.Namespace) -> Policy:
    """The policy for the files and texts on the command line."""
    events = []
    for phase, path in (
        (Phase.FIRMWARE, options.firmware),
        (Phase.KERNEL, options.kernel),
        (Phase.INITRD, options.initrd),
    ):
        if path is not None:
            events.append(_measure(phase, path))
    if options.append is not None:
        events.append(of_command_line(options.append))
    for text in options.event:
        name, equals, value = text.partition("=")
        if not equals or name not in list(Phase):
            raise TpmError(f"--event {text!r} is not PHASE=TEXT with one of {', '.join(Phase)}")
        events.append(of_bytes(Phase(name), value, value.encode()))
    return Policy.from_measurements(events, profile=options.profile)


def verify(options: argparse.Namespace) -> list[str]:
    """The findings against a launch, as lines."""
    message = files.read(options.quote)
    log = Log.from_json(files.read(options.log))
    values = files.values_of(message, files.read(options.pcrs))
    policy = Policy.from_json(files.read(options.policy)) if options.policy else None
    try:
        nonce = bytes.fromhex(options.nonce)
    except ValueError:
        raise TpmError(f"--nonce {options.nonce!r} is not hexadecimal") from None
    signer = load_key(files.read(options.ak))
    findings = appraisal.appraise(
        log, policy, message, files.read(options.sig), signer, nonce=nonce, values=values
    )
    return [f"{finding.code}: {finding.text}" for finding in findings]


def check_ek(options: argparse.Namespace) -> list[str]:
    """The findings against an endorsement certificate, as lines."""
    try:
        root = x509.load_pem_x509_certificate(files.read(options.ca))
        check_certificate(files.read(options.certificate), root, options.vm, files.read(options.ek))
    except ValueError as error:
        raise MalformedMessage(f"{options.ca} holds no certificate: {error}") from None
    except TpmError as error:
        return [f"certificate: {error}"]
    return []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tpm", description="Verify a measured launch with files alone."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    one = commands.add_parser("verify", help="appraise a quote and its log")
    for name in ("log", "quote", "sig", "pcrs", "ak"):
        one.add_argument(f"--{name}", type=Path, required=True)
    one.add_argument("--nonce", required=True, help="hexadecimal, as it was sent")
    one.add_argument(
        "--policy", type=Path, help="the expected events; without it only quote and log are checked"
    )

    one = commands.add_parser("policy", help="compute the expected events from the files")
    for name in ("firmware", "kernel", "initrd"):
        one.add_argument(f"--{name}", type=Path)
    one.add_argument("--append", help="the kernel command line")
    one.add_argument(
        "--event", action="append", default=[], metavar="PHASE=TEXT", help="an event over a text"
    )
    one.add_argument("--profile", default="seed", choices=list(PROFILES))

    one = commands.add_parser("explain", help="join every extend with its source")
    one.add_argument("--log", type=Path, required=True)
    one.add_argument("--firmware-log", type=Path, help="the guest's binary_bios_measurements")
    one.add_argument("--pcr", help="only these registers, such as 0,4,8-11")

    one = commands.add_parser("check-ek", help="check an endorsement certificate")
    one.add_argument("--certificate", type=Path, required=True, help="DER")
    one.add_argument("--ca", type=Path, required=True, help="the installation's ca.pem")
    one.add_argument("--ek", type=Path, required=True, help="the endorsement key's TPMT_PUBLIC")
    one.add_argument("--vm", required=True, help="the VM's UUID")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        if options.command == "policy":
            sys.stdout.write(make_policy(options).to_json().decode())
            return 0
        if options.command == "explain":
            firmware = event_log.decode(files.read(options.firmware_log)) if options.firmware_log else []
            chosen = pcr.parse_list(options.pcr) if options.pcr else None
            print("\n".join(explain(Log.from_json(files.read(options.log)), firmware, chosen)))
            return 0
        findings = verify(options) if options.command == "verify" else check_ek(options)
    except (TpmError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(findings) or "verified")
    return 1 if findings else 0
