import collections

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from buffer.draw import split_by_share
from buffer.image_cache import ImageCache
from buffer.ingest import Ingest
from buffer.log import Log
from buffer.sampler import Sampler
from fleet.batch import BatchNeeds
from fleet.errors import NoData, SpecError
from fleet.journal import Journal, read_journal
from fleet.robot import Source
from tests.buffer.fragments import make_spec, message

P, O, S, D = Source.POLICY, Source.OPERATOR, Source.SCRIPT, Source.DEMO  # noqa: E741
B = "b" * 16
STATE = ("observation.state",)
ALL = {(P, O, S, D): 1.0}


class Writer:
    """Ingests episodes of several robots; counts the numbers."""

    def __init__(self, folder, spec=None, segment_bytes=1 << 20):
        self.spec = spec or make_spec()
        self.log = Log(folder, segment_bytes=segment_bytes)
        self.ingest, self.seqs = Ingest(self.log), collections.Counter()

    def send(self, robot, episode, first_frame, sources, **options):
        self.ingest.admit(robot, B, self.spec)
        self.seqs[robot] += 1
        self.ingest.offer(robot, *message(robot, B, self.seqs[robot], episode, first_frame, sources, spec=self.spec, **options))

    def commit(self):
        self.ingest.commit()


def sampler(folder, tasks=("reach",), **options):
    made = Sampler(folder, tasks, 7, **options)
    made.poll()
    return made


def test_windows_end_at_takeovers_episode_ends_and_the_newest_step(tmp_path):
    writer = Writer(tmp_path)
    writer.send("r1", 0, 0, [P, P, O], opened=True)
    writer.send("r2", 0, 0, [P] * 4)
    writer.send("r1", 0, 3, [O, O, P], closed=True)
    writer.send("r1", 1, 0, [P, P])
    writer.commit()
    batch = sampler(tmp_path).batch(BatchNeeds(200, 3, STATE, ALL), 0)
    want = {(1, 0, 0): 2, (1, 0, 1): 1, (1, 0, 2): 3, (1, 0, 3): 2, (1, 0, 4): 1, (1, 0, 5): 1, (1, 1, 0): 2, (1, 1, 1): 1}
    want |= {(2, 0, 0): 3, (2, 0, 1): 3, (2, 0, 2): 2, (2, 0, 3): 1}
    seen = {}
    for state, actions, mask in zip(batch.obs[STATE[0]], batch.actions_BHA, batch.mask_BH, strict=True):
        robot, episode, frame = (int(v) for v in state)
        length = int(mask.sum())
        frames = [1000 * episode + frame + min(h, length - 1) for h in range(3)]
        assert actions[:, 0].tolist() == frames and set(actions[:, 1]) == {robot}, "what is padded repeats the last action"
        seen[robot, episode, frame] = length
    assert seen == want
    assert batch.actions_BHA.dtype == np.float32 and batch.mask_BH.dtype == bool


def test_a_window_grows_when_the_rest_of_its_episode_arrives(tmp_path):
    writer = Writer(tmp_path)
    writer.send("r1", 0, 0, [P])
    writer.commit()
    follower, needs = sampler(tmp_path), BatchNeeds(1, 4, STATE, ALL)
    assert follower.batch(needs, 0).mask_BH.sum() == 1
    writer.send("r1", 0, 1, [P] * 5)
    writer.commit()
    assert follower.poll() == 5
    lengths = {int(follower.batch(needs, step).mask_BH.sum()) for step in range(60)}
    assert lengths == {1, 2, 3, 4}


