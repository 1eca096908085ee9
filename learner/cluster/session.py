"""The Ray that this process belongs to: started or joined, with its token, and watched.

Who calls Ray when its own servers are gone hangs, for a minute or for ever. So a thread knocks at their ports, and ends
this process within seconds when nothing answers; whoever started it starts it again. Ray's servers started here, and all
that Ray placed, end with this process.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import importlib
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayError

from fleet.errors import LearnerError
from learner.placement import Node

log = logging.getLogger("fleet.cluster")
RAY_IS_GONE = 70  # exit code of a process that lost its Ray
_OBJECT_STORE_BYTES = 100 * 1024 * 1024  # nothing of size goes through Ray
_WATCH_S, _MISSED, _ANSWER_S, _SHUTDOWN_S = 0.5, 3, 2.0, 20.0
_raylet: Any = importlib.import_module("ray._raylet")
_watch: threading.Event | None = None


def start_ray(
    address: str = "", token: Path | None = None, *, num_cpus: int | None = None, lost: Callable[[str], None] | None = None
) -> None:
    """Joins the Ray cluster at ``address``, or starts a quiet one on this machine that ends with this process.

    Call it on a thread that lives as long as the process: the system ends Ray's servers with the thread that made them.

    Connections need Ray's token unless RAY_AUTH_MODE is set to disabled. A cluster's token is read from RAY_AUTH_TOKEN,
    the file RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token.

    Args:
        address: HOST:PORT of a cluster of which this machine is a node, or "auto"; empty for a Ray of our own.
        token: File with the token of a Ray of our own, made if it is missing. None: where Ray itself keeps it.
        num_cpus: Of a Ray of our own; default: what the machine has.
        lost: Called on another thread with what is gone when Ray died. Default: ends this process with code 70.

    Raises:
        LearnerError: No cluster answers at ``address``, it refuses the token, or there is none.
    """
    global _watch
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if not address and token is not None and os.environ["RAY_AUTH_MODE"] == "token":
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(_token_file(token))
    _read_environment_again()
    # Workers must find these packages also when they are not installed but lie beside this file.
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": False,
        "runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}},
    }
    with _own_signal_handlers():
        if address:
            _join(address, options)
        else:
            _start(num_cpus, options)
    stop = _watch = threading.Event()
    atexit.register(stop.set)  # Ray's servers end at the end of this process, before its threads
    threading.Thread(target=_knock, args=(stop, _servers(), lost or _end), name="ray-watch", daemon=True).start()


def stop_ray() -> None:
    """Leaves the cluster; a local one ends. Where Ray died in this moment, this process ends with code 70."""
    global _watch
    if _watch is not None:
        _watch.set()
        _watch = None
    patience = threading.Timer(_SHUTDOWN_S, _end, ["Ray, which does not let go,"])
    patience.daemon = True
    patience.start()
    ray.shutdown()
    patience.cancel()


def nodes() -> list[Node]:
    """The nodes that are there and answer, this one first, then by name.

    Ray itself notices a lost node after 15 seconds or more; one whose port is closed is left out at once.
    """
    here = ray.get_runtime_context().get_node_id()
    rows = [row for row in ray.nodes() if row["Alive"]]
    with concurrent.futures.ThreadPoolExecutor(min(len(rows), 32) or 1) as pool:
        answers = list(pool.map(lambda row: answers_at(row["NodeManagerAddress"], row["NodeManagerPort"]), rows))
    found = [_node(row, row["NodeID"] == here) for row, answer in zip(rows, answers, strict=True) if answer]
    return sorted(found, key=lambda node: (not node.here, node.name, node.id))


def answers_at(host: str, port: int) -> bool:
    """Whether something listens there."""
    try:
        socket.create_connection((host, port), timeout=_ANSWER_S).close()
    except OSError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """The first line of an error's text; Ray's go on for a screen."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _node(row: dict[str, Any], here: bool) -> Node:
    resources = row["Resources"]
    robots = sorted(name.removeprefix("robot:") for name in resources if name.startswith("robot:"))
    cpus, gpus = float(resources.get("CPU", 0)), float(resources.get("GPU", 0))
    return Node(row["NodeID"], row["NodeName"], row["NodeManagerAddress"], cpus, gpus, here, tuple(robots))


