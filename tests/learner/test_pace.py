"""What the learner waits for, in one line, and nothing else."""

import contextlib

import pytest

from algorithms.hg_dagger import HgDagger
from buffer.ingest import Ingest
from buffer.log import Log
from buffer.prefetch import Prefetcher
from buffer.rate import RateLimiter
from buffer.sampler import Sampler
from fleet.batch import BatchNeeds, Filter
from fleet.errors import ConfigError, NoData
from fleet.journal import Journal
from fleet.robot import Source
from learner.pace import NOBODY, Pace
from learner.train import make_loop
from tests.buffer.fragments import make_spec, message
from tests.learner_toys import INSTRUCTIONS_KE, TASKS, make_run, make_tables

NEEDS = BatchNeeds(16, 4, ("observation.state",), {(Source.DEMO,): 1.0})


def make_pace(samples_per_insert=8, error_buffer=32):
    said = []
    limiter = RateLimiter(samples_per_insert, 10, error_buffer)
    return Pace(limiter, lambda kind, **fields: said.append({"kind": kind, **fields})), said


def test_who_waits_for_what_is_always_one_line():
    pace, said = make_pace()
    assert pace.line == NOBODY and pace.waiting == ""
    assert pace.rate_holds(7, NEEDS, 0) and pace.line.startswith("learner waits for data: 7 steps in the buffer")
    for _ in range(2):
        assert not pace.rate_holds(10, NEEDS, 0)
        pace.goes_on(NEEDS, counted=True)
        assert (pace.line, pace.waiting) == (NOBODY, "")
    assert pace.rate_holds(10, NEEDS, 2) and pace.line == "learner waits for robots: 2 more steps"
    assert "samples_per_insert 8" in pace.waiting
    pace.inserted(1)
    assert pace.rate_holds(11, NEEDS, 2) and pace.line == "learner waits for robots: 1 more steps"
    pace.inserted(1)
    assert not pace.rate_holds(12, NEEDS, 2)
    pace.inserted(100)
    assert not pace.rate_holds(112, NEEDS, 2)
    pace.goes_on(NEEDS, counted=True)
    assert pace.line == "robots are ahead by 768 windows; nobody waits"
    pace.goes_on(NEEDS, counted=False)
    assert pace.line == NOBODY
    assert [line["state"] for line in said] == [
        "buffer too small",
        "in range",
        "learner ahead",
        "in range",
        "robots ahead",
    ]


def test_what_is_too_old_is_said_with_both_numbers_and_once():
    pace, said = make_pace()
    fresh = BatchNeeds(16, 4, ("observation.state",), {(Source.DEMO,): 1.0}, filter=Filter(max_version_age=3))
    for _ in range(3):
        pace.data_is_missing(NoData("no step passes"), fresh, 12, 40)
    assert pace.line == (
        "learner waits for data: no step passes; steps may be at most 3 releases old, the newest release is 12"
    )
    assert [(line["kind"], line["step"]) for line in said] == [("waiting", 40)]
    pace.goes_on(fresh, counted=True)
    pace.data_is_missing(NoData("no step passes"), NEEDS, 12, 41)
    assert len(said) == 2 and "releases old" not in pace.line


def test_a_rate_goes_on_where_a_checkpoint_left_it():
    pace, _ = make_pace()
    pace.inserted(3)
    pace.goes_on(NEEDS, counted=True)
    other, _ = make_pace()
    other.load(pace.counts())
    assert other.counts() == pace.counts() and other.counts()["inserts"] == 3 and other.counts()["samples"] == 16
    other.begin()
    assert other.counts()["inserts"] == 0


def operator_steps(ingest, seq, version, episode):
    """An episode of 20 operator steps, proposed to by a policy of this version."""
    fields = message(
        "r1", "b" * 16, seq, episode, 0, [Source.OPERATOR] * 20, task="left", opened=True, closed=True, chunk=(1, version)
    )
    ingest.offer("r1", *fields)
    ingest.commit()


@pytest.mark.parametrize("depth", [0, 2])
def test_the_learner_never_draws_older_steps_than_it_may_and_waits_when_there_are_no_others(tmp_path, depth):
    run = make_run(tmp_path / "run")
    log = Log(run.buffer)
    ingest = Ingest(log)
    ingest.admit("r1", "b" * 16, make_spec())
    operator_steps(ingest, 1, 1, 0)
    tables = make_tables(steps=60, start_steps=0, publish_every=10, checkpoint_every=60)
    tables["algorithm"].config |= {"max_staleness": 2}
    sampler, drawn, waited = Sampler(run.buffer, TASKS, 0), [], []
    source = Prefetcher(sampler, depth=depth)
    with contextlib.closing(log), contextlib.closing(sampler), contextlib.closing(source):
        source.poll()
        journal = Journal(run.logs / "learner.jsonl")
        loop = make_loop(run, tables, source, [make_spec()], INSTRUCTIONS_KE, journal, lambda progress: None)
        update = loop._update

        def watched(windows):
            drawn.append((loop._supply.known.release, windows.version_B.tolist()))
            update(windows)
            loop._note(loop._keep.facts(flush=True))  # every release is out before the next one is due

        def stop():
            if "releases old" in loop.progress.waiting and not waited:
                waited.append(loop._pace.line)
                operator_steps(ingest, 2, loop._supply.known.release, 1)
            return False

        loop._update = watched
        loop.run(stop)
    (line,) = waited
    assert line.endswith("steps may be at most 2 releases old, the newest release is 4")
    assert len(drawn) == loop.progress.step == 60 and all(set(versions) <= {1, 4} for _, versions in drawn)
    ages = [max(release - version for version in versions) for release, versions in drawn]
    assert 0 < max(ages) <= 2
    assert loop.progress.stats["staleness_max"] == ages[-1] >= loop.progress.stats["staleness_mean"] > 0


def test_a_bound_of_staleness_is_not_negative():
    with pytest.raises(ConfigError, match="max_staleness -1"):
        HgDagger(None, HgDagger.Config(max_staleness=-1))
