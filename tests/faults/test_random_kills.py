"""Kill after kill, of whoever chance names, in one run."""

import random

import pytest

from infra.up import DRIVER
from tests.faults.toy_run import ToyRun, show

SEED = 4


@pytest.mark.timeout(1500)
def test_random_kills(tmp_path, scale, capsys):
    num, chance = (20 if scale >= 10 else 3), random.Random(SEED)
    run = ToyRun(tmp_path)
    try:
        run.start()
        victims = ["rank", DRIVER, "raylet", "gateway", "registry", *(child.name for child in run.robots)]
        recoveries = []
        for _ in range(num):
            recoveries.append(run.kill(chance.choice(victims), timeout_s=120))
            run.until(lambda: True, 1)
        assert run.local.failure is None
        assert max(recovery.steps_lost for recovery in recoveries) <= 100
        run.check_that_nothing_was_lost()
        show(recoveries, capsys)
    finally:
        run.local.stop()
