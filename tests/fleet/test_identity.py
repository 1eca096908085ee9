"""Who may connect: the keys folder, credential files, signatures."""

import dataclasses
import os
import threading

import pytest
import yaml

from fleet.errors import IdentityError
from fleet.identity import Credential, create_run_keys, enroll, enrolled, revoke, robot_of, server_keys, sign, verify

ENDPOINT = "tcp://127.0.0.1:7447"


@pytest.fixture
def keys(tmp_path):
    create_run_keys(tmp_path / "keys")
    return tmp_path / "keys"


def test_credential_survives_its_file(keys, tmp_path):
    credential = enroll(keys, "arm-07", ENDPOINT, "run-1")
    path = tmp_path / "arm-07.yaml"
    credential.save(path, {"robot": {"adapter": "toy"}})
    assert Credential.load(path) == credential
    assert yaml.safe_load(path.read_text())["robot"] == {"adapter": "toy"}
    assert path.stat().st_mode & 0o777 == 0o600
    assert credential.secret not in repr(credential)
    assert credential.server_public == server_keys(keys)[0]


def test_secrets_are_for_the_owner_and_the_run_keeps_no_robot_secret(keys):
    credential = enroll(keys, "arm-07", ENDPOINT, "run-1")
    assert keys.stat().st_mode & 0o077 == 0
    for name in ("server.key", "release.key"):
        assert (keys / name).stat().st_mode & 0o777 == 0o600
    for path in keys.rglob("*"):
        assert path.is_dir() or credential.secret not in path.read_text()


def test_keys_of_a_run_are_made_once(keys):
    before = {path: path.read_text() for path in keys.iterdir() if path.is_file()}
    create_run_keys(keys)
    assert {path: path.read_text() for path in keys.iterdir() if path.is_file()} == before


def test_robot_is_found_by_its_key_until_revoked(keys):
    first, second = (enroll(keys, name, ENDPOINT, "run-1") for name in ("arm-1", "arm-2"))
    assert robot_of(keys, first.public) == "arm-1" and robot_of(keys, second.public) == "arm-2"
    revoke(keys, "arm-1")
    assert robot_of(keys, first.public) is None
    assert enrolled(keys) == {"arm-2": second.public}
    again = enroll(keys, "arm-1", ENDPOINT, "run-1")
    assert again.public != first.public and robot_of(keys, again.public) == "arm-1"


def test_second_enrolment_is_refused_and_changes_nothing(keys):
    first = enroll(keys, "arm-1", ENDPOINT, "run-1")
    with pytest.raises(IdentityError, match=r"enrolled already.*revoke"):
        enroll(keys, "arm-1", ENDPOINT, "run-1")
    assert enrolled(keys) == {"arm-1": first.public}
    assert os.listdir(keys / "robots") == ["arm-1.pub"]


def test_of_many_enrolments_at_once_one_wins(keys):
    won, lost = [], []

    def try_it():
        try:
            won.append(enroll(keys, "arm-1", ENDPOINT, "run-1"))
        except IdentityError:
            lost.append(1)

    threads = [threading.Thread(target=try_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(lost) == 7
    assert enrolled(keys) == {"arm-1": won[0].public}


@pytest.mark.parametrize("name", ["", "Arm", "../server", "a" * 33, "-a", "a b", "a.b"])
def test_names_out_of_the_rules_are_refused(keys, name):
    with pytest.raises(IdentityError, match="rule: 1 to 32"):
        enroll(keys, name, ENDPOINT, "run-1")
    assert enrolled(keys) == {}


@pytest.mark.parametrize("endpoint", ["127.0.0.1:7447", "tcp://host", "ipc:///tmp/x", "tcp://a b:1"])
def test_endpoint_must_be_dialable(keys, endpoint):
    with pytest.raises(IdentityError, match="tcp://HOST:PORT"):
        enroll(keys, "arm-1", endpoint, "run-1")


def test_revoking_nobody_says_so(keys):
    with pytest.raises(IdentityError, match="'arm-9' is not enrolled"):
        revoke(keys, "arm-9")


def test_folder_without_keys_says_so(tmp_path):
    with pytest.raises(IdentityError, match=r"server.key cannot be used"):
        enroll(tmp_path, "arm-1", ENDPOINT, "run-1")
    with pytest.raises(IdentityError, match=r"release.key cannot be used"):
        sign(tmp_path, b"data")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.pop("secret"), "holds exactly"),
        (lambda data: data.update(more=1), "holds exactly"),
        (lambda data: data.update(public="short"), "credential.public .* 'short'"),
        (lambda data: data.update(robot_id=7), "credential.robot_id"),
        (lambda data: data.update(endpoint="nowhere"), "credential.endpoint .* 'nowhere'"),
    ],
)
def test_altered_credential_is_refused_by_name(keys, tmp_path, change, words):
    path = tmp_path / "robot.yaml"
    data = dataclasses.asdict(enroll(keys, "arm-1", ENDPOINT, "run-1"))
    change(data)
    path.write_text(yaml.safe_dump({"credential": data}))
    with pytest.raises(IdentityError, match=words):
        Credential.load(path)


@pytest.mark.parametrize("text", ["", "[1, 2]", "credential: 5", "{", "\x00"])
def test_file_that_is_no_credential_is_refused(tmp_path, text):
    path = tmp_path / "robot.yaml"
    path.write_text(text)
    with pytest.raises(IdentityError, match=r"robot.yaml"):
        Credential.load(path)
    with pytest.raises(IdentityError, match="cannot be read"):
        Credential.load(tmp_path / "missing.yaml")


def test_a_bad_secret_is_not_shown(keys, tmp_path):
    path = tmp_path / "robot.yaml"
    data = dataclasses.asdict(enroll(keys, "arm-1", ENDPOINT, "run-1")) | {"secret": "hush hush"}
    path.write_text(yaml.safe_dump({"credential": data}))
    with pytest.raises(IdentityError, match=r"credential\.secret") as caught:
        Credential.load(path)
    assert "hush" not in str(caught.value)


def test_signature_holds_for_the_data_and_the_key_only(keys, tmp_path):
    public = (keys / "release.pub").read_text()
    signature = sign(keys, b"manifest")
    assert len(signature) == 64
    assert verify(public, b"manifest", signature) and verify(public.encode(), b"manifest", signature)
    assert not verify(public, b"manifesT", signature)
    assert not verify(public, b"manifest", bytes(64))
    assert not verify(public, b"manifest", b"")
    create_run_keys(tmp_path / "other")
    assert not verify((tmp_path / "other" / "release.pub").read_text(), b"manifest", signature)
    with pytest.raises(IdentityError, match="release key"):
        verify("not a key", b"manifest", signature)
