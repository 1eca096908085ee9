"""A log with everything that a robot may send, and the same as plain lists: what the sampler's windows must be."""

from __future__ import annotations

import collections
import dataclasses
import math

import numpy as np
from hypothesis import strategies as st

from buffer.ingest import Ingest
from buffer.log import Log
from fleet.batch import BatchNeeds, Outcome, Within
from fleet.robot import Source
from fleet.schema import build_table, encode_fragment
from tests.buffer.fragments import chunk_row, episode_row, make_rows, make_spec

TASKS = ("reach", "push")  # "other" is recorded too and not sampled
BOOT = "b" * 16
STATE = "observation.state"
IMAGE = "observation.images.top"


@dataclasses.dataclass
class Step:
    """A step as it was sent. chunk: (chunk_id, version) of the policy call behind it."""

    robot: int
    episode: int
    frame: int
    source: int
    task: str
    reward: float
    terminated: bool
    truncated: bool
    chunk: tuple[int, int] | None
    lost_version: int = -1  # of a policy call whose row retention took


@dataclasses.dataclass
class Episode:
    steps: list[Step]
    task: str
    seed: int = -1
    group_id: str = ""
    length: int = -1
    finished: bool = False
    outcome: Outcome = Outcome.OPEN
    labels: dict[str, tuple[tuple[int, int], str]] = dataclasses.field(default_factory=dict)

    @property
    def judged(self) -> Outcome:
        return Outcome[self.labels["outcome"][1].upper()] if "outcome" in self.labels else self.outcome

    @property
    def excluded(self) -> bool:
        return "excluded" in self.labels and self.labels["excluded"][1] == "true"


class Recorder:
    """Sends to a log what robots send, and keeps it as lists."""

    def __init__(self, folder, *, image=None, extra=0, segment_bytes=1 << 20):
        self.folder, self.spec, self.segment_bytes = folder, make_spec(image=image, extra=extra), segment_bytes
        self.episodes: dict[tuple[int, int], Episode] = {}
        self.seqs, self.chunk_ids = collections.Counter(), collections.Counter()
        self.labels_seq = 0
        self.open()

    def open(self):
        self.log = Log(self.folder, segment_bytes=self.segment_bytes)
        self.ingest = Ingest(self.log)
        self.labels = Log(self.folder / "labels")

    def close(self):
        self.log.close()
        self.labels.close()

    def commit(self):
        self.ingest.commit()
        self.labels.commit()

    def fragment(
        self, robot, episode, sources, *, task="reach", rewards=None, opened=None, closed=None, new_chunk=None, end=None
    ):
        """A fragment of steps of an episode.

        opened: fields of the opened row. closed: the outcome. new_chunk: version of a policy call that these steps are of.
        end: "terminated" or "truncated", of the last step.
        """
        name, known = f"r{robot}", self.episodes.setdefault((robot, episode), Episode([], task))
        first, tables, chunk = len(known.steps), {}, None
        if opened is not None:
            known.seed, known.group_id = opened.get("seed", -1), opened.get("group_id", "")
        if new_chunk is not None:
            self.chunk_ids[robot] += 1
            chunk = (self.chunk_ids[robot], new_chunk)
            row = {**chunk_row(episode, chunk[0], new_chunk, first), "log_prob_T": [float(i) for i in range(chunk[0] % 4)]}
            tables["chunks"] = build_table("chunks", self.spec, [{**row, "replay.seed": chunk[0] * 10}])
        elif known.steps:
            chunk = known.steps[-1].chunk
        if sources:
            rows = make_rows(name, BOOT, episode, first, sources, task, self.spec, chunk[0] if chunk else -1)
            for i, row in enumerate(rows):
                last = i == len(rows) - 1 and end
                row["next.reward"] = rewards[i] if rewards else 0.0
                row["next.terminated"], row["next.truncated"] = last == "terminated", last == "truncated"
                fields = (row["next.reward"], row["next.terminated"], row["next.truncated"], chunk)
                known.steps.append(Step(robot, episode, first + i, int(sources[i]), task, *fields))
            tables["steps"] = build_table("steps", self.spec, rows)
        events = [episode_row(episode, "opened", task) | (opened or {})] if opened is not None else []
        if closed == "dropped":
            events.append(episode_row(episode, "dropped", task))
        elif closed is not None:
            events.append(episode_row(episode, "closed", task, len(known.steps), closed))
            known.finished, known.length, known.outcome = True, len(known.steps), Outcome[closed.upper()]
        if events:
            tables["episodes"] = build_table("episodes", self.spec, events)
        if not tables:
            return
        directory, payload = encode_fragment(tables)
        self.ingest.admit(name, BOOT, self.spec)
        self.seqs[robot] += 1
        fields = {"boot_id": BOOT, "seq": self.seqs[robot], "spec_hash": self.spec.hash, "tables": directory}
        self.ingest.offer(name, fields, payload)

    def label(self, robot, episode, field, value, time_ns):
        """A person's label in the log of labels; its episode must have been heard of by the model only."""
        row = {"robot_id": f"r{robot}", "boot_id": BOOT, "episode_id": episode, "field": field, "value": value}
        table = build_table("labels", self.spec, [{**row, "judge": "somebody", "time_ns": time_ns}])
        directory, payload = encode_fragment({"labels": table})
        self.labels_seq += 1
        self.labels.append("labels", BOOT, self.labels_seq, self.spec.hash, directory, payload, ())
        order, labels = (time_ns, self.labels_seq), self.episodes[robot, episode].labels
        if field not in labels or order >= labels[field][0]:
            labels[field] = (order, value)

    def boot(self, robot) -> list[Step]:
        return [step for (r, _), e in sorted(self.episodes.items()) if r == robot for step in e.steps]

    def drawable(self, tasks=TASKS) -> set[tuple[int, int, int]]:
        return {(r, n, s.frame) for (r, n), e in self.episodes.items() if e.task in tasks and not e.excluded for s in e.steps}