EPISODES = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.integers(0, 2),
        st.lists(st.lists(st.sampled_from([P, O, S, D]), min_size=1, max_size=5), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(episodes=EPISODES, horizon=st.integers(1, 7), order=st.randoms(use_true_random=False), polls=st.integers(1, 4))
def test_every_window_is_that_of_a_plain_model(tmp_path_factory, episodes, horizon, order, polls):
    """Fragments of two robots in any interleaving; the model holds whole episodes as lists."""
    folder = tmp_path_factory.mktemp("log")
    tasks = ("a", "b")  # the third one is not sampled
    model, queues = {}, {0: [], 1: []}
    for number, (robot, task, runs) in enumerate(episodes):
        frame = 0
        model[robot, number] = [source for run in runs for source in run], task
        for run in runs:
            queues[robot].append((number, frame, run, "abc"[task]))
            frame += len(run)
    writer, follower = Writer(folder, segment_bytes=200_000), Sampler(folder, tasks, 3)
    while queues[0] or queues[1]:
        robot = order.choice([r for r in queues if queues[r]])
        number, frame, run, task = queues[robot].pop(0)
        writer.send(f"r{robot}", number, frame, run, task=task)
        if order.randrange(polls) == 0:
            writer.commit()
            follower.poll()
    writer.commit()
    follower.poll()
    writer.log.close()
    known = {(r, n, f) for (r, n), (s, t) in model.items() if t < 2 for f in range(len(s))}
    assert follower.num_steps() == len(known)
    assert follower.skipped_steps == sum(len(s) for s, t in model.values() if t == 2)
    if not known:
        with pytest.raises(NoData):
            follower.batch(BatchNeeds(4, horizon, STATE, ALL), 0)
        return
    batch = follower.batch(BatchNeeds(64, horizon, STATE, ALL), 5)
    for i, state in enumerate(batch.obs[STATE[0]]):
        robot, number, frame = (int(v) for v in state)
        assert (robot, number, frame) in known
        sources, task = model[robot, number]
        end = frame
        while end < len(sources) and end - frame < horizon and sources[end] == sources[frame]:
            end += 1
        assert batch.mask_BH[i].tolist() == [h < end - frame for h in range(horizon)]
        assert batch.actions_BHA[i, :, 0].tolist() == [1000 * number + min(frame + h, end - 1) for h in range(horizon)]
        assert (batch.source_B[i], batch.task_B[i]) == (sources[frame], task)
    again = Sampler(folder, tasks, 3)
    while again.poll(limit=2) or again.position < follower.position:
        pass
    same = again.batch(BatchNeeds(64, horizon, STATE, ALL), 5)
    assert (same.actions_BHA == batch.actions_BHA).all() and (same.mask_BH == batch.mask_BH).all()


def test_a_batch_depends_on_seed_and_step_only(tmp_path):
    writer = Writer(tmp_path)
    writer.send("r1", 0, 0, [P] * 200)
    writer.commit()
    needs = BatchNeeds(32, 2, STATE, ALL)
    a, b, other = sampler(tmp_path), sampler(tmp_path), Sampler(tmp_path, ("reach",), 8)
    other.poll()
    a.batch(needs, 3)
    frames = [s.batch(needs, step).obs[STATE[0]][:, 2].tolist() for s, step in ((a, 4), (b, 4), (b, 5), (other, 4))]
    assert frames[0] == frames[1] != frames[2] and frames[0] != frames[3]


def test_shares_hold_and_an_empty_group_gives_its_share_away(tmp_path):
    writer = Writer(tmp_path)
    writer.send("r1", 0, 0, [D] * 5 + [P] * 90)
    writer.commit()
    follower = sampler(tmp_path)
    shares = {(D,): 0.25, (P, S): 0.25, (O,): 0.5}
    assert collections.Counter(follower.batch(BatchNeeds(100, 1, STATE, shares), 0).source_B.tolist()) == {P: 50, D: 50}
    writer.send("r1", 0, 95, [O] * 3)
    writer.commit()
    follower.poll()
    assert collections.Counter(follower.batch(BatchNeeds(100, 1, STATE, shares), 0).source_B.tolist()) == {O: 50, P: 25, D: 25}
    assert (follower.num_steps(), follower.num_steps(D), follower.num_steps(S)) == (98, 5, 0)


@pytest.mark.parametrize(("by_task", "rare"), [(True, 0.5), (False, 10 / 310)])
def test_tasks_or_steps_weigh_the_same(tmp_path, by_task, rare):
    """Chi-square over all steps: each is drawn as often as the rule says."""
    writer = Writer(tmp_path)
    writer.send("r1", 0, 0, [D] * 300, task="common")
    writer.send("r2", 0, 0, [D] * 4 + [O] * 6, task="rare")
    writer.commit()
    follower = sampler(tmp_path, ("common", "rare", "never"))
    counts = collections.Counter()
    for step in range(40):
        batch = follower.batch(BatchNeeds(500, 1, STATE, {(D, O): 1.0}, by_task=by_task), step)
        counts.update(zip(batch.task_B.tolist(), batch.obs[STATE[0]][:, 2].tolist(), strict=True))
    expected = {(0, float(f)): 20_000 * (1 - rare) / 300 for f in range(300)} | {
        (1, float(f)): 20_000 * rare / 10 for f in range(10)
    }
    chi_square = sum((counts[key] - n) ** 2 / n for key, n in expected.items())
    assert set(counts) <= set(expected) and chi_square < 309 + 5 * np.sqrt(2 * 309)


@given(
    total=st.integers(1, 300),
    shares=st.lists(st.floats(0.01, 1), min_size=1, max_size=5),
    offset=st.floats(0, 1, exclude_max=True),
)
def test_shares_are_split_within_one(total, shares, offset):
    counts = split_by_share(total, shares, offset)
    assert sum(counts) == total
    assert all(abs(c - total * s / sum(shares)) < 1 + 1e-9 for c, s in zip(counts, shares, strict=True))


def test_no_data_and_unknown_features_are_named(tmp_path):
    writer, follower = Writer(tmp_path), Sampler(tmp_path, ("reach",), 0)
    with pytest.raises(NoData, match="nothing"):
        follower.batch(BatchNeeds(4, 2, STATE, ALL), 0)
    writer.send("r1", 0, 0, [P] * 3)
    writer.commit()
    follower.poll()
    with pytest.raises(NoData, match=r"operator.*policy"):
        follower.batch(BatchNeeds(4, 2, STATE, {(O,): 1.0}), 0)
    with pytest.raises(SpecError, match=r"observation\.force"):
        follower.batch(BatchNeeds(4, 2, ("observation.force",), ALL), 0)


def test_versions_come_from_the_chunk_that_proposed_the_step(tmp_path):
    writer = Writer(tmp_path)
    writer.send("r1", 0, 0, [P] * 2, chunk=(5, 31))
    writer.send("r1", 0, 2, [P] * 2, chunk_id=5)
    writer.send("r1", 0, 4, [O] * 2)
    writer.send("r2", 0, 0, [P] * 2, chunk=(5, 44))
    writer.commit()
    batch = sampler(tmp_path).batch(BatchNeeds(100, 1, STATE, ALL), 0)
    seen = {(int(r), int(f)): v for (r, _, f), v in zip(batch.obs[STATE[0]], batch.version_B.tolist(), strict=True)}
    assert seen == {(1, 0): 31, (1, 1): 31, (1, 2): 31, (1, 3): 31, (1, 4): -1, (1, 5): -1, (2, 0): 44, (2, 1): 44}


@pytest.mark.parametrize(("codec", "cached"), [("raw", False), ("jpeg", False), ("jpeg", True)])
def test_images_come_as_arrays(tmp_path, codec, cached):
    writer, name = Writer(tmp_path, make_spec(image=codec)), "observation.images.top"
    writer.send("r1", 0, 0, [P] * 3)
    writer.send("r1", 0, 3, [P] * 3)
    writer.commit()
    cache = ImageCache(1 << 20) if cached else None
    follower = sampler(tmp_path, cache=cache)
    for step in range(2):
        batch = follower.batch(BatchNeeds(20, 1, (name, *STATE), ALL, offsets=(0, 2), cached_share=0.5 * cached), step)
        for obs in (batch.obs, batch.obs_at[2]):
            frames, images = obs[STATE[0]][:, 2], obs[name]
            assert images.shape == (20, 16, 16, 3) and images.dtype == np.uint8
            want = frames if codec == "raw" else frames + 40
            assert np.abs(images.astype(int) - want[:, None, None, None]).max() <= (0 if codec == "raw" else 2)
    assert cache is None or (cache.stats().misses <= 20 and cache.stats().hits >= 60)


def test_a_batch_is_read_into_the_callers_arrays(tmp_path):
    writer, name = Writer(tmp_path, make_spec(image="raw")), "observation.images.top"
    writer.send("r1", 0, 0, [P] * 6)
    writer.commit()
    follower, arrays = sampler(tmp_path), {}

    def out(name, shape, dtype):
        return arrays.setdefault(name, np.full(shape, 255, dtype))

    draw = follower.draw(BatchNeeds(8, 3, (name, *STATE), ALL, offsets=(0, 1)), 0)
    batch, own = follower.gather(draw, out), follower.gather(draw)
    assert set(arrays) == {"actions", name, STATE[0], f"{name}@1", f"{STATE[0]}@1"}
    assert batch.obs[name] is arrays[name] and (batch.obs[name] == own.obs[name]).all()
    assert batch.actions_BHA is arrays["actions"] and (batch.actions_BHA == own.actions_BHA).all()
    arrays["actions"] = np.empty((8, 3, 4), np.float32)[:, :, ::2]
    with pytest.raises(ValueError, match="actions"):
        follower.gather(draw, out)


def test_sampleable_lines_have_a_latency_a_step(tmp_path):
    writer, journal = Writer(tmp_path / "log"), Journal(tmp_path / "learner.jsonl")
    writer.send("r1", 0, 0, [P] * 3)
    writer.commit()
    sampler(tmp_path / "log", journal=journal)
    (line,) = read_journal(tmp_path / "learner.jsonl")
    assert (line["kind"], line["robot"], line["seq"], len(line["latency_ms"])) == ("sampleable", "r1", 1, 3)
