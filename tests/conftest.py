"""Shared by all tests. Nothing heavy is imported here."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def scale() -> int:
    """Factor on counts: 1 in ``make test``, 10 in ``make test-full``."""
    return max(1, int(os.environ.get("FLEET_TEST_SCALE", "1")))
