"""Gaps, retention, labels, feedback and threads: what becomes of the sampler's index while the log changes."""

import collections
import dataclasses
import os
import subprocess
import sys
import threading

import numpy as np
import pyarrow as pa
import pytest

import buffer.follower
from buffer.index import StepIndex
from buffer.parts import PartBuilder
from buffer.reader import LogReader
from buffer.renumber import renumber
from buffer.retention import COMPACT, Limits, prune
from buffer.returns import Returns
from buffer.sampler import Sampler
from buffer.segment import list_segments
from fleet.batch import Adaptive, BatchNeeds, Filter, Outcome, Priority, Within
from fleet.errors import LearnerError, NoData
from fleet.robot import Source
from fleet.schema import build_table, decode_fragment, encode_fragment
from tests.buffer.fragments import episode_row, make_rows, make_spec
from tests.buffer.runs import feed_back
from tests.buffer.sampler_model import BOOT, STATE, TASKS, Recorder, assert_windows

P, O, D = int(Source.POLICY), int(Source.OPERATOR), int(Source.DEMO)  # noqa: E741
ALL = {tuple(Source): 1.0}
LATER = Limits(max_age_ns=1)


def sampler_of(folder, **options):
    made = Sampler(folder, TASKS, 3, **options)
    made.poll()
    return made


def drawn(sampler, needs, steps=range(20)):
    """(robot, episode, frame) of everything that is drawn."""
    states = np.concatenate([sampler.batch(needs, step).obs[STATE] for step in steps])
    return {tuple(int(v) for v in state) for state in states}


def record_with_corrections(folder, num_episodes=24, first=0):
    """The first episodes and every third one, the second one first, have an operator's steps. Several segments of several
    episodes."""
    recorder = Recorder(folder, extra=1000, segment_bytes=1)
    for episode in range(num_episodes):
        sources = [P, P, O] if episode % 3 == 1 or episode < first else [P, P, P]
        for part in range(4):
            ends = {"closed": "success", "end": "terminated"} if part == 3 else {}
            rewards = [0.5, 0.0, 1.0]
            opened = {"seed": episode} if part == 0 else None
            new_chunk = episode if part % 2 == 0 else None
            recorder.fragment(episode % 2, episode, sources, rewards=rewards, opened=opened, new_chunk=new_chunk, **ends)
            recorder.commit()
    return recorder


def forget_what_is_gone(recorder):
    """Leaves in the model only what the log's fragments still have."""
    found = collections.defaultdict(set)
    for record in LogReader(recorder.folder).poll():
        steps = decode_fragment(record.tables, record.payload).tables["steps"]
        key = (int(record.robot_id[1:]), steps.column("episode_id")[0].as_py())
        found[key].update(steps.column("frame_index").to_pylist())
    for key, episode in recorder.episodes.items():
        made = {step.chunk: step.frame for step in reversed(episode.steps)}  # frame at which a policy was called
        for step in episode.steps:
            if step.chunk is not None and made[step.chunk] not in found[key]:
                step.chunk, step.lost_version = None, step.chunk[1]
        episode.steps = [step for step in episode.steps if step.frame in found[key]]
    recorder.episodes = {key: episode for key, episode in recorder.episodes.items() if episode.steps}


@pytest.fixture(params=[False, True], ids=["gaps", "renumbered"])
def renumbered(request, monkeypatch):
    """Whether what retention leaves gets new numbers at once, or not in so small a log."""
    if request.param:
        monkeypatch.setattr(buffer.follower, "ROWS_MIN", 0)
        monkeypatch.setattr(buffer.follower, "ROWS_A_STEP", 1)
    return request.param


