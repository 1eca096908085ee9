"""The ready-made files of infra/cluster, as far as they can be checked without images, clouds and other machines."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import tomllib
import yaml

from fleet.identity import create_run_keys
from fleet.runfolder import RunFolder
from infra.run_config import check_run_file, load_tables, write_catalogue
from infra.supervisor import Supervisor
from infra.targets import scrape_targets, targets_file, write_targets
from infra.up import LocalRun, open_run, start_gateway, write_run_file
from tests.command_line import ROOT
from tests.ports import free_port

HERE = ROOT / "infra" / "cluster"
PACKAGES = ("fleet", "algorithms", "buffer", "actors", "learner", "infra")


def read(name):
    return yaml.safe_load((HERE / name).read_text())


# Ray's cluster launcher


@pytest.fixture(scope="module")
def ray_cluster():
    util = pytest.importorskip("ray.autoscaler._private.util")
    config = util.prepare_config(read("ray-cluster.yaml"))
    util.validate_config(config)
    return config


def test_the_ray_cluster_passes_rays_own_schema(ray_cluster):
    util = pytest.importorskip("ray.autoscaler._private.util")
    assert ray_cluster["provider"]["type"] == "local" and ray_cluster["max_workers"] == 2
    with pytest.raises(Exception, match="Additional properties"):
        util.validate_config({**ray_cluster, "head_start_comands": []})


def test_the_ray_clusters_commands_are_such_that_ray_knows(ray_cluster):
    from ray.scripts.scripts import cli

    lines = [*ray_cluster["head_start_ray_commands"], *ray_cluster["worker_start_ray_commands"]]
    calls = [shlex.split(part)[1:] for line in lines for part in line.split(";") if "/bin/ray " in part]
    assert [call[0] for call in calls] == ["stop", "start", "stop", "start"]
    for name, *arguments in calls:
        cli.commands[name].make_context(name, [a.replace("$RAY_HEAD_IP", "10.0.0.10") for a in arguments])
    starts = [line for line in lines if " start " in line]
    assert all("RAY_AUTH_MODE=token" in line and "--node-name" in line for line in starts)


def test_the_ray_cluster_copies_what_its_setup_needs_and_the_token(ray_cluster):
    mounts = ray_cluster["file_mounts"]
    assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token"
    assert {to.removeprefix("~/fleet-rl/"): source for to, source in mounts.items()} == {s: s for s in mounts.values()}
    assert set(mounts.values()) == {*PACKAGES, "constraints", "tools", "pyproject.toml", "README.md", "LICENSE"}
    assert all((ROOT / source).exists() for source in mounts.values())
    command = next(line for line in ray_cluster["setup_commands"] if "setup.sh" in line)
    check_setup(command.split("&&")[1])


def check_setup(command):
    """A call of tools/setup.sh: it names environment, mark and extras that exist."""
    script, _, _, extras = shlex.split(command)[-4:]
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert os.access(ROOT / script, os.X_OK) and set(extras.split(",")) == {"learner", "sim"} <= set(known)


# The image


def dockerfile():
    """(instruction, rest) of each line, continued ones put together."""
    text = re.sub(r"\\\n", " ", (HERE / "Dockerfile").read_text())
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line and not line.startswith("#")]


def test_the_image_is_built_from_what_is_there():
    copied = [shlex.split(rest)[1:] for name, rest in dockerfile() if name == "COPY"]
    sources = [source for *sources, _ in copied for source in sources]
    assert all((ROOT / source).exists() for source in sources)
    assert [s for s in sources if (ROOT / s).is_dir()] == list(PACKAGES)
    base = next(rest for name, rest in dockerfile() if name == "FROM")
    assert re.fullmatch(r"python:3\.(1[1-9])-slim-\w+", base)
    setup = next(rest for name, rest in dockerfile() if name == "RUN" and "setup.sh" in rest)
    check_setup(setup)
    ignored = (HERE / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[1] == "*" and all(f"!{source.split('/')[0]}" in ignored for source in sources)
    entrypoint = json.loads(next(rest for name, rest in dockerfile() if name == "ENTRYPOINT"))
    workdir = next(rest for name, rest in dockerfile() if name == "WORKDIR")
    assert os.access(ROOT / Path(entrypoint[0]).relative_to(workdir), os.X_OK)


def test_the_image_runs_as_an_ordinary_user_and_has_what_programs_call():
    names = [name for name, _ in dockerfile()]
    user = names.index("USER")
    assert dockerfile()[user][1] == "fleet" and "USER" not in names[user + 1 :]
    system = " ".join(rest for name, rest in dockerfile()[:user] if name == "RUN")
    assert all(package in system for package in ("procps", "g++", "libosmesa6"))


@pytest.mark.parametrize("again", [False, True])
def test_the_container_starts_a_run_and_goes_on_with_it(tmp_path, again):
    """What serve.sh calls is what the command line understands."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "fleet").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "bin" / "fleet").chmod(0o755)
    shutil.copy(ROOT / "examples" / "toy.yaml", tmp_path / "run.yaml")
    if again:
        RunFolder.create(tmp_path / "runs" / "run")
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RUNS": str(tmp_path / "runs")}
    command = [HERE / "serve.sh", tmp_path / "run.yaml", "learner.steps=50000"]
    called = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    expected = ["up", str(tmp_path / "run.yaml"), "learner.steps=50000", "--runs", str(tmp_path / "runs")]
    assert called == [*expected, *(["--resume"] if again else [])]

    import typer.main

    from infra.cli import app

    given = typer.main.get_command(app).commands["up"].make_context("up", called[1:]).params
    run, tables = open_run(given["source"], given["overrides"], resume=given["resume"], runs=given["runs"])
    assert run.path == tmp_path / "runs" / "run" and tables["learner"].steps == 50000


