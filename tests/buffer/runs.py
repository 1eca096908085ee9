"""Runs for tests: a run folder whose log was written by the real ingest."""

from __future__ import annotations

from pathlib import Path

from buffer.ingest import Ingest
from buffer.log import Log
from buffer.mixture import loss_table
from fleet.robot import Source
from fleet.runfolder import RunFolder
from tests.buffer.fragments import make_spec, message

ROOT = Path(__file__).parents[2]
POLICY, OPERATOR, DEMO = Source.POLICY, Source.OPERATOR, Source.DEMO


def make_run(path):
    run = RunFolder.create(path)
    run.config.write_text((ROOT / "examples" / "toy.yaml").read_text())
    (run.path / "tasks.json").write_text('{"reach": {"instruction": "reach it", "embedding": [0.0]}}')
    return run


def feed_back(sampler, windows, loss_B):
    """As a learner with one rank."""
    sampler.feed_back(windows, loss_B, loss_table(windows, loss_B, len(sampler.index.task_names)))


class Writer:
    """Writes episodes of one boot after the other; seqs go on where the log stopped.

    Args:
        segment_bytes: Small by default, so that a few episodes fill several segments.
        spec: By default with 4 kB a step, for the same reason.
    """

    def __init__(self, buffer, segment_bytes=40_000, spec=None):
        self.spec = spec or make_spec(extra=4000)
        self.log = Log(buffer, segment_bytes=segment_bytes)
        self.ingest = Ingest(self.log)

    def episode(self, robot, boot, episode, sources, *, per_fragment=3, version=4, closed=True, task="reach"):
        """Sends an episode in fragments; one policy call a fragment."""
        self.ingest.admit(robot, boot, self.spec)
        for first in range(0, len(sources), per_fragment):
            part = sources[first : first + per_fragment]
            options = {"opened": first == 0, "closed": closed and first + per_fragment >= len(sources), "task": task}
            if POLICY in part:
                options["chunk"] = (1000 * episode + first, version)
            seq = self.log.last(robot, boot).seq + 1
            fields, payload = message(robot, boot, seq, episode, first, part, spec=self.spec, **options)
            self.ingest.offer(robot, fields, payload)
            self.ingest.commit()
        return robot, boot, episode

    def close(self):
        self.log.close()


def fill(buffer, *, robots=2, episodes=4, spec=None, segment_bytes=40_000):
    """A log of several segments: policy episodes, the last of each robot with a takeover in the middle."""
    writer = Writer(buffer, segment_bytes, spec)
    keys = []
    for number in range(episodes):
        for robot in range(robots):
            takeover = number == episodes - 1
            sources = [POLICY] * 4 + [OPERATOR] * 3 + [POLICY] * 2 if takeover else [POLICY] * 9
            keys.append(writer.episode(f"arm-{robot}", f"boot{robot}", number, sources, version=4 + number))
    writer.close()
    return keys
