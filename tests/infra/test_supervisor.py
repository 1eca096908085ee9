import os
import signal
import sys
import time

import pytest

from fleet.errors import FleetError
from infra.supervisor import CRASH_LOOP_ENDS, Child, CrashLoop, Supervisor, end_recorded, last_lines


def python(code, tmp_path, name="child", once=False):
    return Child(name, [sys.executable, "-c", code], tmp_path / f"{name}.log", once=once)


def poll_until(supervisor, condition, timeout_s=10):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        supervisor.poll()
        time.sleep(0.02)


def test_a_killed_child_is_started_again(tmp_path):
    supervisor = Supervisor()
    child = python("import time; time.sleep(60)", tmp_path)
    supervisor.add(child)
    first = child.process.pid
    os.kill(first, signal.SIGKILL)
    poll_until(supervisor, lambda: child.running and child.process.pid != first)
    assert child.num_restarts == 1
    supervisor.stop()
    assert not child.running


def test_a_crash_loop_ends_with_the_childs_last_words(tmp_path):
    supervisor = Supervisor()
    supervisor.add(python("raise SystemExit('no such camera')", tmp_path))
    with pytest.raises(CrashLoop, match="no such camera"):
        poll_until(supervisor, lambda: False, timeout_s=30)


def test_a_crash_loop_of_what_others_can_do_without_ends_nobody(tmp_path):
    supervisor = Supervisor()
    broken, other = python("raise SystemExit(1)", tmp_path), python("import time; time.sleep(60)", tmp_path, name="other")
    broken.optional = True
    supervisor.add(other)
    supervisor.add(broken)
    poll_until(supervisor, lambda: broken.start_at > time.monotonic() + 30, timeout_s=30)
    assert other.running and other.num_restarts == 0
    supervisor.stop()


def test_work_that_ends_by_itself_is_not_started_again(tmp_path):
    supervisor = Supervisor()
    child = python("pass", tmp_path, once=True)
    supervisor.add(child)
    poll_until(supervisor, lambda: child.done)
    assert child.num_restarts == 0


def test_work_that_fails_is_tried_again(tmp_path):
    supervisor = Supervisor()
    code = f"import pathlib, sys; p = pathlib.Path({str(tmp_path / 'tried')!r}); was = p.exists(); p.touch(); sys.exit(not was)"
    child = python(code, tmp_path, once=True)
    supervisor.add(child)
    poll_until(supervisor, lambda: child.done)
    assert child.num_restarts == 1


def test_what_a_dead_supervisor_left_behind_is_ended_first(tmp_path):
    code = "import time; time.sleep(60)"
    first = python(code, tmp_path)
    Supervisor().add(first)  # this supervisor is never asked again, as if it had been killed
    second = python(code, tmp_path)
    supervisor = Supervisor()
    supervisor.add(second)
    assert first.process.wait(5) == -signal.SIGTERM
    assert second.running
    supervisor.stop()


def test_a_pid_that_was_given_to_another_process_is_left_alone(tmp_path):
    other = python("import time; time.sleep(60)", tmp_path, name="other")
    supervisor = Supervisor()
    supervisor.add(other)
    child = python("import time; time.sleep(61)", tmp_path)
    child.pid_file.write_text(f"{other.process.pid} Sat Nov 21 03:43:29 2020")
    supervisor.add(child)
    assert other.running and child.running
    supervisor.stop()


def test_a_child_that_ignores_sigterm_is_killed(tmp_path):
    supervisor = Supervisor()
    child = python("import signal, time; signal.signal(15, signal.SIG_IGN); print('on', flush=True); time.sleep(60)", tmp_path)
    supervisor.add(child)
    poll_until(supervisor, lambda: "on" in last_lines(child.log))
    process = child.process
    supervisor.stop(timeout_s=0.3)
    assert process.returncode == -signal.SIGKILL


def test_what_waits_for_something_is_tried_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("infra.supervisor.LONGEST_PAUSE_S", 0.01)
    supervisor = Supervisor()
    child = python("import sys; sys.exit(4)", tmp_path)
    child.waits = 4
    supervisor.add(child)
    poll_until(supervisor, lambda: child.num_restarts > 2 * CRASH_LOOP_ENDS)
    assert not child.done


def test_a_process_that_the_system_cannot_start_now_ends_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr("infra.supervisor.LONGEST_PAUSE_S", 0.1)
    supervisor = Supervisor()
    child = python("import time; time.sleep(60)", tmp_path)
    supervisor.add(child)
    child.log.unlink()
    child.log.mkdir()  # so it cannot be written, and neither can the pid file
    child.pid_file.unlink()
    child.pid_file.mkdir()
    child.process.kill()
    poll_until(supervisor, lambda: child.num_restarts > 1)
    assert not child.running
    child.log.rmdir()
    poll_until(supervisor, lambda: child.running)
    supervisor.stop()


def test_what_does_not_end_even_when_killed_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("infra.supervisor.KILL_S", 0.2)
    child = python("import time; time.sleep(60)", tmp_path)
    Supervisor().add(child)
    monkeypatch.setattr("infra.supervisor.os.kill", lambda pid, number: None)  # as if it hung in the kernel
    with pytest.raises(FleetError, match=f"process {child.last_pid} .*does not end"):
        end_recorded(child.pid_file, 0.1)
    monkeypatch.undo()
    child.process.kill()
    child.process.wait()
