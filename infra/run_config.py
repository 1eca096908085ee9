"""A run file: one YAML, a table per process. Which tables there are, and how the whole file is checked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from actors.config import TABLES as ACTOR_TABLES
from actors.records import MAX_HORIZON
from buffer.main import BufferConfig, GatewayConfig
from fleet.config import load_run
from fleet.errors import ConfigError, RunFolderError
from fleet.files import Files
from fleet.lookup import resolve
from fleet.runfolder import RunFolder
from fleet.server.registry import RegistryConfig
from infra.evaluator import EvaluatorConfig


@dataclasses.dataclass
class RunConfig:
    tasks: dict[str, str] = dataclasses.field(default_factory=dict)
    """Instruction by task name."""
    instruction_encoder: str = "hashed"
    """Turns instructions into embeddings, once: a key of ``algorithms.instruction.ENCODERS``, or module:function."""
    shared: str = ""
    """Folder that all nodes of the cluster mount at the same place, a path or a file:// URI: what all of them need (keys,
    releases, checkpoints) lies in a folder of the run's name in it. Empty: the run has one node."""

    def check(self) -> None:
        if not self.tasks:
            raise ConfigError(
                "tasks is empty", rule="a run has at least one task", remedy="run: {tasks: {reach: reach the target}}"
            )
        self.shared_path()

    def shared_path(self) -> Path | None:
        """The folder that all nodes mount; None where the run has one node. ConfigError when it cannot be a path."""
        scheme, separator, rest = self.shared.partition("://")
        if separator and (scheme != "file" or not rest.startswith("/")):
            raise ConfigError(
                f"shared = {self.shared!r}",
                rule="a path or file:///PATH that all nodes mount; other file systems are not supported yet",
                remedy="mount it (NFS, a FUSE driver of the object store) and name the folder",
            )
        path = rest if separator else self.shared
        return Path(path).expanduser().absolute() if path else None


PROCESS_TABLES: dict[str, type] = {
    "run": RunConfig,
    "gateway": GatewayConfig,
    "buffer": BufferConfig,
    "registry": RegistryConfig,
    "evaluator": EvaluatorConfig,
    **ACTOR_TABLES,
}


def load_tables(path: Path, overrides: list[str]) -> dict[str, Any]:
    """All tables of a run file, checked.

    Raises:
        ConfigError: With file, key, value, rule and the nearest known key.
    """
    tables = load_plain_tables(path, overrides)  # under a second: wrong files are told before torch is loaded
    from learner.main import check_learner_tables

    check_learner_tables(tables)
    check_horizon(tables)
    return tables


def load_plain_tables(path: Path, overrides: list[str]) -> dict[str, Any]:
    """The same without what only the classes of policy and algorithm know, for who must not load torch.

    Raises:
        ConfigError: As ``load_tables``.
    """
    from learner.main import LEARNER_TABLES

    tables = load_run(path, {**PROCESS_TABLES, **LEARNER_TABLES}, overrides)
    check_cluster(tables)
    return tables


def check_cluster(tables: dict[str, Any]) -> None:
    """Raises ConfigError where tables do not go together: for nodes, ranks and the engine, known before anything starts."""
    nodes, engine, ranks = tables["cluster"].nodes, tables["engine"], tables["cluster"].ranks
    advertise, shared = tables["gateway"].advertise, tables["run"].shared
    rules = [
        (
            len(nodes) > 1 and not shared,
            f"cluster.nodes = {nodes}, and run.shared is empty",
            "nodes share keys, releases and checkpoints in a folder that all of them mount",
            "run.shared=/mnt/fleet, or one node",
        ),
        (
            bool(advertise and (len(nodes) > 1 or shared)),
            f"gateway.advertise = {advertise!r} in a run of several nodes",
            "each node has a gateway at its own address",
            "leave it empty, and give `fleet enroll` an --endpoint where robots see another address",
        ),
        (
            engine.name == "torch" and (ranks > 1 or len(nodes) > 1),
            f"engine.name = 'torch' with cluster.ranks = {ranks}, cluster.nodes = {nodes}",
            "torch trains with one rank",
            "engine.name=ddp or deepspeed",
        ),
        (
            engine.name != "deepspeed" and engine.zero_stage != type(engine).zero_stage,
            f"engine.zero_stage = {engine.zero_stage} with engine.name = {engine.name!r}",
            "ZeRO is deepspeed's",
            "engine.name=deepspeed",
        ),
    ]
    for broken, what, rule, remedy in rules:
        if broken:
            raise ConfigError(what, rule=rule, remedy=remedy)


