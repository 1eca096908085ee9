import dataclasses
import json
import os
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from fleet.errors import DiskFull, ReleaseError
from fleet.files import Files
from fleet.identity import create_run_keys
from fleet.releases import MAX_CHUNK_BYTES, OWN_CHUNK_BYTES, assemble, chunk_id, parse_manifest, read_manifest, split
from fleet.server.releases import ReleaseStore

POLICY = {"family": "mlp", "config": {"width": 8}, "spec": {"reads": {"observation.state": [3]}}}


@pytest.fixture
def keys(tmp_path):
    create_run_keys(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def store(tmp_path, keys):
    return ReleaseStore(tmp_path / "releases", keys)


def weights(seed=0, big=40_000):
    rng = np.random.default_rng(seed)
    return {
        "a.bias": rng.normal(size=7).astype(np.float32),
        "a.weight": rng.normal(size=big).astype(np.float32),
        "b.bias": rng.normal(size=5).astype(np.float16),
        "c.count": np.array(3, np.int64),
        "d.mask": np.array([True, False, True]),
    }


def publish(store, tensors=None, step=1):
    return store.publish(save(tensors or weights()), algorithm="bc", step=step, metrics={"loss": 0.5}, policy=POLICY)


def public(keys):
    return (keys / "release.pub").read_text().strip()


def same(first, second):
    return set(first) == set(second) and all(
        np.array_equal(first[n], second[n]) and first[n].dtype == second[n].dtype for n in first
    )


def test_a_release_goes_from_the_store_to_a_robot(store, keys):
    published = publish(store)
    manifest = parse_manifest(store.read("manifest", "1"), public(keys))
    assert manifest == published and manifest.version == 1 and manifest.parent is None
    assert manifest.policy == POLICY and manifest.metrics == {"loss": 0.5}
    chunks = {i: store.read("chunk", i) for i in manifest.missing(())}
    assert same(load(assemble(manifest, chunks)), weights())
    assert store.load(1) == assemble(manifest, chunks)


def test_only_changed_tensors_are_missing_and_written(store, tmp_path):
    first = publish(store)
    written = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(tmp_path / "releases" / "chunks")}
    changed = weights()
    changed["a.bias"] = changed["a.bias"] + 1
    second = publish(store, changed)
    missing = second.missing({chunk.id for chunk in first.chunks})
    assert [len(store.read("chunk", i)) for i in missing] == [8 + 7 * 4]  # the small tensors before the large one share a chunk
    for entry in os.scandir(tmp_path / "releases" / "chunks"):
        assert written.get(entry.name, entry.stat().st_mtime_ns) == entry.stat().st_mtime_ns
    assert second.parent == 1 and same(load(store.load(2)), changed) and same(load(store.load(1)), weights())


def test_large_tensors_have_their_own_bounded_chunks():
    size = (2 * MAX_CHUNK_BYTES + 1000) // 4
    tensors = {"big": np.arange(size, dtype=np.float32), "edge": np.zeros(OWN_CHUNK_BYTES // 4, np.float32)}
    tensors |= {f"small{i}": np.full(100, i, np.float32) for i in range(20)}
    header, pieces = split(save(tensors))
    assert sorted(len(data) for _, data in pieces) == sorted(
        [20 * 400, OWN_CHUNK_BYTES, MAX_CHUNK_BYTES, MAX_CHUNK_BYTES, 1000]
    )
    assert all(name == chunk_id(data) for name, data in pieces)
    assert set(header) == set(tensors)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["f8", "f4", "f2", "i8", "u1", "?"]), st.lists(st.integers(0, 40), max_size=3)), max_size=8
    )
)
@example([("f8", [0]), ("f8", [40, 40, 40])])  # an empty tensor in front of a large one
def test_any_layout_survives_the_cut(shapes):
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": np.asarray(rng.random(shape) * 100).astype(dtype) for i, (dtype, shape) in enumerate(shapes)}
    header, pieces = split(save(tensors))
    from fleet.releases import ChunkRef, Manifest

    manifest = Manifest(1, None, "bc", 0, 0, {}, POLICY, header, tuple(ChunkRef(i, len(d)) for i, d in pieces))
    assert read_manifest(manifest.to_bytes()) == manifest
    assert same(load(assemble(manifest, dict(pieces))), tensors)
    for entry in header.values():
        item = {"F64": 8, "I64": 8, "F32": 4, "F16": 2}.get(entry["dtype"], 1)
        assert entry["data_offsets"][0] % item == 0


