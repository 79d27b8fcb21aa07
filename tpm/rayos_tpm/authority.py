"""An installation's certificate authority and master secret.

The authority certifies each VM's endorsement key with the VM's UUID in it, so a stranger who trusts the
installation's root can tell whose quote it is. The master secret gives each VM's state its own key: state
that is moved to another VM or installation does not open. Both files are 0600 in a directory of 0700.
Specification: TCG EK Credential Profile 2.5, 3 (certificate), RFC 5280, RFC 5869 (HKDF).
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID, ObjectIdentifier

from rayos_tpm.errors import StateError, TpmError
from rayos_tpm.signature import public_key

CERTIFICATE: Final = "ca.pem"  # what a verifier needs
_KEY: Final = "ca.key"
_MASTER: Final = "master.key"
_MASTER_SIZE: Final = 32
_LIFE: Final = datetime.timedelta(days=3650)
_EK_USAGE: Final = ObjectIdentifier("2.23.133.8.1")  # tcg-kp-EKCertificate
_TPM_NAMES: Final = (  # EK profile 3.2.9: manufacturer, model, version
    ("2.23.133.2.1", "id:49424D00"),  # "IBM", as libtpms names itself
    ("2.23.133.2.2", "swtpm"),
    ("2.23.133.2.3", "id:20191023"),
)


@dataclass(frozen=True, slots=True)
class Authority:
    """The installation's keys, loaded. Make it with Authority.open."""

    certificate: x509.Certificate
    _key: ec.EllipticCurvePrivateKey
    _master: bytes

    @classmethod
    def open(cls, directory: Path, *, now: datetime.datetime) -> Self:
        """Load an installation's authority; make it when the directory has none. Blocks for a millisecond.

        StateError: the files are damaged, incomplete, or others may read them.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        paths = {name: directory / name for name in (_KEY, _MASTER, CERTIFICATE)}
        present = {name for name, path in paths.items() if path.exists()}
        if not present:
            _make(directory, now)
        elif len(present) < len(paths):
            missing = ", ".join(sorted(set(paths) - present))
            raise StateError(f"the TPM authority in {directory} lacks {missing}; restore it from a backup")
        for path in (directory, paths[_KEY], paths[_MASTER]):
            if path.is_symlink() or path.stat().st_mode & 0o077:
                raise StateError(f"{path} must be private to this user (chmod go=) and no symlink")
        try:
            key = load_pem_private_key(paths[_KEY].read_bytes(), None)
            certificate = x509.load_pem_x509_certificate(paths[CERTIFICATE].read_bytes())
        except ValueError as error:
            raise StateError(f"the TPM authority in {directory} is damaged: {error}") from None
        master = paths[_MASTER].read_bytes()
        if not isinstance(key, ec.EllipticCurvePrivateKey) or len(master) != _MASTER_SIZE:
            raise StateError(f"the TPM authority in {directory} is damaged: a key has another kind or size")
        return cls(certificate, key, master)

    def state_key(self, vm_uuid: str) -> bytes:
        """The 32-byte key of one VM's TPM state."""
        info = b"RayOS VMM TPM state " + vm_uuid.encode()
        return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(self._master)

    def certify(self, vm_uuid: str, ek_public: bytes, *, now: datetime.datetime) -> bytes:
        """The certificate (DER) of a VM's endorsement key.

        TpmError: the key is not ECC P-256.
        """
        names = [x509.NameAttribute(ObjectIdentifier(oid), value) for oid, value in _TPM_NAMES]
        alternative = [
            x509.DirectoryName(x509.Name(names)),
            x509.UniformResourceIdentifier(f"urn:uuid:{vm_uuid}"),
        ]
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"vTPM of {vm_uuid}")]))
            .issuer_name(self.certificate.subject)
            .public_key(public_key(ek_public))
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + _LIFE)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(key_agreement=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([_EK_USAGE]), critical=False)
            .add_extension(x509.SubjectAlternativeName(alternative), critical=False)
            .sign(self._key, hashes.SHA256())
            .public_bytes(Encoding.DER)
        )


def _usage(*, key_agreement: bool = False, signs_certificates: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=key_agreement,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _make(directory: Path, now: datetime.datetime) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "RayOS VMM installation TPM authority")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + 2 * _LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    for file, data in (
        (_KEY, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())),
        (_MASTER, os.urandom(_MASTER_SIZE)),
        (CERTIFICATE, certificate.public_bytes(Encoding.PEM)),
    ):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(directory / file, flags, 0o600), "wb") as stream:
            stream.write(data)


def check_certificate(certificate: bytes, root: x509.Certificate, vm_uuid: str, ek_public: bytes) -> None:
    """A stranger's check of an endorsement certificate (DER): root, VM and key.

    TpmError names what does not fit.
    """
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        parsed.verify_directly_issued_by(root)
    except Exception as error:  # cryptography raises ValueError, TypeError and InvalidSignature here
        raise TpmError(
            f"the endorsement certificate is not from this authority: {error or 'signature'}"
        ) from None
    names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    found = names.get_values_for_type(x509.UniformResourceIdentifier)
    if found != [f"urn:uuid:{vm_uuid}"]:
        raise TpmError(
            f"the endorsement certificate is for {', '.join(found) or 'nobody'}, not for VM {vm_uuid}"
        )
    if parsed.public_key() != public_key(ek_public):
        raise TpmError("the endorsement certificate is for another key")