@pytest.mark.parametrize(("all_of_it", "first"), [(True, 0), (False, 0), (False, 4)])
def test_steps_that_retention_takes_are_not_drawn_and_what_it_keeps_stays_whole(tmp_path, all_of_it, first, renumbered):
    recorder = record_with_corrections(tmp_path, first=first)
    follower = sampler_of(tmp_path)
    needs = BatchNeeds(100, 5, (STATE,), ALL, offsets=(-3, 0, 4), within=Within.BOOT, replay=("replay.seed", "log_prob_T"))
    early = follower.draw(needs, 0)
    before = follower.gather(early)
    assert len(list_segments(tmp_path)) > 3
    recorder.close()
    used = sum(name.path.stat().st_blocks * 512 for name in list_segments(tmp_path))
    limits = LATER if all_of_it else Limits(max_bytes=int(0.6 * used))
    actions = prune(tmp_path, dataclasses.replace(limits, protect=("operator",)), dry_run=False)
    assert any(action.kind == COMPACT for action in actions)
    recorder.open()
    recorder.fragment(1, 99, [P, O, O], opened={}, new_chunk=9)
    recorder.commit()
    assert follower.poll() == 3, "what retention wrote anew is not new"
    everything = set(recorder.episodes)
    forget_what_is_gone(recorder)
    left = recorder.episodes
    assert {key for key in everything if key[1] % 3 == 1} <= set(left) < everything
    for sampler in (follower, sampler_of(tmp_path)):
        assert sampler.num_steps() == sum(len(e.steps) for e in left.values())
        for within in Within:
            narrow = dataclasses.replace(needs, within=within)
            assert_windows(recorder, sampler.batch(narrow, 1), narrow, sampler is follower)
        assert drawn(sampler, needs) == recorder.drawable()
        table = sampler.index.episodes
        for robot, episode in everything:
            row = table.find((f"r{robot}", BOOT, episode))
            gone = row is None or table.first_step[row] < 0
            assert gone == ((robot, episode) not in left)
    after = follower.gather(early)
    assert (after.actions_BHA == before.actions_BHA).all(), "a draw in flight reads what it named"
    if renumbered or not first:
        assert follower.index.fragment.first > 0, "memory of the oldest steps is let go of"
    assert not renumbered or follower.index.num_rows == follower.index.num_there


def scores_in(sampler):
    (scores,) = sampler._feedback._scores.values()
    return scores


def chance_by_step(sampler, needs):
    """(robot, boot, episode), frame -> the chance that a proposal of this step is kept."""
    sampler.draw(needs, 0)
    index = sampler.index
    steps = np.concatenate([pool.view for pool in index.pools.values()])
    keys = [index.episodes.keys[episode] for episode in index.episode[index.fragment[steps]]]
    chances = scores_in(sampler).accept(steps).tolist()
    return dict(zip(zip(keys, index.frame(steps).tolist(), strict=True), chances, strict=True))


def test_scores_follow_their_steps_through_a_restart_after_retention(tmp_path, renumbered):
    recorder = record_with_corrections(tmp_path)
    follower = sampler_of(tmp_path)
    needs = BatchNeeds(200, 1, (STATE,), ALL, priority=Priority(alpha=1.0, beta=1.0))
    for step in range(30):
        windows = follower.batch(needs, step)
        feed_back(follower, windows, np.where(windows.obs[STATE][:, 1] == 22, 1.0, 0.001))
    windows = follower.batch(needs, 50)
    assert {key[1] for key in drawn(follower, needs)} >= {6, 7, 8}
    rare = windows.obs[STATE][:, 1] != 22
    assert rare.mean() < 0.2 and windows.weight_B[rare].min(initial=1) > 100 * windows.weight_B[~rare].max()
    windows = follower.batch(dataclasses.replace(needs, priority=None), 51)
    recorder.close()
    state = follower.state()
    used = sum(name.path.stat().st_blocks * 512 for name in list_segments(tmp_path))
    prune(tmp_path, Limits(max_bytes=int(0.7 * used), protect=("operator",)), dry_run=False)
    restarted = sampler_of(tmp_path)
    restarted.load_state(state)
    follower.poll()
    assert follower.num_steps() == restarted.num_steps() < sum(len(e.steps) for e in recorder.episodes.values())
    chances = [chance_by_step(sampler, needs) for sampler in (follower, restarted)]
    assert chances[0] == chances[1] and sum(chance < 0.01 for chance in chances[0].values()) > 50
    gone = ~follower.index.is_there(windows.step_B)
    assert 0 < gone.sum() < len(gone)
    feed_back(follower, windows, np.where(gone, 1e6, 1.0))
    there = np.concatenate([pool.view for pool in follower.index.pools.values()])
    assert scores_in(follower).accept(there).max() == 1, "gone steps do not hold the others down"