def test_an_altered_manifest_is_refused(store, keys):
    data = json.loads(publish(store).to_bytes())
    changes = {"step": 2, "version": 2, "algorithm": "x", "metrics": {}, "parent": None, "created_ns": 1}
    changes["policy"] = {**POLICY, "family": "evil:Class"}
    changes["chunks"] = [*data["chunks"][:-1], {**data["chunks"][-1], "id": "0" * 64}]
    for name, value in changes.items():
        altered = json.dumps({**data, name: value}, sort_keys=True, separators=(",", ":")).encode()
        if data[name] != value:
            with pytest.raises(ReleaseError, match="signature"):
                parse_manifest(altered, public(keys))


def test_a_signature_of_another_key_is_refused(store, tmp_path):
    manifest = publish(store)
    create_run_keys(tmp_path / "other")
    with pytest.raises(ReleaseError, match="signature"):
        parse_manifest(manifest.to_bytes(), public(tmp_path / "other"))
    unsigned = dataclasses.replace(manifest, signature="")
    with pytest.raises(ReleaseError, match="signature"):
        parse_manifest(unsigned.to_bytes(), public(tmp_path / "keys"))


def test_an_altered_or_missing_chunk_is_refused(store):
    manifest = publish(store)
    chunks = {i: store.read("chunk", i) for i in manifest.missing(())}
    victim = manifest.chunks[0].id
    for bad in (chunks[victim][:-1] + bytes([chunks[victim][-1] ^ 1]), chunks[victim][:-1], chunks[victim] + b"x"):
        with pytest.raises(ReleaseError, match="altered"):
            assemble(manifest, {**chunks, victim: bad})
    with pytest.raises(ReleaseError, match="missing"):
        assemble(manifest, {i: d for i, d in chunks.items() if i != victim})


