"""Several ranks train together on a real log, each in a process of its own. Processes are slow to start, so each test plays
several scenes with the same ones."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from algorithms.hg_dagger import HgDagger
from buffer.sampler import Sampler
from fleet.errors import FleetError
from fleet.files import FolderLock
from fleet.journal import read_journal
from fleet.robot import Source
from fleet.runfolder import RunFolder
from learner.checkpoint import Checkpoints
from learner.ranks import RankPlace
from learner.supply import Supply
from learner.train import train
from tests.learner.test_train import fill
from tests.learner_toys import make_run, make_tables
from tests.rank_processes import on_ranks, rendezvous

pytestmark = pytest.mark.timeout(150)  # beyond what on_ranks waits: its message names the rank


@dataclasses.dataclass
class Scene:
    """A training: ``paths`` are the run folders of its ranks, on the ``shards`` that they read."""

    paths: list[Path]
    tables: dict[str, Any]
    shards: tuple[int, ...] = ()
    act: str = ""  # what happens meanwhile
    at: str = dataclasses.field(default_factory=rendezvous)


@dataclasses.dataclass
class Told:
    """What a rank saw: losses by step and their weights, what was waited for, whether its rows were borrowed, its error."""

    losses: dict[int, float] = dataclasses.field(default_factory=dict)
    weights: set[float] = dataclasses.field(default_factory=set)
    waiting: list[str] = dataclasses.field(default_factory=list)
    borrowed: list[bool] = dataclasses.field(default_factory=list)
    step: int = 0
    error: str = ""
    code: str = ""
    seconds: float = 0.0


def play(place: RankPlace, scenes: list[Scene]) -> list[Told | None]:
    """What this rank saw of each scene; ranks beyond a scene's number have no part in it."""
    import learner.loop

    learner.loop.REPORT_S = 0.0
    told: list[Told | None] = []
    for scene in scenes:
        size = len(scene.paths)
        if place.rank >= size:
            told.append(None)
            continue
        at = RankPlace(place.rank, scene.shards or (0,) * size, scene.at, 60.0) if size > 1 else RankPlace()
        with pytest.MonkeyPatch.context() as patch:
            told.append(play_one(at, scene, patch))
        if dist.is_initialized():
            dist.destroy_process_group()
    return told


def play_one(place: RankPlace, scene: Scene, patch: pytest.MonkeyPatch) -> Told:
    run, told, began = RunFolder.open(scene.paths[place.rank]), Told(), time.monotonic()
    act = ACTS.get(scene.act)
    prepared = act(place.rank, run, told, patch) if act else None
    borrow = Supply._borrow

    def noted(self, needs):
        borrow(self, needs)
        told.borrowed.append(self._borrowed)

    def report(progress):
        told.step = progress.step
        if progress.stats:
            told.losses[progress.step] = progress.stats["loss"]
            told.weights.add(progress.stats["weight"])
        if progress.waiting:
            told.waiting.append(progress.waiting)
        if callable(prepared):
            prepared(progress)

    patch.setattr(Supply, "_borrow", noted)
    try:
        train(
            run,
            scene.tables,
            stop=lambda: scene.act == "stop" and place.rank == 1 and told.step >= 13,
            report=report,
            place=place,
        )
    except FleetError as error:
        told.error, told.code = str(error), error.code
    told.seconds = time.monotonic() - began
    return told


def fill_when_it_waits(rank, run, told, patch):
    """The second rank's shard gets demonstrations once both wait."""

    def look(progress):
        if rank == 1 and len(told.waiting) == 3:
            fill(run, robot="r2")

    return look


def fill_at_step_20(rank, run, told, patch):
    def look(progress):
        if rank == 1 and progress.step == 20 and not (run.path / "filled").exists():
            (run.path / "filled").touch()
            fill(run, robot="r2", source=Source.OPERATOR)
        if rank == 1 and progress.step == 30:
            time.sleep(0.3)  # until all have looked at the log

    return look


def disk_fails(rank, run, told, patch):
    gather = Sampler.gather

    def broken(self, draw, out=None):
        if draw.step == 7 and rank == 1:
            raise OSError(5, "the disk is gone")
        return gather(self, draw, out)

    patch.setattr(Sampler, "gather", broken)


def drift(rank, run, told, patch):
    after = HgDagger.after_step

    def drifted(self, step, stats):
        after(self, step, stats)
        if rank == 1 and step == 15:
            with torch.no_grad():
                next(self.parts["policy"].module.parameters()).view(-1)[0] += 1e-6

    patch.setattr(HgDagger, "after_step", drifted)


