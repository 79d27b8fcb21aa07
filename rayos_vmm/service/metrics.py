"""Everything that is counted, for Prometheus: a collector over the accounts, asked at each scrape.

Counters of devices survive their worker's death; those of a machine begin again when it is started again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from rayos_devices.account import LATENCY_BUCKETS, Account
from rayos_devices.gate import Op
from rayos_vmm.machine.view import VmState
from rayos_vmm.network.view import DhcpStatus
from rayos_vmm.shared.accounts import hit_ratio

if TYPE_CHECKING:
    from rayos_vmm.service.service import Service

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
#: Buckets from 128 ns up, a factor of four apart: of those in the account every second.
_BUCKETS: Final = range(7, LATENCY_BUCKETS - 1, 2)


def latency(account: Account, op: Op) -> tuple[list[tuple[str, float]], float]:
    """Cumulated buckets in seconds, and about the sum: three quarters of each bucket's upper end."""
    counts = account.buckets(op)
    buckets: list[tuple[str, float]] = [
        (repr((1 << top) / 1e9), float(sum(counts[: top + 1]))) for top in _BUCKETS
    ]
    total = sum(count * (1 << bucket) * 0.75 for bucket, count in enumerate(counts))
    return [*buckets, ("+Inf", float(sum(counts)))], total / 1e9


class _Collector:
    def __init__(self, service: Service, dhcp: DhcpStatus) -> None:
        self._service = service
        self._dhcp = dhcp
        self._events = service.event_counts

    def collect(self) -> Iterator[Metric]:
        yield from self._devices()
        yield from self._machines()

    def _devices(self) -> Iterator[Metric]:
        where = ["vm", "device", "operation"]
        allowed = CounterMetricFamily("rayos_device_operations", "Operations that were done", labels=where)
        denied = CounterMetricFamily(
            "rayos_device_denied_operations", "Those that were refused", labels=where
        )
        size = CounterMetricFamily("rayos_device_bytes", "Bytes that operations moved", labels=where)
        took = HistogramMetricFamily(
            "rayos_device_latency_seconds",
            "What sampled operations took; the sum is estimated from the buckets",
            labels=where,
        )
        why = CounterMetricFamily(
            "rayos_device_denials", "Denials by their reason", labels=["vm", "device", "reason"]
        )
        depth = GaugeMetricFamily(
            "rayos_device_queue_depth", "Requests or events before the device", labels=["vm", "device"]
        )
        cpu = CounterMetricFamily("rayos_worker_cpu_seconds", "Processor time of the worker", labels=["vm"])
        decided = CounterMetricFamily(
            "rayos_firewall_frames",
            "Frames by the layer of the firewall that decided",
            labels=["vm", "layer"],
        )
        share = GaugeMetricFamily(
            "rayos_firewall_hit_ratio", "A layer's share of all frames, 0 to 1", labels=["vm", "layer"]
        )
        level = GaugeMetricFamily("rayos_worker_level", "Level of optimization", labels=["vm"])
        for machine, reader in self._service.accounts.running():
            vm = machine.name
            level.add_metric([vm], reader.level)
            counts = reader.layers()
            for layer, ratio in hit_ratio(counts).items():
                decided.add_metric([vm, layer], counts[layer])
                share.add_metric([vm, layer], ratio)
            for sample in reader.metrics(1):
                cpu.add_metric([vm], sample["cpu_ns"] / 1e9)
            for device, account in reader.devices().items():
                for op in account.ops:
                    labels = [vm, device, op.value]
                    done, refused, moved = account.counted(op)
                    allowed.add_metric(labels, done)
                    denied.add_metric(labels, refused)
                    size.add_metric(labels, moved)
                    buckets, total = latency(account, op)
                    took.add_metric(labels, buckets, sum_value=total)
                for reason, count in account.denials().items():
                    why.add_metric([vm, device, reason], count)
                depth.add_metric([vm, device], account.depth)
        yield from (allowed, denied, size, took, why, depth, cpu, level, decided, share)

    def _machines(self) -> Iterator[Metric]:
        states = Counter(machine.state for machine in self._service.registry.all())
        machines = GaugeMetricFamily("rayos_machines", "Machines by state", labels=["state"])
        for state in VmState:
            machines.add_metric([state.value], states[state])
        events = CounterMetricFamily("rayos_events", "Events of the service by type", labels=["type"])
        for kind, count in sorted(self._events.items()):
            events.add_metric([kind], count)
        restarts = CounterMetricFamily("rayos_worker_deaths", "Workers that died and were replaced")
        restarts.add_metric([], self._events["devices.worker_exited"])
        leases = GaugeMetricFamily("rayos_dhcp_leases", "Leases by state", labels=["state"])
        packets = CounterMetricFamily("rayos_dhcp", "What our DHCP server counted", labels=["what"])
        for lease, count in self._dhcp.leases.items():
            leases.add_metric([lease], count)
        for what, count in self._dhcp.counters.items():
            packets.add_metric([what], count)
        yield from self._connections()
        audit = CounterMetricFamily("rayos_audit_lost", "Audit records that were lost")
        record = self._service.policy.status().audit
        audit.add_metric([], record.lost)
        trouble = GaugeMetricFamily(
            "rayos_audit_trouble", "1 while the audit record is not written, or not told", labels=["what"]
        )
        trouble.add_metric(["record"], bool(record.trouble))
        trouble.add_metric(["witness"], bool(record.witness))
        yield from (machines, events, restarts, leases, packets, audit, trouble)

    def _connections(self) -> Iterator[Metric]:
        counts = self._service.connections
        current = GaugeMetricFamily("rayos_api_connections", "Connections to the API that are open")
        current.add_metric([], counts.open)
        accepted = CounterMetricFamily("rayos_api_connections_accepted", "Connections that were taken in")
        accepted.add_metric([], counts.accepted)
        failed = CounterMetricFamily("rayos_api_connections_failed", "Those that ended with an error of ours")
        failed.add_metric([], counts.failed)
        refused = CounterMetricFamily(
            "rayos_api_connections_refused", "Those that were turned away", labels=["reason"]
        )
        for reason, count in sorted(counts.refused.items()):
            refused.add_metric([reason], count)
        yield from (current, accepted, failed, refused)


async def render(service: Service) -> bytes:
    """All of it in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(service, await service.dhcp.status()))
    return generate_latest(registry)
