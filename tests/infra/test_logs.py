import threading

from fleet.runfolder import RunFolder
from infra.logs import last_and_new, log_files
from tests.command_line import fleet


def follow(path, num=50):
    """Starts following; returns (what was seen so far, a function that ends it)."""
    seen, stop = [], threading.Event()

    def work():
        seen.extend(last_and_new(path, num, follow=True, stop=stop.is_set))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def end():
        stop.set()
        thread.join(5)
        return b"".join(seen).decode()

    return end


def test_the_last_lines_of_a_long_log(tmp_path):
    path = tmp_path / "gateway.log"
    path.write_text("".join(f"line {i}\n" for i in range(30_000)) + "no newline yet")
    assert b"".join(last_and_new(path, 3, follow=False)) == b"line 29998\nline 29999\nno newline yet"
    assert b"".join(last_and_new(path, 0, follow=False)) == b""
    assert len(b"".join(last_and_new(path, 10**9, follow=False))) == path.stat().st_size


def wait_a_little():
    threading.Event().wait(0.6)


def test_following_goes_on_when_the_file_comes_later_is_made_anew_or_cut(tmp_path):
    path = tmp_path / "driver.log"
    end = follow(path)
    wait_a_little()
    path.write_text("first\n")
    wait_a_little()
    with path.open("a") as file:
        file.write("added\n")
    wait_a_little()
    path.unlink()
    path.write_text("anew\n")
    wait_a_little()
    path.write_text("cut\n")
    wait_a_little()
    assert end() == "first\nadded\nanew\ncut\n"


def test_logs_are_listed_with_sizes_and_an_unknown_one_is_named(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    (run.logs / "gateway.log").write_text("a\nb\n")
    (run.logs / "learner-rank0.log").write_text("c\n")
    (run.logs / "learner.jsonl").write_text("{}\n")
    assert sorted(log_files(run)) == ["gateway", "learner-rank0", "learner.jsonl"]
    listed, shown, wrong = (fleet("logs", run.path, *more) for more in ((), ("gateway", "-n", 1), ("gatewy",)))
    assert "learner-rank0" in listed.communicate(timeout=30)[0]
    assert shown.communicate(timeout=30)[0] == "b\n"
    said = wrong.communicate(timeout=30)[0]
    assert wrong.returncode == 2 and "gateway" in said
