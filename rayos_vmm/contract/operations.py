"""Every operation of the service, one row each. Server, guard, OpenAPI document, client and completion read them.

A new operation is a row here, its handler in `rayos_vmm/api/` and, where a person asks for it, a verb in
`rayos_vmm/cli/`. The constant is the command in capitals. Commands and rights stand in tokens and audit records that
others keep: `tests/unit/api/operations.txt` holds them, and changes only on purpose.
"""

from __future__ import annotations

from typing import Any, Final

from rayos_tpm.event_log import Log
from rayos_tpm.policy import Policy
from rayos_tpm.protocol import Attestation, DeviceInfo, Status
from rayos_vmm.config.firewall import FirewallRule
from rayos_vmm.contract import answers, asks
from rayos_vmm.contract.operation import BYTES, JSONL, NDJSON, PNG, Operation
from rayos_vmm.errors import Busy, Conflict, GuestGone, NotFound, Timeout_
from rayos_vmm.events import Event
from rayos_vmm.guest.view import DeviceDetail, Metrics
from rayos_vmm.machine.recording import Step
from rayos_vmm.machine.view import Damage, DiskView, ExecResult, NetView, VmView
from rayos_vmm.network.view import DhcpLogs, DhcpStatus
from rayos_vmm.policy.capability import NONE, Capability
from rayos_vmm.policy.gatekeeper import Issued
from rayos_vmm.policy.view import Changes, GrantView, PolicyView, Shown, Verified
from rayos_vmm.service.balance import BalanceStatus, LoadView, Moved, Rebalanced
from rayos_vmm.service.view import Info
from rayos_vmm.shared.packet import Stats
from rayos_vmm.shared.timed import Span
from rayos_vmm.shared.view import DisplayInfo, FaultState, Verdict

ADMIN: Final = Capability.CAP_ADMIN
AUDIT: Final = Capability.CAP_AUDIT
NET: Final = Capability.CAP_NET
GPU: Final = Capability.CAP_GPU
INPUT: Final = Capability.CAP_INPUT
READ: Final = Capability.CAP_CONSOLE_R
WRITE: Final = Capability.CAP_CONSOLE_W

_VM: Final = "/v1/vms/{name}"
_DEVICE: Final = f"{_VM}/devices/{{device}}"
#: The exposition format of Prometheus.
METRICS: Final = "text/plain; version=1.0.0; charset=utf-8"
#: A machine that does not run, or whose devices do not answer.
_LIVE: Final = (Conflict, GuestGone)
_SLOW: Final = (Conflict, GuestGone, Timeout_)

# fmt: off

# -- machines as wholes --------------------------------------------------------------------------------------

MACHINES_INFO: Final = Operation[Info](
    "machines.info", "GET", "/v1/info", NONE, "The daemon, its QEMU and its accelerator",
    answer=Info, fails=(*_SLOW, NotFound))
MACHINES_LIST: Final = Operation[answers.VmList](
    "machines.list", "GET", "/v1/vms", NONE, "All machines", answer=answers.VmList)
MACHINES_CREATE: Final = Operation[VmView](
    "machines.create", "POST", "/v1/vms", ADMIN, "Define a machine, and start it if asked",
    body=asks.Create, answer=VmView, status=201, fails=(*_SLOW, NotFound), is_judged=True,
    makes=(_VM, "$response.body#/spec/name"))
MACHINES_GET: Final = Operation[VmView](
    "machines.get", "GET", _VM, NONE, "One machine", answer=VmView)
MACHINES_REMOVE: Final = Operation[None](
    "machines.remove", "DELETE", _VM, ADMIN, "Remove a machine that does not run, with its disks and TPM",
    fails=(Conflict,))
MACHINES_START: Final = Operation[VmView](
    "machines.start", "POST", f"{_VM}/start", ADMIN, "Start; answers once the machine runs",
    answer=VmView, fails=_SLOW, is_judged=True)
MACHINES_STOP: Final = Operation[VmView](
    "machines.stop", "POST", f"{_VM}/stop", ADMIN,
    "Ask the guest to power down; after the time limit QEMU is told to quit",
    body=asks.Stop, body_is_optional=True, answer=VmView, fails=_SLOW)
MACHINES_KILL: Final = Operation[VmView](
    "machines.kill", "POST", f"{_VM}/kill", ADMIN, "End QEMU at once", answer=VmView, fails=_SLOW)
