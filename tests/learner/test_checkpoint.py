import errno
import hashlib
import json
import random
import shutil
import subprocess
import sys

import pytest
import torch

from algorithms.bc import Bc
from fleet.errors import DiskFull, LearnerError
from fleet.journal import read_journal
from fleet.server.releases import ReleaseStore
from learner.checkpoint import Checkpoint, Checkpoints
from tests.faults.disk_model import Unsynced
from tests.learner_toys import MemorySource, make_run, make_tables, make_toy_loop, state_of, train_toy

STATE = {
    "parts": {"policy": {"w": torch.arange(6.0).reshape(2, 3)}},
    "optimizers": {"lr": 0.1, "betas": [0.9, 0.999]},
    "count": torch.tensor(3),
}


def save_steps(folder, *steps, keep=10):
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(Checkpoint(step, {"phase": 1, "note": "x"}, STATE))
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
    checkpoints.save(Checkpoint(2, {}, STATE))
    assert checkpoints.newest().step == 2 and checkpoints.refused == []


def test_when_all_are_damaged_nothing_is_begun_anew_silently(tmp_path):
    checkpoints = save_steps(tmp_path, 1, 2)
    for name in ("0000000001", "0000000002"):
        (tmp_path / name / "meta.json").write_text("{}")
    with pytest.raises(LearnerError, match="all 2 checkpoints"):
        checkpoints.newest()
    assert Checkpoints(tmp_path / "none").newest() is None


@pytest.mark.parametrize("file", ["tensors.safetensors", "meta.json", "SHA256SUMS"])
def test_a_checkpoint_cut_or_changed_at_any_byte_is_passed_over(tmp_path, file, scale):
    checkpoints = save_steps(tmp_path, 1, 2)
    victim = tmp_path / "0000000002" / file
    data, rng = victim.read_bytes(), random.Random(file)
    for cut in {0, 1, 8, len(data) - 1, *(rng.randrange(len(data)) for _ in range(15 * scale))}:
        victim.write_bytes(data[:cut])
        assert checkpoints.newest().step == 1 and len(checkpoints.refused) == 1, cut
    for _ in range(15 * scale):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        for other in (flipped, data + b"x", rng.randbytes(rng.randrange(2 * len(data)))):
            victim.write_bytes(other)
            assert checkpoints.newest().step == 1, other


def stamped(folder, meta=None, tensors=None, sums=None):
    """Other contents for the checkpoint of step 2, with checksums that fit."""
    path = folder / "0000000002"
    for name, data in (("meta.json", meta), ("tensors.safetensors", tensors)):
        if data is not None:
            (path / name).write_bytes(data)
    fitting = [
        f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}" for name in ("tensors.safetensors", "meta.json")
    ]
    (path / "SHA256SUMS").write_text("\n".join(sums(fitting) if sums else fitting) + "\n")


HUGE = (10**18).to_bytes(8, "little")
OF_OTHERS = {
    "a header of 10**18 bytes": ({"tensors": HUGE + b"{}"}, "a header of"),
    "a header that is no JSON": ({"tensors": (4).to_bytes(8, "little") + b"\x80\x04N."}, "damaged"),
    "deep JSON": ({"meta": b"[" * 200_000}, "damaged"),
    "a list": ({"meta": b"[]"}, "format"),
    "another format": ({"meta": b'{"format": 99}'}, "format"),
    "no state": ({"meta": b'{"format": 1, "step": 2, "time_ns": 0, "meta": {}}'}, "'state'"),
    "a tensor elsewhere": (
        {"meta": b'{"format": 1, "step": 2, "time_ns": 0, "meta": {}, "state": {"$tensor": "../../x"}}'},
        "'../../x' is missing",
    ),
    "sums of another folder": ({"sums": lambda lines: [*lines, f"{'0' * 64}  ../../../etc/passwd"]}, "names"),
    "sums without the tensors": ({"sums": lambda lines: lines[1:]}, "names meta.json"),
    "sums that are none": ({"sums": lambda lines: ["x" * 64]}, "SHA256SUMS is"),
}


@pytest.mark.parametrize("what", OF_OTHERS)
def test_what_others_put_there_is_refused_with_the_reason(tmp_path, what):
    checkpoints = save_steps(tmp_path / "checkpoints", 1, 2)
    contents, reason = OF_OTHERS[what]
    stamped(tmp_path / "checkpoints", **contents)
    before = sorted(tmp_path.rglob("*"))
    assert checkpoints.newest().step == 1
    assert reason in checkpoints.refused[0] and "0000000002" in checkpoints.refused[0]
    assert sorted(tmp_path.rglob("*")) == before


def taken_at(folder, hours, keep=2, keep_every_h=1.0):
    """Steps that stay when checkpoint number i is taken at hour ``hours[i]``."""
    checkpoints = Checkpoints(folder, keep=keep, keep_every_h=keep_every_h)
    for step, hour in enumerate(hours):
        checkpoints.save(Checkpoint(step, {}, STATE, time_ns=int((1000 + hour) * 3.6e12)))
    return checkpoints.steps()


