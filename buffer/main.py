"""The shard process: the gateway in front of one buffer shard. ``python -m buffer.main RUN_FOLDER``.

Started and restarted by the supervisor. All that it needs is on disk: run.yaml, keys/, tasks.json, releases/, buffer/.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleet.config import load_run
from fleet.errors import ConfigError, FleetError, PolicyError
from fleet.files import Files
from fleet.lookup import nearest
from fleet.runfolder import RunFolder
from fleet.spec import RobotSpec

if TYPE_CHECKING:
    from buffer.retention import Limits

log = logging.getLogger("fleet.gateway")
KEPT_BYTES = 256 * 1024 * 1024  # freed memory that stays with the process


@dataclasses.dataclass
class GatewayConfig:
    bind: str = "tcp://127.0.0.1:7447"
    """Where robots dial in. tcp://0.0.0.0:7447 for robots on other hosts; port 0: any free one, kept for later starts."""
    advertise: str = ""
    """Address written into credential files, where it differs from bind (behind NAT, a host name)."""
    metrics_port: int = 0
    """Prometheus endpoint on loopback; 0: any free one, see gateway.json."""
    commit_ms: float = 2.0
    """Longest wait for more fragments before a group is fsynced."""

    def check(self) -> None:
        if not self.bind.startswith("tcp://") or not self.bind.rpartition(":")[2].isdigit():
            raise ConfigError(f"bind = {self.bind!r}", rule="tcp://HOST:PORT", remedy="for example tcp://0.0.0.0:7447")


@dataclasses.dataclass
class BufferConfig:
    max_gb: float = 0.0
    """The oldest data is given up when the buffer grows beyond this; 0: no limit."""
    max_age_h: float = 0.0
    """Data received longer ago is given up; 0: no limit."""
    protect: list[str] = dataclasses.field(default_factory=lambda: ["demo", "operator"])
    """Whole episodes with a step of these sources are kept whatever the limits say: demo, operator, policy, script."""
    grace_s: float = 60.0
    """Between the decision to give data up and the deletion of its files; readers need a part of it to notice."""
    warn_free_gb: float = 5.0
    """With less room on the disk the gateway warns."""
    min_free_gb: float = 1.0
    """With less room on the disk nothing more is stored: robots keep their data until there is room again."""
    segment_mb: int = 256
    """Size of one file of the log."""

    def check(self) -> None:
        from fleet.robot import SOURCE_NAMES

        for name in ("max_gb", "max_age_h", "grace_s", "warn_free_gb", "min_free_gb"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} = {getattr(self, name)}", rule="a finite number, 0 or more")
        if not 1 <= self.segment_mb <= 4096:
            raise ConfigError(f"segment_mb = {self.segment_mb}", rule="1 to 4096")
        for source in self.protect:
            if source not in SOURCE_NAMES:
                raise ConfigError(
                    f"protect = {self.protect}",
                    rule=f"sources of {SOURCE_NAMES}",
                    remedy=nearest(source, SOURCE_NAMES),
                )
        if 0 < self.max_gb * 1000 < 4 * self.segment_mb:
            raise ConfigError(
                f"max_gb = {self.max_gb}",
                rule=f"at least 4 files of segment_mb = {self.segment_mb}, because whole files are given up",
                remedy=f"max_gb={4 * self.segment_mb / 1000:g}, or a smaller segment_mb",
            )
        if self.warn_free_gb < self.min_free_gb:
            raise ConfigError(
                f"warn_free_gb = {self.warn_free_gb}",
                rule=f"at least min_free_gb = {self.min_free_gb}: the warning comes first",
            )

    def limits(self) -> Limits:
        from buffer.retention import Limits

        return Limits(int(self.max_gb * 1e9), int(self.max_age_h * 3600e9), tuple(self.protect))


def endpoint_file(run: RunFolder) -> Path:
    """Where the running gateway writes down its address and metrics port."""
    return run.path / "gateway.json"


def bind_address(run: RunFolder, config: GatewayConfig) -> str:
    """The configured address; where it leaves the port open, the port of the last start, so that robots find it again."""
    host, _, port = config.bind.rpartition(":")
    if port == "0" and endpoint_file(run).exists():
        port = json.loads(endpoint_file(run).read_text())["bound"].rpartition(":")[2]
    return f"{host}:{port}"


def advertised(bound: str, config: GatewayConfig) -> str:
    """The address for credential files."""
    if config.advertise:
        return config.advertise
    return bound.replace("0.0.0.0", socket.gethostname())