# Compose


def test_the_composed_services_fit_each_other():
    compose = read("compose.yaml")
    services = compose["services"]
    assert set(services) == {"pod", "learner", "registry", "prometheus", "grafana"}
    for name, service in services.items():
        if name != "pod":
            assert service["network_mode"] == "service:pod" and "ports" not in service
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            there = source in compose["volumes"] or (HERE / source).exists()
            assert there or source == "./run.yaml"  # the user's own
    build = services["pod"]["build"]
    assert (HERE / build["context"]).resolve() == ROOT and (ROOT / build["dockerfile"]).exists()
    assert services["learner"]["image"] == services["pod"]["image"]
    assert set(compose["volumes"]) == {v.split(":")[0] for s in services.values() for v in s.get("volumes", []) if v[0] != "."}


def test_the_composed_learner_is_told_what_it_understands(tmp_path):
    services = read("compose.yaml")["services"]
    file, *overrides = services["learner"]["command"]
    assert any(volume.startswith("./run.yaml:" + file) for volume in services["learner"]["volumes"])
    overrides = [re.sub(r"\$\{GATEWAY_HOST:\?[^}]*\}", "learner.example.org", text) for text in overrides]
    assert not any("$" in text for text in overrides)
    check_run_file(ROOT / "examples" / "toy.yaml", overrides)
    tables = load_tables(ROOT / "examples" / "toy.yaml", overrides)
    port = tables["gateway"].bind.rpartition(":")[2]
    assert f"{port}:{port}" in services["pod"]["ports"] and tables["gateway"].advertise.endswith(f":{port}")
    registry = services["registry"]["command"]
    assert tables["registry"].url == f"redis://127.0.0.1:{registry[registry.index('--port') + 1]}/0"
    assert registry[registry.index("--bind") + 1] == "127.0.0.1"
    stop_s = tables["learner"].stop_within_s
    assert float(services["learner"]["stop_grace_period"].removesuffix("s")) > stop_s + 15


def test_grafana_asks_the_prometheus_that_reads_the_runs_ports():
    services = read("compose.yaml")["services"]
    listen = next(c for c in services["prometheus"]["command"] if c.startswith("--web.listen-address="))
    address = listen.partition("=")[2]
    assert read("grafana/prometheus.yaml")["datasources"][0]["url"] == f"http://{address}" and address.startswith("127.0.0.1:")
    assert all(port.startswith("127.0.0.1:") for port in services["pod"]["ports"] if "3000" in port)
    config = next(c for c in services["prometheus"]["command"] if c.startswith("--config.file=")).partition("=")[2]
    assert f"./prometheus.yaml:{config}:ro" in services["prometheus"]["volumes"]
    stem = services["learner"]["command"][0].rpartition("/")[2].removesuffix(".yaml")
    expected = f"/runs/{stem}/{targets_file(RunFolder(ROOT)).name}"
    assert read("prometheus.yaml")["scrape_configs"][0]["file_sd_configs"][0]["files"] == [expected]