def test_of_older_checkpoints_one_in_so_many_hours_stays(tmp_path):
    assert taken_at(tmp_path, [n / 4 for n in range(20)]) == [0, 4, 8, 12, 16, 18, 19]
    assert Checkpoints(tmp_path, keep=2).newest().step == 19
    again = Checkpoints(tmp_path, keep=2, keep_every_h=1.0)  # of another process, which reads the times
    again.save(Checkpoint(20, {}, STATE, time_ns=int(1005 * 3.6e12)))
    assert again.steps() == [0, 4, 8, 12, 16, 19, 20]


@pytest.mark.parametrize("jump_h", [-2000.0, -2.0, 2.0, 50_000.0])
def test_a_clock_that_jumps_deletes_no_more_than_a_clock_that_does_not(tmp_path, jump_h):
    hours = [n / 4 for n in range(20)]
    plain = taken_at(tmp_path / "plain", hours)
    jumped = taken_at(tmp_path / "jumped", [hour + jump_h * (n >= 10) for n, hour in enumerate(hours)])
    assert len(jumped) >= len(plain) and jumped[-2:] == [18, 19] and jumped[:3] == [0, 4, 8]


def test_a_damaged_old_checkpoint_does_not_stop_the_next(tmp_path):
    taken_at(tmp_path, [0, 1, 2, 3, 4])
    (tmp_path / "0000000001" / "meta.json").write_text("{")
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every_h=1.0)
    checkpoints.save(Checkpoint(5, {}, STATE, time_ns=int(1005 * 3.6e12)))
    assert checkpoints.steps() == [0, 2, 3, 4, 5]


MEMORY = """
import sys, torch
from pathlib import Path
from learner.checkpoint import Checkpoint, Checkpoints
def memory_mb(name):
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields[name].split()[0]) / 1024
checkpoints, state = Checkpoints(Path(sys.argv[1])), {str(i): torch.ones(2 << 20) for i in range(16)}
if sys.argv[2] == "load":
    state = None
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = memory_mb("VmRSS")
if state:
    checkpoints.save(Checkpoint(1, {}, state))
else:
    state = checkpoints.load(1).state
print(memory_mb("VmHWM") - before)
"""


def test_a_checkpoint_is_never_twice_in_memory(tmp_path):
    grown = [
        float(subprocess.run([sys.executable, "-c", MEMORY, tmp_path, what], capture_output=True, text=True, check=True).stdout)
        for what in ("save", "load")
    ]
    assert grown[0] < 40 and 100 < grown[1] < 128 + 40, f"{grown} MB for a checkpoint of 128 MB"


class FullDisk(Unsynced):
    def __init__(self, room):
        self.room = room

    def write(self, fd, buffers):
        self.room -= sum(map(len, buffers))
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(fd, buffers)


@pytest.mark.parametrize("room", [0, 100, 400, 1000])
def test_a_full_disk_is_left_as_it_was(tmp_path, room):
    save_steps(tmp_path, 1)
    with pytest.raises(DiskFull, match="checkpoint 0000000002"):
        Checkpoints(tmp_path, files=FullDisk(room)).save(Checkpoint(2, {"note": "x" * 1000}, STATE))
    assert [path.name for path in tmp_path.iterdir()] == ["0000000001"] and Checkpoints(tmp_path).newest().step == 1


def test_what_a_killed_save_left_is_swept(tmp_path):
    checkpoints = save_steps(tmp_path, 1)
    (tmp_path / "0000000002.part").mkdir()
    (tmp_path / "0000000002.part" / "tensors.safetensors").write_bytes(b"half")
    assert checkpoints.newest().step == 1
    checkpoints.save(Checkpoint(3, {}, STATE))
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


def bc_tables(steps, learning_rate):
    tables = make_tables(steps=steps, start_steps=1)
    tables["algorithm"].name, tables["algorithm"].config = "bc", {"batch_size": 16, "learning_rate": learning_rate}
    return tables


def test_a_changed_learning_rate_is_taken_and_said(tmp_path):
    run = make_run(tmp_path / "run")
    train_toy(run, bc_tables(20, 1e-3))
    loop = train_toy(run, bc_tables(40, 0.0))
    before = Checkpoints(run.checkpoints).load(20).state["parts"]["policy"]
    after = loop._engine.weights()["policy"]
    assert all(torch.equal(after[name], before[name]) for name in before), "nothing is learnt at a rate of 0"
    resumed = next(line for line in read_journal(run.logs / "learner.jsonl") if line["kind"] == "resumed")
    assert resumed["changed"] == {"algorithm.config.learning_rate": [1e-3, 0.0], "learner.steps": [20, 40]}


def test_another_optimizer_is_refused_with_both_sides(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    train_toy(run, bc_tables(20, 1e-3))

    def make_sgd(self, parameters):
        return torch.optim.SGD(parameters, lr=self.config.learning_rate)

    monkeypatch.setattr(Bc, "_make_optimizer", make_sgd)
    with pytest.raises(LearnerError, match="trained with SGD, but the checkpoint's optimizer is AdamW"):
        train_toy(run, bc_tables(40, 1e-3))


def test_the_meta_says_what_an_auditor_asks(tmp_path):
    run = make_run(tmp_path / "run")
    train_toy(run, make_tables(steps=20))
    meta = json.loads((run.checkpoints / "0000000020" / "meta.json").read_text())["meta"]
    assert meta["run_id"] == run.run_id and meta["algorithm"] == "hg_dagger" and meta["num_steps"] == 1000
    assert meta["policy"]["config"]["width"] == 16 and meta["seed"] == 0