def accepts_policy(newest_policy: dict[str, Any], spec: RobotSpec) -> None:
    """Refuses a robot that the newest release's policy cannot drive.

    Raises:
        PolicyError: Names both sides.
    """
    reads, action_dim = newest_policy["reads"], newest_policy["action_dim"]
    for name, shape in reads.items():
        feature = spec.features.get(name)
        if feature is None or list(feature.shape) != list(shape):
            raise PolicyError(
                f"robot type {spec.robot_type!r} has {name!r} of shape {feature and feature.shape}",
                rule=f"the run's policy reads {name!r} of shape {tuple(shape)}",
                remedy=f"join a run for this robot type; it has {sorted(spec.features)}",
            )
    if spec.action.shape != (action_dim,):
        raise PolicyError(
            f"robot type {spec.robot_type!r} takes actions of shape {spec.action.shape}",
            rule=f"the run's policy writes actions of shape ({action_dim},)",
            remedy="join a run for this robot type",
        )


def accepts_beside(stored: list[RobotSpec], spec: RobotSpec) -> None:
    """Before there is a policy: refuses a robot whose actions are not those of the data that is there already.

    Raises:
        PolicyError: Names both sides.
    """
    for other in stored:
        if other.action.shape != spec.action.shape:
            raise PolicyError(
                f"robot type {spec.robot_type!r} takes actions of shape {spec.action.shape}",
                rule=f"the run has data of {other.robot_type!r}, whose actions have shape {other.action.shape}",
                remedy="start a run of its own for this robot type",
            )


class Catalogue(Mapping[str, Any]):
    """tasks.json of the run: instruction and embedding by task, read anew when it changes, so that tasks can be edited
    while the run lives."""

    def __init__(self, path: Path) -> None:
        self._path, self._changed_ns = path, -1
        self._tasks: dict[str, Any] = {}

    def _read(self) -> dict[str, Any]:
        """A file that cannot be read leaves the last good one in force."""
        try:
            changed_ns = self._path.stat().st_mtime_ns
            if changed_ns != self._changed_ns:
                self._tasks, self._changed_ns = json.loads(self._path.read_text()), changed_ns
        except (OSError, ValueError) as error:
            log.error("%s cannot be read, the tasks stay as they were: %s", self._path, error)
        return self._tasks

    def __getitem__(self, task: str) -> Any:
        return self._read()[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


def serve(
    run: RunFolder,
    config: GatewayConfig,
    buffer: BufferConfig,
    registry_address: str,
    prefix: str,
    stop: threading.Event,
) -> None:
    """Serves one shard until ``stop`` is set.

    Raises:
        FleetError: The address is taken, another process writes this log, or the disk cannot be used.
    """
    from buffer.ingest import Ingest
    from buffer.keeper import Keeper
    from buffer.log import Log
    from fleet.metrics import GATEWAY, MeteredJournal, Metrics
    from fleet.server.gateway import Gateway
    from fleet.server.membership import Membership
    from fleet.server.registry import Registry
    from fleet.server.releases import ReleaseStore
    from fleet.transport_zmq import ZmqServerLink

    metrics = Metrics(GATEWAY)
    journal = MeteredJournal(run.logs / "gateway.jsonl", metrics)
    releases = ReleaseStore(run.releases)
    shard = Log(run.buffer, segment_bytes=buffer.segment_mb * 1_000_000, min_free_bytes=int(buffer.min_free_gb * 1e9))
    keeper = Keeper(
        run.buffer,
        buffer.limits(),
        grace_s=buffer.grace_s,
        warn_free_bytes=int(buffer.warn_free_gb * 1e9),
        journal=journal,
        metrics=metrics,
    )
    link = ZmqServerLink(bind_address(run, config), run.keys)
    registry = Registry(registry_address, prefix)

    def accepts(spec: RobotSpec) -> None:
        newest = releases.newest()
        if newest is None:
            accepts_beside(shard.specs(), spec)
        else:
            accepts_policy(dict(releases.manifest(newest).policy["spec"]), spec)

    gateway = Gateway(
        link,
        run_id=run.run_id,
        tasks=Catalogue(run.path / "tasks.json"),
        settings={},
        ingest=Ingest(shard, journal),
        releases=releases,
        membership=Membership(),
        accepts=accepts,
        journal=journal,
        metrics=metrics,
        view=registry,
        commit_s=config.commit_ms / 1000,
    )
    link.on_malformed = gateway.count_malformed
    port = metrics.serve(config.metrics_port)
    facts = {"endpoint": advertised(link.endpoint, config), "bound": link.endpoint, "metrics_port": port}
    Files().write_atomic(endpoint_file(run), json.dumps(facts).encode())
    keeper.start()
    try:
        gateway.run(stop)
    finally:
        link.close()
        keeper.close()
        shard.close()
        registry.close()


def main() -> None:
    from fleet.memory import keep_freed_memory
    from fleet.server.registry import RegistryConfig, registry_url

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    keep_freed_memory(KEPT_BYTES)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, frame: stop.set())
    try:
        run = RunFolder.open(Path(sys.argv[1]))
        tables = load_run(run.config, {"gateway": GatewayConfig, "buffer": BufferConfig, "registry": RegistryConfig})
        serve(run, tables["gateway"], tables["buffer"], registry_url(run.registry, run.config), tables["registry"].prefix, stop)
    except FleetError as error:
        log.error("%s", error)
        sys.exit(2)


if __name__ == "__main__":
    main()
