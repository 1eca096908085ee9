"""What a clumsy user meets: one clear message with value, rule and remedy, exit code 2, and nothing lost."""

import json
import re
import signal
import socket
import subprocess
import sys

import pytest

from fleet.identity import create_run_keys
from fleet.runfolder import RunFolder
from infra.enroll import enroll_here
from tests import command_line
from tests.command_line import ENV, ROOT
from tests.ports import free_port

TOY = (ROOT / "examples" / "toy.yaml").read_text()


def fleet(*arguments):
    """Runs the command line as a user does; returns (exit code, everything it said)."""
    command = command_line.fleet(*arguments)
    said, _ = command.communicate(timeout=60)
    return command.returncode, said


def ask(*arguments):
    """The same in this process."""
    code, out, err = command_line.answer(*arguments)
    return code, out + err


@pytest.fixture
def run_file(tmp_path):
    def write(change=lambda text: text):
        path = tmp_path / "toy.yaml"
        path.write_text(change(TOY))
        return path

    return write


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("publish_every: 50", "publish_evry: 50", ["publish_evry", "publish_every"]),
        ("publish_every: 50", "publish_every: soon", ["publish_every", "soon"]),
        ("learner:", "lerner:", ["lerner", "learner"]),
        ("min_size_to_sample: 200", "min_size_to_sample: 0", ["learner.min_size_to_sample = 0", "min_size_to_sample >= 1"]),
        ("family: mlp", "family: mpl", ["mpl", "mlp"]),
        ("name: hg_dagger", "name: hg_daggr", ["hg_daggr", "hg_dagger"]),
        ("horizon: 8", "horizn: 8", ["horizn", "horizon"]),
        ("bind: tcp://127.0.0.1:0", "bind: 7447", ["bind", "tcp://HOST:PORT"]),
    ],
)
def test_a_mistake_in_the_run_file_is_named_with_the_remedy(run_file, old, new, words):
    path = run_file(lambda text: text.replace(old, new))
    code, said = ask("config", "check", path)
    assert code == 2
    for word in words:
        assert word in said
    assert "Traceback" not in said


def test_a_wrong_key_on_the_command_line_is_named(run_file):
    code, said = ask("config", "check", run_file(), "learner.stepz=5")
    assert code == 2 and "stepz" in said and "steps" in said


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["engine.name=zero"], ["engine.name", "deepspeed"]),
        (["engine.name=deepspeed", "engine.zero_stage=4"], ["zero_stage = 4", "0, 1, 2 or 3"]),
        (["engine.zero_stage=3"], ["zero_stage = 3", "engine.name=deepspeed"]),
        (["engine.offload_optimizer=true"], ["offload_optimizer", "engine.name=deepspeed"]),
        (["engine.name=deepspeed", "engine.zero_stage=3", "engine.compile=true"], ["engine.compile", "engine.zero_stage=2"]),
        (["engine.name=torch", "cluster.ranks=2"], ["cluster.ranks = 2", "engine.name=ddp"]),
        (["cluster.ranks=2", "cluster.min_ranks=3"], ["min_ranks = 3", "ranks = 2"]),
        (["cluster.nodes=[a, b]"], ["cluster.nodes", "run.shared"]),
        (["run.shared=s3://bucket/runs"], ["s3://bucket/runs", "mount"]),
    ],
)
def test_an_engine_or_cluster_that_cannot_be_is_named_before_anything_starts(run_file, overrides, words):
    code, said = ask("config", "check", run_file(), *overrides)
    assert code == 2 and "Traceback" not in said
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["policy.config.horizon=3"], ["horizon = 3", "actor.execute = 4"]),
        (["policy.config.horizon=129"], ["horizon = 129", "at most 128"]),
        (["policy.config={}", "actor.execute=9"], ["horizon = 8", "actor.execute = 9"]),
        (["policy.family=token", "policy.config.num_bins=1"], ["'num_bins': 1", "2 to 4096"]),
        (["policy.pretrained=runs/elsewhere"], ["no policy at 'runs/elsewhere'", "RUN@VERSION"]),
        (["run.instruction_encoder=hashd"], ["hashd", "did you mean 'hashed'"]),
        (["actor.chunking=rtc"], ["chunking = 'rtc'", "async"]),
    ],
)
def test_a_policy_that_no_robot_could_run_is_named_before_anything_starts(run_file, overrides, words):
    code, said = ask("config", "check", run_file(), *overrides)
    assert code == 2 and "Traceback" not in said
    for word in words:
        assert word in said


