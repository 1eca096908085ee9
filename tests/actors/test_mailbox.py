import numpy as np
import pytest
from safetensors.numpy import load, save

from actors.mailbox import Mailbox
from fleet.errors import ReleaseError
from fleet.identity import create_run_keys
from fleet.server.releases import ReleaseStore

POLICY = {"family": "mlp", "config": {}, "spec": {}}


@pytest.fixture
def store(tmp_path):
    create_run_keys(tmp_path / "keys")
    return ReleaseStore(tmp_path / "releases", tmp_path / "keys")


@pytest.fixture
def key(store, tmp_path):
    return (tmp_path / "keys" / "release.pub").read_text()


def weights(value):
    """Two large tensors, of which only the head depends on ``value``."""
    return {"trunk": np.arange(40_000, dtype=np.float32), "head": np.full(20_000, value, np.float32)}


def publish(store, value):
    return store.publish(save(weights(value)), algorithm="bc", step=0, metrics={}, policy=POLICY)


def pull_all(mailbox, store):
    """Answers every request; returns what was asked for."""
    asked = []
    while requests := mailbox.requests():
        for what, id in requests:
            asked.append((what, id))
            mailbox.deliver(what, id, store.read(what, id))
    return asked


def test_a_release_arrives_whole(tmp_path, store, key):
    publish(store, 1.0)
    mailbox = Mailbox(tmp_path / "robot", key)
    assert mailbox.take() is None
    mailbox.announce(1)
    pull_all(mailbox, store)
    manifest, data = mailbox.take()
    assert manifest.version == 1
    np.testing.assert_array_equal(load(data)["head"], weights(1.0)["head"])
    assert mailbox.take() is None  # handed over once


def test_only_what_changed_is_asked_for(tmp_path, store, key):
    mailbox = Mailbox(tmp_path / "robot", key)
    for version, value in ((1, 1.0), (2, 2.0)):
        publish(store, value)
        mailbox.announce(version)
        asked = pull_all(mailbox, store)
        mailbox.take()
    assert [what for what, _ in asked] == ["manifest", "chunk"]


def test_a_robot_can_go_from_any_release_to_any_other(tmp_path, store, key):
    mailbox = Mailbox(tmp_path / "robot", key)
    for version in range(1, 6):
        publish(store, float(version))
    for version in (1, 5):
        mailbox.announce(version)
        pull_all(mailbox, store)
        assert load(mailbox.take()[1])["head"][0] == version


def test_nothing_is_handed_over_while_a_chunk_is_missing(tmp_path, store, key):
    publish(store, 1.0)
    mailbox = Mailbox(tmp_path / "robot", key)
    mailbox.announce(1)
    (request,) = mailbox.requests()
    mailbox.deliver(*request, store.read(*request))
    chunks = mailbox.requests()
    for request in chunks[:-1]:
        mailbox.deliver(*request, store.read(*request))
    assert mailbox.take() is None


def test_an_altered_chunk_is_refused_and_asked_for_again(tmp_path, store, key):
    publish(store, 1.0)
    mailbox = Mailbox(tmp_path / "robot", key)
    mailbox.announce(1)
    (request,) = mailbox.requests()
    mailbox.deliver(*request, store.read(*request))
    what, id = mailbox.requests()[0]
    with pytest.raises(ReleaseError, match="altered"):
        mailbox.deliver(what, id, store.read(what, id)[:-1] + b"x")
    assert (what, id) not in mailbox.requests()  # not at once: a gateway that sends damaged data is not asked in a tight loop
    mailbox.reconnected()
    assert (what, id) in mailbox.requests()


def test_a_manifest_of_another_key_is_refused(tmp_path, store):
    publish(store, 1.0)
    create_run_keys(tmp_path / "other")
    mailbox = Mailbox(tmp_path / "robot", (tmp_path / "other" / "release.pub").read_text())
    mailbox.announce(1)
    (request,) = mailbox.requests()
    with pytest.raises(ReleaseError, match="signature"):
        mailbox.deliver(*request, store.read(*request))


def test_a_restarted_robot_has_its_release_without_asking(tmp_path, store, key):
    publish(store, 1.0)
    mailbox = Mailbox(tmp_path / "robot", key)
    mailbox.announce(1)
    pull_all(mailbox, store)
    mailbox.take()
    again = Mailbox(tmp_path / "robot", key)
    assert again.requests() == []
    assert again.take()[0].version == 1


def test_a_damaged_cache_is_noticed_and_mended(tmp_path, store, key):
    publish(store, 1.0)
    mailbox = Mailbox(tmp_path / "robot", key)
    mailbox.announce(1)
    pull_all(mailbox, store)
    mailbox.take()
    damaged = next((tmp_path / "robot" / "chunks").iterdir())
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    again = Mailbox(tmp_path / "robot", key)
    assert again.take() is None
    assert [id for _, id in again.requests()] == [damaged.name]
    pull_all(again, store)
    again.reconnected()
    pull_all(again, store)
    assert again.take()[0].version == 1


def test_a_refused_release_is_not_asked_for_again(tmp_path, store, key):
    publish(store, 1.0)
    mailbox = Mailbox(tmp_path / "robot", key)
    mailbox.refuse(1)
    mailbox.announce(1)
    assert mailbox.requests() == []
