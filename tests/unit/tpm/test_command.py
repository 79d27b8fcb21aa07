"""TPM 2.0 commands and structures against the bytes of the specification and of a real TPM."""

from __future__ import annotations

import pytest

from rayos_tpm import command, key, quote, seal, signature
from rayos_tpm.command import Code
from rayos_tpm.errors import CommandFailed, MalformedMessage


def test_startup_bytes() -> None:
    """TPM2_Startup(CLEAR)."""
    assert command.startup().hex() == "80010000000c000001440000"


def test_pcr_extend_bytes() -> None:
    """An empty password session, one SHA-256 digest."""
    frame = command.pcr_extend(8, b"\xab" * 32)
    assert frame.hex() == "80020000004100000182" + "00000008" + "00000009" + "40000009" + "0000000000" + (
        "00000001" + "000b" + "ab" * 32
    )


def test_quote_bytes() -> None:
    """Handle, password, nonce, the key's own scheme, selection of the seed's registers."""
    frame = quote.quote(0x81810001, b"\x01\x02", (0, 4, 8, 9, 10, 11))
    assert frame[10:14].hex() == "81810001"
    assert frame.hex().endswith("00020102" + "0010" + "00000001" + "000b" + "03" + "110f00")


def test_failed_command_is_named_in_words() -> None:
    """The sentence has the command and what the code means."""
    with pytest.raises(CommandFailed, match=r"NV_Read with 0x28b \(TPM_RC_HANDLE"):
        command.checked("NV_Read", command.error_response(0x28B))


@pytest.mark.parametrize("frame", [b"", bytes(9), bytes.fromhex("80010000000b00000000"), bytes(10)])
def test_short_or_lying_answers_are_malformed(frame: bytes) -> None:
    """An answer is as long as it says."""
    with pytest.raises(MalformedMessage):
        command.parse_response(frame)


def test_reader_never_reads_past_the_end() -> None:
    """A size field that reaches past the structure is an error, not a short read."""
    with pytest.raises(MalformedMessage, match="ends inside a field of 5"):
        command.Reader(b"\0\x05abc").sized()


def test_seal_policy_is_the_specifications() -> None:
    """PolicyPCR of PCR 0 at zero: SHA-256(0 || 17f || selection || SHA-256(value)), computed apart with tpm2-tools."""
    import hashlib

    inner = hashlib.sha256(bytes(32)).digest()
    expected = hashlib.sha256(bytes(32) + bytes.fromhex("0000017f" + "00000001000b03010000") + inner).digest()
    assert seal.policy_digest({0: bytes(32)}) == expected


@pytest.mark.parametrize("public", [key.AK_TEMPLATE, key.EK_TEMPLATE])
def test_templates_parse_and_are_no_key(public: bytes) -> None:
    """The point of a template is zero, which is no point of the curve."""
    assert key.point_of(public) == key.Point(bytes(32), bytes(32))
    with pytest.raises(MalformedMessage, match="no point of P-256"):
        signature.public_key(public)


@pytest.mark.parametrize(
    "message", [b"", bytes(64), bytes.fromhex("ff5443478017"), bytes.fromhex("ff54434780180000")]
)
def test_what_is_no_quote_is_refused(message: bytes) -> None:
    """Not made in a TPM, another attestation, or cut off."""
    with pytest.raises(MalformedMessage):
        quote.parse_attest(message)


def test_nonce_limit() -> None:
    """The TPM's limit is told before the TPM is asked."""
    with pytest.raises(ValueError, match="65 bytes"):
        quote.quote(1, bytes(65), (0,))


def test_codes_are_unique_and_named() -> None:
    """A number stands for one command."""
    assert len({int(code) for code in Code}) == len(list(Code))
