"""The registry on its embedded server: a view that nobody waits for."""

import os
import signal
import time

import pytest

from fleet.errors import ConfigError, RegistryUnreachable
from fleet.server.registry import MAX_WAITING, Registry, RegistryConfig, RegistryServer, registry_url


@pytest.fixture
def server(tmp_path):
    server = RegistryServer(tmp_path / "registry")
    yield server
    server.stop()


@pytest.fixture
def registry(server):
    registry = Registry(server.url)
    yield registry
    registry.close()


def test_what_is_put_is_read_by_another_client(server, registry):
    registry.put("arm-1", {"state": "live", "version": 3, "spool": 0.5})
    registry.put("arm-2", {"state": "left"})
    registry.put_learner({"step": 100, "loss": 0.25})
    assert registry.flush()
    reader = Registry(registry_url(server._folder))
    assert reader.robots() == {"arm-1": {"state": "live", "version": 3, "spool": 0.5}, "arm-2": {"state": "left"}}
    assert reader.learner() == {"step": 100, "loss": 0.25}
    reader.close()


def test_the_newest_state_replaces_the_older_whole(registry):
    registry.put("arm-1", {"state": "live", "old": 1})
    assert registry.flush()
    registry.put("arm-1", {"state": "lost"})
    assert registry.flush()
    assert registry.robots() == {"arm-1": {"state": "lost"}}


def test_runs_can_share_a_server(server, registry):
    other = Registry(server.url, prefix="other")
    registry.put("arm-1", {"state": "live"})
    assert registry.flush()
    assert other.robots() == {} and other.learner() == {}
    other.close()


def test_the_state_is_there_after_a_kill(tmp_path):
    folder = tmp_path / "registry"
    first = RegistryServer(folder)
    registry = Registry(first.url)
    registry.put("arm-1", {"state": "live"})
    assert registry.flush()
    time.sleep(1.1)  # the append-only file is synced every second; the write itself is done before the answer
    os.kill(first.pid, signal.SIGKILL)
    first.process.wait()
    second = RegistryServer(folder)
    try:
        assert Registry(second.url).robots() == {"arm-1": {"state": "live"}}
        registry.put("arm-1", {"state": "lost"})
        assert registry.flush(5)
        assert registry.robots() == {"arm-1": {"state": "lost"}}
    finally:
        registry.close()
        second.stop()


def test_a_server_left_behind_is_ended_before_the_next_starts(tmp_path):
    first = RegistryServer(tmp_path / "registry")
    second = RegistryServer(tmp_path / "registry")
    try:
        assert first.process.wait(5) is not None
        assert Registry(second.url).robots() == {}
    finally:
        second.stop()


def test_a_folder_with_a_long_name_works(tmp_path):
    folder = tmp_path / ("n" * 60) / ("m" * 60) / "registry"
    server = RegistryServer(folder)
    url = registry_url(folder)
    try:
        assert len(url) < 108 and Registry(url).robots() == {}
    finally:
        server.stop()
    assert not os.path.exists(os.path.dirname(url.removeprefix("unix://")))
    assert folder.is_dir()


def test_stopping_keeps_the_folder_and_leaves_no_process(tmp_path):
    server = RegistryServer(tmp_path / "registry")
    server.stop()
    assert server.process.poll() is not None and any((tmp_path / "registry").iterdir())
    with pytest.raises(RegistryUnreachable, match="fleet up"):
        Registry(server.url).robots()


def test_nobody_waits_for_a_registry_that_is_not_there(tmp_path):
    registry = Registry(f"unix://{tmp_path}/nothing.sock")
    started = time.monotonic()
    for n in range(2 * MAX_WAITING):
        registry.put(f"arm-{n}", {"n": n})
    assert time.monotonic() - started < 1.0
    assert registry.num_dropped == MAX_WAITING
    with pytest.raises(RegistryUnreachable):
        registry.robots()
    started = time.monotonic()
    registry.close()
    assert time.monotonic() - started < 5


def test_where_it_is_must_be_known(tmp_path):
    with pytest.raises(RegistryUnreachable, match="has no registry"):
        registry_url(tmp_path)
    with pytest.raises(ConfigError, match="nonsense"):
        Registry("nonsense")
    with pytest.raises(ConfigError, match="nonsense"):
        RegistryConfig(url="nonsense").check()
