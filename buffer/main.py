"""The shard process: the gateway in front of one buffer shard. ``python -m buffer.main RUN_FOLDER``.

Started and restarted by the supervisor. All that it needs is on disk: run.yaml, keys/, tasks.json, releases/, buffer/.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from fleet.config import load_run
from fleet.errors import ConfigError, FleetError, PolicyError
from fleet.runfolder import RunFolder
from fleet.spec import RobotSpec

log = logging.getLogger("fleet.gateway")


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


def accepts_policy(newest_policy: dict[str, Any] | None, spec: RobotSpec) -> None:
    """Refuses a robot that the newest release's policy cannot drive.

    Raises:
        PolicyError: Names both sides.
    """
    if newest_policy is None:
        return
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
