"""The verifier's cryptography: signatures of quotes, keys in PEM, and credentials for activation.

Nothing here talks to a TPM; a stranger who has the files can run it. A credential is a secret that only the
TPM with this endorsement key can open, and only when it holds the named attestation key.
Specification: TPM 2.0 Part 1, 24 (credential protection), 11.4.10 (KDFa, KDFe), Annex C.6 (ECDH).
"""

from __future__ import annotations

import hashlib
import hmac
import struct

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from rayos_tpm import key, quote
from rayos_tpm.command import sized
from rayos_tpm.errors import MalformedMessage


def public_key(public: bytes) -> ec.EllipticCurvePublicKey:
    """The key in a TPMT_PUBLIC; MalformedMessage when it is no point of P-256."""
    point = key.point_of(public)
    try:
        return ec.EllipticCurvePublicNumbers(
            int.from_bytes(point.x, "big"), int.from_bytes(point.y, "big"), ec.SECP256R1()
        ).public_key()
    except ValueError as error:
        raise MalformedMessage(f"the public key is no point of P-256: {error}") from None


def to_pem(public: bytes) -> bytes:
    """A TPMT_PUBLIC as PEM, for tpm2_checkquote and OpenSSL."""
    return public_key(public).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def is_signed_by(message: bytes, signature: bytes, signer: ec.EllipticCurvePublicKey) -> bool:
    """Whether the TPMT_SIGNATURE over a TPMS_ATTEST is the key's.

    MalformedMessage: not a signature at all.
    """
    r, s = quote.parse_signature(signature)
    try:
        signer.verify(utils.encode_dss_signature(r, s), message, ec.ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True


def kdf_a(secret: bytes, label: str, context: bytes, bits: int) -> bytes:
    """KDFa with SHA-256 for one block of output (Part 1, 11.4.10.2)."""
    message = struct.pack(">I", 1) + label.encode() + b"\0" + context + struct.pack(">I", bits)
    return hmac.digest(secret, message, "sha256")[: bits // 8]


def kdf_e(shared: bytes, label: str, party_u: bytes, party_v: bytes) -> bytes:
    """KDFe with SHA-256 for 256 bits (Part 1, 11.4.10.3)."""
    return hashlib.sha256(struct.pack(">I", 1) + shared + label.encode() + b"\0" + party_u + party_v).digest()


def make_credential(ek_public: bytes, ak_name: bytes, secret: bytes) -> tuple[bytes, bytes]:
    """TPM2_MakeCredential in software: (credential blob, encrypted secret), both TPM2B contents.

    ek_public: the endorsement key's TPMT_PUBLIC. ak_name: the attestation key's name.
    secret: up to 32 bytes, which ActivateCredential will return.
    """
    if not 1 <= len(secret) <= 32:
        raise ValueError(f"a credential of {len(secret)} bytes; 1 to 32 are allowed")
    ephemeral = ec.generate_private_key(ec.SECP256R1())
    numbers = ephemeral.public_key().public_numbers()
    x, y = numbers.x.to_bytes(32, "big"), numbers.y.to_bytes(32, "big")
    shared = ephemeral.exchange(ec.ECDH(), public_key(ek_public))
    seed = kdf_e(shared, "IDENTITY", x, key.point_of(ek_public).x)
    cipher = Cipher(algorithms.AES(kdf_a(seed, "STORAGE", ak_name, 128)), CFB(bytes(16)))
    encryptor = cipher.encryptor()
    identity = encryptor.update(sized(secret)) + encryptor.finalize()
    outer = hmac.digest(kdf_a(seed, "INTEGRITY", b"", 256), identity + ak_name, "sha256")
    return sized(outer) + identity, sized(x) + sized(y)
