"""Who may connect: the ``keys/`` folder of a run, and the credential file that a robot is given.

``keys/`` is the only truth. A robot is enrolled while ``robots/<robot_id>.pub`` is there, and by no other sign:

    server.key            the gateway's CURVE key pair, readable by the owner only
    release.key           the run's Ed25519 key that signs releases, readable by the owner only
    release.pub           its public half
    robots/<robot_id>.pub the CURVE public key of each enrolled robot

CURVE keys are written as Z85 text (40 characters), Ed25519 keys as 64 hexadecimal digits. A robot's secret key
is in its credential file and nowhere else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fleet.errors import IdentityError
from fleet.files import Files
from fleet.spec import ROBOT_ID

_Z85_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_HEX_KEY = re.compile(r"[0-9a-f]{64}")
_ENDPOINT = re.compile(r"tcp://[^\s/]+:[0-9]{1,5}")


@dataclasses.dataclass(frozen=True)
class Credential:
    """What one robot needs to join one run: the content of its credential file.

    Args:
        robot_id: The robot's name in the run.
        endpoint: Where the gateway listens, ``tcp://HOST:PORT``.
        run_id: The run that enrolled the robot.
        server_public: The gateway's CURVE public key.
        public, secret: The robot's own CURVE key pair.
        release_public: The key that signs the run's releases.
    """

    robot_id: str
    endpoint: str
    run_id: str
    server_public: str
    public: str
    secret: str = dataclasses.field(repr=False)
    release_public: str

    def save(self, path: Path, tables: Mapping[str, Any] | None = None) -> None:
        """Writes the file, readable by its owner only; a file of that name is replaced.

        Args:
            tables: Further tables of the file by name, plain data, for example the actor's settings.
        """
        text = "# Credential of one robot. Whoever has this file can act as the robot: do not share it.\n"
        data = {"credential": dataclasses.asdict(self), **(tables or {})}
        _write_private(path, text + yaml.safe_dump(data, sort_keys=False))

    @classmethod
    def load(cls, path: Path) -> Credential:
        """Reads the table ``credential`` of a credential file; other tables are left to their readers.

        Raises:
            IdentityError: The file is missing or unreadable, or a value is not of the form that ``save`` writes.
        """
        remedy = "use the file that `fleet enroll` wrote; or enrol the robot again"
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = str(error).splitlines()[0]
            raise IdentityError(f"credential file {path} cannot be read: {reason}", remedy=remedy) from None
        data = content.get("credential") if isinstance(content, dict) else None
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(data, dict) or sorted(map(str, data)) != sorted(names):
            found = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
            raise IdentityError(f"table 'credential' of {path} is {found}", rule=f"it holds exactly {names}", remedy=remedy)
        for name, form in _FORMS.items():
            value = data[name]
            if not isinstance(value, str) or not form.fullmatch(value):
                shown = "a value" if name == "secret" else repr(value)
                raise IdentityError(f"credential.{name} in {path} is {shown}", rule=f"it matches {form.pattern}", remedy=remedy)
        return cls(**{name: str(data[name]) for name in names})


_FORMS = {
    "robot_id": ROBOT_ID,
    "endpoint": _ENDPOINT,
    "server_public": _Z85_KEY,
    "public": _Z85_KEY,
    "secret": _Z85_KEY,
    "release_public": _HEX_KEY,
}


def create_run_keys(keys: Path) -> None:
    """Makes the keys of a run. Keys that are there already are kept, so that enrolled robots stay enrolled."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from fleet.transport_zmq import curve_keypair

    keys.mkdir(parents=True, exist_ok=True)
    keys.chmod(0o700)
    (keys / "robots").mkdir(exist_ok=True)
    if not (keys / "server.key").exists():
        public, secret = curve_keypair()
        _write_private(keys / "server.key", json.dumps({"public": public, "secret": secret}))
    if not (keys / "release.key").exists():
        _write_private(keys / "release.key", Ed25519PrivateKey.generate().private_bytes_raw().hex())
    # Derived anew each time: a crash between the two files must not leave a public half of another key.
    release = Ed25519PrivateKey.from_private_bytes(_release_secret(keys))
    _write_private(keys / "release.pub", release.public_key().public_bytes_raw().hex())


