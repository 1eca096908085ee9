"""A dataset made by lerobot goes into a run over the real wire and comes out again; lerobot itself reads both."""

import json

import numpy as np
import pytest

pytest.importorskip("lerobot", reason="lerobot is not installed here: make test-lerobot has an environment for it")

from buffer.export_lerobot import Selection, export_dataset
from buffer.import_lerobot import Demonstrations
from fleet.robot import Source
from infra.data_lerobot import import_dataset
from tests.lerobot.helpers import FPS, TASKS, frame_values, make_dataset, make_run, open_dataset, stored_steps

LENGTHS = [7, 130, 5]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("video", [False, True], ids=["images", "video"])
def test_a_dataset_survives_the_way_through_a_run(tmp_path, video):
    source = make_dataset(tmp_path / "source", LENGTHS, video=video)
    run = make_run(tmp_path / "run")
    done = import_dataset(run, Demonstrations(source, success="column"))
    assert (done.robot_id, done.episodes, done.steps, done.steps_before) == ("import-source", 3, sum(LENGTHS), 0)
    steps = stored_steps(run)
    assert [(episode, frame) for _, _, episode, frame in steps] == [(e, f) for e, n in enumerate(LENGTHS) for f in range(n)]

    out = tmp_path / "out"
    exported = export_dataset(run.buffer, out, Selection(), run_id=run.run_id, video=video)
    assert (exported.episodes, exported.steps, exported.left_out) == (3, sum(LENGTHS), {})
    ours, theirs = open_dataset(out), open_dataset(source)
    assert (ours.fps, ours.meta.robot_type, ours.num_episodes, ours.num_frames) == (FPS, "toy_arm", 3, sum(LENGTHS))
    texts, at = list(TASKS.values()), 0
    for episode, length in enumerate(LENGTHS):
        for frame in range(length):
            item, expected = ours[at], frame_values(episode, frame, frame == length - 1)
            assert item["task"] == texts[episode % 2]
            for name, value in expected.items():
                if name.startswith("observation.images."):
                    # What was recorded is the frame as lerobot reads it: videos have lost something already.
                    pixels, given = (np.asarray(d[at][name]) * 255 for d in (ours, theirs))
                    assert np.abs(pixels - given).max() < (60 if video else 24)
                    assert np.abs(pixels - given).mean() < 3
                else:
                    assert np.array_equal(np.asarray(item[name]).reshape(value.shape), value), (name, episode, frame)
            assert (item["source"], item["intervention"], item["policy_version"]) == (Source.DEMO, False, -1)
            at += 1
    origin = json.loads((out / "meta" / "fleet.json").read_text())
    assert [e["outcome"] for e in origin["episodes"]] == ["success", "failure", "success"]
    assert {e["robot_id"] for e in origin["episodes"]} == {"import-source"}


@pytest.mark.timeout(120)
def test_an_export_feeds_a_data_loader(tmp_path):
    from torch.utils.data import DataLoader

    run = make_run(tmp_path / "run")
    import_dataset(run, Demonstrations(make_dataset(tmp_path / "source", [6, 6])))
    export_dataset(run.buffer, tmp_path / "out", Selection(), run_id=run.run_id)
    batch = next(iter(DataLoader(open_dataset(tmp_path / "out"), batch_size=8, shuffle=True)))
    assert batch["observation.images.top"].shape == (8, 3, 32, 48)
    assert batch["action"].shape == (8, 2) and batch["intervention"].shape == (8,)