MACHINES_PAUSE: Final = Operation[VmView](
    "machines.pause", "POST", f"{_VM}/pause", ADMIN, "Stop the guest's processors", answer=VmView, fails=_SLOW)
MACHINES_RESUME: Final = Operation[VmView](
    "machines.resume", "POST", f"{_VM}/resume", ADMIN, "Let the guest's processors go on", answer=VmView, fails=_SLOW)
MACHINES_RESET: Final = Operation[VmView](
    "machines.reset", "POST", f"{_VM}/reset", ADMIN, "Press the reset button", answer=VmView, fails=_SLOW)
MACHINES_WAIT: Final = Operation[VmView](
    "machines.wait", "GET", f"{_VM}/wait", NONE, "Wait until the machine is ready, running or stopped",
    query=asks.WaitQuery, answer=VmView, fails=_SLOW, is_long=True)
MACHINES_HOLD: Final = Operation[VmView](
    "machines.hold", "GET", f"{_VM}/hold", ADMIN,
    "The machine after each change, one JSON object a line; an ephemeral one ends with its last holder",
    answer=VmView, media=NDJSON)
MACHINES_RELEASE: Final = Operation[None](
    "machines.release", "POST", f"{_VM}/release", ADMIN, "Let a machine live on without its holders")
MACHINES_STATS: Final = Operation[Stats](
    "machines.stats", "GET", f"{_VM}/stats", NONE, "Counters of the devices", answer=Stats, fails=_LIVE)

# -- inside a guest, and QEMU's monitor ----------------------------------------------------------------------

GUEST_SIZE: Final = Operation[None](
    "guest.size", "POST", f"{_VM}/console/size", WRITE, "Resize a console", body=asks.ConsoleSize, fails=_LIVE)
GUEST_EXEC: Final = Operation[ExecResult](
    "guest.exec", "POST", f"{_VM}/exec", ADMIN, "Run a command by the agent",
    body=asks.Exec, answer=ExecResult, fails=_SLOW, is_long=True)
GUEST_READ: Final = Operation[bytes](
    "guest.read", "GET", f"{_VM}/files", ADMIN, "Read a file",
    query=asks.FileQuery, answer=bytes, media=BYTES, fails=_SLOW, is_long=True)
GUEST_WRITE: Final = Operation[None](
    "guest.write", "PUT", f"{_VM}/files", ADMIN, "Write a file", query=asks.PutQuery, takes=BYTES, fails=_SLOW)
GUEST_TRANSCRIPT: Final = Operation[bytes](
    "guest.transcript", "GET", f"{_VM}/qmp", ADMIN, "The last of what was said over QMP, a line of JSON each",
    answer=bytes, media=JSONL)
GUEST_QMP: Final = Operation[answers.QmpReturn](
    "guest.qmp", "POST", f"{_VM}/qmp", ADMIN, "A QMP command",
    body=asks.Qmp, answer=answers.QmpReturn, fails=_SLOW, is_long=True)

# -- display -------------------------------------------------------------------------------------------------

DISPLAY_SCREENSHOT: Final = Operation[bytes](
    "display.screenshot", "GET", f"{_VM}/screenshot", GPU, "The picture of a monitor",
    query=asks.ScreenshotQuery, answer=bytes, media=PNG, fails=_LIVE)
DISPLAY_INFO: Final = Operation[DisplayInfo](
    "display.info", "GET", f"{_VM}/display", GPU, "The monitors and their modes", answer=DisplayInfo, fails=_LIVE)
DISPLAY_RESIZE: Final = Operation[None](
    "display.resize", "POST", f"{_VM}/display/resize", ADMIN, "Give a monitor another mode, and tell the guest",
    body=asks.DisplayMode, fails=_LIVE)
DISPLAY_DAMAGE: Final = Operation[Damage](
    "display.damage", "GET", f"{_VM}/display/damage", GPU, "Wait until a picture changes; answers what of it did",
    query=asks.DamageQuery, answer=Damage, fails=_SLOW, is_long=True)

# -- input ---------------------------------------------------------------------------------------------------

INPUT_DEVICES: Final = Operation[answers.InputDevices](
    "input.devices", "GET", f"{_VM}/input", INPUT, "The input devices as they are now",
    answer=answers.InputDevices, fails=_LIVE, is_frequent=True)
