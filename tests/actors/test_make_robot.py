import sys

import pytest

from actors.operators import make_operator
from actors.operators.scripted import ScriptedOperator
from actors.robots import make_robot
from actors.robots.toy import ToyRobot
from fleet.errors import RobotError


def test_by_name_and_by_path():
    assert isinstance(make_robot("toy", max_steps=10), ToyRobot)
    assert isinstance(make_robot("actors.robots.toy:ToyRobot"), ToyRobot)
    assert isinstance(make_operator("scripted", expert="toy"), ScriptedOperator)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: make_robot("metawrld"), "did you mean 'metaworld'"),
        (lambda: make_robot("toy", max_step=3), "did you mean 'max_steps'"),
        (lambda: make_robot("gym"), "setting 'env' of robot adapter 'gym' is missing"),
        (lambda: make_robot("actors.robots.toy:Nothing"), "has no 'Nothing'"),
        (lambda: make_robot("no_such_package:Robot"), "no_such_package"),
        (lambda: make_operator("script", expert="toy"), "did you mean 'scripted'"),
        (lambda: make_operator("scripted", expert="to"), "did you mean 'toy'"),
        (lambda: make_operator("scripted"), "setting 'expert'"),
    ],
)
def test_mistakes_are_named_with_the_nearest_known_name(call, said):
    with pytest.raises(RobotError) as caught:
        call()
    assert said in str(caught.value)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.delitem(sys.modules, "actors.robots.gym", raising=False)
    with pytest.raises(RobotError) as caught:
        make_robot("gym", env="Pendulum-v1")
    assert "gymnasium" in str(caught.value) and "fleet-rl[sim]" in str(caught.value)
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(RobotError, match=r"fleet-rl\[sim\]"):
        make_robot("metaworld")
