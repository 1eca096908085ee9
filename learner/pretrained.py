"""Policies outside of the run that trains them: a release of any run, or a folder of its own.

    FOLDER/policy.json          what a release's manifest says of its policy, and where it comes from
    FOLDER/model.safetensors    its weights and statistics, without frozen modules

Families of other projects read and write their own form: ``from_pretrained`` and ``export`` of the policy's class.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from algorithms.policies.registry import FAMILIES, load_published, rebuild
from fleet.errors import LearnerError
from fleet.files import Files, storage_errors
from fleet.lookup import resolve
from fleet.releases import Manifest
from fleet.runfolder import RunFolder
from fleet.server.releases import ReleaseStore
from learner.beginning import plain
from learner.main import DEFAULT_FAMILY, PolicyConfig
from learner.tensor_file import read_tensors

FORMAT = "fleet-rl policy"
FACTS, WEIGHTS = "policy.json", "model.safetensors"
_VERSIONED = re.compile(r"(.+)@([1-9][0-9]{0,17})")


@dataclasses.dataclass
class Pretrained:
    """``described``: see ``algorithms.policies.registry.describe``, with "origin", text for people. ``weights``: what
    ``load_published`` takes."""

    described: dict[str, Any]
    weights: dict[str, Tensor]

    def policy(self) -> Any:
        """Built, with its weights and statistics.

        Raises:
            PolicyError: It cannot be built here, or the weights do not fit.
        """
        policy = rebuild(self.described)
        load_published(policy, self.weights)
        return policy


def check_pretrained(table: PolicyConfig) -> None:
    """Before anything starts: is there a policy where ``table.pretrained`` says, and does the table say nothing else of it?

    Raises:
        LearnerError: No to one of these; names both sides.
    """
    if is_ours(table.pretrained):
        require_agreement(table, load_pretrained(table.pretrained).described)
    elif not hasattr(_class_of(table), "from_pretrained"):
        _nothing_at(table.pretrained)


def from_pretrained(table: PolicyConfig, config: Mapping[str, Any]) -> Any:
    """A policy made of a checkpoint of another project, by the family's own ``from_pretrained(where, config)``; None where
    the place holds a policy of ours.

    Args:
        config: The family's settings, those included that were read off robots and tasks.
    """
    if is_ours(table.pretrained) or not hasattr(_class_of(table), "from_pretrained"):
        return None
    return _class_of(table).from_pretrained(table.pretrained, config)


def _class_of(table: PolicyConfig) -> Any:
    return resolve(FAMILIES, table.family or DEFAULT_FAMILY, kind="policy.family", error=LearnerError)


def require_agreement(table: PolicyConfig, described: Mapping[str, Any]) -> None:
    """Raises LearnerError when the run file says another family or setting than a pretrained policy has."""
    for name, (old, new) in differences(table, described).items():
        raise LearnerError(
            f"policy.{name} = {new!r}, but the policy in {table.pretrained} has {old!r}",
            rule="a pretrained policy brings its family and settings",
            remedy=f"leave policy.{name} out, or name a checkpoint of this family and these settings",
        )


def differences(table: PolicyConfig, described: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What a run file says of its policy and a description contradicts: (described, said) by setting."""
    if table.family and described["family"] != table.family:
        return {"family": (described["family"], table.family)}
    different: dict[str, tuple[Any, Any]] = {}
    for name, value in table.config.items():
        old = plain(described["config"].get(name))
        names_only = name == "reads" and isinstance(value, list) and isinstance(old, dict)
        if (sorted(value) != sorted(old)) if names_only else (old != plain(value)):
            different[f"config.{name}"] = (old, value)
    return different


def settled(where: str) -> str:
    """The same place for processes in other folders and for later: an absolute path, a run with the version that is its
    newest now. What is no path here (a name on a hub) stays."""
    folder, version = _split(where)
    if not folder.exists():
        return where
    if version is None and not (folder / FACTS).is_file() and RunFolder(folder).mark.is_file():
        version = ReleaseStore(folder / "releases").newest()
    return str(folder.absolute()) + (f"@{version}" if version else "")


def same_place(before: str, now: str) -> bool:
    """Whether a run file still means what it did when ``settled`` looked: the place may be gone, and a run grow."""
    (old, old_version), (new, new_version) = _split(before), _split(now)
    alike = old == new or (not new.is_absolute() and old.parts[-len(new.parts) :] == new.parts)
    return before == now or (bool(before and now) and alike and new_version in (None, old_version))