INPUT_TYPE: Final = Operation[answers.InputTaken](
    "input.type", "POST", f"{_VM}/type", INPUT, "Type text on the keyboard",
    body=asks.Type, answer=answers.InputTaken, fails=_LIVE, is_long=True, is_frequent=True, is_judged=True)
INPUT_KEY: Final = Operation[answers.InputTaken](
    "input.key", "POST", f"{_VM}/key", INPUT, "Press keys together",
    body=asks.Key, answer=answers.InputTaken, fails=_LIVE, is_frequent=True, is_judged=True)
INPUT_POINTER: Final = Operation[None](
    "input.pointer", "POST", f"{_VM}/pointer", INPUT, "Move the tablet's pointer, hold buttons",
    body=asks.Pointer, fails=_LIVE, is_frequent=True)
INPUT_MOUSE: Final = Operation[None](
    "input.mouse", "POST", f"{_VM}/mouse", INPUT, "Move the mouse, turn its wheel, hold buttons",
    body=asks.Mouse, fails=_LIVE, is_frequent=True)
INPUT_TOUCH: Final = Operation[None](
    "input.touch", "POST", f"{_VM}/touch", INPUT, "Put fingers on the touch screen",
    body=asks.Touch, fails=_LIVE, is_frequent=True)
INPUT_EVENTS: Final = Operation[None](
    "input.events", "POST", f"{_VM}/input", INPUT, "Hand evdev events to a device",
    body=asks.InputEvents, fails=_LIVE, is_long=True, is_frequent=True)
INPUT_RECORD: Final = Operation[Step](
    "input.record", "GET", f"{_VM}/input/record", ADMIN,
    "What reaches the input devices: a line that says so, then one step as JSON a line until the machine ends",
    answer=Step, media=NDJSON, fails=_LIVE, is_frequent=True)
INPUT_REPLAY: Final = Operation[None](
    "input.replay", "POST", f"{_VM}/input/replay", INPUT,
    "Do a recording again; a client that leaves ends it, and what is held is released",
    body=asks.Replay, fails=_LIVE, is_long=True, is_frequent=True)

# -- consoles ------------------------------------------------------------------------------------------------

#: A WebSocket; `api/console.py` says what travels on it.
CONSOLE_ATTACH: Final = Operation[None](
    "console.attach", "GET", f"{_VM}/console", READ | WRITE, "A WebSocket to a console",
    query=asks.StreamQuery, fails=_LIVE)
CONSOLE_WRITE: Final = Operation[None](
    "console.write", "PUT", f"{_VM}/console/input", WRITE,
    "Type into a console that nobody else writes on; answers once the device has taken it",
    query=asks.PortQuery, takes=BYTES, fails=_LIVE, is_frequent=True)
CONSOLE_PORTS: Final = Operation[answers.ConsolePorts](
    "console.ports", "GET", f"{_VM}/console/ports", ADMIN, "The console's ports, and who sits there",
    answer=answers.ConsolePorts, fails=_LIVE)
CONSOLE_TIMED: Final = Operation[Span](
    "console.timed", "GET", f"{_VM}/console/timed", ADMIN,
    "What a console said and when, one piece as JSON a line: offset, time, data in base64",
    query=asks.TimedQuery, answer=Span, media=NDJSON, fails=_LIVE)
CONSOLE_LOG: Final = Operation[bytes](
    "console.log", "GET", f"{_VM}/console/log", READ, "What a console said so far",
    query=asks.PortQuery, answer=bytes, media=BYTES, fails=_LIVE)

# -- events --------------------------------------------------------------------------------------------------

EVENTS_EVENTS: Final = Operation[Event](
    "events.events", "GET", "/v1/events", AUDIT, "Events, one JSON object a line, without end",
    query=asks.EventsQuery, answer=Event, media=NDJSON)

# -- rights, and the record of them --------------------------------------------------------------------------

POLICY_GRANTS: Final = Operation[answers.Grants](
    "policy.grants", "GET", "/v1/grants", AUDIT, "What is granted", query=asks.GrantsQuery, answer=answers.Grants)
POLICY_REVOKE: Final = Operation[answers.Grants](
    "policy.revoke", "DELETE", "/v1/grants/{id}", ADMIN, "Revoke a grant and what was passed on", answer=answers.Grants,
    fails=_LIVE)
