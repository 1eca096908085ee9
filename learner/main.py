"""The learner's tables in a run file, and the names of algorithms. Loading this needs no torch."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from buffer.rate import RateLimiter
from fleet.errors import ConfigError, PolicyError
from fleet.lookup import check_settings, nearest, resolve
from fleet.spec import STATE

ALGORITHMS = {
    "bc": "algorithms.bc:Bc",
    "hg_dagger": "algorithms.hg_dagger:HgDagger",
    "rlpd": "algorithms.rlpd:Rlpd",
    "recap": "algorithms.recap:Recap",
    "chunked_rl": "algorithms.chunked_rl:ChunkedRl",
}
DEFAULT_FAMILY = "mlp"
FROM_DATA = ("reads", "action_dim", "instruction_dim")  # settings of a policy that are read off robots and tasks if not given


@dataclasses.dataclass
class LearnerConfig:
    steps: int = 8000
    """Updates in all, those of the start included."""
    start_steps: int = 2000
    """Updates of the start, on what is in the buffer when it begins: neither limited nor published before the last one."""
    seed: int = 0
    """Of weights, batches and noise."""
    device: str = "auto"
    """"cpu", "cuda", or "auto": cuda where there is one."""
    publish_every: int = 100
    """Updates between releases."""
    restart_every: int = 0
    """Updates of an iteration: each begins at the run's first release again, with new optimizers and all data so far, and has
    one release, at its end (RECAP). 0: the policy is trained on without end."""
    checkpoint_every: int = 500
    """Updates between checkpoints."""
    keep_checkpoints: int = 3
    """Newest checkpoints that stay."""
    keep_checkpoint_every_h: float = 0.0
    """Of older ones, one in so many hours stays as well; 0: none."""
    stop_within_s: float = 30.0
    """Between SIGTERM and the last checkpoint on disk; who takes longer is killed and goes on from the one before."""
    trace_steps: int = 0
    """Updates of which logs/trace-RANK.json tells where the time went, for ui.perfetto.dev; 0: none."""
    keep_releases: int = 500
    """Newest releases that stay; 0 for all."""
    min_size_to_sample: int = 500
    """Steps in the buffer before anything is trained: the policy's normalisation is fixed from what is there then."""
    samples_per_insert: float = 0.0
    """Windows drawn for each step that came since the start ended, as Reverb counts; 0: as many as the machine makes.
    With batches of 256, 256 is one update for each step."""
    error_buffer: float = 51200.0
    """Windows that the learner may be ahead of that ratio before it waits; robots are never held. 200 batches of 256."""
    prefetch_depth: int = 2
    """Batches that are made ahead of the one that is trained on; 0: each when it is needed."""
    prefetch_workers: int = 1
    """Threads that read and decode them."""
    image_cache_mb: int = 512
    """Memory for decoded images; 0: each is decoded whenever it is drawn."""
    num_threads: int = 1
    """torch's threads on the CPU; 0: torch's own choice."""
    metrics_port: int = 0
    """Prometheus endpoint on loopback; 0: any free one, see learner.json; -1: none."""

    def check(self) -> None:
        """Raises ConfigError when a value is out of its range."""
        rules = {
            "steps": (self.steps >= 1, "steps >= 1"),
            "start_steps": (0 <= self.start_steps <= self.steps, f"0 <= start_steps <= steps = {self.steps}"),
            "device": (self.device in ("auto", "cpu", "cuda"), "one of auto, cpu, cuda"),
            "publish_every": (self.publish_every >= 1, "publish_every >= 1"),
            "restart_every": (
                self.restart_every == 0
                or (self.restart_every > 0 < self.start_steps and (self.steps - self.start_steps) % self.restart_every == 0),
                f"0, or with start_steps >= 1 a divisor of steps - start_steps = {self.steps - self.start_steps}",
            ),
            "checkpoint_every": (self.checkpoint_every >= 1, "checkpoint_every >= 1"),
            "keep_checkpoints": (self.keep_checkpoints >= 2, "keep_checkpoints >= 2, so that one may be damaged"),
            "keep_releases": (self.keep_releases == 0 or self.keep_releases >= 10, "0, or at least 10"),
            "prefetch_depth": (0 <= self.prefetch_depth <= 64, "0 <= prefetch_depth <= 64"),
            "prefetch_workers": (1 <= self.prefetch_workers <= 64, "1 <= prefetch_workers <= 64"),
            "image_cache_mb": (self.image_cache_mb >= 0, "image_cache_mb >= 0"),
            "keep_checkpoint_every_h": (self.keep_checkpoint_every_h >= 0, "keep_checkpoint_every_h >= 0"),
            "stop_within_s": (self.stop_within_s > 0, "stop_within_s > 0"),
            "trace_steps": (0 <= self.trace_steps <= 10_000, "0 <= trace_steps <= 10000"),
            "num_threads": (self.num_threads >= 0, "num_threads >= 0"),
            "metrics_port": (-1 <= self.metrics_port <= 65535, "-1, 0, or a port"),
        }
        for key, (holds, rule) in rules.items():
            if not holds:
                raise ConfigError(f"learner.{key} = {getattr(self, key)!r}", rule=rule)
        try:
            self.rate_limiter()
        except ConfigError as error:
            raise ConfigError(f"learner.{error.what}", rule=error.rule) from None

    def rate_limiter(self) -> RateLimiter:
        """How often it may draw what robots insert."""
        return RateLimiter(self.samples_per_insert, self.min_size_to_sample, self.error_buffer)


