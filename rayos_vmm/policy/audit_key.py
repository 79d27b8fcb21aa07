"""The key that signs the audit record's checkpoints: Ed25519 (RFC 8032), one for each installation.

Keep the public half elsewhere: whoever can write the record can write the key beside it as well. A secret of the
installation is a file that is made once, whole or not at all, and that its owner alone can read (`load_secret`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from rayos_vmm.errors import Invalid


def load_secret(path: Path, make: Callable[[], bytes]) -> bytes:
    """Returns the contents of `path`; when there is no such file, those that `make` gives, on disk when this returns.

    Raises:
        OSError: it cannot be read or written.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        data = make()
    beside = path.with_name(f"{path.name}.new")
    beside.unlink(missing_ok=True)  # of a service that was killed
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return data


def load_private(path: Path) -> Ed25519PrivateKey:
    """The key at `path`, made when there is none.

    Raises:
        OSError: it cannot be read or written.
        Invalid: the file holds another kind of key, or none.
    """
    data = load_secret(path, _generate)
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise Invalid(f"{path}: no key: {error}", hint="move it away to make another") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise Invalid(f"{path}: a key of another kind than Ed25519")
    return key


def _generate() -> bytes:
    return Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_text(key: Ed25519PublicKey) -> str:
    """The public half as PEM."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def read_public(data: bytes) -> Ed25519PublicKey:
    """The public key in a PEM text. Raises Invalid."""
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Invalid(f"no public key: {error}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise Invalid("a public key of another kind than Ed25519")
    return key
