import json
import shutil

import pytest
import torch

from fleet.errors import LearnerError
from fleet.journal import read_journal
from fleet.server.releases import ReleaseStore
from learner.checkpoint import Checkpoint, Checkpoints, freeze
from tests.learner_toys import MemorySource, make_run, make_tables, make_toy_loop, state_of, train_toy

STATE = {
    "parts": {"policy": {"w": torch.arange(6.0).reshape(2, 3)}},
    "optimizers": {"lr": 0.1, "betas": [0.9, 0.999]},
    "count": torch.tensor(3),
}


def save_steps(folder, *steps, keep=10):
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(Checkpoint(step, {"phase": 1, "note": "x"}, freeze(STATE)))
    return checkpoints


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    loaded = save_steps(tmp_path, 7).newest()
    assert loaded.step == 7 and loaded.meta == {"phase": 1, "note": "x"}
    assert torch.equal(loaded.state["parts"]["policy"]["w"], STATE["parts"]["policy"]["w"])
    assert loaded.state["optimizers"] == STATE["optimizers"] and int(loaded.state["count"]) == 3


def test_the_newest_few_stay(tmp_path):
    checkpoints = save_steps(tmp_path, 1, 20, 300, 4000, keep=2)
    assert checkpoints.steps() == [300, 4000]
    assert {path.name for path in tmp_path.iterdir()} == {"0000000300", "0000004000"}


def test_a_checkpoint_is_a_copy():
    live = {"w": torch.zeros(3)}
    kept = freeze(live)
    live["w"] += 1
    assert kept["w"].sum() == 0