def is_ours(where: str) -> bool:
    """Whether a place holds what ``load_pretrained`` reads, not a checkpoint of another project."""
    folder, _ = _split(where)
    return (folder / FACTS).is_file() or RunFolder(folder).mark.is_file()


def load_pretrained(where: str) -> Pretrained:
    """A policy by its place.

    Args:
        where: A run's folder (the newest release), RUN@VERSION, or a folder that ``export_policy`` wrote.

    Raises:
        LearnerError: There is none of these, or it is damaged.
        ReleaseError: The run has no such release, or it is damaged.
    """
    folder, version = _split(where)
    if version is None and (folder / FACTS).is_file():
        return _read_folder(folder)
    if RunFolder(folder).mark.is_file():
        run = RunFolder.open(folder)
        manifest, data = _release(run, version or 0)
        described = {**manifest.policy, "origin": f"release {manifest.version} of {run.run_id}, step {manifest.step}"}
        return Pretrained(described, _tensors(data, f"release {manifest.version}"))
    _nothing_at(where)


def _nothing_at(where: str) -> NoReturn:
    raise LearnerError(
        f"there is no policy at {where!r}",
        rule="a run's folder, RUN@VERSION, or a folder that `fleet policy export` wrote",
        remedy="name the whole path",
    )


def export_policy(run: RunFolder, version: int, folder: Path) -> Manifest:
    """Writes a release as a folder that stands alone. A family that has a form of its own (``export``) writes that.

    Args:
        version: 0 for the newest.
        folder: A new or empty one.

    Raises:
        LearnerError: The folder holds something.
        ReleaseError: There is no such release, or it is damaged.
        StorageError: It cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LearnerError(f"{folder} holds something", rule="a policy is exported into a new folder")
    manifest, data = _release(run, version)
    with storage_errors(f"writing {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        policy = rebuild(manifest.policy)
        if hasattr(policy, "export"):
            load_published(policy, _tensors(data, f"release {manifest.version}"))
            policy.export(folder)
            return manifest
        facts = {
            "format": FORMAT,
            **manifest.policy,
            "algorithm": manifest.algorithm,
            "step": manifest.step,
            "origin": f"release {manifest.version} of {run.run_id}, step {manifest.step}",
        }
        files = Files()
        files.write_atomic(folder / WEIGHTS, data)
        files.write_atomic(folder / FACTS, json.dumps(facts, indent=1).encode())  # last: what has it is whole
    return manifest


def _split(where: str) -> tuple[Path, int | None]:
    match = _VERSIONED.fullmatch(where)
    if match is None or Path(where).exists():
        return Path(where).expanduser(), None
    return Path(match[1]).expanduser(), int(match[2])


def _release(run: RunFolder, version: int) -> tuple[Manifest, bytes]:
    store = ReleaseStore(run.releases)
    newest = store.newest()
    if newest is None:
        raise LearnerError(
            f"{run.path} has no release", rule="the learner publishes one after its start phase", remedy="wait for it"
        )
    manifest = store.manifest(version or newest)
    return manifest, bytes(store.load(manifest.version))


def _read_folder(folder: Path) -> Pretrained:
    try:
        described = json.loads((folder / FACTS).read_text())
        if not isinstance(described, dict) or described.get("format") != FORMAT:
            raise ValueError(f"{FACTS} is not marked {FORMAT!r}")
        if not {"family", "config", "spec"} <= set(described):
            raise ValueError(f"{FACTS} has {sorted(described)}, needed are family, config and spec")
        data = (folder / WEIGHTS).read_bytes()
    except (OSError, ValueError) as error:
        raise LearnerError(f"the policy in {folder} cannot be read: {error}", rule=f"{FACTS} and {WEIGHTS}, whole") from None
    return Pretrained(described, _tensors(data, str(folder)))


def _tensors(data: bytes, what: str) -> dict[str, Tensor]:
    try:
        return read_tensors(io.BytesIO(data), len(data))[0]
    except (ValueError, KeyError, TypeError) as error:
        raise LearnerError(f"weights of {what} are damaged: {error}"[:500], rule="a whole safetensors file") from None