def test_process_tables_are_checked_in_under_a_second_of_work(run_file):
    path = run_file(lambda text: text.replace("gateway:", "gatewy:"))
    tells = "import sys, time\nfrom infra.cli import app\ntry: app()\nfinally: print(time.process_time(), *sys.modules)"
    command = [sys.executable, "-c", tells, "config", "check", str(path)]
    done = subprocess.run(command, env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "gatewy" in done.stderr
    used_s, *modules = done.stdout.split()
    assert float(used_s) < 3 and "torch" not in modules  # of processor time; two thirds of a second on an idle machine


def test_a_good_file_is_said_to_be_good(run_file):
    code, said = fleet("config", "check", run_file())
    assert code == 0 and "ok" in said


def test_up_refuses_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    code, said = fleet("up", tmp_path / "photos", "--resume")
    assert code == 2 and "run.json" in said and "remedy" in said


def test_up_does_not_write_into_somebody_elses_folder(tmp_path, run_file):
    foreign = tmp_path / "runs" / "toy"
    foreign.mkdir(parents=True)
    (foreign / "thesis.tex").write_text("x")
    code, said = ask("up", run_file(), "--runs", tmp_path / "runs")
    assert code == 2 and "something else" in said
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]


def test_a_port_in_use_is_named(tmp_path, run_file):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        path = run_file(lambda text: text.replace("tcp://127.0.0.1:0", f"tcp://127.0.0.1:{port}"))
        code, said = fleet("up", path, "--runs", tmp_path / "runs")
    assert code == 2 and str(port) in said and "in use" in said


def make_run(tmp_path, endpoint):
    """A run that was started once and is down now."""
    run = RunFolder.create(tmp_path / "run")
    run.config.write_text(TOY)
    create_run_keys(run.keys)
    (run.path / "gateway.json").write_text(json.dumps({"endpoint": endpoint, "bound": endpoint}))
    return run


def test_an_unreachable_gateway_is_named_and_the_robot_goes_on_trying(tmp_path):
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    path = enroll_here(make_run(tmp_path, endpoint), "arm-1", {})
    code, said = fleet("join", path, "actor.wait_for_gateway_s=6")
    assert code == 2
    assert endpoint in said and "nothing answers" in said and "fleet up" in said
    assert re.search("again", said)


def test_a_credential_cannot_be_overwritten_by_accident(tmp_path):
    run = make_run(tmp_path, "tcp://127.0.0.1:7447")
    out = tmp_path / "arm-1.yaml"
    assert ask("enroll", "arm-1", "--run", run.path, "--out", out)[0] == 0
    before = out.read_text()
    code, said = ask("enroll", "arm-1", "--run", run.path, "--out", out)
    assert code == 2 and "exists" in said and out.read_text() == before
    assert out.stat().st_mode & 0o077 == 0


def test_a_robot_can_be_revoked_once_and_enrolled_again(tmp_path):
    run = make_run(tmp_path, "tcp://127.0.0.1:7447")
    for number in (1, 2):
        assert ask("enroll", "arm-1", "--run", run.path, "--out", tmp_path / f"{number}.yaml")[0] == 0
        assert ask("revoke", "arm-1", "--run", run.path)[0] == 0
    code, said = ask("revoke", "arm-1", "--run", run.path)
    assert code == 2 and "not enrolled" in said


def test_an_unknown_robot_adapter_is_named(tmp_path):
    run = make_run(tmp_path, f"tcp://127.0.0.1:{free_port()}")
    code, said = fleet("join", enroll_here(run, "arm-1", {"robot": {"adapter": "tooy"}}))
    assert code == 2 and "tooy" in said and "toy" in said and "Traceback" not in said


def test_a_robot_that_waits_leaves_when_asked(tmp_path):
    path = enroll_here(make_run(tmp_path, f"tcp://127.0.0.1:{free_port()}"), "arm-1", {})
    process = command_line.fleet("join", path)
    try:
        while "again" not in (line := process.stdout.readline()):
            assert line, "it ended"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode == 0
    finally:
        process.kill()  # it would wait for ever