POLICY_GRANT: Final = Operation[GrantView](
    "policy.grant", "POST", f"{_VM}/grants", ADMIN, "Grant rights, for a time or until they are revoked",
    body=asks.AskGrant, answer=GrantView, status=201, fails=_LIVE, is_judged=True,
    makes=("/v1/grants/{id}", "$response.body#/id"))
POLICY_DELEGATE: Final = Operation[GrantView](
    "policy.delegate", "POST", f"{_VM}/delegations", ADMIN, "Let a machine pass rights on to another",
    body=asks.AskDelegation, answer=GrantView, status=201, fails=_LIVE, reaches_beyond_vm=True, is_judged=True,
    makes=("/v1/grants/{id}", "$response.body#/id"))
POLICY_REVOKE_RIGHTS: Final = Operation[answers.Grants](
    "policy.revoke_rights", "POST", f"{_VM}/revoke", ADMIN, "Take rights from a machine, wherever it has them from",
    body=asks.Rights, answer=answers.Grants, fails=_LIVE)
POLICY_EXPLAIN: Final = Operation[PolicyView](
    "policy.explain", "GET", f"{_VM}/policy", AUDIT, "All that holds for a machine and where it comes from",
    answer=PolicyView)
POLICY_SECURITY: Final = Operation[answers.Security](
    "policy.security", "GET", "/v1/security", AUDIT,
    "How much there is of everything that has a limit, and the limit", answer=answers.Security)
POLICY_AUDIT: Final = Operation[answers.AuditRecords](
    "policy.audit", "GET", "/v1/audit", AUDIT, "The last audit records",
    query=asks.AuditQuery, answer=answers.AuditRecords)
POLICY_VERIFY: Final = Operation[Verified](
    "policy.verify", "GET", "/v1/audit/verify", AUDIT, "Check the audit file", answer=Verified)
POLICY_RESTART: Final = Operation[answers.SetAside](
    "policy.restart", "POST", "/v1/audit/restart", ADMIN, "Set a damaged audit record aside and begin another",
    body=asks.Why, answer=answers.SetAside, fails=(Conflict,), is_for_owner=True)
POLICY_KEY: Final = Operation[answers.AuditKey](
    "policy.key", "GET", "/v1/audit/key", AUDIT, "The key that the record is signed by",
    answer=answers.AuditKey, fails=(NotFound,))
POLICY_EXPORT: Final = Operation[bytes](
    "policy.export", "GET", "/v1/audit/export", AUDIT, "The audit file: a digest and JSON a line",
    answer=bytes, media=NDJSON)

# -- the policy document -------------------------------------------------------------------------------------

HIERARCHY_SHOW: Final = Operation[Shown](
    "hierarchy.show", "GET", "/v1/policy", AUDIT, "The policy document in force", answer=Shown)
HIERARCHY_APPLY: Final = Operation[Changes](
    "hierarchy.apply", "PUT", "/v1/policy", ADMIN, "Put another document in force, whole",
    body=asks.Apply, answer=Changes, fails=(*_LIVE, NotFound), is_judged=True)
HIERARCHY_DIFF: Final = Operation[Changes](
    "hierarchy.diff", "POST", "/v1/policy/diff", AUDIT, "What another document would change",
    body=asks.Compare, answer=Changes, fails=(Conflict, NotFound), is_judged=True)
HIERARCHY_HISTORY: Final = Operation[answers.History](
    "hierarchy.history", "GET", "/v1/policy/history", AUDIT, "The revisions that are kept", answer=answers.History)
HIERARCHY_ROLLBACK: Final = Operation[Changes](
    "hierarchy.rollback", "POST", "/v1/policy/rollback", ADMIN,
    "Put the document of a former revision in force again",
    body=asks.Rollback, answer=Changes, fails=(*_LIVE, NotFound))
HIERARCHY_ZONES: Final = Operation[answers.Zones](
    "hierarchy.zones", "GET", "/v1/zones", AUDIT, "The zones and who is in them", answer=answers.Zones)
HIERARCHY_CREATE_ZONE: Final = Operation[Changes](
    "hierarchy.create_zone", "POST", "/v1/zones", ADMIN, "Make a zone",
    body=asks.NewZone, answer=Changes, status=201, fails=_LIVE,
    makes=("/v1/zones/{name}", "$request.body#/zone"))
