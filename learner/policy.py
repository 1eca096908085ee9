"""The policy that a run's learner begins with: made to fit its robots, taken from elsewhere, or as a checkpoint describes it.

All ranks take part, and come to the same.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from algorithms.policies.base import INSTRUCTION
from algorithms.policies.frozen import fingerprints
from algorithms.policies.normalise import ActionScale
from algorithms.policies.registry import FAMILIES, build, describe, load_published, rebuild
from fleet.errors import LearnerError, PolicyError
from fleet.lookup import nearest, resolve
from fleet.runfolder import RunFolder
from fleet.server.releases import ReleaseStore
from fleet.spec import RobotSpec
from learner.checkpoint import Checkpoint
from learner.fit import fit_statistics
from learner.main import DEFAULT_FAMILY, PolicyConfig
from learner.pretrained import (
    Pretrained,
    differences,
    from_pretrained,
    is_ours,
    load_pretrained,
    require_agreement,
    same_place,
)
from learner.ranks import Ranks
from learner.supply import BatchSource
from learner.tensor_file import pack, unpack


def make_policy(
    table: PolicyConfig,
    checkpoint: Checkpoint | None,
    specs: list[RobotSpec],
    instruction_dim: int,
    source: BatchSource,
    ranks: Ranks,
) -> tuple[Any, dict[str, Any]]:
    """A policy with its first weights and statistics, or as the checkpoint describes it; and its description.

    Args:
        specs: Of the robots of all shards.
        instruction_dim: Size of the tasks' instruction embeddings.

    Raises:
        LearnerError: Robots share no action or observation, or checkpoint or pretrained policy are of another policy.
        PolicyError: The policy does not fit the robots or the tasks, or its frozen modules are others here.
    """
    if checkpoint is not None:
        described = checkpoint.meta["policy"]
        check_same_policy(table, described, checkpoint)
        return rebuild(described), described
    fit = table.statistics == "fit" or not table.pretrained
    if table.pretrained:
        policy = _pretrained(table, specs, instruction_dim, ranks)
    else:
        completed = complete_policy(table, specs, instruction_dim)
        policy = build(completed["family"], completed["config"])
    check_fits(policy, specs, instruction_dim, normalised=not fit)
    _require_same_files(policy, ranks)
    if fit:
        fit_statistics(policy, source, ranks)
    return policy, describe(policy)


def complete_policy(table: PolicyConfig, specs: list[RobotSpec], instruction_dim: int) -> dict[str, Any]:
    """Family and whole config of a policy: what the run file leaves open is read off the robots' specs and the tasks.

    A policy reads all vectors that the robots share, and all cameras if its class says ``cameras = True``; or what
    ``policy.config.reads`` lists by name.

    Raises:
        LearnerError: The robots of this run do not share an action, an observation, or a camera.
    """
    family = table.family or DEFAULT_FAMILY
    cls = resolve(FAMILIES, family, kind="policy family", error=LearnerError)
    fields = set(cls.Config.__dataclass_fields__)
    sizes = sorted({spec.action.size for spec in specs})
    if len(sizes) != 1:
        raise LearnerError(f"robots of this run have actions of {sizes} dims", rule="one policy has one action dimension")
    config: dict[str, Any] = {"action_dim": sizes[0], "instruction_dim": instruction_dim, **table.config}
    if "reads" in fields and not isinstance(config.get("reads"), Mapping):
        names = config.get("reads") or _shared_names(specs, family, cameras=getattr(cls, "cameras", False))
        config["reads"] = {name: _shape(name, specs) for name in ([names] if isinstance(names, str) else names)}
    return {"family": family, "config": {name: v for name, v in config.items() if name in fields or name in table.config}}


def _shared_names(specs: list[RobotSpec], family: str, *, cameras: bool) -> list[str]:
    """What a policy reads where nobody says it: vectors that all robots have alike and, on demand, every camera."""
    vectors = [
        name
        for name, feature in specs[0].observations.items()
        if not feature.is_image and all(name in s.features and s.features[name].shape == feature.shape for s in specs)
    ]
    images = dict.fromkeys(name for s in specs for name, f in s.observations.items() if f.is_image) if cameras else {}
    if cameras and not images:
        raise LearnerError(
            f"robots of type {', '.join(sorted({s.robot_type for s in specs}))} have no camera",
            rule=f"a policy of family {family!r} reads images",
            remedy="record images, or choose a family that reads the state alone",
        )
    if not vectors and not images:
        raise LearnerError(
            "the robots of this run share no observation", rule="a policy reads something", remedy="set policy.config.reads"
        )
    return [*vectors, *images]


def _shape(name: str, specs: list[RobotSpec]) -> list[int]:
    """Of a feature that all robots have alike."""
    found = {spec.robot_type: spec.observations[name].shape if name in spec.observations else None for spec in specs}
    shapes = {spec.observations[name].shape if name in spec.observations else None for spec in specs}
    if len(shapes) == 1 and None not in shapes:
        return list(specs[0].observations[name].shape)
    known = sorted({other for spec in specs for other in spec.observations})
    raise LearnerError(
        f"a policy is to read {name!r}, which is "
        + ", ".join(f"{shape or 'missing'} on robots of type {kind!r}" for kind, shape in found.items()),
        rule="all robots of a run have what its policy reads, of one shape",
        remedy=nearest(name, known) if shapes == {None} else f"list what it reads in policy.config.reads; there are {known}",
    )


def check_fits(policy: Any, specs: list[RobotSpec], instruction_dim: int, *, normalised: bool) -> None:
    """Checks a policy against the robots and tasks of a run before anything is trained.

    Args:
        normalised: Whether it has statistics already, which must suit the robots' actions.

    Raises:
        PolicyError: Names the feature or condition and both sides.
    """
    lacking = getattr(policy, "lacks_statistics", []) if normalised else []
    if lacking:
        raise PolicyError(
            f"the pretrained policy has no statistics that fit {lacking}",
            rule="it normalises what it reads and writes",
            remedy="policy.statistics=fit takes them from this run's data",
        )
    for spec in specs:
        policy.spec.check_robot(spec)
        for module in policy.modules() if normalised else ():
            if isinstance(module, ActionScale):
                module.check_robot(spec)
    size = policy.spec.conditions.get(INSTRUCTION)
    if size is not None and tuple(size) != (instruction_dim,):
        raise PolicyError(
            f"the policy reads 'instruction' of shape {tuple(size)}",
            rule=f"the run's instruction encoder makes embeddings of {instruction_dim} elements",
            remedy="set run.instruction_encoder to the one that the policy was trained with",
        )


def _require_same_files(policy: Any, ranks: Ranks) -> None:
    """Ranks on several machines have the same frozen modules, or all raise LearnerError."""
    here = fingerprints(policy)
    if ranks.size == 1 or not here:
        return
    told = [json.loads(data) for data in ranks.gather_bytes(json.dumps(here).encode())]
    for name in here:
        differ = [rank for rank, other in enumerate(told) if other.get(name) != told[0].get(name)]
        if differ:
            raise LearnerError(
                f"frozen module {name!r} of ranks {differ} differs from that of rank 0",
                rule="all ranks train with the same pretrained files",
                remedy="install the same ones on all nodes",
            )


def check_same_policy(table: PolicyConfig, described: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raises LearnerError when the configuration names another policy than the checkpoint holds."""
    family = table.family or ("" if table.pretrained else DEFAULT_FAMILY)
    different = differences(dataclasses.replace(table, family=family), described)
    before = (checkpoint.meta["settings"].get("policy") or {}).get("pretrained", "")
    if not same_place(before, table.pretrained):
        different["pretrained"] = (before, table.pretrained)
    for name, (old, new) in different.items():
        raise LearnerError(
            f"policy.{name} = {new!r}, but the checkpoint of step {checkpoint.step} has {old!r}",
            rule="a run goes on with the policy that it began with",
            remedy="put the setting back, or start a new run",
        )