@pytest.mark.parametrize("file", ["tensors.safetensors", "meta.json", "SHA256SUMS"])
@pytest.mark.parametrize("how", ["half", "empty", "gone", "flipped"])
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, file, how):
    checkpoints = save_steps(tmp_path, 1, 2)
    victim = tmp_path / "0000000002" / file
    data = victim.read_bytes()
    if how == "gone":
        victim.unlink()
    else:
        flipped = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        victim.write_bytes({"half": data[: len(data) // 2], "empty": b"", "flipped": flipped}[how])
    assert checkpoints.newest().step == 1
    assert len(checkpoints.refused) == 1 and "0000000002" in checkpoints.refused[0] and "damaged" in checkpoints.refused[0]
    # The run comes by here again and writes a good one in its place.
    checkpoints.save(Checkpoint(2, {}, freeze(STATE)))
    assert checkpoints.newest().step == 2 and checkpoints.refused == []


def test_when_all_are_damaged_nothing_is_begun_anew_silently(tmp_path):
    checkpoints = save_steps(tmp_path, 1, 2)
    for name in ("0000000001", "0000000002"):
        (tmp_path / name / "meta.json").write_text("{}")
    with pytest.raises(LearnerError, match="all 2 checkpoints"):
        checkpoints.newest()
    assert Checkpoints(tmp_path / "none").newest() is None


def test_what_a_killed_save_left_is_swept(tmp_path):
    checkpoints = save_steps(tmp_path, 1)
    (tmp_path / "0000000002.part").mkdir()
    (tmp_path / "0000000002.part" / "tensors.safetensors").write_bytes(b"half")
    assert checkpoints.newest().step == 1
    checkpoints.save(Checkpoint(3, {}, freeze(STATE)))
    assert {path.name for path in tmp_path.iterdir()} == {"0000000001", "0000000003"}


@pytest.mark.parametrize("state", [{"a": object()}, {"a": {1: torch.zeros(1)}}, {"a": [torch.zeros(1), {2.0: 1}]}])
def test_what_cannot_be_read_back_is_not_written(tmp_path, state):
    with pytest.raises(LearnerError, match="state 'a"):
        Checkpoints(tmp_path).save(Checkpoint(1, {}, state))
    assert Checkpoints(tmp_path).newest() is None


def test_no_file_is_a_pickle(tmp_path):
    run = make_run(tmp_path / "run")
    train_toy(run, make_tables())
    for folder in (run.checkpoints, run.releases):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert files and not any(path.suffix in (".pt", ".pkl", ".bin") for path in files)
        assert not any(path.read_bytes()[:2] in (b"\x80\x04", b"\x80\x02", b"PK") for path in files)


def test_a_resumed_run_is_equal_to_the_last_bit(tmp_path):
    straight = state_of(train_toy(make_run(tmp_path / "straight"), make_tables(steps=40)))
    run = make_run(tmp_path / "cut")
    cut = train_toy(run, make_tables(steps=20))
    assert not all(torch.equal(value, straight[name]) for name, value in state_of(cut).items())
    resumed = state_of(train_toy(run, make_tables(steps=40)))
    assert set(resumed) == set(straight) and all(torch.equal(resumed[n], straight[n]) for n in straight)
    assert [line["step"] for line in read_journal(run.logs / "learner.jsonl") if line["kind"] == "resumed"] == [20]


@pytest.mark.parametrize("cut_at", [5, 10, 15])
def test_a_run_of_two_phases_resumes_in_either(tmp_path, cut_at):
    def tables():
        made = make_tables(steps=20, start_steps=10, checkpoint_every=5)
        made["start"].name, made["start"].config = "bc", {"batch_size": 16}
        return made

    straight = state_of(train_toy(make_run(tmp_path / "straight"), tables()))
    run = make_run(tmp_path / "cut")
    loop = make_toy_loop(run, tables(), MemorySource(1000))
    loop.run(lambda: loop.progress.step >= cut_at)
    assert Checkpoints(run.checkpoints).steps()[-1] == cut_at
    resumed = state_of(train_toy(run, tables()))
    assert all(torch.equal(resumed[n], straight[n]) for n in straight)


def test_torchs_own_generator_resumes_too(tmp_path):
    def tables(steps):
        made = make_tables(steps=steps, start_steps=1)
        made["policy"].family, made["policy"].config = "tests.learner_toys:LinearPolicy", {}
        made["algorithm"].name, made["algorithm"].config = "tests.learner_toys:Pair", {"learning_rate": 0.01}
        return made

    straight = state_of(train_toy(make_run(tmp_path / "straight"), tables(40)))
    run = make_run(tmp_path / "cut")
    train_toy(run, tables(20))
    resumed = state_of(train_toy(run, tables(40)))
    assert all(torch.equal(resumed[n], straight[n]) for n in straight)


def test_an_older_checkpoint_publishes_nothing_until_it_is_ahead_again(tmp_path):
    run = make_run(tmp_path / "run")
    train_toy(run, make_tables(steps=40, publish_every=5, checkpoint_every=20))
    store = ReleaseStore(run.releases)
    before, newest_step = store.newest(), store.manifest(store.newest()).step
    assert newest_step == 40
    shutil.rmtree(run.checkpoints / "0000000040")
    train_toy(run, make_tables(steps=60, publish_every=5, checkpoint_every=20))
    steps = [store.manifest(v).step for v in store.versions()]
    assert steps == sorted(set(steps)) and store.newest() > before and min(steps[before:]) > 40


def test_releases_that_were_deleted_do_not_give_their_numbers_back(tmp_path):
    run = make_run(tmp_path / "run")
    train_toy(run, make_tables(steps=40))
    newest = ReleaseStore(run.releases).newest()
    shutil.rmtree(run.releases)
    train_toy(run, make_tables(steps=60))
    assert min(ReleaseStore(run.releases).versions()) >= newest


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"policy": {"width": 32}}, "policy.config.width = 32.*has 16"),
        ({"policy": {"horizon": 8}}, "policy.config.horizon"),
        ({"family": "tests.learner_toys:LinearPolicy"}, "policy.family"),
        ({"algorithm": "bc"}, "made by 'hg_dagger'"),
    ],
)
def test_a_changed_configuration_is_refused_with_both_sides(tmp_path, change, match):
    run = make_run(tmp_path / "run")
    train_toy(run, make_tables(steps=20))
    tables = make_tables(steps=40)
    tables["policy"].config |= change.get("policy", {})
    tables["policy"].family = change.get("family", "mlp")
    if "algorithm" in change:
        tables["algorithm"].name, tables["algorithm"].config = change["algorithm"], {"batch_size": 16}
    with pytest.raises(LearnerError, match=match):
        train_toy(run, tables)


def test_the_meta_says_what_an_auditor_asks(tmp_path):
    run = make_run(tmp_path / "run")
    train_toy(run, make_tables(steps=20))
    meta = json.loads((run.checkpoints / "0000000020" / "meta.json").read_text())["meta"]
    assert meta["run_id"] == run.run_id and meta["algorithm"] == "hg_dagger" and meta["num_steps"] == 1000
    assert meta["policy"]["config"]["width"] == 16 and meta["seed"] == 0
