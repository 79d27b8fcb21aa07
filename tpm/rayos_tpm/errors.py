"""The errors of a TPM, each in one clear sentence.

Every public function of this package that can fail for a reason outside its caller's code raises
TpmError or one of its children; programming errors stay ValueError and TypeError.
"""

from __future__ import annotations


class TpmError(RuntimeError):
    """A TPM that cannot be started, measured or asked; the text says what was seen and what to do."""


class MissingSwtpm(TpmError):
    """No swtpm program on this host."""


class StateError(TpmError):
    """The state directory is unusable: a symlink, damaged, locked, or another VM's."""


class Unavailable(TpmError):
    """The TPM runs but cannot attest: the guest damaged its hierarchy, or swtpm is gone."""


class MalformedMessage(TpmError):
    """Bytes from the peer (QEMU, swtpm, a quote file) that are not what the specification allows."""


class CommandFailed(TpmError):
    """The TPM answered a command of ours with a response code.

    code: the TPM 2.0 response code (Part 2, 6.6).
    command: the command's name.
    """

    def __init__(self, command: str, code: int) -> None:
        super().__init__(f"the TPM answered {command} with {code:#x} ({describe(code)})")
        self.command = command
        self.code = code


# TPM 2.0 Part 2, 6.6.3. The ones a VM's owner meets.
_FIXED = {
    0x100: "TPM_RC_INITIALIZE: it is not in the state the command needs",
    0x101: "TPM_RC_FAILURE: it is in failure mode",
    0x120: "TPM_RC_DISABLED",
    0x128: "TPM_RC_PCR_CHANGED",
    0x142: "TPM_RC_COMMAND_SIZE",
    0x143: "TPM_RC_COMMAND_CODE",
    0x148: "TPM_RC_NV_LOCKED",
    0x149: "TPM_RC_NV_AUTHORIZATION",
    0x14A: "TPM_RC_NV_UNINITIALIZED",
    0x14C: "TPM_RC_NV_DEFINED",
    0x902: "TPM_RC_OBJECT_MEMORY: the guest holds all object slots",
    0x903: "TPM_RC_SESSION_MEMORY: the guest holds all sessions",
    0x907: "TPM_RC_LOCALITY",
    0x921: "TPM_RC_LOCKOUT",
}
_FORMAT_ONE = {
    0x05: "TPM_RC_HIERARCHY: the hierarchy is disabled",
    0x0B: "TPM_RC_HANDLE: no such handle",
    0x0E: "TPM_RC_AUTH_FAIL",
    0x15: "TPM_RC_SIZE",
    0x1D: "TPM_RC_POLICY_FAIL",
    0x1F: "TPM_RC_INTEGRITY",
    0x22: "TPM_RC_BAD_AUTH: the authorization was changed",
    0x24: "TPM_RC_POLICY",
}


def describe(code: int) -> str:
    """The name of a response code; "response code 0x…" for one that is not in the table."""
    if code & 0x80:
        return _FORMAT_ONE.get(code & 0x3F, f"response code {code:#x}")
    return _FIXED.get(code, f"response code {code:#x}")
