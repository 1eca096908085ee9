import json

import pytest

from buffer.main import BufferConfig, Catalogue, GatewayConfig, accepts_beside, accepts_policy, advertised, bind_address
from buffer.retention import Limits
from fleet.config import load_run
from fleet.errors import ConfigError, PolicyError
from fleet.runfolder import RunFolder
from fleet.spec import Feature, RobotSpec


def spec(action_dim=2, state_dim=3, name="toy"):
    features = {"action": Feature("float32", (action_dim,)), "observation.state": Feature("float32", (state_dim,))}
    return RobotSpec(name, 20, features)


def test_before_there_is_a_policy_a_robot_with_other_actions_is_refused_with_both_sides_named():
    accepts_beside([], spec())
    accepts_beside([spec(name="other")], spec(state_dim=9))
    with pytest.raises(PolicyError, match=r"'arm'.*\(7,\).*'toy'.*\(2,\)"):
        accepts_beside([spec()], spec(action_dim=7, name="arm"))


@pytest.mark.parametrize("robot", [spec(action_dim=7), spec(state_dim=9)])
def test_a_robot_that_the_policy_cannot_drive_is_refused(robot):
    policy = {"reads": {"observation.state": [3]}, "action_dim": 2}
    accepts_policy(policy, spec())
    with pytest.raises(PolicyError):
        accepts_policy(policy, robot)


def test_a_free_port_is_kept_for_later_starts(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    config = GatewayConfig(bind="tcp://127.0.0.1:0")
    assert bind_address(run, config) == "tcp://127.0.0.1:0"
    (run.path / "gateway.json").write_text(json.dumps({"bound": "tcp://127.0.0.1:5123"}))
    assert bind_address(run, config) == "tcp://127.0.0.1:5123"


def test_the_address_for_robots_can_differ_from_the_bound_one():
    assert advertised("tcp://0.0.0.0:7447", GatewayConfig(advertise="tcp://lab.example:9000")) == "tcp://lab.example:9000"
    assert "0.0.0.0" not in advertised("tcp://0.0.0.0:7447", GatewayConfig())


def test_an_address_without_a_port_is_refused():
    with pytest.raises(ConfigError, match="HOST:PORT"):
        GatewayConfig(bind="tcp://localhost").check()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_gb": -1.0}, "max_gb = -1.*0 or more"),
        ({"max_age_h": float("nan")}, "max_age_h = nan"),
        ({"min_free_gb": float("inf"), "warn_free_gb": float("inf")}, "inf"),
        ({"max_gb": 0.5}, "max_gb = 0.5.*at least 4 files.*max_gb=1.024"),
        ({"protect": ["operater"]}, "protect.*did you mean 'operator'"),
        ({"warn_free_gb": 0.5}, "warn_free_gb = 0.5.*min_free_gb = 1.0"),
        ({"segment_mb": 0}, "segment_mb = 0"),
    ],
)
def test_what_the_buffer_cannot_do_is_refused_with_value_and_rule(changes, said):
    BufferConfig().check()
    with pytest.raises(ConfigError, match=said):
        BufferConfig(**changes).check()


def test_the_limits_of_the_buffer_are_in_the_units_that_their_names_say(tmp_path):
    (tmp_path / "run.yaml").write_text("buffer: {max_gb: 2.5, max_age_h: 48, protect: [demo]}\n")
    config = load_run(tmp_path / "run.yaml", {"buffer": BufferConfig})["buffer"]
    assert config.limits() == Limits(2_500_000_000, 48 * 3600 * 10**9, ("demo",))


def test_tasks_are_read_anew_and_a_broken_file_leaves_the_last_good_one(tmp_path):
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps({"reach": {"instruction": "reach it"}}))
    catalogue = Catalogue(path)
    assert list(catalogue) == ["reach"]
    path.write_text(json.dumps({"reach": {}, "mirror": {}}))
    assert len(catalogue) == 2
    path.write_text("{ half")
    assert dict(catalogue) == {"reach": {}, "mirror": {}}