HIERARCHY_REMOVE_ZONE: Final = Operation[Changes](
    "hierarchy.remove_zone", "DELETE", "/v1/zones/{name}", ADMIN, "Remove an empty zone",
    answer=Changes, fails=_LIVE)
HIERARCHY_ASSIGN: Final = Operation[Changes](
    "hierarchy.assign", "PUT", f"{_VM}/place", ADMIN, "Put a machine into a zone or under a parent",
    body=asks.Assign, answer=Changes, fails=_LIVE, reaches_beyond_vm=True, is_judged=True)

# -- device workers ------------------------------------------------------------------------------------------

SCALABILITY_STATUS: Final = Operation[answers.Scalability](
    "scalability.status", "GET", "/v1/scalability", AUDIT,
    "How far the newest revision has come: in all, by machine, by zone; how evenly the workers are spread",
    answer=answers.Scalability)
SCALABILITY_LOAD: Final = Operation[LoadView](
    "scalability.load", "GET", "/v1/scalability/load", AUDIT,
    "How busy each device worker and each processor is; takes a second", answer=LoadView)
SCALABILITY_REBALANCE: Final = Operation[Rebalanced](
    "scalability.rebalance", "POST", "/v1/scalability/rebalance", ADMIN,
    "Measure, and move workers to idler processors where it is worth it", answer=Rebalanced, fails=_LIVE)
SCALABILITY_SWITCH: Final = Operation[BalanceStatus](
    "scalability.switch", "PUT", "/v1/scalability/auto", ADMIN,
    "Move workers without being asked while their load is uneven, or not", body=asks.Switch, answer=BalanceStatus)
SCALABILITY_MOVE: Final = Operation[Moved](
    "scalability.move", "POST", f"{_VM}/worker", ADMIN,
    "Hand the devices over to a new worker on another processor, under the running guest",
    body=asks.Place, answer=Moved, fails=_LIVE)

# -- tokens --------------------------------------------------------------------------------------------------

TOKEN_LIST: Final = Operation[answers.Tokens](
    "token.list", "GET", "/v1/tokens", ADMIN, "The tokens that hold", answer=answers.Tokens, is_for_owner=True)
TOKEN_CREATE: Final = Operation[answers.NewToken](
    "token.create", "POST", "/v1/tokens", ADMIN, "Give out a token",
    body=asks.AskToken, answer=answers.NewToken, status=201, fails=(Conflict,), is_for_owner=True, is_judged=True,
    makes=("/v1/tokens/{id}", "$response.body#/issued/identifier"))
TOKEN_REVOKE: Final = Operation[Issued](
    "token.revoke", "DELETE", "/v1/tokens/{id}", ADMIN, "End a token and all that came of it",
    answer=Issued, is_for_owner=True)

# -- TPM -----------------------------------------------------------------------------------------------------

TPM_STATUS: Final = Operation[Status](
    "tpm.status", "GET", f"{_VM}/tpm", AUDIT, "A machine's TPM at a glance", answer=Status, fails=_SLOW, is_long=True)
TPM_PCRS: Final = Operation[answers.Pcrs](
    "tpm.pcrs", "GET", f"{_VM}/tpm/pcrs", AUDIT, "The registers as they are now",
    query=asks.PcrQuery, answer=answers.Pcrs, fails=_SLOW, is_long=True)
TPM_LOG: Final = Operation[Log](
    "tpm.log", "GET", f"{_VM}/tpm/log", AUDIT, "What changed the registers since the last reset",
    answer=Log, fails=_SLOW, is_long=True)
TPM_EXPLAIN: Final = Operation[answers.Explanation](
    "tpm.explain", "GET", f"{_VM}/tpm/explain", AUDIT, "Each change of a register and who caused it",
    query=asks.PcrQuery, answer=answers.Explanation, fails=_SLOW, is_long=True)
TPM_QUOTE: Final = Operation[Attestation](
    "tpm.quote", "POST", f"{_VM}/tpm/quote", AUDIT, "A quote, and the log of the same moment",
    body=asks.AskQuote, answer=Attestation, fails=_SLOW, is_long=True)
TPM_EXTEND: Final = Operation[answers.Extended](
    "tpm.extend", "POST", f"{_VM}/tpm/extend", ADMIN, "Extend the register of launch events",
    body=asks.HostEvent, answer=answers.Extended, fails=_SLOW, is_long=True)
