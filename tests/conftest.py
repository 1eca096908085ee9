"""Shared by all tests. Nothing heavy is imported here."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import pytest

# For torch here and in all processes that tests start: threads that wait for each other take the cores from other tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def scale() -> int:
    """Factor on counts: 1 in ``make test``, 10 in ``make test-full``."""
    return max(1, int(os.environ.get("FLEET_TEST_SCALE", "1")))


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Keeps a text, for example times that were measured, for the end of the run; it is shown also when the test passes."""
    return lambda text: request.node.user_properties.append(("told", text))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, text in report.user_properties if report.when == "call" else ():
                if name == "told":
                    terminalreporter.write_line(f"{report.nodeid}:\n{text}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several workers share the files, those whose tests are given much time come first: what ends last is short."""
    if not hasattr(config, "workerinput"):
        return
    given_s: Counter[object] = Counter()
    for item in items:
        if (mark := item.get_closest_marker("timeout")) is not None:
            given_s[item.path] += mark.args[0]
    items.sort(key=lambda item: -given_s[item.path])
