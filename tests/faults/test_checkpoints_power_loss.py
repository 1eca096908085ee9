"""Checkpoints on a disk that loses its power: after any cut there is the newest whole one, or the one before it."""

import random
import shutil

import pytest
import torch

from learner.checkpoint import Checkpoint, Checkpoints
from tests.faults.disk_model import RecordedDisk, Unsynced, killed


def state_of(step):
    """Of two tensors, of several sectors each."""
    return {"parts": {"policy": {"w": torch.full((700,), float(step)), "b": torch.full((300,), step)}}, "step": step}


class Learner:
    """Saves one checkpoint after the other, over kills. ``saved``: instant of the disk from which a step is there."""

    def __init__(self, disk, folder):
        self.disk, self.folder, self.saved = disk, folder, {}

    def run(self):
        checkpoints = Checkpoints(self.folder, keep=2, files=self.disk)
        newest = checkpoints.newest()
        assert checkpoints.refused == [], "a kill alone damages nothing"
        step = newest.step if newest else 0
        while True:
            step += 1
            checkpoints.save(Checkpoint(step, {"release": step}, state_of(step)))
            self.saved[step] = len(self.disk.ops)


@pytest.mark.timeout(300)
def test_power_loss_keeps_a_whole_checkpoint(tmp_path, scale):
    for trial in range(5 * scale):
        rng, root = random.Random(trial), tmp_path / "disk"
        root.mkdir()
        learner = Learner(RecordedDisk(root), root / "checkpoints")
        for _ in range(rng.randrange(2, 5)):
            with killed(learner.disk, rng, 90):
                learner.run()
        for number in range(10):
            cut, once = learner.disk.instant(rng), tmp_path / "once"
            said = f"trial {trial}, {number}: {learner.disk.disk_after(cut, once, rng)}"
            try:
                checkpoints = Checkpoints(once / "checkpoints", keep=2, files=Unsynced())
                found = checkpoints.newest()
                done = max((step for step, when in learner.saved.items() if when <= cut), default=0)
                assert checkpoints.refused == [], "half a checkpoint has the name of a whole one"
                assert (found.step if found else 0) >= done, "a checkpoint is gone that was saved"
                if found:
                    weights = found.state["parts"]["policy"]
                    assert (weights["w"] == found.step).all() and (weights["b"] == found.step).all()
                    assert found.meta == {"release": found.step}
                for step in checkpoints.steps():
                    assert checkpoints.load(step).step == step, "what is deleted looks like a checkpoint"
                checkpoints.save(Checkpoint(1000, {}, state_of(1000)))
                assert checkpoints.newest().step == 1000 and len(checkpoints.steps()) <= 2
                assert all(path.name.isdigit() for path in (once / "checkpoints").iterdir())
            except BaseException as error:
                error.add_note(said)
                raise
            shutil.rmtree(once)
        shutil.rmtree(root)
