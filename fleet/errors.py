"""The one error tree. Every error says what was seen, which rule it broke, and what to do.

An error keeps its three parts as attributes, so that a command line, a log and a refusal on the wire can
each show them in their own way.
"""

from __future__ import annotations

from typing import Any


class FleetError(Exception):
    """Base of all errors that this project raises on purpose.

    Args:
        what: One sentence: the value that was seen, and where.
        rule: The rule that it broke.
        remedy: What the reader can do about it.
    """

    code = "error"

    def __init__(self, what: str, *, rule: str = "", remedy: str = "") -> None:
        self.what, self.rule, self.remedy = what, rule, remedy
        super().__init__(what)

    def __str__(self) -> str:
        parts = [self.what]
        if self.rule:
            parts.append(f"rule: {self.rule}")
        if self.remedy:
            parts.append(f"remedy: {self.remedy}")
        return "; ".join(parts)

    def to_fields(self) -> dict[str, Any]:
        """The parts as plain strings, to be sent in a refusal."""
        return {"code": self.code, "what": self.what, "rule": self.rule, "remedy": self.remedy}


class ConfigError(FleetError):
    """A run file, an override or a credential file says something impossible."""

    code = "config"


class SpecError(FleetError):
    """A RobotSpec or Feature is malformed, or two sides disagree about one."""

    code = "spec"


class ImageError(SpecError):
    """The bytes of a frame are no image of the stated shape."""

    code = "image"


class FragmentRefused(FleetError):
    """A fragment does not follow its spec or its order. It is counted and never kept."""

    code = "fragment_refused"


class ProtocolError(FleetError):
    """A message does not follow the wire contract, or two software versions cannot talk."""

    code = "protocol"


class IdentityError(FleetError):
    """A robot is not enrolled, was revoked, or its credential file cannot be used."""

    code = "identity"


class GatewayUnreachable(FleetError):
    """Nothing answered at the gateway's address. The robot keeps spooling meanwhile."""

    code = "gateway_unreachable"


class PortInUse(FleetError):
    """Another process listens on the address that this one was told to listen on."""

    code = "port_in_use"


class RegistryUnreachable(FleetError):
    """The registry does not answer. It is a view only: ingest and learning go on without it."""

    code = "registry_unreachable"


class StorageError(FleetError):
    """A file of the log, the spool or a run folder cannot be written or read."""

    code = "storage"


class DiskFull(StorageError):
    """No room is left. Nothing that was acknowledged is affected."""

    code = "disk_full"


class RunFolderError(StorageError):
    """A run folder belongs to another project, is locked by another process, or is incomplete."""

    code = "run_folder"


class NoData(FleetError):
    """The sampler has no step that is asked for. Wait for robots, or ask for other sources."""

    code = "no_data"


class DatasetError(FleetError):
    """A dataset of another format cannot be read or written, or does not fit the run."""

    code = "dataset"


class EpisodeError(FleetError):
    """No episode or several answer to a name, or a label says of one what none may say."""

    code = "episode"


class ArchiveError(FleetError):
    """An archive of a run is incomplete, altered, or cannot be reached."""

    code = "archive"


class ReleaseError(FleetError):
    """A release is missing, incomplete, altered, or signed by another key."""

    code = "release"


class PolicyError(FleetError):
    """A policy cannot be built, loaded or used with this robot."""

    code = "policy"


class RobotError(FleetError):
    """A robot or simulator cannot be built, reset or driven."""

    code = "robot"


class LearnerError(FleetError):
    """Training cannot start or go on."""

    code = "learner"


class OutOfMemory(LearnerError):
    """A rank has not enough memory. The remedy names the settings that need less and are not used yet."""

    code = "out_of_memory"
