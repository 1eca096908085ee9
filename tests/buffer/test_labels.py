import subprocess
import sys
import time
from pathlib import Path

import pytest

from buffer.labels import AFTERWARDS, BY_ROBOT, Judged, Label, LabelReader, append_labels, labels_folder
from buffer.log import Log
from buffer.sampler import Sampler
from fleet.batch import Outcome
from fleet.errors import EpisodeError, RunFolderError
from tests.buffer.runs import fill

ROOT = Path(__file__).parents[2]


def label(episode, field="outcome", value="failure", judge="ann", time_ns=None):
    return Label(*episode, field, value, judge, time.time_ns() if time_ns is None else time_ns)


def test_what_was_appended_is_read_in_order_and_by_readers_that_follow(tmp_path):
    reader = LabelReader(tmp_path)
    assert reader.poll() == []
    first = [label(("arm-1", "boot", n)) for n in range(3)]
    append_labels(tmp_path, first)
    assert reader.poll() == first
    second = [label(("arm-1", "boot", 0), "excluded", "true")]
    append_labels(tmp_path, second)
    assert reader.poll() == second
    assert LabelReader(tmp_path).poll() == first + second


def test_many_labels_in_one_call_are_all_there(tmp_path):
    labels = [label(("arm-1", "boot", n), time_ns=n) for n in range(12_001)]
    append_labels(tmp_path, labels)
    assert LabelReader(tmp_path).poll() == labels


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [("outcome", "sucess", "success"), ("outcom", "success", "outcome"), ("excluded", "yes", "true")],
)
def test_a_label_that_means_nothing_is_refused_and_none_of_the_call_is_stored(tmp_path, field, value, word):
    with pytest.raises(EpisodeError) as caught:
        append_labels(tmp_path, [label(("arm-1", "boot", 0)), label(("arm-1", "boot", 1), field, value)])
    assert word in str(caught.value)
    assert LabelReader(tmp_path).poll() == []


def test_the_newest_counts_and_of_one_time_the_later(tmp_path):
    episode = ("arm-1", "boot", 0)
    said = [label(episode, value=value, time_ns=at) for value, at in (("success", 5), ("failure", 9), ("aborted", 7))]
    assert Judged(said).outcome.value == "failure"
    judged = Judged([*said, label(episode, value="unknown", time_ns=9)])
    assert judged.outcome.value == "unknown" and not judged.excluded
    judged.add(label(episode, value="aborted", time_ns=9), AFTERWARDS)
    judged.add(label(episode, value="success", time_ns=9), BY_ROBOT)  # was read later and counts less
    assert judged.outcome.value == "aborted"
    for nothing in (
        label(episode, "mood", "good", 99),
        label(episode, "outcome", "fine", 99),
        label(episode, "excluded", "", 99),
    ):
        judged.add(nothing)
    assert judged.outcome.value == "aborted" and not judged.excluded and Judged().outcome is None


def test_several_processes_append_at_once_and_nothing_is_lost(tmp_path):
    program = (
        "import sys; from pathlib import Path; from buffer.labels import Label, append_labels\n"
        "for n in range(5):\n"
        "    append_labels(Path(sys.argv[1]), [Label('arm', sys.argv[2], n, 'excluded', 'true', 'j', 1)], wait_s=30)\n"
    )
    started = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), name], cwd=ROOT) for name in ("a", "b", "c")]
    assert [process.wait(60) for process in started] == [0, 0, 0]
    found = [(item.boot_id, item.episode_id) for item in LabelReader(tmp_path).poll()]
    assert sorted(found) == [(boot, n) for boot in "abc" for n in range(5)]


def test_who_cannot_get_the_lock_says_so_and_stores_nothing(tmp_path):
    held = Log(labels_folder(tmp_path))
    with pytest.raises(RunFolderError):
        append_labels(tmp_path, [label(("arm-1", "boot", 0))], wait_s=0.1)
    held.close()
    append_labels(tmp_path, [label(("arm-1", "boot", 0))], wait_s=0.1)
    assert len(LabelReader(tmp_path).poll()) == 1


def test_a_running_sampler_takes_labels_in(tmp_path):
    keys = fill(tmp_path)
    sampler = Sampler(tmp_path, ["reach"], seed=0)
    sampler.poll()
    number = sampler.index.episodes.find(keys[1])
    assert sampler.index.episodes.outcome[number] == Outcome.SUCCESS
    append_labels(tmp_path, [label(keys[1]), label(keys[1], "excluded", "true")])
    sampler.poll()
    assert sampler.index.episodes.outcome[number] == Outcome.FAILURE
    assert sampler.index.episodes.excluded[number]
    append_labels(tmp_path, [label(keys[1], "excluded", "false")])
    sampler.poll()
    assert not sampler.index.episodes.excluded[number]
    sampler.close()
