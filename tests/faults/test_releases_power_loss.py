"""The release store on a disk that loses its power: what was published is whole, and no version is given twice."""

import random
import shutil

import numpy as np
import pytest
from safetensors.numpy import load, save

from fleet.identity import create_run_keys
from fleet.server.releases import ReleaseStore
from tests.faults.disk_model import RecordedDisk, Unsynced, killed

POLICY = {"family": "mlp", "config": {}, "spec": {}}


def weights_of(version):
    """Of two tensors one changes with each version, the other with each second."""
    return save({"a": np.full(40_000, version, np.float32), "b": np.full(40_000, version // 2, np.float32)})


class Publisher:
    """A learner that publishes, over kills. ``published``: instant of the disk from which a version is there.
    ``seen``: instant from which robots may have seen it."""

    def __init__(self, disk, folder, keys):
        self.disk, self.folder, self.keys = disk, folder, keys
        self.published, self.pruned = {}, {}

    def run(self):
        store = ReleaseStore(self.folder, self.keys, files=self.disk)
        for version in store.versions():
            self.published.setdefault(version, 1 << 60)  # seen, perhaps not durable
        while True:
            self.publish(store)
            if len(store.versions()) > 4:
                for version in store.versions()[:-2]:
                    self.pruned.setdefault(version, len(self.disk.ops))
                store.prune(2)

    def publish(self, store):
        given = max([store.last_version_given, *store.versions()]) + 1
        manifest = store.publish(weights_of(given), algorithm="bc", step=given, metrics={}, policy=POLICY)
        assert manifest.version == given
        self.published[given] = len(self.disk.ops)


@pytest.mark.timeout(300)
def test_power_loss_keeps_what_was_published(tmp_path, scale):
    create_run_keys(tmp_path / "keys")
    for trial in range(2 * scale):
        rng, root = random.Random(trial), tmp_path / "disk"
        root.mkdir()
        publisher = Publisher(RecordedDisk(root), root / "releases", tmp_path / "keys")
        for _ in range(rng.randrange(2, 6)):
            with killed(publisher.disk, rng, 90):
                publisher.run()
        for number in range(15):
            cut, once = publisher.disk.instant(rng), tmp_path / "once"
            said = f"trial {trial}, {number}: {publisher.disk.disk_after(cut, once, rng)}"
            try:
                store = ReleaseStore(once / "releases", tmp_path / "keys", files=Unsynced())
                there = store.versions()
                for version, when in publisher.published.items():
                    if when <= cut and publisher.pruned.get(version, 1 << 60) > cut:
                        assert version in there, "a published release is gone"
                for version in there:
                    tensors = load(store.load(version))
                    assert (tensors["a"] == version).all() and (tensors["b"] == version // 2).all()
                ever = max((version for version, when in publisher.published.items() if when <= cut), default=0)
                assert store.last_version_given >= max([ever, *there])
                assert store.publish(weights_of(0), algorithm="bc", step=1, metrics={}, policy=POLICY).version > ever
            except BaseException as error:
                error.add_note(said)
                raise
            shutil.rmtree(once)
        shutil.rmtree(root)
