"""Other people's losses on the same numbers as ours: in ``make test-reference``, where their libraries are installed.

Elsewhere these files are skipped; there, a test that is skipped fails the run.
"""

from __future__ import annotations

import os

import pytest

# Before jax is imported: it has 32-bit numbers unless it is told, and looks for a GPU.
os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_JIT", "1")  # compiling takes longer than what these tests compute
os.environ.setdefault("RL_WARNINGS", "False")  # torchrl misses an updater of its targets, which are tested as they stand


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("FLEET_REFERENCE") != "all" or reporter is None:
        return
    num_passed, num_skipped = len(reporter.stats.get("passed", ())), len(reporter.stats.get("skipped", ()))
    if num_passed == 0 or num_skipped > 0:
        reporter.write_line(f"\n{num_passed} passed, {num_skipped} skipped: all are to be tried here", red=True)
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