def expected(recorder: Recorder, key: tuple[int, int, int], needs: BatchNeeds, remembers: bool = False) -> dict:
    """Every field of Windows for the window at one step. ``remembers``: of a sampler that saw what retention took."""
    boot = recorder.boot(key[0])
    at = next(i for i, s in enumerate(boot) if (s.episode, s.frame) == key[1:])
    here, episode = boot[at], recorder.episodes[key[:2]]

    def inside(i):
        if not 0 <= i < len(boot) or boot[i].episode != here.episode:
            return False
        between = boot[min(at, i) : max(at, i) + 1]
        return needs.within is not Within.SOURCE or all(s.source == here.source for s in between)

    def reached(offset):
        """The step that is read at an offset: the last one inside of the border, or of the boot."""
        step = 1 if offset > 0 else -1
        i = at
        while i != at + offset and (_joined(boot, i, i + step) if needs.within is Within.BOOT else inside(i + step)):
            i += step
        return boot[i]

    ahead = [reached(h) for h in range(needs.horizon)]
    mask = [inside(at + h) for h in range(needs.horizon)]
    rest = [s.reward for s in episode.steps if s.frame >= here.frame]
    searched = range(needs.takeover_within + 1) if needs.takeover_within else ()
    takeover = next(
        (d for d in searched if _unbroken(boot, at, d, here.episode) and boot[at + d].source == Source.OPERATOR), -1
    )
    to_go = episode.length - here.frame if episode.finished else -1
    total = sum(needs.discount**i * reward for i, reward in enumerate(rest)) if episode.finished else math.nan
    return {
        "state": [here.robot, here.episode, here.frame],
        "state_at": {o: [reached(o).robot, reached(o).episode, reached(o).frame] for o in needs.offsets if o},
        "inside_at": {o: inside(at + o) for o in needs.offsets if o},
        "actions": [[1000 * s.episode + s.frame, s.robot] for s in ahead],
        "rewards": [s.reward if ok else 0.0 for s, ok in zip(ahead, mask, strict=True)],
        "terminated": [s.terminated and ok for s, ok in zip(ahead, mask, strict=True)],
        "truncated": [s.truncated and ok for s, ok in zip(ahead, mask, strict=True)],
        "mask": mask,
        "source": here.source,
        "sources": [s.source for s in ahead],
        "takeover_in": takeover,
        "task": TASKS.index(here.task),
        "version": here.chunk[1] if here.chunk else here.lost_version if remembers else -1,
        "frame": here.frame,
        "steps_to_go": to_go,
        "outcome": int(episode.judged),
        "ended": episode.steps[-1].terminated,
        "return": total,
        "replay.seed": here.chunk[0] * 10 if here.chunk else 0,
        "log_prob_T": [float(i) for i in range(here.chunk[0] % 4)] if here.chunk else [],
    }


def _joined(boot, i, j):
    """Whether two neighbouring steps of a boot follow each other; retention may have taken an episode's first part."""
    if not 0 <= j < len(boot):
        return False
    earlier, later = boot[min(i, j)], boot[max(i, j)]
    return later.frame == (earlier.frame + 1 if later.episode == earlier.episode else 0)


def _unbroken(boot, at, distance, episode):
    """Whether every step up to so many behind is there, and of this episode."""
    behind = boot[at : at + distance + 1]
    frames = [s.frame for s in behind if s.episode == episode]
    return frames == list(range(boot[at].frame, boot[at].frame + distance + 1))


def row_of(windows, i: int) -> dict:
    """One row of a batch in the same form; floats as they are."""
    replay = {}
    if windows.replay:
        seed = windows.replay["replay.seed"]  # without any policy call in the log nobody knows its form
        replay = {"replay.seed": int(seed[i]) if seed.ndim == 1 else 0, "log_prob_T": windows.replay["log_prob_T"][i]}
    return {
        "state": windows.obs[STATE][i].tolist(),
        "state_at": {o: obs[STATE][i].tolist() for o, obs in windows.obs_at.items()},
        "inside_at": {o: bool(inside[i]) for o, inside in windows.inside_at.items()},
        "actions": windows.actions_BHA[i].tolist(),
        "rewards": windows.rewards_BH[i].tolist(),
        "terminated": windows.terminated_BH[i].tolist(),
        "truncated": windows.truncated_BH[i].tolist(),
        "mask": windows.mask_BH[i].tolist(),
        "source": int(windows.source_B[i]),
        "sources": windows.source_BH[i].tolist(),
        "takeover_in": int(windows.takeover_in_B[i]),
        "task": int(windows.task_B[i]),
        "version": int(windows.version_B[i]),
        "frame": int(windows.frame_B[i]),
        "steps_to_go": int(windows.steps_to_go_B[i]),
        "outcome": int(windows.outcome_B[i]),
        "ended": bool(windows.terminated_B[i]),
        "return": float(windows.return_B[i]),
        **replay,
    }


