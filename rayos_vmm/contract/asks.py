"""The query strings and bodies that a caller of the API sends. The OpenAPI document is made from these.

Invariant: what a struct accepts has the shape that the service needs; it is refused only for what else there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from rayos_devices.account import OPERATIONS
from rayos_devices.faults import MAX_RULES
from rayos_devices.levels import Level
from rayos_devices.limits import MAXIMUM
from rayos_devices.metrics import SAMPLES
from rayos_tpm.nv import POLICY_SIZE
from rayos_tpm.pcr import PCR_COUNT
from rayos_vmm.config.fault import FaultRule
from rayos_vmm.config.firewall import RULES_MAXIMUM, FirewallRule, RuleName
from rayos_vmm.config.load import Table
from rayos_vmm.config.spec import DISKS_MAXIMUM, FINGERS, SNAP_MAXIMUM, Layout, Name, Side, VmSpec
from rayos_vmm.config.units import Rate, Size, parse_rate
from rayos_vmm.machine.recording import EVENTS_MAXIMUM, STEPS_MAXIMUM, EvdevEvent, Step
from rayos_vmm.policy.audit import RING
from rayos_vmm.policy.capability import DEVICE_NAMES
from rayos_vmm.policy.constraint import Constraints
from rayos_vmm.policy.token import CAVEAT_MAXIMUM, CAVEATS_MAXIMUM

# -- machines, guests and rights -----------------------------------------------------------------------------


_OCTET: Final = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
#: The names that stand in paths.
PATH_PARAMETERS: Final[Mapping[str, Any]] = {
    "name": Name,
    "device": Annotated[str, Meta(pattern=r"^[a-z][a-z0-9-]{0,31}$", examples=["disk0"])],
    "rule": RuleName,
    "id": Annotated[str, Meta(pattern=r"^[0-9a-f]{1,18}$")],
    "address": Annotated[str, Meta(pattern=rf"^{_OCTET}([.]{_OCTET}){{3}}$", examples=["10.86.0.2"])],
}
_WITHOUT_NUL: Final = {"pattern": r"^[^\x00]*$"}
Port = Annotated[
    int,
    Meta(
        ge=0,
        le=38,
        description="console port; 0 is the shell, 31 to 34 are COM1 to COM4, 35 to 38 the debug consoles",
    ),
]


Seconds = Annotated[float, Meta(gt=0, le=86400, description="time limit in seconds")]


class Create(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine to define, and whether to start it at once."""

    spec: VmSpec
    start: bool = False


