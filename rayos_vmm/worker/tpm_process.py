"""The parent of all TPM processes, each of which is confined as a device worker is before a guest is there.

`python -P -m rayos_vmm.worker.tpm_process` is what the service gives to `rayos_tpm.spawner.open_spawner`. A TPM process
relays what its guest sends to swtpm. Its swtpm is started first, by the launcher that has a confinement of its own
(`host/confine.py`); from there on the process starts nothing. It keeps its state directory, where it writes its record
and, when QEMU saves the TPM, the journal; its sockets, log and status file are descriptors.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Final

from rayos_tpm import spawner
from rayos_tpm.protocol import Config
from rayos_vmm.host import landlock, privilege
from rayos_vmm.host.confine import Reach, build_root
from rayos_vmm.worker import sandbox, seccomp

#: Calls that it makes and a device worker does not. Files: below its state directory, which is its whole root.
CALLS: Final = (
    "openat",
    "stat",
    "lstat",
    "rename",
    "unlink",
    "pwrite64",
    "fsync",
    # trio's loop, its wake-up socket, and swtpm: waited for, and ended when it does not end itself
    "epoll_create1",
    "eventfd2",
    "socketpair",
    "pidfd_open",
    "pidfd_send_signal",
    "waitid",
    "wait4",
)
MEMORY_BYTES: Final = 256 << 20
DESCRIPTORS: Final = 256
#: Of its user's, which is swtpm's as well.
TASKS: Final = 16
_RIGHTS: Final = (
    landlock.READ_FILE
    | landlock.READ_DIR
    | landlock.WRITE_FILE
    | landlock.TRUNCATE
    | landlock.MAKE_REG
    | landlock.REMOVE_FILE
)


def confine(config: Config) -> None:
    """Give up all that a TPM process does not need. Raises OSError as root; without root says what is lacking."""
    mode = sandbox.mode_wanted()
    if mode == "off":
        return
    report = sandbox.Report()
    directory = Path(config.state_dir)
    if os.geteuid() == 0:
        privilege.unshare(privilege.CLONE_NEWNET | privilege.CLONE_NEWIPC | privilege.CLONE_NEWUTS)
        build_root(Reach(write=[directory]), config.uid, has_proc=False)
        rule = landlock.rights_on(config.state_dir, _RIGHTS)
        privilege.drop_bounding_set()
        if config.uid:
            privilege.become(config.uid)
        privilege.keep_capabilities()
    else:
        report.missing("user, namespaces, root", f"needs root; this is user {os.geteuid()}")
        rule = landlock.rights_on(config.state_dir, _RIGHTS)
    privilege.no_new_privileges()
    privilege.not_dumpable()
    privilege.limit(
        {
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_NOFILE: DESCRIPTORS,
            resource.RLIMIT_DATA: MEMORY_BYTES,
            **({resource.RLIMIT_NPROC: TASKS} if config.uid else {}),
        }
    )
    # It may signal: it ends its swtpm, which was there before. The user's id keeps it from all others.
    report.layer("landlock", lambda: landlock.restrict([rule], scopes_signals=False))
    os.close(rule[0])
    report.layer("seccomp", lambda: seccomp.install("trap" if mode == "trap" else "kill", CALLS))
    for name, layer in report.layers.items():
        if not layer["on"]:
            print(f"tpm: the sandbox lacks {name}: {layer['what']}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sandbox.prepare()
    spawner.main(confine)