def assert_windows(recorder: Recorder, windows, needs: BatchNeeds, remembers: bool = False) -> None:
    """Every row of a batch is what the model says."""
    for i in range(len(windows.step_B)):
        row = row_of(windows, i)
        want = expected(recorder, tuple(int(v) for v in row["state"]), needs, remembers)
        total, wanted = row.pop("return"), want.pop("return")
        assert math.isnan(total) if math.isnan(wanted) else math.isclose(total, wanted, rel_tol=1e-5, abs_tol=1e-5), (
            row,
            wanted,
        )
        log_prob, wanted_log_prob = row.pop("log_prob_T", None), want.pop("log_prob_T")
        if log_prob is None:
            want.pop("replay.seed")
        else:
            assert log_prob.tolist() == wanted_log_prob + [0.0] * (len(log_prob) - len(wanted_log_prob))
        assert row == want


def assert_same(a, b) -> None:
    """Two batches are equal in every field."""
    for field in dataclasses.fields(a):
        _same(getattr(a, field.name), getattr(b, field.name), field.name)


def _same(a, b, where) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            _same(a[key], b[key], f"{where}[{key}]")
    else:
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), where


LABELS = [("outcome", "success"), ("outcome", "aborted"), ("excluded", "true"), ("excluded", "false")]
SOURCES = st.sampled_from([int(s) for s in Source])
RUNS = st.lists(
    st.tuples(st.lists(SOURCES, min_size=1, max_size=4), st.none() | st.integers(0, 9)), min_size=1, max_size=4
)  # fragments of an episode: sources of the steps, and the version of a new policy call
EPISODES = st.lists(
    st.fixed_dictionaries(
        {
            "robot": st.integers(0, 1),
            "task": st.sampled_from([*TASKS, "other"]),
            "runs": RUNS,
            "closed": st.sampled_from([None, "dropped", "success", "failure", "unknown"]),
            "end": st.sampled_from([None, "terminated", "truncated"]),
            "seed": st.integers(-1, 3),
            "labels": st.lists(
                st.tuples(
                    st.sampled_from(
                        [("outcome", "success"), ("outcome", "aborted"), ("excluded", "true"), ("excluded", "false")]
                    ),
                    st.integers(0, 3),
                ),
                max_size=2,
            ),
        }
    ),
    min_size=1,
    max_size=6,
)
NEEDS = st.builds(
    lambda horizon, offsets, within, takeover_within, discount, replay: BatchNeeds(
        48,
        horizon,
        (STATE,),
        {tuple(Source): 1.0},
        offsets=(0, *sorted(offsets)),
        within=within,
        takeover_within=takeover_within,
        discount=discount,
        replay=("log_prob_T", "replay.seed") if replay else (),
    ),
    st.integers(1, 7),
    st.sets(st.integers(-4, 6).filter(bool), max_size=3),
    st.sampled_from(Within),
    st.integers(0, 7),
    st.sampled_from([1.0, 0.5]),
    st.booleans(),
)


def record_all(recorder: Recorder, episodes: list[dict], order, between) -> None:
    """Sends the fragments of all episodes, those of different robots interleaved; calls ``between`` after each one."""
    queues: dict[int, list] = {0: [], 1: []}
    for number, episode in enumerate(episodes):
        robot, runs = episode["robot"], episode["runs"]
        recorder.episodes[robot, number] = Episode([], episode["task"])
        for i, (sources, version) in enumerate(runs):
            last = i == len(runs) - 1
            rewards = [order.choice([0.0, 0.0, 1.0, -0.5]) for _ in sources]
            opened = {"seed": episode["seed"], "group_id": ""} if i == 0 else None
            fields = {"task": episode["task"], "rewards": rewards, "opened": opened, "new_chunk": version}
            if last:
                fields |= {"closed": episode["closed"], "end": episode["end"]}
            queues[robot].append((lambda r=robot, n=number, s=sources, f=fields: recorder.fragment(r, n, s, **f)))
        for (field, value), time_ns in episode["labels"]:  # in any order beside their episode's data
            label = lambda r=robot, n=number, f=field, v=value, t=time_ns: recorder.label(r, n, f, v, t)  # noqa: E731
            queues[robot].insert(order.randrange(len(queues[robot]) + 1), label)
    while queues[0] or queues[1]:
        queues[order.choice([r for r in queues if queues[r]])].pop(0)()
        between()