ENGINES = ("auto", "torch", "ddp", "deepspeed")


@dataclasses.dataclass
class EngineConfig:
    name: str = "auto"
    """"torch": one rank. "ddp": every rank has all weights. "deepspeed": ZeRO. "auto": torch for one rank, else ddp."""
    zero_stage: int = 1
    """Of deepspeed. What ranks share among them: 0 nothing, 1 optimizer state, 2 gradients as well, 3 weights as well."""
    shard_above: int = 0
    """Parts with fewer parameters are kept whole on every rank (stage 0) whatever ``zero_stage`` says."""
    dtype: str = "float32"
    """"float32", or "bfloat16": forward and backward in bfloat16, averages and optimizer state in float32."""
    micro_batch: int = 0
    """Samples of a rank in one backward pass, gradients are summed over them; 0: all of its samples at once."""
    max_grad_norm: float = 0.0
    """Gradients are scaled down to this norm; 0: never."""
    activation_checkpointing: bool = False
    """Activations are computed again in the backward pass: less memory, about a third more time."""
    offload_optimizer: bool = False
    """Optimizer state lies in the CPU's memory. deepspeed, stages 1 to 3."""
    compile: bool = False
    """Whether each direct child of a trained module goes through torch.compile. Not with stage 3."""

    def check(self) -> None:
        """Raises ConfigError when a value is out of its range or two do not go together."""
        zero = self.name == "deepspeed"
        rules = {
            "name": (self.name in ENGINES, f"one of {', '.join(ENGINES)}", nearest(self.name, ENGINES)),
            "zero_stage": (0 <= self.zero_stage <= 3, "0, 1, 2 or 3", ""),
            "shard_above": (self.shard_above >= 0, "shard_above >= 0", ""),
            "dtype": (self.dtype in ("float32", "bfloat16"), "float32 or bfloat16", ""),
            "micro_batch": (self.micro_batch >= 0, "micro_batch >= 0", ""),
            "max_grad_norm": (self.max_grad_norm >= 0, "max_grad_norm >= 0", ""),
            "offload_optimizer": (
                not self.offload_optimizer or (zero and self.zero_stage >= 1),
                "offloading needs engine.name=deepspeed and engine.zero_stage of 1 to 3",
                "engine.name=deepspeed engine.zero_stage=1",
            ),
            "compile": (
                not (self.compile and zero and self.zero_stage == 3),
                "stage 3 moves weights between layers, which a compiled layer cannot see",
                "engine.zero_stage=2, or engine.compile=false",
            ),
        }
        for key, (holds, rule, remedy) in rules.items():
            if not holds:
                raise ConfigError(f"engine.{key} = {getattr(self, key)!r}", rule=rule, remedy=remedy)


@dataclasses.dataclass
class ClusterConfig:
    ranks: int = 0
    """Processes that train together; 0: one for each GPU of the cluster, where there is none one for each of ``nodes``."""
    min_ranks: int = 1
    """Training goes on with so many when nodes are lost; with fewer it waits for them."""
    cpus_per_rank: float = 1.0
    """CPUs that Ray reserves for a rank."""
    gpus_per_rank: float = -1.0
    """GPUs that Ray reserves for a rank; -1: one where the cluster has any and learner.device is not cpu."""
    nodes: list[str] = dataclasses.field(default_factory=list)
    """Names of the nodes that train, each with a gateway and a shard of the buffer; empty: as many as ``ranks`` need, this
    node first. A node's name is Ray's, by default its address."""
    node_folder: str = ""
    """Where a node other than the first keeps its part of the run, {node} stands for its name, {run} for the run's;
    empty: ~/.fleet-rl/{run}-{node}."""
    rank_timeout_s: float = 120.0
    """A rank that does not answer the others for so long is taken for dead. At the start, reading the log and a checkpoint may
    take longer."""
    simulators: int = 0
    """Simulated robots that Ray spreads over the cluster."""

    def check(self) -> None:
        """Raises ConfigError when a value is out of its range."""
        rules = {
            "ranks": (0 <= self.ranks <= 4096, "0 <= ranks <= 4096"),
            "min_ranks": (
                self.min_ranks >= 1 and (not self.ranks or self.min_ranks <= self.ranks),
                f"1 <= min_ranks <= ranks = {self.ranks}",
            ),
            "cpus_per_rank": (self.cpus_per_rank >= 0, "cpus_per_rank >= 0"),
            "gpus_per_rank": (self.gpus_per_rank == -1 or self.gpus_per_rank >= 0, "-1, or gpus_per_rank >= 0"),
            "rank_timeout_s": (self.rank_timeout_s >= 1, "rank_timeout_s >= 1"),
            "simulators": (self.simulators >= 0, "simulators >= 0"),
        }
        for key, (holds, rule) in rules.items():
            if not holds:
                raise ConfigError(f"cluster.{key} = {getattr(self, key)!r}", rule=rule)