@pytest.mark.parametrize(
    "change",
    [
        {"version": 0},
        {"version": True},
        {"parent": 5},
        {"step": -1},
        {"metrics": {"loss": "high"}},
        {"policy": {}},
        {"signature": 3},
        {"chunks": []},
        {"chunks": [{"id": "../../keys/release.key", "bytes": 28}]},
        {"chunks": [{"id": "0" * 64, "bytes": MAX_CHUNK_BYTES + 1}]},
        {"header": {"t": {"dtype": "F32", "shape": [7], "data_offsets": [0, 29]}}},
        {"header": {"t": {"dtype": "F32", "shape": [-7, -1], "data_offsets": [0, 28]}}},
        {"header": {"t": {"dtype": "OBJECT", "shape": [7], "data_offsets": [0, 28]}}},
        {"header": [1, 2]},
        {"unknown": 1},
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(store, change):
    data = {**json.loads(publish(store).to_bytes()), **change}
    with pytest.raises(ReleaseError, match="manifest"):
        read_manifest(json.dumps(data, sort_keys=True, separators=(",", ":")).encode())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_manifest_are_refused(data):
    with pytest.raises(ReleaseError):
        read_manifest(data)


def test_hostile_json_is_refused(store):
    for data in (b"[" * 100_000, b'{"chunks":1}', b"null", b" " * (9 * 1024 * 1024)):
        with pytest.raises(ReleaseError):
            read_manifest(data)
    good = publish(store).to_bytes()
    for data in (good + b" ", b'{"step":7,' + good[1:]):  # another spelling, a key given twice
        with pytest.raises(ReleaseError, match="canonical"):
            read_manifest(data)


@pytest.mark.parametrize("data", [b"", b"\0" * 8, b"\xff" * 100, save(weights())[:-1], save(weights()) + b"x"])
def test_what_is_no_safetensors_file_is_not_published(store, data):
    with pytest.raises(ReleaseError, match="safetensors"):
        store.publish(data, algorithm="bc", step=1, metrics={}, policy=POLICY)
    assert store.newest() is None


@pytest.mark.parametrize("metrics", [{"loss": float("nan")}, {"loss": "high"}])
def test_metrics_that_robots_would_refuse_are_not_published(store, metrics):
    with pytest.raises(ReleaseError):
        store.publish(save(weights()), algorithm="bc", step=1, metrics=metrics, policy=POLICY)
    assert store.newest() is None


@pytest.mark.parametrize(
    ("what", "id"),
    [
        ("manifest", "../../keys/release.key"),
        ("manifest", "1.json"),
        ("manifest", "01"),
        ("manifest", ""),
        ("manifest", "1\n"),
        ("chunk", "../manifests/1.json"),
        ("chunk", "A" * 64),
        ("chunk", "0" * 64),
        ("chunk", "0" * 63 + "\n"),
        ("counter", "1"),
        ("manifest", "2"),
    ],
)
def test_only_manifests_and_chunks_can_be_read(store, what, id):
    publish(store)
    with pytest.raises(ReleaseError):
        store.read(what, id)


def test_versions_are_never_reused(store, tmp_path, keys):
    for step in (1, 2, 3):
        publish(store, step=step)
    (tmp_path / "releases" / "manifests" / "3.json").unlink()
    again = ReleaseStore(tmp_path / "releases", keys)
    assert again.newest() == 2
    manifest = publish(again)
    assert (manifest.version, manifest.parent) == (4, 2)
    again.never_reuse(10)
    again.never_reuse(5)
    assert publish(again).version == 11


def test_without_its_counter_the_store_goes_on_after_the_newest(store, tmp_path):
    publish(store)
    (tmp_path / "releases" / "counter").unlink()
    assert publish(store).version == 2


def test_newest_is_seen_at_once_by_another_reader(store, tmp_path):
    reader = ReleaseStore(tmp_path / "releases")
    assert reader.newest() is None
    for version in range(1, 31):  # faster than the file system's clock ticks
        publish(store, weights(version, big=10))
        assert reader.newest() == version
    time.sleep(0.12)
    reader.newest()
    start = time.thread_time()
    for _ in range(1000):
        assert reader.newest() == 30
    assert time.thread_time() - start < 0.5  # listing 30 names each time would still pass; a slow newest() would not
    with pytest.raises(ReleaseError, match="reading"):
        publish(reader)


def test_pruning_keeps_what_is_still_named(store, tmp_path):
    for step in range(1, 6):
        publish(store, {**weights(), "a.bias": np.full(7, step, np.float32)}, step=step)
    assert store.prune(2) == [1, 2, 3] and store.versions() == [4, 5] and store.newest() == 5
    assert load(store.load(4))["a.bias"][0] == 4 and load(store.load(5))["a.bias"][0] == 5
    named = {chunk.id for version in (4, 5) for chunk in store.manifest(version).chunks}
    assert {entry.name for entry in os.scandir(tmp_path / "releases" / "chunks")} == named
    assert publish(store).version == 6


class FullDisk(Files):
    """Full while it is ``full``; that shows at the fsync."""

    full = False

    def fsync(self, fd):
        if self.full:
            raise OSError(28, "No space left on device")
        super().fsync(fd)


def test_a_full_disk_publishes_nothing(tmp_path, keys):
    disk = FullDisk()
    store = ReleaseStore(tmp_path / "releases", keys, files=disk)
    publish(store)
    disk.full = True
    with pytest.raises(DiskFull):
        publish(store, weights(1))
    disk.full = False
    assert store.newest() == 1 and not list((tmp_path / "releases" / "tmp").iterdir())
    assert publish(store, weights(1)).version == 2


def test_a_change_within_one_tick_of_the_file_systems_clock_is_seen(store, tmp_path):
    publish(store)
    reader, manifests = ReleaseStore(tmp_path / "releases"), tmp_path / "releases" / "manifests"
    assert reader.newest() == 1
    mtime_ns = manifests.stat().st_mtime_ns
    publish(store)
    os.utime(manifests, ns=(mtime_ns, mtime_ns))  # as on a file system whose clock did not tick in between
    assert reader.newest() == 2


class Died(BaseException):
    pass


@pytest.mark.parametrize("before", [True, False])
def test_death_at_any_file_call_leaves_whole_releases(tmp_path, keys, monkeypatch, before):
    """The process ends right before, or right after, the n-th rename or fsync of a publish, for every n."""
    folder = tmp_path / "releases"
    publish(ReleaseStore(folder, keys))
    given, deaths = {1: 1}, 0
    for die_at in range(2, 100):
        store, calls = ReleaseStore(folder, keys), 0

        def dying(real, die_at=die_at):
            def call(*args):
                nonlocal calls
                calls += 1
                if calls == die_at - 1 and before:
                    raise Died
                real(*args)
                if calls == die_at - 1:
                    raise Died

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying(os.replace))
            patch.setattr(os, "fsync", dying(os.fsync))
            try:
                finished = publish(store, weights(die_at), step=die_at).version
            except Died:
                deaths, finished = deaths + 1, None
        reader = ReleaseStore(folder)
        for version in reader.versions():
            assert len(load(reader.load(version))) == len(weights())
            assert given.setdefault(version, reader.manifest(version).step) == reader.manifest(version).step, (
                "a number came twice"
            )
        newest = reader.newest()
        if newest and reader.manifest(newest).step == die_at:  # it was out, and is deleted: its number is not given again
            (folder / "manifests" / f"{newest}.json").unlink()
        if finished is not None:
            break
    assert finished == max(given) and deaths > 10