# Prometheus


def test_targets_are_those_that_wrote_down_a_port(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    everybody = ("gateway", "learner", "evaluator")
    write_targets(run, everybody)
    assert json.loads(targets_file(run).read_text()) == []
    (run.path / "gateway.json").write_text('{"metrics_port": 9101, "endpoint": "tcp://x:1"}')
    (run.path / "learner.json").write_text('{"pid": 7}')  # its metrics are off
    (run.path / "evaluator.json").write_text('{"pid": 8, "metri')
    write_targets(run, everybody)
    expected = [{"targets": ["127.0.0.1:9101"], "labels": {"run": run.run_id, "process": "gateway"}}]
    assert json.loads(targets_file(run).read_text()) == expected == scrape_targets(run, everybody)
    written = targets_file(run).stat().st_mtime_ns
    write_targets(run, everybody)
    assert targets_file(run).stat().st_mtime_ns == written  # Prometheus would read it anew
    (run.path / "gateway.json").write_text('{"metrics_port": 9102}')
    write_targets(run, everybody)
    assert scrape_targets(run, everybody)[0]["targets"] == ["127.0.0.1:9102"]


@pytest.mark.parametrize("every", [0, 1])
def test_fleet_up_keeps_the_targets_up_to_date(tmp_path, every):
    run = RunFolder.create(tmp_path / "run")
    local = LocalRun(run, load_tables(ROOT / "examples" / "toy.yaml", [f"evaluator.every={every}"]))
    try:
        for process in ("gateway", "evaluator"):  # an evaluator of an earlier start, when there is none now
            (run.path / f"{process}.json").write_text('{"metrics_port": 9101}')
        local.poll()
        found = [target["labels"]["process"] for target in json.loads(targets_file(run).read_text())]
        assert found == (["gateway", "evaluator"] if every else ["gateway"])
    finally:
        local.stop()


def needs(program):
    found = shutil.which(program)
    if not found:
        pytest.skip(f"{program} is not installed (Debian: apt-get install prometheus)")
    return found


def test_promtool_accepts_the_configuration():
    said = subprocess.run(
        [needs("promtool"), "check", "config", "--syntax-only", HERE / "prometheus.yaml"], capture_output=True, text=True
    )
    assert said.returncode == 0, said.stdout + said.stderr


@pytest.fixture
def gateway(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    tables = load_tables(ROOT / "examples" / "toy.yaml", ["registry.url=unix:///nowhere"])  # a view only: it may be missing
    write_run_file(run, tables)
    create_run_keys(run.keys)
    write_catalogue(run, tables["run"])
    supervisor = Supervisor()
    start_gateway(run, supervisor)
    yield run
    supervisor.stop()


def test_a_prometheus_finds_and_scrapes_a_gateway(gateway, tmp_path):
    program = needs("prometheus")
    write_targets(gateway, ["gateway"])
    config = (HERE / "prometheus.yaml").read_text().replace("/runs/run/", f"{gateway.path}/")
    config = config.replace("scrape_interval: 5s", "scrape_interval: 200ms").replace(
        "scrape_timeout: 4s", "scrape_timeout: 200ms"
    )
    (tmp_path / "prometheus.yaml").write_text(config)
    port = free_port()
    command = [program, f"--config.file={tmp_path / 'prometheus.yaml'}", f"--web.listen-address=127.0.0.1:{port}"]
    command.append(f"--storage.tsdb.path={tmp_path / 'tsdb'}")
    with open(tmp_path / "log", "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline, found = time.monotonic() + 30, []
        while not found:
            assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.2)
            with contextlib.suppress(OSError):
                found = query(port, 'fleet_robots_live{process="gateway"}')
        assert found[0]["value"][1] == "0" and found[0]["metric"]["run"] == gateway.run_id
    finally:
        process.terminate()
        process.wait(20)


def query(port, text):
    url = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.request.quote(text)}"
    return json.loads(urllib.request.urlopen(url, timeout=5).read())["data"]["result"]