@dataclasses.dataclass
class PolicyConfig:
    family: str = ""
    """A key of ``algorithms.policies.registry.FAMILIES``, or module:Class; empty: that of ``pretrained``, else mlp."""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the family's Config. What robots read and act with is taken from their spec where it is not given; ``reads``
    may be a list of names."""
    pretrained: str = ""
    """What to begin with: another run's folder (its newest release), RUN@VERSION, or a folder that `fleet policy export`
    wrote; with family=lerobot also a LeRobot checkpoint. Empty: fresh weights."""
    statistics: str = "keep"
    """Normalisation of a pretrained policy: keep it, or "fit" it to this run's data. A fresh policy is always fitted."""

    def check(self) -> None:
        """Raises ConfigError when a value is out of its range."""
        if self.statistics not in ("keep", "fit"):
            raise ConfigError(f"policy.statistics = {self.statistics!r}", rule="keep or fit")


@dataclasses.dataclass
class AlgorithmConfig:
    name: str = "hg_dagger"
    """A key of ``ALGORITHMS``, or module:Class."""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the algorithm's Config."""


@dataclasses.dataclass
class StartConfig:
    name: str = ""
    """Algorithm of the first ``learner.start_steps`` updates, for example bc; empty: the run's algorithm from the first one."""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of its Config."""


LEARNER_TABLES: dict[str, type] = {
    "learner": LearnerConfig,
    "engine": EngineConfig,
    "cluster": ClusterConfig,
    "policy": PolicyConfig,
    "algorithm": AlgorithmConfig,
    "start": StartConfig,
}


def check_learner_tables(tables: Mapping[str, Any]) -> None:
    """Checks what only the classes themselves know: names, settings and their types. Loads torch.

    Raises:
        ConfigError: Names table, key, value, rule and the nearest known key.
    """
    from algorithms.policies.registry import FAMILIES

    algorithm_class(tables["algorithm"], "algorithm")
    if tables["start"].name:
        algorithm_class(tables["start"], "start")
    policy = tables["policy"]
    if policy.pretrained and not policy.family:
        return  # its settings are compared with the checkpoint's
    family = policy.family or DEFAULT_FAMILY
    policy_class = resolve(FAMILIES, family, kind="policy.family", error=ConfigError)
    cls = policy_class.Config
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    later = {name: None for name in required if name in FROM_DATA or policy.pretrained}
    check_settings(cls, {**later, **policy.config}, kind=f"policy.config of family {family!r}", error=ConfigError)
    _check_types(cls, policy.config, "policy.config")
    if hasattr(policy_class, "check") and not policy.pretrained:
        _check_values(policy_class, family, policy.config)


def _check_values(policy_class: Any, family: str, settings: Mapping[str, Any]) -> None:
    """What a family says of its settings; robots and tasks, which nobody knows yet, are stood in for."""
    reads = settings.get("reads") or {STATE: (1,)}
    try:
        policy_class.check(policy_class.Config(**{"action_dim": 1, "instruction_dim": 1, **settings, "reads": reads}))
    except PolicyError as error:
        raise ConfigError(f"policy.config = {dict(settings)} of family {family!r}", rule=error.rule) from None
    except TypeError as error:
        raise ConfigError(
            f"policy.config = {dict(settings)} of family {family!r}: {error}", rule="types as its Config"
        ) from None


def algorithm_class(table: AlgorithmConfig | StartConfig, where: str) -> Any:
    """The class that a table names, its settings checked.

    Raises:
        ConfigError: Unknown name or setting, or a value of another type.
    """
    cls = resolve(ALGORITHMS, table.name, kind=f"{where}.name", error=ConfigError)
    check_settings(cls.Config, table.config, kind=f"{where}.config of {table.name!r}", error=ConfigError)
    _check_types(cls.Config, table.config, f"{where}.config")
    return cls


def _check_types(cls: type, settings: Mapping[str, Any], where: str) -> None:
    accepted: dict[Any, tuple[type, ...]] = {float: (float, int), int: (int,), bool: (bool,), str: (str,)}
    for name, hint in typing.get_type_hints(cls).items():
        is_list = typing.get_origin(hint) is list
        plain = typing.get_args(hint)[0] if is_list else hint
        types = accepted.get(plain)
        if name not in settings or types is None:
            continue
        value = settings[name]
        each = value if is_list and isinstance(value, list) else [value]
        wrong = [one for one in each if not isinstance(one, types) or (isinstance(one, bool) and plain is not bool)]
        if wrong or is_list != isinstance(value, list):
            rule = f"it is a list of {plain.__name__}" if is_list else f"it is a {plain.__name__}"
            raise ConfigError(f"{where}.{name} = {value!r} is a {type(value).__name__}", rule=rule)
