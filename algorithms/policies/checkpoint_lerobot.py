"""LeRobot's checkpoints: config.json, model.safetensors and files of the processors, in a folder or a repository of the hub."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import draccus
from huggingface_hub import hf_hub_download
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import NormalizerProcessorStep
from safetensors.torch import load_file
from torch import Tensor

from algorithms.policies.config_lerobot import OURS, Feature, config_class, kind_of
from algorithms.policies.lora_lerobot import merge_lora
from algorithms.policies.processors_lerobot import as_numpy, make_processors
from fleet.errors import PolicyError

WEIGHTS = "model.safetensors"


def read_checkpoint(where: str) -> tuple[str, dict[str, Any], dict[str, Feature]]:
    """Kind, the fields that differ from LeRobot's defaults, and features (kind of feature, shape) by name, "action" too.

    Raises:
        PolicyError: There is no such checkpoint, or its kind is not wrapped.
    """
    try:
        config = PreTrainedConfig.from_pretrained(where)
    except (OSError, ValueError, draccus.utils.DecodingError) as error:
        raise _unreadable(where, error) from None
    kind = kind_of(config.type)
    if config.use_peft:
        raise PolicyError(
            f"{where} holds adapters alone", rule="a checkpoint holds whole weights", remedy="merge them with lerobot first"
        )
    plain, first = draccus.encode(config), draccus.encode(config_class(config.type)(device="cpu"))
    fields = {name: value for name, value in plain.items() if name not in OURS and value != first.get(name)}
    # Where our default is not LeRobot's, what the checkpoint has must be said.
    fields |= {name: plain[name] for name in kind.defaults if name != "pretrained_backbone_weights"}
    if config.type == "diffusion":  # trained alike, and DDIM draws nothing on its way
        fields["noise_scheduler_type"] = "DDIM"
    features = {**config.input_features, **config.output_features}
    return config.type, fields, {name: (f.type.value, tuple(f.shape)) for name, f in features.items()}


def load_weights(policy: Any, where: str) -> None:
    """Weights of a checkpoint into LeRobot's policy; every tensor must be there and fit.

    Raises:
        PolicyError: There is no such checkpoint, or its tensors are others; names some.
    """
    state = load_file(_file(where, WEIGHTS))
    if hasattr(policy, "_fix_pytorch_state_dict_keys"):  # pi0, pi0.5: openpi's own names
        fixed = policy._fix_pytorch_state_dict_keys(state, policy.config)
        state = {name if name.startswith("model.") else f"model.{name}": tensor for name, tensor in fixed.items()}
    own = policy.state_dict()
    held = {tensor.data_ptr() for name, tensor in own.items() if name in state}
    problems = [f"{name} is missing" for name, tensor in own.items() if name not in state and tensor.data_ptr() not in held]
    problems += [f"{name} is not known" for name in state if name not in own]
    problems += [
        f"{name} is {list(tensor.shape)}, here {list(own[name].shape)}"
        for name, tensor in state.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if problems:
        raise PolicyError(
            f"weights of {where} do not fit: {'; '.join(problems[:4])}" + (" ..." if len(problems) > 4 else ""),
            rule="the same settings have the same tensors",
            remedy="policy.config.policy has the checkpoint's settings; normalize_* are of a LeRobot before 0.4: migrate it",
        )
    policy.load_state_dict(state, strict=False)


def read_statistics(config: Any, where: str) -> dict[str, Tensor]:
    """Those of a checkpoint's normalisation by "feature.statistic"; empty where it has none.

    Raises:
        PolicyError: It processes observations in another way than LeRobot's policy of that kind does.
    """
    try:
        before, _ = make_pre_post_processors(config, str(where), preprocessor_overrides={"device_processor": {"device": "cpu"}})
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unreadable(where, error) from None
    usual, _ = make_processors(config, {})
    steps, known = [type(s).__name__ for s in before.steps], [type(s).__name__ for s in usual.steps]
    if steps != known:
        raise PolicyError(f"checkpoint {where} processes observations by {steps}", rule=f"LeRobot's {config.type!r}: {known}")
    found: dict[str, Tensor] = {}
    for step in before.steps:
        if isinstance(step, NormalizerProcessorStep):
            found |= step.state_dict()
    return found


def export(policy: Any, statistics: Mapping[str, Mapping[str, Tensor]], rename: Mapping[str, str], folder: Path) -> None:
    """Writes what lerobot's ``from_pretrained`` of policies and processors reads."""
    whole = copy.deepcopy(policy).cpu()
    merge_lora(whole)
    whole.config = dataclasses.replace(whole.config, pretrained_path=None, use_peft=False)
    folder.mkdir(parents=True, exist_ok=True)
    whole.save_pretrained(folder)
    for pipeline in make_processors(whole.config, rename, as_numpy(statistics)):
        pipeline.save_pretrained(folder)


def _file(where: str, name: str) -> Path:
    if Path(where).is_dir():
        path = Path(where) / name
        if not path.is_file():
            raise PolicyError(f"{where} has no {name}", rule="a LeRobot checkpoint has one")
        return path
    try:
        return Path(hf_hub_download(where, name))
    except (OSError, ValueError) as error:
        raise _unreadable(where, error) from None


def _unreadable(where: str, error: Exception) -> PolicyError:
    return PolicyError(
        f"LeRobot checkpoint {where!r} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}",
        rule="a folder that lerobot wrote, or the id of a repository on the hub that this machine can reach or has cached",
        remedy="look at the path; for a private repository log in with `hf auth login`",
    )