class Stop(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long the guest may take to power down before QEMU is told to quit."""

    timeout_s: Seconds = 20.0


class ConsoleSize(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The size of the terminal at the other end of a console."""

    port: Port = 0
    columns: Annotated[int, Meta(ge=1, le=65535)]
    rows: Annotated[int, Meta(ge=1, le=65535)]


class Exec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A command for the guest: a line for its shell, or words that no shell touches."""

    command: (
        Annotated[str, Meta(min_length=1, max_length=65536, extra_json_schema=_WITHOUT_NUL)]
        | Annotated[
            list[Annotated[str, Meta(max_length=65536, extra_json_schema=_WITHOUT_NUL)]],
            Meta(min_length=1, max_length=1024),
        ]
    )
    timeout_s: Seconds = 60.0


class DiskSize(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which disk, and how large it is to be: not smaller than it is."""

    size: Size
    disk: Annotated[int, Meta(ge=0, lt=DISKS_MAXIMUM)] = 0


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether the cable is in the network card."""

    up: bool


class CaptureQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many bytes to keep of a frame, and after how many frames to end; absent means when the client leaves."""

    snap: Annotated[int, Meta(ge=1, le=SNAP_MAXIMUM)] = SNAP_MAXIMUM
    count: Annotated[int, Meta(ge=1)] | None = None


class Qmp(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A QMP command; see the QEMU QMP Reference Manual."""

    command: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,128}$", examples=["query-status"])]
    arguments: Table | None = None


_NAMES: Final = "|".join(name.removeprefix("CAP_") for name in (*DEVICE_NAMES, "CAP_ALL"))
_WORDS: Final = f"^((CAP_)?({_NAMES})|(cap_)?({_NAMES.lower()}))$"
CapabilityWord = Annotated[
    str,
    Meta(
        max_length=32,
        extra_json_schema={"pattern": f"^((CAP_)?({_NAMES})|(cap_)?({_NAMES.lower()}))$"},
        examples=["CAP_NET"],
    ),
]


class Rights(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Capabilities by name, such as `CAP_NET`; `all` is every one."""

    capabilities: Annotated[list[CapabilityWord], Meta(min_length=1, max_length=16)]


class AskConstraints(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Constraints of rights: ports such as `80` and `8000-8100`, a rate, disk requests at once, and whether use is
    recorded.
    """

    ports: Annotated[
        list[Annotated[str, Meta(pattern=r"^[0-9]{1,5}(-[0-9]{1,5})?$")]], Meta(max_length=16)
    ] = []
    bandwidth: Rate | None = None
    concurrent: Annotated[int, Meta(ge=1, le=1 << 16)] | None = None
    audit: bool = False

    def constraints(self) -> Constraints:
        """As the policy takes them."""
        ranges = [[int(word) for word in text.split("-")] for text in self.ports]
        return Constraints(
            ports=tuple((one[0], one[-1]) for one in ranges),
            bandwidth=parse_rate(self.bandwidth) if self.bandwidth is not None else None,
            concurrent=self.concurrent,
            audit=self.audit,
        )


class AskGrant(Rights, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rights for a machine; without a time they last until they are revoked."""

    ttl_s: Annotated[float, Meta(gt=0, le=366 * 86400)] | None = None
    reason: Annotated[str, Meta(max_length=200)] = ""
    constraints: AskConstraints = AskConstraints()


class AskDelegation(Rights, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rights to pass on; they last no longer than those that they come from."""

    to: Name
    ttl_s: Annotated[float, Meta(gt=0, le=366 * 86400)] | None = None
    constraints: AskConstraints = AskConstraints()


class GrantsQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of which machine; absent means of all."""

    vm: str | None = None


class AuditQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many of the last records."""

    limit: Annotated[int, Meta(ge=1, le=RING)] = 100


class AskRules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of a machine's own firewall rules."""

    rules: Annotated[list[FirewallRule], Meta(max_length=RULES_MAXIMUM)]


class AskPacket(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A packet in words."""

    packet: Annotated[
        str, Meta(min_length=1, max_length=200, examples=["out tcp 10.86.0.2:4000 > 93.184.216.34:80"])
    ]


class PortQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which console."""

    port: Port = 0


class TimedQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which console, from where, and whether to go on at the present."""

    port: Port = 0
    since: Annotated[int, Meta(ge=0)] = 0
    follow: bool = False


class StreamQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which console, and from where: 0 replays what is kept, absent means from now on.

    `mode`: write unless somebody else does, only watch, or take over from whoever writes.
    """

    mode: Literal["write", "watch", "take"] = "write"

    port: Port = 0
    since: Annotated[int, Meta(ge=0)] | None = None


class EventsQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From which event on: `since` was the last one seen, absent means from now on."""

    since: Annotated[int, Meta(ge=0)] | None = None


class FileQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file in the guest."""

    path: Annotated[str, Meta(min_length=1, max_length=4096, pattern=r"^/[^\x00]*$")]


class PutQuery(FileQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file in the guest, and its permission bits when it is written (decimal)."""

    mode: Annotated[int, Meta(ge=0, le=0o7777)] = 0o644


class WaitQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The state to wait for, and the time limit."""

    for_: Literal["ready", "running", "stopped"] = msgspec.field(name="for", default="ready")
    timeout_s: Seconds = 60.0


# -- devices -------------------------------------------------------------------------------------------------


_Limit = Annotated[int, Meta(ge=0, le=MAXIMUM)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Limits of a device, those that it has; 0 is unbounded. `rate` and `storage` and `memory` are in bytes."""

    rate: _Limit | UnsetType = UNSET
    iops: _Limit | UnsetType = UNSET
    storage: _Limit | UnsetType = UNSET
    memory: _Limit | UnsetType = UNSET
    queue: _Limit | UnsetType = UNSET


class AskLevel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much a machine's devices do to be fast."""

    level: Annotated[int, Meta(ge=0, le=int(max(Level)))]


class DeviceQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many of the last operations that were kept."""

    last: Annotated[int, Meta(ge=0, le=OPERATIONS)] = 0


class MetricsQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many of the last samples."""

    last: Annotated[int, Meta(ge=1, le=SAMPLES)] = SAMPLES


# -- displays ------------------------------------------------------------------------------------------------


Scanout = Annotated[int, Meta(ge=0, le=15, description="monitor; 0 is the first")]


class ScreenshotQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which monitor, and whether the guest's cursor is drawn into the picture."""

    scanout: Scanout = 0
    cursor: bool = False


class DisplayMode(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The mode that a monitor is to prefer."""

    width: Side
    height: Side
    scanout: Scanout = 0


class DamageQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """After which serial (0: since ever), and how long to wait."""

    since: Annotated[int, Meta(ge=0)] = 0
    scanout: Scanout = 0
    timeout_s: Seconds = 60.0


# -- faults --------------------------------------------------------------------------------------------------


class SetFaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The faults of one device from now on, in the order in which they are tried; none: nothing goes wrong."""

    device: Annotated[str, Meta(max_length=64, examples=["disk0"])]
    rules: Annotated[list[FaultRule], Meta(max_length=MAX_RULES)] = []
    seed: int = 0


# -- input ---------------------------------------------------------------------------------------------------


_Share = Annotated[float, Meta(ge=0, le=1)]


_Steps = Annotated[int, Meta(ge=-32768, le=32767)]


_Buttons = Annotated[list[Literal["left", "right", "middle"]], Meta(max_length=3)]


class Type(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Text to type on the guest's keyboard; `layout` is the one that the guest has (absent: the machine's)."""

    text: Annotated[str, Meta(max_length=65536)]
    layout: Layout | None = None


class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Keys to press together, such as `ctrl-alt-delete`."""

    combo: Annotated[str, Meta(min_length=1, max_length=200, examples=["ctrl-alt-delete"])]


class Pointer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the tablet points, as a share of the display, and the buttons held; none releases all."""

    x: _Share
    y: _Share
    buttons: _Buttons = []


class Mouse(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the mouse moves and its wheel turns, and the buttons held; none releases all."""

    dx: _Steps = 0
    dy: _Steps = 0
    wheel: _Steps = 0
    buttons: _Buttons = []


class Touch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where fingers are on the touch screen, as shares of the display; none lifts all."""

    points: Annotated[list[tuple[_Share, _Share]], Meta(max_length=FINGERS)] = []


class InputEvents(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """evdev events (type, code, value) for one device; a missing SYN_REPORT at the end is added."""

    device: Annotated[str, Meta(max_length=32)]
    events: Annotated[list[EvdevEvent], Meta(min_length=1, max_length=EVENTS_MAXIMUM)]


class Replay(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A recording to do again, so many times as fast."""

    steps: Annotated[list[Step], Meta(max_length=STEPS_MAXIMUM)]
    speed: Annotated[float, Meta(ge=0.01, le=1000)] = 1.0


# -- the policy document -------------------------------------------------------------------------------------


_Document = Annotated[
    Table, Meta(extra_json_schema={"$ref": "#/components/schemas/Document"})
]  # parsed by the policy, which names the path of what is wrong


class Apply(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole document, why, and of which revision it is a change (absent: of whichever is in force)."""

    document: _Document
    reason: Annotated[str, Meta(max_length=200)] = ""
    base: Annotated[int, Meta(ge=0)] | None = None


class Compare(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A document to hold against the one in force."""

    document: _Document


class Rollback(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The revision to go back to; 0 is the empty document."""

    revision: Annotated[int, Meta(ge=0)]


class NewZone(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A zone to make."""

    zone: Name


class Assign(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where to put a machine; absent leaves that as it is."""

    zone: Name | None = None
    parent: Name | None = None


# -- workers -------------------------------------------------------------------------------------------------


class Place(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The processor to move a machine's worker to."""

    core: Annotated[int, Meta(ge=0, le=4095)]


class Switch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether workers are moved without being asked, until the service ends (`service.balance` says how it begins)."""

    on: bool


# -- tokens --------------------------------------------------------------------------------------------------


class Why(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A reason, for the record."""

    reason: Annotated[str, Meta(min_length=1, max_length=200)]


class AskToken(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Caveats: uses for which the token is not good (`vm=a,b`, `zone=lab`, `capability=CAP_NET`, `command=console`,
    …).
    """

    caveats: Annotated[
        list[Annotated[str, Meta(max_length=CAVEAT_MAXIMUM)]], Meta(max_length=CAVEATS_MAXIMUM - 1)
    ] = []
    label: Annotated[str, Meta(max_length=64)] = ""
    ttl_s: Annotated[float, Meta(gt=0, le=366 * 86400)] | None = None


# -- TPMs ----------------------------------------------------------------------------------------------------


#: A register, or a range that does not run backwards.
_PART: Final = "|".join(
    f"{first}(-({'|'.join(map(str, range(first, PCR_COUNT)))}))?" for first in reversed(range(PCR_COUNT))
)
_Registers = Annotated[
    str,
    Meta(max_length=200, extra_json_schema={"pattern": f"^({_PART})(, ?({_PART}))*$"}, examples=["0,4,8-11"]),
]


_NONCE_HEX: Final = r"^([0-9a-fA-F]{2}){0,64}$"


class PcrQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which registers, such as `0,4,8-11`; absent means those of the machine's profile."""

    pcrs: _Registers | None = None


class AskQuote(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The request for a quote: the caller's nonce (hexadecimal, up to 64 bytes), and the registers."""

    nonce: Annotated[str, Meta(pattern=_NONCE_HEX)]
    pcrs: _Registers | None = None


class HostEvent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One more event of the host's: what it was, and its SHA-256."""

    description: Annotated[str, Meta(min_length=1, max_length=256)]
    digest: Annotated[
        bytes,
        Meta(
            min_length=32,
            max_length=32,
            extra_json_schema={"pattern": "^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=$"},
        ),
    ]


_BASE64: Final = f"^([A-Za-z0-9+/]{{4}}){{0,{POLICY_SIZE // 3}}}([A-Za-z0-9+/][AQgw]==)?$"


class Storage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The policy storage; filled with zeroes to its 256 bytes."""

    data: Annotated[bytes, Meta(max_length=POLICY_SIZE, extra_json_schema={"pattern": _BASE64})]