TPM_READ_NV: Final = Operation[asks.Storage](
    "tpm.read_nv", "GET", f"{_VM}/tpm/nv", ADMIN, "The policy storage, which the guest can only read",
    answer=asks.Storage, fails=_SLOW, is_long=True)
TPM_WRITE_NV: Final = Operation[None](
    "tpm.write_nv", "PUT", f"{_VM}/tpm/nv", ADMIN, "Write the policy storage",
    body=asks.Storage, fails=_SLOW, is_long=True)
TPM_UNSEAL: Final = Operation[answers.Unsealed](
    "tpm.unseal", "POST", f"{_VM}/tpm/unseal", ADMIN, "The secret of the machine's specification",
    answer=answers.Unsealed, fails=_SLOW, is_long=True)
TPM_DEVICE: Final = Operation[DeviceInfo](
    "tpm.device", "GET", f"{_VM}/tpm/device", ADMIN, "Vendor, firmware and limits",
    answer=DeviceInfo, fails=_SLOW, is_long=True)
TPM_POLICY: Final = Operation[Policy](
    "tpm.policy", "GET", f"{_VM}/tpm/policy", ADMIN, "The policy that accepts exactly this launch",
    answer=Policy, fails=_SLOW, is_long=True)

# -- DHCP ----------------------------------------------------------------------------------------------------

DHCP_STATUS: Final = Operation[DhcpStatus](
    "dhcp.status", "GET", "/v1/dhcp", NET, "The server, its leases by state, its counters", answer=DhcpStatus)
DHCP_LEASES: Final = Operation[answers.Leases](
    "dhcp.leases", "GET", "/v1/dhcp/leases", NET, "Addresses given out", answer=answers.Leases)
DHCP_RELEASE: Final = Operation[None](
    "dhcp.release", "DELETE", "/v1/dhcp/leases/{address}", ADMIN, "Take a lease back", fails=(Busy,))
DHCP_LOGS: Final = Operation[DhcpLogs](
    "dhcp.logs", "GET", "/v1/dhcp/logs", ADMIN,
    "The server's last exchanges, and the last transactions of machines' upstream clients",
    query=asks.GrantsQuery, answer=DhcpLogs, fails=(NotFound,))
DHCP_RENEW: Final = Operation[None](
    "dhcp.renew", "POST", f"{_VM}/dhcp/renew", ADMIN, "Renew a machine's upstream lease now", fails=(Conflict,))

# -- disks ---------------------------------------------------------------------------------------------------

DISK_LIST: Final = Operation[list[DiskView]](
    "disk.list", "GET", f"{_VM}/disks", ADMIN, "The disks", answer=list[DiskView])
DISK_RESIZE: Final = Operation[DiskView](
    "disk.resize", "PUT", f"{_VM}/disks/size", ADMIN, "Make a disk larger, also under a running guest",
    body=asks.DiskSize, answer=DiskView, fails=_LIVE, is_judged=True)

# -- firewall ------------------------------------------------------------------------------------------------

FIREWALL_RULES: Final = Operation[answers.FirewallRules](
    "firewall.rules", "GET", f"{_VM}/firewall", NET,
    "All rules that hold for a machine, where each comes from, and how many frames it decided",
    answer=answers.FirewallRules)
FIREWALL_SET: Final = Operation[answers.Applied](
    "firewall.set", "PUT", f"{_VM}/firewall", ADMIN, "Replace the machine's own rules; in force when this answers",
    body=asks.AskRules, answer=answers.Applied, fails=_LIVE, is_judged=True)
FIREWALL_ADD: Final = Operation[answers.Applied](
    "firewall.add", "POST", f"{_VM}/firewall/rules", ADMIN, "Add a rule behind the machine's own",
    body=FirewallRule, answer=answers.Applied, status=201, fails=_LIVE, is_judged=True,
    makes=(f"{_VM}/firewall/rules/{{rule}}", "$request.body#/name"))
FIREWALL_REMOVE: Final = Operation[answers.Applied](
    "firewall.remove", "DELETE", f"{_VM}/firewall/rules/{{rule}}", ADMIN, "Remove one of the machine's own rules",
    answer=answers.Applied, fails=_LIVE)
