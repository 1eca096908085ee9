"""Frames that were accepted and are no images: the learner goes on without them, and says which they are."""

import dataclasses

import numpy as np
import pytest

import fleet.images
from buffer.image_cache import ImageCache
from buffer.ingest import Ingest
from buffer.log import Log
from buffer.sampler import Sampler
from fleet.batch import WHOLE, BatchNeeds, Split
from fleet.errors import StorageError
from fleet.journal import Journal, read_journal
from fleet.robot import Source
from tests.buffer.fragments import make_spec, message

SPEC, BOOT = make_spec(image="jpeg"), "b" * 16
IMAGE, STATE = "observation.images.top", "observation.state"
NEEDS = BatchNeeds(200, 2, (STATE, IMAGE), {(Source.DEMO,): 1.0}, offsets=(0, 1))


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes a sampler of an episode of 100 steps whose ``broken`` frames are headers of images without an image."""

    def make(broken, cache=None, split=WHOLE):
        encode, log = fleet.images.encode, Log(tmp_path / "log")

        def encoded(feature, image):
            data = encode(feature, image)
            return data[: data.index(b"\xff\xda")] if image.flat[0] - 40 in broken else data

        monkeypatch.setattr(fleet.images, "encode", encoded)
        ingest = Ingest(log)
        ingest.admit("r1", BOOT, SPEC)
        for i in range(5):
            options = {"spec": SPEC, "opened": i == 0, "closed": i == 4}
            ingest.offer("r1", *message("r1", BOOT, i + 1, 7, 20 * i, [Source.DEMO] * 20, **options))
        ingest.commit()
        log.close()
        journal = Journal(tmp_path / "learner.jsonl")
        sampler = Sampler(tmp_path / "log", ["reach"], 0, journal, cache=cache, split=split)
        assert sampler.poll() == 100
        return sampler, lambda: [line for line in read_journal(tmp_path / "learner.jsonl") if line["kind"] == "undecodable"]

    return make


@pytest.mark.parametrize("cache", [None, ImageCache(1 << 20)], ids=["plain", "cached"])
def test_up_to_half_are_left_out_counted_and_named_once(make, cache):
    sampler, lines = make(range(40, 70), cache)
    replaced, seen = 0, set()
    for step in range(30):
        needs = dataclasses.replace(NEEDS, batch_size=20)
        draw = sampler.draw(needs, step)
        bad = np.isin(draw.facts["frame_B"], range(39, 70))  # 39: its image at t + 1 is that of 40
        if bad.sum() > 10:
            continue
        seen.update(draw.facts["frame_B"][bad].tolist())
        windows = sampler.gather(draw)
        replaced += int(bad.sum())
        assert not np.isin(windows.frame_B, range(39, 70)).any() and len(windows.frame_B) == 20
        for images, frames in (
            (windows.obs[IMAGE], windows.frame_B),
            (windows.obs_at[1][IMAGE], windows.obs_at[1][STATE][:, 2]),
        ):
            assert np.abs(images.reshape(20, -1).mean(1) - 40 - frames).max() < 3
        np.testing.assert_array_equal(windows.obs[STATE][:, 2], windows.frame_B)
        np.testing.assert_array_equal(windows.actions_BHA[:, 0, 0], 7000 + windows.frame_B)
    assert replaced >= 50 and sampler.undecodable.num_windows == replaced
    assert len(lines()) == len(seen) and all("episode 7 of r1" in line["why"] and IMAGE in line["why"] for line in lines())
    sampler.close()


def test_more_than_half_are_refused_by_name(make):
    sampler, _ = make(range(30, 100))
    with pytest.raises(
        StorageError, match=r"1[1-9]\d of the 200 windows .* frame \d+ of episode 7 of r1 \(boot b+\): observation.images.top"
    ):
        sampler.batch(NEEDS, 0)
    sampler.close()


def test_a_batch_of_nothing_else_is_refused(make):
    sampler, _ = make(range(100))
    with pytest.raises(StorageError, match="1 of the 1 windows"):
        sampler.batch(dataclasses.replace(NEEDS, batch_size=1), 0)
    sampler.close()


def test_a_rank_with_few_rows_takes_others_of_the_batch_when_its_own_are_bad_by_chance(make):
    sampler, lines = make(range(45, 70), split=Split(3, (0,) * 100))
    taken = 0
    for step in range(100):
        draw = sampler.draw(NEEDS, step)
        assert len(draw.facts["frame_B"]) == 2
        frame_B = draw.facts["frame_B"].copy()
        bad = np.isin(frame_B, range(44, 70))
        arrays = {}
        windows = sampler.gather(draw, lambda name, shape, dtype, to=arrays: to.setdefault(name, np.empty(shape, dtype)))
        assert windows.index_B.tolist() == [6, 7] and windows.shard_weight == 1.0
        assert not np.isin(windows.frame_B, range(44, 70)).any() and windows.obs[IMAGE] is arrays[IMAGE]
        np.testing.assert_array_equal(windows.frame_B[~bad], frame_B[~bad])
        for images, frames in ((windows.obs[IMAGE], windows.frame_B), (arrays[f"{IMAGE}@1"], windows.obs_at[1][STATE][:, 2])):
            assert np.abs(images.reshape(2, -1).mean(1) - 40 - frames).max() < 3
        np.testing.assert_array_equal(windows.actions_BHA[:, 0, 0], 7000 + windows.frame_B)
        taken += bad.all()
    assert taken >= 2 and lines()
    sampler.close()


def test_a_rank_with_few_rows_refuses_as_well_when_most_of_the_batch_is_bad(make):
    sampler, _ = make(range(10, 100), split=Split(3, (0,) * 100))
    with pytest.raises(StorageError, match=r"[3-6]\d of the 64 windows"):
        for step in range(20):
            sampler.batch(NEEDS, step)
    sampler.close()
