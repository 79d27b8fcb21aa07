"""Errors of ours on their way out of a request."""

from __future__ import annotations

import logging

import pytest

from rayos_vmm.api import endpoint
from rayos_vmm.api.http.limits import Sparing


def test_errors_of_ours_without_end_are_one_traceback_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(endpoint, "_failures", Sparing(logging.getLogger("sparing"), "A request failed"))
    for _ in range(100):
        error = endpoint.as_rayos_error(ValueError("why"))
        assert (error.code, error.message) == ("internal", "the service failed: ValueError: why")
    (record,) = caplog.records
    assert record.getMessage() == "A request failed: ValueError (0 more since the last)"
    assert record.exc_info is not None and isinstance(record.exc_info[1], ValueError)
