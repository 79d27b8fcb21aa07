"""The control channel's codec: framing of requests and replies of every command."""

from __future__ import annotations

import struct

import pytest

from rayos_tpm import control
from rayos_tpm.control import Control, ControlRequest
from rayos_tpm.errors import MalformedMessage


@pytest.mark.parametrize(
    ("request_", "wire"),
    [
        (control.init(), "0000000200000000"),
        (control.init(flags=1), "0000000200000001"),
        (control.set_locality(4), "0000000504000000"),
        (control.hash_data(b"ab"), "00000007000000026162"),
        (control.set_buffer_size(0xF80), "0000001100000f80"),
        (ControlRequest(Control.STOP), "0000000e"),
    ],
)
def test_requests_have_swtpms_layout(request_: ControlRequest, wire: str) -> None:
    """The bytes that swtpm's tpm_ioctl.h prescribes, and back."""
    assert request_.pack().hex() == wire
    assert control.parse_request(bytes.fromhex(wire)) == request_


@pytest.mark.parametrize("command", list(Control))
def test_a_request_is_complete_at_its_last_byte(command: Control) -> None:
    """No prefix of a request is taken for the whole, and bytes after it are not counted."""
    body = {"INIT": 4, "SET_LOCALITY": 4, "RESET_TPMESTABLISHED": 4, "SET_BUFFERSIZE": 4, "LOCK_STORAGE": 4}
    blobs = {
        "HASH_DATA": struct.pack(">I", 3) + b"abc",
        "SET_STATEBLOB": struct.pack(">III", 0, 2, 3) + b"abc",
    }
    rest = blobs.get(command.name) or bytes(
        body.get(command.name, {"GET_STATEBLOB": 12, "GET_INFO": 16}.get(command.name, 0))
    )
    whole = ControlRequest(command, rest).pack()
    for size in range(len(whole)):
        length = control.request_length(whole[:size])
        assert length is None or length > size
    assert control.request_length(whole + b"next") == len(whole)


def test_unknown_command_and_huge_blob_are_refused() -> None:
    """A peer can neither make us wait for a command that does not exist nor hold gigabytes."""
    with pytest.raises(MalformedMessage, match="control command 99 is unknown"):
        control.request_length(struct.pack(">I", 99))
    with pytest.raises(MalformedMessage, match="4294967295 bytes"):
        control.request_length(struct.pack(">II", Control.HASH_DATA, 0xFFFFFFFF))


def test_replies_end_where_their_command_says() -> None:
    """A failed reply is the result alone; a blob's length field is followed."""
    assert control.reply_length(Control.GET_CAPABILITY, bytes(4)) == 8
    assert control.reply_length(Control.GET_CAPABILITY, struct.pack(">I", 9)) == 4
    assert control.reply_length(Control.INIT, b"\0\0\0") is None
    blob = struct.pack(">IIII", 0, 0, 5, 5)
    assert control.reply_length(Control.GET_STATEBLOB, blob) == 16 + 5
    assert control.reply_length(Control.GET_STATEBLOB, blob[:12]) is None
