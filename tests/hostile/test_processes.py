"""The service's own processes: what each may still do, who owns the state, and what happens when one dies.

The rows P of the threat model.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from rayos_vmm.errors import Busy
from tests.integration.service_lab import home, lab

pytestmark = [pytest.mark.guest, pytest.mark.root]


async def test_P3_a_state_directory_has_one_service() -> None:
    """Also where the second one brings a runtime directory of its own: it would take the first one's guests away."""
    async with home() as paths, lab(paths):
        other = replace(paths, runtime=paths.runtime.with_name("other"))
        with pytest.raises(Busy, match=f"another service .* runs on {paths.state}"):
            async with lab(other):
                pass