def _pretrained(table: PolicyConfig, specs: list[RobotSpec], instruction_dim: int, ranks: Ranks) -> Any:
    """The policy that ``policy.pretrained`` names, with its weights and statistics."""
    if not is_ours(table.pretrained):
        config = complete_policy(table, specs, instruction_dim)["config"]
        foreign = ranks.patiently(lambda: from_pretrained(table, config))
        if foreign is not None:
            return foreign
    found = on_all_ranks(ranks, lambda: load_pretrained(table.pretrained))
    require_agreement(table, found.described)
    return found.policy()


def go_back(policy: Any, run: RunFolder, step: int, ranks: Ranks) -> None:
    """Gives a policy the weights of the run's first release.

    Args:
        step: Of that release.

    Raises:
        LearnerError: It is not there any more, or what acted then is not this policy.
    """

    def load() -> Pretrained:
        store = ReleaseStore(run.releases)
        version = next((version for version in store.versions() if store.manifest(version).step == step), None)
        if version is None:
            raise LearnerError(
                f"{run.path} has no release of step {step}",
                rule="with learner.restart_every each iteration begins at the run's first release",
                remedy="make room on the disk if it is full; a run whose first release was deleted cannot go on like this",
            )
        return load_pretrained(f"{run.path}@{version}")

    found = on_all_ranks(ranks, load)
    weights = found.weights
    if found.described["family"] == "best_of" != policy.family:  # the policy that proposed
        weights = {name.removeprefix("policy."): tensor for name, tensor in weights.items() if name.startswith("policy.")}
    load_published(policy, weights)


def on_all_ranks(ranks: Ranks, load: Callable[[], Pretrained]) -> Pretrained:
    """What the first rank loads, whose machine alone needs the files."""
    found = ranks.patiently(lambda: load() if ranks.first else None)
    if ranks.size > 1:
        found = Pretrained(*unpack(ranks.broadcast_bytes(pack([found.described, found.weights]) if found else b"")))
    assert found is not None
    return found
