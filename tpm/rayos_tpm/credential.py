"""Credential activation, the TPM's side: proof that attestation key and endorsement key share one TPM.

The endorsement key may be used under PolicySecret of the endorsement hierarchy. Both commands fail when the
guest gave that hierarchy a password; the caller reports it as unavailable.
Specification: TPM 2.0 Part 3, 12.5 and 23.4.
"""

from __future__ import annotations

import struct

from rayos_tpm import command
from rayos_tpm.command import RH_ENDORSEMENT, Code


def policy_secret(session: int) -> bytes:
    """TPM2_PolicySecret by the endorsement hierarchy's (empty) password, 23.4."""
    return command.command(
        Code.PolicySecret,
        handles=[RH_ENDORSEMENT, session],
        auths=[command.password()],
        parameters=command.sized(b"") * 3 + struct.pack(">i", 0),
    )


def activate_credential(ak: int, ek: int, session: int, blob: bytes, secret: bytes) -> bytes:
    """TPM2_ActivateCredential, 12.5; the answer holds one TPM2B, the secret."""
    return command.command(
        Code.ActivateCredential,
        handles=[ak, ek],
        auths=[command.password(), command.session(session)],
        parameters=command.sized(blob) + command.sized(secret),
    )