def test_a_gone_step_with_the_highest_score_does_not_hold_the_others_down(tmp_path, renumbered):
    recorder = record_with_corrections(tmp_path)
    follower = sampler_of(tmp_path)
    needs = BatchNeeds(300, 1, (STATE,), ALL, priority=Priority())
    windows, end = follower.batch(needs, 0), follower.index.end
    feed_back(follower, windows, np.where(windows.obs[STATE][:, 1] == 0, 1e6, 1.0))
    recorder.close()
    used = sum(name.path.stat().st_blocks * 512 for name in list_segments(tmp_path))
    prune(tmp_path, Limits(max_bytes=int(0.7 * used), protect=("operator",)), dry_run=False)
    follower.poll()
    follower.draw(needs, 1)
    steps = np.arange(end)
    assert scores_in(follower).accept(steps[follower.index.is_there(steps)]).max() == 1


def test_steps_that_are_never_drawn_do_not_hold_the_others_down(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.fragment(0, 0, [D] * 20, opened={})
    recorder.fragment(1, 0, [P] * 20, opened={})
    recorder.fragment(0, 1, [D] * 20, opened={}, task="other")
    recorder.commit()
    needs = BatchNeeds(200, 1, (STATE,), {(Source.DEMO,): 1.0}, priority=Priority(1.0, 1.0))
    sampler = sampler_of(tmp_path)
    for step in range(3):
        windows = sampler.batch(needs, step)
        feed_back(sampler, windows, np.full(200, 0.01))
    assert len(np.unique(windows.step_B)) == 20
    restarted = sampler_of(tmp_path)
    restarted.load_state(sampler.state())
    for which in (sampler, restarted):
        windows = which.batch(needs, 3)
        assert scores_in(which).accept(windows.step_B).min() == 1
        feed_back(which, windows, np.full(200, 0.001))
        assert scores_in(which).accept(windows.step_B).min() == 1
    feed_back(sampler, sampler.batch(dataclasses.replace(needs, shares=ALL, priority=None), 4), np.full(200, 9.0))
    sampler.draw(dataclasses.replace(needs, shares=ALL), 5)  # whose scores are others


def test_losses_move_an_adaptive_mixture_and_are_kept(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.fragment(0, 0, [D] * 50, opened={})
    recorder.fragment(1, 0, [P] * 50, opened={})
    recorder.commit()
    needs = BatchNeeds(1000, 1, (STATE,), {}, adaptive=Adaptive(window=5))
    sampler = sampler_of(tmp_path)

    def online(s, step):
        return float((s.batch(needs, step).source_B == P).mean())

    assert abs(online(sampler, 0) - 0.5) < 0.01
    for step in range(5):
        windows = sampler.batch(needs, step)
        feed_back(sampler, windows, np.where(windows.source_B == P, 2.0, 0.5))
    assert abs(online(sampler, 9) - 0.8) < 0.01
    restarted = sampler_of(tmp_path)
    restarted.load_state(sampler.state())
    assert online(restarted, 9) == online(sampler, 9)
    with pytest.raises(LearnerError):
        feed_back(sampler, windows, np.full(1000, np.nan))


def test_a_damaged_fragment_is_a_gap_that_no_window_crosses(tmp_path):
    recorder = Recorder(tmp_path)
    for part in range(3):
        recorder.fragment(1, 0, [P] * 4, rewards=[1.0] * 4, closed="success" if part == 2 else None, opened={})
    recorder.commit()
    recorder.close()
    (record,) = [r for r in LogReader(tmp_path).poll() if r.seq == 2]
    with record.segment.name.path.open("r+b") as file:
        file.seek(record.payload_at + 100)
        file.write(b"\xff\xff\xff\xff")
    damaged = sampler_of(tmp_path)
    assert damaged.num_steps() == 8
    needs = BatchNeeds(100, 6, (STATE,), ALL, offsets=(-2, 0), within=Within.BOOT)
    batch = damaged.batch(needs, 0)
    for state, mask, total, to_go in zip(batch.obs[STATE], batch.mask_BH, batch.return_B, batch.steps_to_go_B, strict=True):
        frame = int(state[2])
        assert mask.sum() == min(6, (4 if frame < 4 else 12) - frame)
        assert np.isnan(total) if frame < 4 else total == 12 - frame
        assert to_go == 12 - frame
    assert (batch.obs_at[-2][STATE][:, 2] >= np.where(batch.frame_B < 4, 0, 8)).all()


def parts_of(folder):
    """An index part of each fragment."""
    parts = []
    for record in LogReader(folder).poll():
        builder = PartBuilder(record.segment.address, len(record.segment.bytes))
        builder.add(record)
        parts.append(builder.build())
    return parts


def test_steps_find_the_policy_call_of_a_fragment_that_got_a_new_number(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.fragment(1, 0, [P] * 2, opened={}, new_chunk=3)
    recorder.fragment(0, 0, [P] * 4, opened={}, new_chunk=4)
    recorder.fragment(1, 0, [P] * 3)
    recorder.commit()
    index, (call, other, later) = StepIndex(TASKS), parts_of(tmp_path)
    for part in (call, other):
        index.take_in(part, 0, np.ones(1, bool))
    index.drop(1, 2)
    moved = renumber(index)
    assert (moved.steps.tolist(), moved.first_step, moved.fragment(0), moved.fragment(1)) == ([0, 1], 6, 2, 1)
    index.take_in(later, 0, np.ones(1, bool))
    steps = np.arange(6, 11)
    assert index.frame(steps).tolist() == [0, 1, 2, 3, 4] and index.prev[steps].tolist() == [-1, 6, 7, 8, 9]
    places = index.places_of_chunks(index.chunk[steps])
    assert (places == [0, call.fragments["chunks_at"][0], call.fragments["chunks_length"][0], 0]).all()
    assert index.version[steps].tolist() == [3] * 5 and index.is_there(np.arange(11)).tolist() == [False] * 6 + [True] * 5


def test_returns_are_known_again_when_what_was_missing_is_read_again(tmp_path):
    recorder = Recorder(tmp_path)
    for part in range(3):
        recorder.fragment(1, 0, [P] * 4, rewards=[1.0] * 4, closed="success" if part == 2 else None, opened={})
    recorder.commit()
    index, parts = StepIndex(TASKS), parts_of(tmp_path)
    for part in parts:
        index.take_in(part, 0, np.ones(1, bool))
    returns, steps = Returns(index, 1.0), np.array([0, 3, 8, 11])
    index.drop(1, 2)
    for _ in range(2):
        np.testing.assert_array_equal(returns.of(steps), [np.nan, np.nan, 4, 1])
    index.take_in(parts[1], 0, np.ones(1, bool))
    np.testing.assert_array_equal(returns.of(steps), [12, 9, 4, 1])
    np.testing.assert_array_equal(returns.of(np.array([12, 15])), [8, 5])


def test_columns_that_are_not_aligned_are_refused_and_counted(tmp_path):
    spec = make_spec()
    directory, payload = encode_fragment({"steps": build_table("steps", spec, make_rows("r1", BOOT, 0, 0, [P] * 3))})
    memory = np.zeros(len(payload) + 64, np.uint8)
    for shift, num_fragments in ((0, 1), (2, 0)):
        memory[shift : shift + len(payload)] = np.frombuffer(payload, np.uint8)

        whole = pa.py_buffer(memory)
        builder = PartBuilder(whole.address, whole.size)
        fields = {"robot_id": "r1", "boot_id": BOOT, "seq": 1, "spec_hash": spec.hash, "tables": directory, "payload_at": shift}
        builder.add(type("Record", (), {**fields, "payload": whole.slice(shift, len(payload))})())
        part = builder.build()
        assert (part.num_fragments, part.num_records, bool(part.refused)) == (num_fragments, 1, not num_fragments)


def test_the_newest_label_counts_whenever_it_comes(tmp_path):
    recorder = Recorder(tmp_path)
    table = lambda rows: build_table("labels", recorder.spec, rows)  # noqa: E731
    own = {"robot_id": "r0", "boot_id": BOOT, "episode_id": 0, "field": "outcome", "judge": "classifier"}
    tables = {
        "steps": build_table("steps", recorder.spec, make_rows("r0", BOOT, 0, 0, [P] * 4)),
        "episodes": build_table("episodes", recorder.spec, [episode_row(0, "closed", length=4, outcome="unknown")]),
        "labels": table([{**own, "value": "failure", "time_ns": 10}, {**own, "value": "success", "time_ns": 8}]),
    }
    directory, payload = encode_fragment(tables)
    recorder.ingest.admit("r0", BOOT, recorder.spec)
    fields = {"boot_id": BOOT, "seq": 1, "spec_hash": recorder.spec.hash, "tables": directory}
    sampler = sampler_of(tmp_path)

    def outcome():
        sampler.poll()
        return Outcome(int(sampler.batch(BatchNeeds(4, 1, (STATE,), ALL), 0).outcome_B[0]))

    recorder.seqs[0] = 1
    recorder.ingest.offer("r0", fields, payload)
    recorder.commit()
    assert outcome() is Outcome.FAILURE, "the newest by time, not the last row"
    recorder.episodes[0, 0] = type("Known", (), {"labels": {}})()
    for value, time_ns, want in (
        ("success", 9, Outcome.FAILURE),
        ("success", 10, Outcome.SUCCESS),
        ("nonsense", 99, Outcome.SUCCESS),
        ("aborted", 11, Outcome.ABORTED),
        ("unknown", 11, Outcome.UNKNOWN),
    ):
        recorder.label(0, 0, "outcome", value, time_ns)
        recorder.commit()
        assert outcome() is want
    recorder.label(0, 0, "excluded", "true", 1)
    recorder.commit()
    with pytest.raises(NoData):
        outcome()
    recorder.label(0, 0, "excluded", "false", 2)
    recorder.commit()
    assert outcome() is Outcome.UNKNOWN


def test_an_episode_that_another_one_ended_stays_open(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.fragment(0, 0, [P] * 3, opened={"group_id": "g", "reset_state_id": "s"}, new_chunk=4)
    recorder.fragment(0, 1, [P, O], opened={"seed": 5}, closed="failure")
    recorder.fragment(0, 2, [O, P], opened={}, new_chunk=6)
    recorder.fragment(0, 3, [O, O], opened={}, new_chunk=7)
    recorder.commit()
    sampler = sampler_of(tmp_path)
    table = sampler.index.episodes
    assert table.finished.view.tolist() == [False, True, False, False]
    assert table.outcome.view.tolist() == [Outcome.OPEN, Outcome.FAILURE, Outcome.OPEN, Outcome.OPEN]
    assert table.group_id == ["g", "", "", ""] and table.start == ["s", "seed:5", "", ""]
    assert table.first_version.view.tolist() == table.last_version.view.tolist() == [4, -1, 6, -1], "versions that acted"
    assert table.length.view.tolist() == [3, 2, 2, 2] and table.num_operator_steps.view.tolist() == [0, 1, 1, 2]
    assert table.first_step.view.tolist() == [0, 3, 5, 7]


def test_groups_pairs_and_their_windows(tmp_path):
    recorder = Recorder(tmp_path)
    for episode, outcome in enumerate(["success", "failure", "success", "failure"]):
        group = {"group_id": f"g{episode // 2}", "seed": episode // 2}
        row = {"opened": group, "closed": outcome, "new_chunk": 1}
        recorder.fragment(0, episode, [P] * 7, **row)
    recorder.commit()
    sampler = sampler_of(tmp_path)
    needs = BatchNeeds(1, 3, (STATE,), ALL)
    for group in sampler.pairs(5, 0):
        won, lost = (sampler.index.episodes.outcome[n] for n in group)
        assert (won, lost) == (Outcome.SUCCESS, Outcome.FAILURE)
    draw = sampler.windows_of([2, 0], needs, stride=3)
    windows = sampler.gather(draw)
    assert windows.obs[STATE][:, 1:].tolist() == [[2, 0], [2, 3], [2, 6], [0, 0], [0, 3], [0, 6]]
    assert windows.episode_B.tolist() == [2, 2, 2, 0, 0, 0]
    assert_windows(recorder, windows, needs)
    assert len(sampler.gather(sampler.windows_of([], needs)).step_B) == 0


def test_batches_are_gathered_in_threads_while_the_log_grows(tmp_path):
    recorder = Recorder(tmp_path, image="raw", segment_bytes=80_000)
    recorder.fragment(1, 0, [P] * 5, opened={})
    recorder.commit()
    follower, image = sampler_of(tmp_path, mapped_bytes=1), "observation.images.top"
    needs = BatchNeeds(32, 4, (STATE, image), ALL, offsets=(0, 2))
    draws, failures, stop = [], [], threading.Event()

    def work():
        while not stop.is_set():
            try:
                windows = follower.gather(draws[-1])
                frames = windows.obs[STATE][:, 2]
                assert (windows.obs[image][:, 0, 0, 0] == frames).all() and (windows.actions_BHA[:, 0, 0] == frames).all()
                assert (windows.obs_at[2][image][:, 3, 3, 1] == windows.obs_at[2][STATE][:, 2]).all()
            except BaseException as error:
                failures.append(error)
                raise

    draws.append(follower.draw(needs, 0))
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for step in range(1, 40):
        recorder.fragment(1, 0, [P] * 5)
        recorder.commit()
        follower.poll()
        draws.append(follower.draw(needs, step))
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures and len(list_segments(tmp_path)) > 2


RESIDENT = """
import sys
from pathlib import Path
from buffer.sampler import Sampler
from fleet.batch import BatchNeeds
from fleet.robot import Source
def resident_mb():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssFile:")[1].split()[0]) / 1024
sampler = Sampler(Path(sys.argv[1]), ("reach",), 0, mapped_bytes=int(sys.argv[2]))
sampler.poll()
needs = BatchNeeds(256, 1, ("observation.state", "extra.ballast"), {tuple(Source): 1.0})
sampler.batch(needs, 0)
first = resident_mb()
for step in range(12):
    sampler.batch(needs, step)
print(sampler.num_steps(), first, resident_mb())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_resident_pages_of_the_segments_are_bounded(tmp_path):
    recorder = Recorder(tmp_path, extra=65_000, segment_bytes=64 << 20)
    for _ in range(50):
        recorder.fragment(1, 0, [P] * 10)
        recorder.commit()
    grown = []  # the segment is not sealed: its checksums are verified, which reads all of it
    for mapped in (4 << 20, 1 << 30):
        done = subprocess.run([sys.executable, "-c", RESIDENT, str(tmp_path), str(mapped)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        num_steps, _, after = (float(v) for v in done.stdout.split())
        assert num_steps == 500
        grown.append(after)
    assert grown[1] - grown[0] > 15, f"RssFile with 4 MB and 1 GB: {grown}"


def test_pages_that_small_rows_fault_in_are_counted_and_handed_back(tmp_path):
    recorder = Recorder(tmp_path, extra=40_000)
    for _ in range(8):
        recorder.fragment(1, 0, [P] * 5)
    recorder.commit()
    tight, loose = sampler_of(tmp_path, mapped_bytes=300_000), sampler_of(tmp_path, mapped_bytes=1_500_000)
    needs, counts = BatchNeeds(64, 1, (STATE,), ALL), []
    for sampler in (tight, loose):
        for arena in sampler._log.arenas:
            arena.forget()
        sampler.batch(needs, 0)
        counts.append(sum(int(arena._faulted.sum()) for arena in sampler._log.arenas))
    assert counts[1] >= 8 > counts[0]


def test_unknown_filters_name_what_the_log_has(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.fragment(0, 0, [P] * 3, opened={})
    recorder.commit()
    with pytest.raises(NoData, match="policy"):
        sampler_of(tmp_path).batch(BatchNeeds(4, 1, (STATE,), ALL, filter=Filter(outcomes=(Outcome.SUCCESS,))), 0)
