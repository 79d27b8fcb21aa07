"""The accounts of machines' devices, and their limits from now on.

Figures come from the machines' accounts (`shared/accounts.py`), in place: no worker is asked. Limits and the level of
optimization are kept in a machine's record before its worker is told, and told it again whenever the connection is made
anew (`machine/limits.py`): after a worker's death its successor knows them by itself, after ours from us.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Final

import msgspec

from rayos_devices.account import Account
from rayos_devices.levels import Level
from rayos_devices.limits import Limit
from rayos_vmm.config.spec import Quota
from rayos_vmm.config.units import format_size
from rayos_vmm.errors import Conflict, GuestGone, Invalid, NotFound
from rayos_vmm.guest.view import DeviceDetail, DeviceView, KeptOperation, MachineFigures, Metrics, Sample
from rayos_vmm.machine.machine import Machine, worker_errors
from rayos_vmm.shared.accounts import AccountReader
from rayos_vmm.shared.devices import BOUNDS, devices_of

#: Beyond anything that is asked for: what an unbounded limit is compared as.
_ENDLESS: Final = 10**15 - 1


class MachineAccounts:
    """All machines' figures and limits. `find` gives a machine or raises NotFound, `cap` is the policy's."""

    def __init__(
        self,
        machines: Callable[[], list[Machine]],
        find: Callable[[str], Machine],
        save: Callable[[Machine], Awaitable[None]],
        cap: Callable[[str, Quota], Quota],
    ) -> None:
        self._machines = machines
        self._find = find
        self._save = save
        self._cap = cap

    # -- figures -------------------------------------------------------------------------------------------------

    def running(self) -> Iterator[tuple[Machine, AccountReader]]:
        """The machines whose devices can be looked at now."""
        for machine in self._machines():
            if machine.is_live:
                try:
                    yield machine, AccountReader(machine.runtime)
                except OSError:
                    continue  # it starts, or ends; or its devices are of another version

    def _reader(self, name: str) -> tuple[Machine, AccountReader]:
        machine = self._find(name)
        if not machine.is_live:
            raise Conflict(f"{name} is {machine.state.value}, not running", hint="start it first")
        try:
            return machine, AccountReader(machine.runtime)
        except OSError as error:
            raise GuestGone(f"{name}: its devices keep no accounts: {error}") from None

    def overview(self) -> list[MachineFigures]:
        """Every running machine: its level, its last two samples, its devices as in `devices`."""
        return [
            MachineFigures(
                vm=machine.name,
                level=reader.level,
                metrics=msgspec.convert(reader.metrics(2), list[Sample]),
                devices=_described(machine, reader),
            )
            for machine, reader in self.running()
        ]

    def devices(self, name: str) -> list[DeviceView]:
        """A machine's devices: counters, latencies, denials, queue depth, limits.

        Raises:
            Conflict: it does not run.
        """
        return _described(*self._reader(name))

    def device(self, name: str, device: str, last: int) -> DeviceDetail:
        """One device, with the percentiles of each stage and the last operations that were kept, oldest first.

        Raises:
            NotFound: it has none of that name.
            Conflict: it does not run.
        """
        machine, reader = self._reader(name)
        account = reader.devices().get(device)
        if account is None:
            raise self._no_device(machine, device)
        kept = account.operations()
        last_kept = [one.describe() for one in kept[len(kept) - min(last, len(kept)) :]]
        return DeviceDetail(
            **msgspec.structs.asdict(_describe(machine, device, account)),
            profile={op.value: account.profile(op) for op in account.ops},
            last=msgspec.convert(last_kept, list[KeptOperation]),
        )

    def metrics(self, name: str, last: int) -> Metrics:
        """The worker's last samples, oldest first, and the level of optimization.

        Raises:
            Conflict: it does not run.
        """
        _, reader = self._reader(name)
        return Metrics(level=reader.level, samples=msgspec.convert(reader.metrics(last), list[Sample]))

    def _no_device(self, machine: Machine, device: str) -> NotFound:
        known = ", ".join(devices_of(machine.record.spec))
        return NotFound(
            f"{machine.name} has no device {device[:32]!r}; it has {known}", code="no_such_device"
        )

    # -- limits --------------------------------------------------------------------------------------------------

    def limits(self, name: str, device: str) -> dict[str, int]:
        """A device's limits, whether it runs or not; 0 is unbounded.

        Raises:
            NotFound: there is no such device.
        """
        machine = self._find(name)
        if device not in devices_of(machine.record.spec):
            raise self._no_device(machine, device)
        return _limits(machine, device)

    async def set_limits(self, name: str, device: str, limits: Mapping[str, int]) -> dict[str, int]:
        """Changes limits of a device, in force when this returns, in later runs too; returns all that it has.

        Raises:
            NotFound: there is no such device.
            Invalid: it has no such limit, or cannot have that value.
            Conflict: the policy allows less.
        """
        machine = self._find(name)
        now = self.limits(name, device)
        for limit, value in limits.items():
            if limit not in now:
                raise Invalid(f"{device} has no limit {limit}: it has {', '.join(now)}")
            self._check_policy(machine, device, Limit(limit), value)
        async with machine.lock:
            before = machine.record.limits.get(device, {})
            machine.record.limits[device] = {**before, **limits}
            try:
                if machine.is_live:
                    with worker_errors(machine):
                        await machine.need_worker().limit(device, limits)
                await self._save(machine)
            except BaseException:
                machine.record.limits[device] = before
                raise
        machine.events.publish("device.limits", name, device=device, **limits)
        return _limits(machine, device)

    def _check_policy(self, machine: Machine, device: str, limit: Limit, value: int) -> None:
        bound = BOUNDS[devices_of(machine.record.spec)[device]][limit]
        if bound is None:
            return
        wanted = {bound.field: bound.write(value or _ENDLESS)}
        capped = self._cap(machine.name, msgspec.structs.replace(Quota(), **wanted))
        if getattr(capped, bound.field) != wanted[bound.field]:
            raise Conflict(
                f"the policy allows {machine.name} at most {bound.field} = {getattr(capped, bound.field)}",
                hint=f"rayos policy explain {machine.name}",
            )

    # -- levels --------------------------------------------------------------------------------------------------

    async def set_level(self, name: str, level: int) -> int:
        """Switches a machine's devices to a level of optimization, in force when this returns, in later runs too.

        Raises:
            Invalid: there is no such level.
        """
        machine = self._find(name)
        if level not in tuple(Level):
            raise Invalid(f"there is no level {level}: 0 to {max(Level)} are")
        async with machine.lock:
            before, machine.record.level = machine.record.level, level
            try:
                if machine.is_live:
                    with worker_errors(machine):
                        await machine.need_worker().set_level(level)
                await self._save(machine)
            except BaseException:
                machine.record.level = before
                raise
        machine.events.publish("device.level", name, level=level)
        return level


def _limits(machine: Machine, device: str) -> dict[str, int]:
    spec = machine.record.spec
    bounds = BOUNDS[devices_of(spec)[device]]
    own = {limit.value: bound.read(spec.quota) if bound else 0 for limit, bound in bounds.items()}
    return {**own, **machine.record.limits.get(device, {})}


def _describe(machine: Machine, device: str, account: Account) -> DeviceView:
    known = device in devices_of(machine.record.spec)
    return DeviceView.of(machine.name, device, account, _limits(machine, device) if known else {})


def _described(machine: Machine, reader: AccountReader) -> list[DeviceView]:
    return [_describe(machine, name, account) for name, account in reader.devices().items()]


def spell(limit: str, value: int, device: str) -> str:
    """A limit for people."""
    if not value:
        return "unbounded"
    if limit == Limit.RATE.value:
        if device != "net":
            return f"{format_size(value)}/s"
        bits = 8 * value
        scale, unit = next(
            (scale, unit)
            for scale, unit in ((10**9, "Gbit/s"), (10**6, "Mbit/s"), (10**3, "kbit/s"), (1, "bit/s"))
            if bits % scale == 0
        )
        return f"{bits // scale}{unit}"
    if limit in (Limit.STORAGE.value, Limit.MEMORY.value):
        return format_size(value)
    return str(value)