def begin_apart(rank, run, told, patch):
    init = HgDagger.__init__

    def other(self, policy, config, data):
        if rank == 1:
            with torch.no_grad():
                next(policy.parameters()).view(-1)[0] += 1e-6
        init(self, policy, config, data)

    patch.setattr(HgDagger, "__init__", other)


def share_all(rank, run, told, patch):
    from learner.zero import part

    patch.setattr(part, "WHOLE_BELOW", 0)  # what is so small would be whole on every rank


ACTS = {f.__name__: f for f in (fill_when_it_waits, fill_at_step_20, disk_fails, drift, begin_apart, share_all)}


def a_run(path: Path, **options: Any) -> Path:
    run = make_run(path)
    fill(run, **options)
    return run.path


def a_second_node(path: Path, first: Path) -> Path:
    """A run folder of another node: its own buffer and logs, the rest is the first one's."""
    run = make_run(path)
    for name in ("run.json", "tasks.json"):
        (run.path / name).unlink()
    for name in ("releases", "checkpoints"):
        (run.path / name).rmdir()
    for name in ("run.json", "tasks.json", "releases", "checkpoints"):
        (run.path / name).symlink_to(first / name)
    return run.path


def lines(path: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_journal(path / "logs" / "learner.jsonl") if line["kind"] == kind]


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return Checkpoints(path / "checkpoints").newest().state["parts"]["policy"]


def assert_same_curve(told: list[Told], straight: Told, steps: range) -> None:
    for one in told:
        assert not one.error and sorted(one.losses) == list(steps)
        np.testing.assert_allclose([one.losses[s] for s in steps], [straight.losses[s] for s in steps], rtol=2e-4)


def test_any_number_of_ranks_follows_the_curve_of_one(tmp_path):
    straight = play(RankPlace(), [Scene([a_run(tmp_path / "one")], make_tables())])[0]
    two, three, cut = a_run(tmp_path / "two"), a_run(tmp_path / "three"), a_run(tmp_path / "cut")
    scenes = [
        Scene([three] * 3, make_tables()),
        Scene([two] * 2, make_tables()),
        Scene([cut] * 2, make_tables(steps=15)),
        Scene([cut], make_tables(steps=27)),
        Scene([cut] * 2, make_tables()),
    ]
    played = list(zip(*on_ranks(3, play, scenes, meet=False), strict=True))
    for ranks, steps in zip(played, (range(1, 41), range(1, 41), range(1, 16), range(16, 28), range(28, 41)), strict=True):
        assert_same_curve([told for told in ranks if told is not None], straight, steps)
    alone = weights_of(tmp_path / "one")
    assert "normaliser.mean_S" in alone
    for path in (two, three, cut):
        for name, value in weights_of(path).items():
            np.testing.assert_allclose(value, alone[name], rtol=1e-3, atol=1e-4, err_msg=name)
    assert [(line["step"], line["ranks"]) for line in lines(cut, "resumed")] == [(15, 1), (27, 2)]
    # One rank says what is to be said of the run.
    assert [line["step"] for line in lines(two, "checkpoint")] == [20, 40]
    others = [line["kind"] for line in read_journal(two / "logs" / "learner-rank1.jsonl")]
    assert set(others) <= {"sampleable"}