def _token_file(path: Path) -> Path:
    """The file, with a token for its owner alone."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    if not path.read_text().strip():
        raise LearnerError(
            f"{path} is empty", rule="it holds the token of this run's Ray", remedy="delete it; a new one is made"
        )
    return path


def _read_environment_again() -> None:
    """Ray reads mode and token once, when it is loaded; a process that loaded it earlier would not see them."""
    _raylet.Config.initialize("")
    _tokens().reset_cache()


def _tokens() -> Any:
    return _raylet.AuthenticationTokenLoader.instance()


def _start(num_cpus: int | None, options: dict[str, Any]) -> None:
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            **options,
        )
    except (RayError, OSError, RuntimeError, ValueError) as error:
        raise LearnerError(
            f"Ray does not start: {first_line(error)}", remedy="look into /tmp/ray/session_latest/logs"
        ) from None


def _join(address: str, options: dict[str, Any]) -> None:
    from ray._private.services import canonicalize_bootstrap_address

    start_one = "start one with `ray start --head`, or leave --address out"
    if "://" in address:
        raise LearnerError(
            f"Ray's address is {address!r}", rule="HOST:PORT of a cluster of which this machine is a node", remedy=start_one
        )
    try:
        found = canonicalize_bootstrap_address(address)
        host, _, port = (found or "").rpartition(":")
        if not port.isdigit() or not answers_at(host.strip("[]"), int(port)):
            raise LearnerError(f"no Ray cluster answers at {found or address!r}", remedy=start_one)
        if os.environ["RAY_AUTH_MODE"] == "token" and not _tokens().has_token(ignore_auth_mode=True):
            raise _refused(address, "has no token")  # Ray would end the process
        _raylet.GcsClient(address=found)  # ray.init would try for 20 s and not say why
        ray.init(address=found, **options)
    except AuthenticationError:
        raise _refused(address, "has another one" if os.environ["RAY_AUTH_MODE"] == "token" else "sends none") from None
    except (RayError, OSError, RuntimeError, ValueError) as error:
        raise LearnerError(
            f"the Ray cluster at {address} cannot be joined: {first_line(error)}",
            rule="this machine is a node of the cluster, with the same Ray and Python",
            remedy=f"`ray start --address {address}` here, or {start_one}",
        ) from None


def _refused(address: str, own: str) -> LearnerError:
    return LearnerError(
        f"the Ray cluster at {address} wants a token, and this process {own}",
        rule="RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token holds the cluster's token",
        remedy="copy that file from the head node; only a cluster without tokens is joined with RAY_AUTH_MODE=disabled",
    )


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Keeps ours: Ray sets its own, which would end this process without a checkpoint."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _servers() -> list[tuple[str, str, int]]:
    """(what, host, port) of the servers without which calls into Ray hang."""
    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    here = next(row for row in ray.nodes() if row["NodeID"] == context.get_node_id())
    return [
        ("Ray's control server (gcs_server)", host.strip("[]"), int(port)),
        ("Ray's server of this node (raylet)", here["NodeManagerAddress"], here["NodeManagerPort"]),
    ]


def _knock(stop: threading.Event, servers: Sequence[tuple[str, str, int]], lost: Callable[[str], None]) -> None:
    missed = dict.fromkeys(servers, 0)
    while not stop.wait(_WATCH_S):
        for server in servers:
            what, host, port = server
            missed[server] = 0 if answers_at(host, port) else missed[server] + 1
            if missed[server] >= _MISSED and not stop.is_set():
                lost(f"{what} at {host}:{port}")
                return


def _end(what: str) -> None:
    log.critical("%s is gone: this process ends, and what Ray placed for it with it", what)
    logging.shutdown()
    os._exit(RAY_IS_GONE)
