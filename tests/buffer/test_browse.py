import time

import pytest

from buffer import sidecar
from buffer.browse import find_episodes, fragments_of, parts, read_episodes
from buffer.frames import read_frames
from buffer.labels import Label, append_labels
from buffer.manifest import live_segments
from buffer.sampler import Sampler
from fleet.batch import Outcome
from fleet.errors import EpisodeError
from fleet.files import Files
from tests.buffer.fragments import make_spec
from tests.buffer.runs import OPERATOR, POLICY, Writer, fill
from tests.buffer.test_verify import fragments, spoil


def by_name(buffer):
    return {episode.name: episode for episode in read_episodes(buffer)}


def test_episodes_are_as_they_were_written(tmp_path):
    fill(tmp_path)
    found = by_name(tmp_path)
    assert len(found) == 8 and len(live_segments(tmp_path)) > 2
    plain, corrected = found["arm-1/boot1/1"], found["arm-0/boot0/3"]
    assert (plain.task, plain.outcome, plain.num_steps, plain.length) == ("reach", "success", 9, 9)
    assert (plain.by_source[POLICY], plain.by_source[OPERATOR], plain.num_takeovers) == (9, 0, 0)
    assert (corrected.by_source[POLICY], corrected.by_source[OPERATOR], corrected.num_takeovers) == (6, 3, 1)
    assert 0 < plain.start_ns <= plain.end_ns < corrected.end_ns


def test_sidecars_tell_the_same_as_the_segments(tmp_path):
    fill(tmp_path)
    slow = read_episodes(tmp_path)
    for name in live_segments(tmp_path):
        assert sidecar.write(Files(), tmp_path, name)
    assert read_episodes(tmp_path) == slow


def test_an_open_episode_is_shown_while_it_is_written(tmp_path):
    writer = Writer(tmp_path)
    writer.episode("arm-1", "b", 0, [POLICY] * 5, closed=False, version=7)
    episode = by_name(tmp_path)["arm-1/b/0"]
    assert (episode.outcome, episode.finished, episode.num_steps, episode.length) == ("open", False, 5, -1)
    assert (episode.first_version, episode.last_version) == (7, 7)
    writer.episode("arm-1", "b", 1, [POLICY] * 2)
    assert by_name(tmp_path)["arm-1/b/1"].finished
    writer.close()


def test_labels_overrule_the_robot_and_the_sampler_agrees(tmp_path):
    keys = fill(tmp_path)
    now = time.time_ns()
    said = [
        ("outcome", "failure", now),
        ("outcome", "aborted", now - 10),
        ("excluded", "true", now),
        ("excluded", "false", now),
    ]
    append_labels(tmp_path, [Label(*keys[2], field, value, "ann", at) for field, value, at in said])
    append_labels(
        tmp_path, [Label(*keys[3], "excluded", "true", "ann", now), Label("who", "b", 0, "excluded", "true", "ann", now)]
    )
    sampler = Sampler(tmp_path, ["reach"], seed=0)
    sampler.poll()
    table = sampler.index.episodes
    for episode in read_episodes(tmp_path):
        number = table.find(episode.key)
        assert Outcome[episode.outcome.upper()] == table.outcome[number]
        assert episode.excluded == bool(table.excluded[number])
        assert episode.num_steps == table.length[number]
    found = by_name(tmp_path)
    judged = found["/".join(map(str, keys[2]))]
    assert (judged.outcome, judged.excluded, len(judged.labels), judged.said) == ("failure", False, 4, "success")
    assert found["/".join(map(str, keys[3]))].excluded
    sampler.close()


def test_the_fragments_of_an_episode_are_all_of_it_and_nothing_else(tmp_path):
    fill(tmp_path)
    for episode in read_episodes(tmp_path):
        steps = [fragment.tables["steps"] for fragment in fragments_of(tmp_path, episode)]
        assert [f for table in steps for f in table["frame_index"].to_pylist()] == list(range(9))
        assert {e for table in steps for e in table["episode_id"].to_pylist()} == {episode.key[2]}


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("arm-1/boot1/2", "arm-1/boot1/2"),
        ("arm-1/2", "arm-1/boot1/2"),
        ("arm-1/bo/2", "arm-1/boot1/2"),
        ("arm-0/0", "arm-0/boot0/0"),
    ],
)
def test_names_may_be_cut_short(tmp_path, asked, name):
    fill(tmp_path)
    assert find_episodes(read_episodes(tmp_path), [asked])[0].name == name


@pytest.mark.parametrize(
    ("asked", "word"), [("arm/1", "2 episodes"), ("arm-1/9", "no episode"), ("3", "no episode"), ("", "no")]
)
def test_a_name_of_none_or_several_is_refused(tmp_path, asked, word):
    fill(tmp_path)
    with pytest.raises(EpisodeError, match=word):
        find_episodes(read_episodes(tmp_path), [asked])


def test_an_empty_or_missing_log_has_no_episodes(tmp_path):
    assert read_episodes(tmp_path) == read_episodes(tmp_path / "none") == list(parts(tmp_path)) == []


def test_of_a_damaged_episode_the_rest_is_shown(tmp_path):
    fill(tmp_path)
    episode = read_episodes(tmp_path)[0]
    name = live_segments(tmp_path)[0]
    record = fragments(name)[0]
    spoil(name.path, record.payload_at + record.key["tables"]["steps"] // 2)  # a value, still valid as Arrow
    frames = read_frames(tmp_path, episode, 100)
    assert [frame.index for frame in frames] == [3, 4, 5, 6, 7, 8]


def test_frames_are_spread_evenly_and_show_who_takes_over(tmp_path):
    writer = Writer(tmp_path, spec=make_spec(image="jpeg"))
    writer.episode("arm-1", "b", 0, [POLICY] * 10 + [OPERATOR] + [POLICY] * 90, per_fragment=7, version=3)
    writer.close()
    (episode,) = read_episodes(tmp_path)
    frames = read_frames(tmp_path, episode, 5)
    assert [frame.index for frame in frames] == [0, 10, 11, 25, 50, 75, 100]
    assert [frame.source == OPERATOR for frame in frames] == [False, True, False, False, False, False, False]
    assert frames[3].version == 3 and frames[3].action.tolist() == [25.0, 1.0]
    assert abs(int(frames[3].images["observation.images.top"].mean()) - 65) <= 2
    assert read_frames(tmp_path, episode, 1, images=False)[0].images == {}
    assert len(read_frames(tmp_path, episode, 1000)) == 101


def test_the_number_of_an_episode_is_not_cut_short(tmp_path):
    fill(tmp_path, robots=1, episodes=12)
    assert find_episodes(read_episodes(tmp_path), ["arm-0/1"])[0].key[2] == 1