FIREWALL_EXPLAIN: Final = Operation[Verdict](
    "firewall.explain", "POST", f"{_VM}/firewall/explain", NET, "What would happen to a packet, and which rule decides",
    body=asks.AskPacket, answer=Verdict, fails=_LIVE, is_judged=True)
FIREWALL_TRACE: Final = Operation[Verdict](
    "firewall.trace", "GET", f"{_VM}/firewall/trace", NET,
    "What happens to each packet from now on, one JSON object a line, without end",
    answer=Verdict, media=NDJSON, fails=_LIVE)

# -- faults --------------------------------------------------------------------------------------------------

FAULTS_GET: Final = Operation[dict[str, list[FaultState]]](
    "faults.get", "GET", f"{_VM}/faults", ADMIN, "What goes wrong on purpose, and how often it did",
    answer=dict[str, list[FaultState]], fails=_LIVE)
FAULTS_SET: Final = Operation[dict[str, list[FaultState]]](
    "faults.set", "PUT", f"{_VM}/faults", ADMIN, "Have things go wrong in a device",
    body=asks.SetFaults, answer=dict[str, list[FaultState]], fails=_LIVE, is_judged=True)

# -- network card --------------------------------------------------------------------------------------------

NET_VIEW: Final = Operation[NetView](
    "net.view", "GET", f"{_VM}/net", NET, "The network card", answer=NetView, fails=_LIVE)
NET_LINK: Final = Operation[NetView](
    "net.link", "PUT", f"{_VM}/net/link", ADMIN, "Pull the cable or plug it in",
    body=asks.Link, answer=NetView, fails=_LIVE)
NET_ANNOUNCE: Final = Operation[None](
    "net.announce", "POST", f"{_VM}/net/announce", ADMIN, "Have the guest announce its addresses", fails=_LIVE)
NET_CAPTURE: Final = Operation[bytes](
    "net.capture", "GET", f"{_VM}/net/capture", ADMIN, "What passes the network card, live, as pcapng",
    query=asks.CaptureQuery, answer=bytes, media=BYTES, fails=_LIVE)

# -- devices' accounts, limits, level ------------------------------------------------------------------------

DEVICE_PROMETHEUS: Final = Operation[bytes](
    "device.prometheus", "GET", "/metrics", AUDIT, "All that is counted, for Prometheus", answer=bytes, media=METRICS)
DEVICE_OVERVIEW: Final = Operation[answers.Machines](
    "device.overview", "GET", "/v1/devices", NONE, "The devices of all machines, and their load",
    answer=answers.Machines)
DEVICE_LIST: Final = Operation[answers.Devices](
    "device.list", "GET", f"{_VM}/devices", NONE, "What a machine's devices did", answer=answers.Devices, fails=_LIVE)
DEVICE_SHOW: Final = Operation[DeviceDetail](
    "device.show", "GET", _DEVICE, NONE, "One device: also where its time goes, and its last operations",
    query=asks.DeviceQuery, answer=DeviceDetail, fails=_LIVE)
DEVICE_LIMITS: Final = Operation[asks.Limits](
    "device.limits", "GET", f"{_DEVICE}/limits", NONE, "A device's limits", answer=asks.Limits)
DEVICE_SET_LIMITS: Final = Operation[asks.Limits](
    "device.set_limits", "PUT", f"{_DEVICE}/limits", ADMIN,
    "Change limits; the running device obeys them when this answers",
    body=asks.Limits, answer=asks.Limits, fails=_LIVE, is_judged=True)
DEVICE_METRICS: Final = Operation[Metrics](
    "device.metrics", "GET", f"{_VM}/metrics", NONE, "The last samples of what a machine's devices did, one a second",
    query=asks.MetricsQuery, answer=Metrics, fails=_LIVE)
DEVICE_SET_LEVEL: Final = Operation[asks.AskLevel](
    "device.set_level", "PUT", f"{_VM}/level", ADMIN, "Switch a machine's devices to a level of optimization",
    body=asks.AskLevel, answer=asks.AskLevel, fails=_LIVE)

# fmt: on

OPERATIONS: Final[tuple[Operation[Any], ...]] = tuple(
    row for row in list(globals().values()) if isinstance(row, Operation)
)
COMMANDS: Final[dict[str, Operation[Any]]] = {row.command: row for row in OPERATIONS}
