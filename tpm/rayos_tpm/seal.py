"""A secret that the TPM releases only while chosen registers have chosen values.

The secret is a sealed primary of the platform hierarchy with a PolicyPCR, persistent, without any password:
host and guest may both try to unseal it, and the registers decide. Which values open it is known before the
launch, for the host's log predicts them. Specification: TPM 2.0 Part 1, 19.7; Part 3, 11.1, 12.7, 23.7.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Final

from rayos_tpm import command, key, pcr
from rayos_tpm.command import ALG_KEYEDHASH, ALG_NULL, ALG_SHA256, RH_NULL, Code

HANDLE: Final = 0x81810010
SECRET_LIMIT: Final = 128  # MAX_SYM_DATA
_POLICY_SESSION: Final = 1


def policy_digest(values: Mapping[int, bytes]) -> bytes:
    """The policy that only these register values satisfy (Part 3, 23.7.1)."""
    selection = command.pcr_selection(values)
    return hashlib.sha256(
        pcr.ZERO + struct.pack(">I", Code.PolicyPCR) + selection + pcr.composite(values)
    ).digest()


def template(policy: bytes) -> bytes:
    """The public area of a sealed object under a policy."""
    attributes = key.FIXED_TPM | key.FIXED_PARENT | key.NO_DA
    area = struct.pack(">HHI", ALG_KEYEDHASH, ALG_SHA256, attributes)
    return area + command.sized(policy) + struct.pack(">H", ALG_NULL) + command.sized(b"")


def check_secret(secret: bytes) -> bytes:
    """Return secret; ValueError when a sealed object cannot hold it."""
    if not 1 <= len(secret) <= SECRET_LIMIT:
        raise ValueError(f"a secret of {len(secret)} bytes; a TPM seals 1 to {SECRET_LIMIT}")
    return secret


def start_policy_session(nonce: bytes) -> bytes:
    """TPM2_StartAuthSession of a policy session, unbound and unsalted, 11.1."""
    parameters = (
        command.sized(nonce) + command.sized(b"") + struct.pack(">BHH", _POLICY_SESSION, ALG_NULL, ALG_SHA256)
    )
    return command.command(Code.StartAuthSession, handles=[RH_NULL, RH_NULL], parameters=parameters)


def policy_pcr(session: int, chosen: tuple[int, ...]) -> bytes:
    """TPM2_PolicyPCR with the registers' present values, 23.7."""
    return command.command(
        Code.PolicyPCR, handles=[session], parameters=command.sized(b"") + command.pcr_selection(chosen)
    )


def unseal(handle: int, session: int) -> bytes:
    """TPM2_Unseal, 12.7; the answer holds one TPM2B."""
    return command.command(Code.Unseal, handles=[handle], auths=[command.session(session)])