def server_keys(keys: Path) -> tuple[str, str]:
    """The gateway's CURVE key pair (public, secret).

    Raises:
        IdentityError: The folder has no usable ``server.key``.
    """
    try:
        data: Any = json.loads((keys / "server.key").read_text())
        public, secret = str(data["public"]), str(data["secret"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _no_keys(keys, "server.key", error) from None
    if not _Z85_KEY.fullmatch(public) or not _Z85_KEY.fullmatch(secret):
        raise _no_keys(keys, "server.key", ValueError("not Z85 keys"))
    return public, secret


def enroll(keys: Path, robot_id: str, endpoint: str, run_id: str) -> Credential:
    """Makes a key pair for a robot and writes down its public half; a running gateway takes it at once.

    Args:
        endpoint: The gateway as the robot will reach it, ``tcp://HOST:PORT``.

    Raises:
        IdentityError: The name or the endpoint is out of the rules, or the robot is enrolled already.
    """
    from fleet.transport_zmq import curve_keypair

    if not ROBOT_ID.fullmatch(robot_id):
        raise IdentityError(
            f"robot name {robot_id!r}",
            rule="1 to 32 of a-z, 0-9, '_' and '-', beginning with a letter or digit",
            remedy="choose a name like arm-07",
        )
    if not _ENDPOINT.fullmatch(endpoint):
        raise IdentityError(f"endpoint {endpoint!r}", rule="tcp://HOST:PORT, as the robot reaches the gateway")
    server_public, _ = server_keys(keys)
    try:
        release_public = (keys / "release.pub").read_text().strip()
    except OSError as error:
        raise _no_keys(keys, "release.pub", error) from None
    public, secret = curve_keypair()
    _write_new(_pub_file(keys, robot_id), public)
    return Credential(robot_id, endpoint, run_id, server_public, public, secret, release_public)


def revoke(keys: Path, robot_id: str) -> None:
    """Takes a robot's permission away. A running gateway cuts its connection within a second.

    Raises:
        IdentityError: The robot is not enrolled.
    """
    try:
        _pub_file(keys, robot_id).unlink()
    except FileNotFoundError:
        raise IdentityError(
            f"robot {robot_id!r} is not enrolled", rule="only enrolled robots can be revoked", remedy=f"see {keys / 'robots'}"
        ) from None
    Files().fsync_dir(keys / "robots")


def enrolled(keys: Path) -> dict[str, str]:
    """All enrolled robots: robot_id -> public key."""
    found: dict[str, str] = {}
    folder = keys / "robots"
    for entry in os.scandir(folder) if folder.is_dir() else ():
        robot_id, dot, ending = entry.name.rpartition(".")
        if dot and ending == "pub" and ROBOT_ID.fullmatch(robot_id):
            with contextlib.suppress(FileNotFoundError):  # revoked while we looked
                found[robot_id] = Path(entry.path).read_text(encoding="ascii", errors="replace").strip()
    return found


def public_key_of(keys: Path, robot_id: str) -> str | None:
    """The public key of an enrolled robot, else None."""
    try:
        return _pub_file(keys, robot_id).read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        return None


def robot_of(keys: Path, public_key: str) -> str | None:
    """The robot that enrolled with this public key, else None. Reads the folder anew each time."""
    return next((robot_id for robot_id, key in enrolled(keys).items() if key == public_key), None)


def sign(keys: Path, data: bytes) -> bytes:
    """Ed25519 signature (64 bytes) of ``data`` by the run's release key.

    Raises:
        IdentityError: The folder has no usable ``release.key``.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(_release_secret(keys)).sign(data)


def verify(release_public: str | bytes, data: bytes, signature: bytes) -> bool:
    """Whether ``signature`` is that of the owner of ``release_public`` (64 hex digits) over ``data``.

    Raises:
        IdentityError: ``release_public`` is not a key.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    text = release_public.decode("ascii", "replace") if isinstance(release_public, bytes) else release_public
    if not _HEX_KEY.fullmatch(text):
        raise IdentityError(
            f"release key {text[:80]!r}", rule="64 hexadecimal digits", remedy="use the credential file unchanged"
        )
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(text)).verify(signature, data)
    except InvalidSignature:
        return False
    return True


def _pub_file(keys: Path, robot_id: str) -> Path:
    return keys / "robots" / f"{robot_id}.pub"


def _release_secret(keys: Path) -> bytes:
    try:
        text = (keys / "release.key").read_text().strip()
    except OSError as error:
        raise _no_keys(keys, "release.key", error) from None
    if not _HEX_KEY.fullmatch(text):
        raise _no_keys(keys, "release.key", ValueError("not an Ed25519 key"))
    return bytes.fromhex(text)


def _no_keys(keys: Path, name: str, error: Exception) -> IdentityError:
    return IdentityError(
        f"{keys / name} cannot be used: {error}",
        rule="a run's keys folder holds server.key, release.key and release.pub",
        remedy="name the folder of a run that was started once, or restore its keys",
    )


def _write_private(path: Path, text: str) -> None:
    part = _part(path, text)
    os.replace(part, path)
    Files().fsync_dir(path.parent)


def _write_new(path: Path, text: str) -> None:
    part = _part(path, text)
    try:
        os.link(part, path)  # unlike a rename it fails when somebody was first
    except FileExistsError:
        raise IdentityError(
            f"robot {path.stem!r} is enrolled already",
            rule="one key a robot",
            remedy=f"use its credential file, or revoke it first: `fleet revoke {path.stem}`",
        ) from None
    finally:
        part.unlink()
    Files().fsync_dir(path.parent)


def _part(path: Path, text: str) -> Path:
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return part