def test_shards_that_are_empty_hold_nobody(tmp_path):
    first = a_run(tmp_path / "first")
    second = a_second_node(tmp_path / "second", first)
    asleep = a_run(tmp_path / "asleep", source=Source.POLICY)
    awake = a_second_node(tmp_path / "awake", asleep)
    adaptive = make_tables(steps=60, min_size_to_sample=1, checkpoint_every=60)
    adaptive["algorithm"].config["mixture"] = "adaptive"
    later = make_tables(steps=70, checkpoint_every=60)
    later["algorithm"].config["mixture"] = "adaptive"
    uneven = a_run(tmp_path / "uneven", episodes=2)
    other = a_second_node(tmp_path / "other", uneven)
    fill(RunFolder.open(other), episodes=6, robot="r3")
    scenes = [
        Scene([uneven, other], make_tables(steps=1), (0, 1)),
        Scene([first, second], adaptive, (0, 1), "fill_at_step_20"),
        Scene([asleep, awake], make_tables(), (0, 1), "fill_when_it_waits"),
        Scene([second], later),
    ]
    played = list(zip(*on_ranks(2, play, scenes, meet=False), strict=True))
    _, (a, b), (c, d), (e, _) = played
    assert not a.error + b.error and a.losses == b.losses and set(a.losses) == set(range(1, 61))
    assert not any(a.borrowed) and b.borrowed[:20] == [True] * 20 and b.borrowed[-20:] == [False] * 20
    samplers = Checkpoints(first / "checkpoints").load(60).state["samplers"]
    shares = [samplers[shard]["shares"] for shard in "01"]
    (key,) = shares[0]
    assert {n: v.tolist() for n, v in shares[0][key].items()} == {n: v.tolist() for n, v in shares[1][key].items()}
    assert shares[0][key]["online"].any()  # operator steps, which only the second shard has

    # Neither has what is asked for: both wait, and go on together when one has.
    assert not c.error + d.error and c.losses == d.losses and set(c.losses) == set(range(1, 41))
    assert c.waiting and d.waiting and all("waits for data" in why for why in c.waiting + d.waiting)
    assert all(c.borrowed) and not any(d.borrowed)
    assert c.weights == d.weights == {16 * 4.0}  # rows times steps of a window: half of them count twice, and borrowed ones not
    assert [line["kind"] for line in lines(asleep, "waiting")] == ["waiting"]

    # A shard is known by its log, not by its number.
    assert e.step == 70 and lines(second, "resumed")[-1]["shards_left_out"] == ["0"]

    # Observations are normalised by what all shards have, each step counting the same.
    both = make_run(tmp_path / "both")
    fill(both, episodes=2)
    fill(both, episodes=6, robot="r3")
    assert play(RankPlace(), [Scene([both.path], make_tables(steps=1))])[0].step == 1
    for name in ("normaliser.mean_S", "normaliser.std_S"):
        np.testing.assert_allclose(weights_of(uneven)[name], weights_of(both.path)[name], rtol=0.05)


def test_one_rank_that_fails_or_stops_ends_all_with_its_own_words(tmp_path):
    scenes, paths = [], {}
    for act in ("stop", "fill_at_step_20", "disk_fails", "drift", "begin_apart", "locked"):
        paths[act] = a_run(tmp_path / act)
        scenes.append(Scene([paths[act]] * 2, make_tables(), act=act))
    lock = FolderLock(paths["locked"] / "checkpoints", "test")
    try:
        played = dict(zip(paths, zip(*on_ranks(2, play, scenes, meet=False), strict=True), strict=True))
    finally:
        lock.release()
    assert [(told.step, told.error) for told in played["stop"]] == [(13, "")] * 2
    assert Checkpoints(paths["stop"] / "checkpoints").steps() == [13]

    # Both read what came, and it is counted once.
    assert [told.step for told in played["fill_at_step_20"]] == [40, 40]
    meta = Checkpoints(paths["fill_at_step_20"] / "checkpoints").load(40).meta
    assert meta["rate"]["inserts"] == 80 and meta["num_steps"] == 160

    zero, one = played["disk_fails"]
    assert "the disk is gone" in one.error and zero.error == f"rank 1: {one.error}" and zero.seconds < 20
    for act, step in (("drift", 20), ("begin_apart", 0)):
        assert [told.error.split(":")[0] for told in played[act]] == [
            f"at step {step} ranks [1] have other weights than rank 0; rule"
        ] * 2
        assert Checkpoints(paths[act] / "checkpoints").steps() == []
    zero, one = played["locked"]
    assert (zero.code, one.code) == ("run_folder",) * 2 and one.error == f"rank 0: {zero.error}"


def test_shared_weights_at_two_ranks_go_on_as_plain_ones_at_one_and_back(tmp_path):
    """ZeRO-3 at two ranks, plain torch at one, ZeRO-3 again: one curve. The start has an algorithm and an engine of its own."""

    def tables(steps, **engine):
        made = make_tables(steps=steps, start_steps=8, checkpoint_every=100, engine=engine)
        made["start"].name, made["start"].config = "bc", {"batch_size": 16}
        return made

    straight = play(RankPlace(), [Scene([a_run(tmp_path / "one")], tables(30))])[0]
    path, zero = a_run(tmp_path / "cut"), {"name": "deepspeed", "zero_stage": 3}
    for scene, steps in (
        (Scene([path] * 2, tables(12, **zero), act="share_all"), range(1, 13)),
        (Scene([path], tables(20)), range(13, 21)),
        (Scene([path] * 2, tables(30, **zero), act="share_all"), range(21, 31)),
    ):
        # DeepSpeed begins once in a process.
        played = on_ranks(2, play, [scene], meet=False) if len(scene.paths) == 2 else [play(RankPlace(), [scene])]
        assert_same_curve([told for (told,) in played], straight, steps)
    alone = weights_of(tmp_path / "one")
    for name, value in weights_of(path).items():
        np.testing.assert_allclose(value, alone[name], rtol=1e-3, atol=1e-4, err_msg=name)