def check_horizon(tables: dict[str, Any]) -> None:
    """Raises ConfigError where robots would refuse every release, because its chunks are too short or too long for them."""
    from algorithms.policies.registry import FAMILIES
    from learner.main import DEFAULT_FAMILY

    policy, execute = tables["policy"], tables["actor"].execute
    family = resolve(FAMILIES, policy.family or DEFAULT_FAMILY, kind="policy.family", error=ConfigError)
    default = None if policy.pretrained else getattr(family.Config, "horizon", None)
    horizon = policy.config.get("horizon", default)
    if horizon is not None and not execute <= horizon <= MAX_HORIZON:
        raise ConfigError(
            f"policy.config.horizon = {horizon} with actor.execute = {execute}",
            rule=f"a chunk has at least the actions that are executed of it, and at most {MAX_HORIZON}",
            remedy="set actor.execute to at most the horizon",
        )


def check_run_file(path: Path, overrides: list[str]) -> list[str]:
    """What `fleet config check` prints: one line a table. It looks at what a new run would take from elsewhere, too."""
    from algorithms.instruction import encode

    tables = load_tables(path, overrides)
    if not RunFolder(path.parent).mark.exists():
        settle_pretrained(tables)
    for text in tables["run"].tasks.values():
        encode(text, tables["run"].instruction_encoder)
    return [f"{path}: ok", *(f"  {name}: {table}" for name, table in tables.items())]


def settle_pretrained(tables: dict[str, Any]) -> dict[str, Any]:
    """For a new run that begins with a policy from elsewhere: the tables, with a place that processes in other folders
    understand, and that says the same later. A run that goes on needs it no more.

    Raises:
        FleetError: There is no such policy, or the run file says something else of its family or settings.
    """
    policy = tables["policy"]
    if not policy.pretrained:
        return tables
    from learner.pretrained import check_pretrained, settled

    check_pretrained(policy)
    return tables | {"policy": dataclasses.replace(policy, pretrained=settled(policy.pretrained))}


def write_catalogue(run: RunFolder, config: RunConfig) -> dict[str, Any]:
    """Computes each task's instruction embedding once and writes tasks.json, which the gateway sends to robots. What
    was added to tasks.json while the run lived stays.

    Raises:
        RunFolderError: tasks.json cannot be read.
        ConfigError: An embedding in there is by another encoder, or of another size.
        PolicyError: The encoder cannot be used.
    """
    from algorithms.instruction import encode

    path, encoder = run.path / "tasks.json", config.instruction_encoder
    try:
        tasks: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise RunFolderError(f"{path} is no JSON: {error}", remedy="mend it, or delete it: the run file's tasks stay") from None
    for task, entry in tasks.items():
        if entry.get("encoder", encoder) != encoder:
            raise ConfigError(
                f"run.instruction_encoder = {encoder!r}, but task {task!r} was encoded by {entry['encoder']!r}",
                rule="a policy knows the embeddings that it was trained with",
                remedy="put the setting back, or start a new run",
            )
    for task, text in config.tasks.items():
        if task not in tasks:
            embedding = [float(x) for x in encode(text, encoder)]
            tasks[task] = {"instruction": text, "embedding": embedding, "encoder": encoder}
    _require_one_size(tasks)
    Files().write_atomic(path.resolve(), json.dumps(tasks, indent=1).encode())  # the gateway may be reading it
    return tasks


def _require_one_size(tasks: dict[str, Any]) -> None:
    sizes = {task: len(entry["embedding"]) for task, entry in tasks.items()}
    if len(set(sizes.values())) > 1:
        raise ConfigError(
            f"tasks have instruction embeddings of several sizes: {sizes}",
            rule="one encoder encodes all tasks of a run",
            remedy="mend tasks.json: what was added by hand must be encoded by run.instruction_encoder",
        )
