"""LeRobot's configuration of a policy, from ours: fields checked by name, features by LeRobot's names and shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import draccus
import lerobot.policies  # noqa: F401  its import tells PreTrainedConfig of all kinds
from lerobot.configs import PreTrainedConfig
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_STATE

from algorithms.policies.kinds_lerobot import KINDS, Kind
from fleet.errors import PolicyError
from fleet.lookup import nearest
from fleet.spec import IMAGE_PREFIX

Feature = tuple[str, tuple[int, ...]]  # LeRobot's type and shape: "VISUAL", (3, 84, 84)

# Fields that we fill in, or that say nothing about a policy that the fleet trains.
OURS = {"input_features", "output_features", "device", "use_peft", "use_amp", "push_to_hub", "repo_id", "private"}
OURS |= {"tags", "license", "pretrained_path", "pretrained_revision", "type"}


def make_config(config: Any) -> Any:
    """LeRobot's configuration for a ``LerobotConfig``.

    Raises:
        PolicyError: Unknown kind or field, a value that LeRobot does not take, or a feature that it cannot read.
    """
    kind = kind_of(config.kind)
    cls = config_class(config.kind)
    known = {field.name for field in dataclasses.fields(cls)} - OURS
    given = {**config.checkpoint, **config.policy}
    for name in given:
        if name not in known:
            raise PolicyError(f"setting {name!r} of policy.config.policy is unknown", remedy=nearest(name, known))
    features = {name: {"type": kind_, "shape": list(shape)} for name, (kind_, shape) in features_of(config).items()}
    fields = {**kind.defaults, **given}
    if "n_action_steps" not in given:  # LeRobot executes so many of a chunk, and wants no more than there are
        fields["n_action_steps"] = fields.get(kind.length, getattr(cls, kind.length))
    fields |= {"input_features": features, "device": "cpu"}
    fields["output_features"] = {ACTION: {"type": "ACTION", "shape": [config.action_dim]}}
    try:
        made = draccus.decode(cls, fields)
    except (ValueError, TypeError, NotImplementedError, draccus.utils.DecodingError, draccus.utils.ParsingError) as error:
        names_field = isinstance(error, draccus.utils.DecodingError)  # else what the configuration said lies beneath
        said = str(error if names_field else error.__cause__ or error).splitlines()[0]
        raise PolicyError(
            f"policy.config.policy for {config.kind!r}: {said}", rule="LeRobot's own rules for its fields"
        ) from None
    kind.check(made)
    return made


def kind_of(name: str) -> Kind:
    """Raises PolicyError for a kind that is not wrapped."""
    if name not in KINDS:
        raise PolicyError(f"policy.config.kind is {name!r}", rule="a kind of LeRobot's policies", remedy=nearest(name, KINDS))
    return KINDS[name]


def config_class(kind: str) -> Any:
    return PreTrainedConfig.get_choice_class(kind)


def features_of(config: Any) -> dict[str, Feature]:
    """LeRobot's kind of feature, and its shape, by LeRobot's name.

    Raises:
        PolicyError: A feature is none that LeRobot's policies read, or ``rename`` names one that the policy does not read.
    """
    for name in config.rename:
        if name not in config.reads:
            raise PolicyError(f"policy.config.rename names {name!r}", rule=f"the policy reads {sorted(config.reads)}")
    found: dict[str, Feature] = {}
    for name, shape in config.reads.items():
        theirs = config.rename.get(name, name)
        if theirs.startswith(IMAGE_PREFIX) and len(shape) == 3:
            found[theirs] = "VISUAL", (int(shape[2]), int(shape[0]), int(shape[1]))
        elif theirs in (OBS_STATE, OBS_ENV_STATE) and len(shape) == 1:
            found[theirs] = "STATE" if theirs == OBS_STATE else "ENV", tuple(int(n) for n in shape)
        else:
            raise PolicyError(
                f"feature {name!r} of shape {tuple(shape)} cannot be read",
                rule=f"LeRobot's policies read {OBS_STATE!r}, {OBS_ENV_STATE!r} (vectors) and {IMAGE_PREFIX}NAME",
                remedy="leave it out of policy.config.reads, or name it in policy.config.rename",
            )
    if OBS_STATE not in found:
        raise PolicyError(f"the policy reads {sorted(found)}", rule=f"every one of LeRobot's policies reads {OBS_STATE!r}")
    return found


def same_features(where: str, kind: Kind, checkpoint: Mapping[str, Feature], config: Mapping[str, Any]) -> None:
    """Compares what a checkpoint was trained on with what is to be read now.

    Raises:
        PolicyError: A camera is missing, or a feature has another size; names it.
    """
    rename = config.get("rename", {})
    ours = features_of(_Named(config.get("reads", {}), rename))
    ours[ACTION] = "ACTION", (int(config["action_dim"]),)
    back = {theirs: name for name, theirs in rename.items()}
    for name in [n for n, (what, _) in ours.items() if what == "VISUAL" and n not in checkpoint]:
        cameras = sorted(n for n, (what, _) in checkpoint.items() if what == "VISUAL")
        raise PolicyError(
            f"camera {back.get(name, name)!r} is none of the checkpoint {where}",
            rule=f"it was trained with {cameras}",
            remedy=f"say which one it stands for: policy.config.rename={{{back.get(name, name)}: {(cameras or ['...'])[0]}}}",
        )
    for name, (what, shape) in checkpoint.items():
        if what == "VISUAL" and kind.any_image_size:  # it has images resized, and a camera may be missing
            continue
        if ours.get(name, (what, ()))[1] != shape and not (kind.any_image_size and name in ours):  # vectors are padded there
            seen = f"is {ours[name][1]}" if name in ours else "is missing"
            raise PolicyError(
                f"feature {back.get(name, name)!r} {seen} (channels first) for the checkpoint {where}",
                rule=f"it was trained with {name!r} of shape {shape}",
                remedy="give the robots this feature, or name another of theirs in policy.config.rename",
            )


@dataclasses.dataclass
class _Named:
    reads: Mapping[str, Any]
    rename: Mapping[str, str]
