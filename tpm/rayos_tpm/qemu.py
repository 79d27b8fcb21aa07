"""The arguments that a TPM adds to QEMU's command line."""

from __future__ import annotations

from pathlib import Path
from typing import Final

MODELS: Final = ("tpm-crb", "tpm-tis")
SOCKET_PATH_LIMIT: Final = 107  # sockaddr_un.sun_path has 108 bytes, one is the terminator


def check_socket_path(path: Path) -> Path:
    """Return path; ValueError when the kernel would not take it as a unix socket's name."""
    size = len(bytes(path))
    if size > SOCKET_PATH_LIMIT:
        raise ValueError(f"the socket path {path} has {size} bytes; the kernel takes {SOCKET_PATH_LIMIT}")
    return path


def qemu_arguments(control: Path, model: str = "tpm-crb") -> list[str]:
    """The arguments that connect QEMU's TPM device to the emulator at a control socket.

    control: the unix socket that start_swtpm or open_tpm returned.
    model: "tpm-crb" (q35 and pc) or "tpm-tis" (also isapc and microvm).
    ValueError: an unknown model, or a path that is too long for a socket.
    """
    if model not in MODELS:
        raise ValueError(f"TPM model {model!r} is unknown; known are {', '.join(MODELS)}")
    path = str(check_socket_path(control)).replace(",", ",,")  # QEMU's escape for a comma in a value
    return [
        "-chardev", f"socket,id=tpmchar,path={path}",
        "-tpmdev", "emulator,id=tpm0,chardev=tpmchar",
        "-device", f"{model},tpmdev=tpm0",
    ]  # fmt: skip
