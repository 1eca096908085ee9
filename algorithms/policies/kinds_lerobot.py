"""What differs between LeRobot's policies: how each is given noise, gives a loss by action, and shows its features.

LeRobot's own ``forward`` draws from torch's global generator and gives one mean over a batch. Here the parts of each model are
called, so that what is drawn comes from a policy's noise and rows do not depend on each other. The numbers are LeRobot's:
tests/lerobot/test_policy_kinds.py holds them against ``forward``.

Shape suffixes: B batch, H chunk length, A action dims, M padded action dims, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fleet.errors import PolicyError

Batch = dict[
    str, Any
]  # LeRobot's: observations by its names, "action" (B, H, A) and "action_is_pad" (B, H) where there is a loss


def _modes(mode: str) -> dict[str, str]:
    return {"VISUAL": "MEAN_STD", "STATE": mode, "ENV": mode, "ACTION": mode}


class Kind:
    """One of LeRobot's policies. ``policy`` and ``config`` are LeRobot's own objects."""

    length = "chunk_size"  # the field that says H
    defaults: Mapping[str, Any] = {}  # fields that differ from LeRobot's defaults
    reads_text = False  # whether it reads the instruction itself
    any_image_size = False  # whether it brings images to its own size

    def check(self, config: Any) -> None:
        """Raises PolicyError for settings that cannot work here."""
        if config.n_obs_steps != 1:
            raise PolicyError(
                f"policy.n_obs_steps is {config.n_obs_steps}",
                rule="a chunk is decided by one observation; there is no history of observations",
                remedy="policy.config.policy.n_obs_steps=1",
            )

    def noise(self, config: Any, batch_size: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """What act and the loss draw, each (B, ...)."""
        raise NotImplementedError

    def losses(self, policy: Any, batch: Batch, noise: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | float]:
        """(B, H, A) of the actions, and what a row's loss has beside them, (B,)."""
        raise NotImplementedError

    def act(self, policy: Any, batch: Batch, start: Tensor | None) -> Tensor:
        """Normalised actions (B, H, A), from the noise ``start`` where the kind has one."""
        actions_BHA: Tensor = policy.predict_action_chunk(batch, noise=start)
        return actions_BHA

    def start_shape(self, config: Any) -> tuple[int, int] | None:
        """Of the noise that a chunk starts from; None where there is none."""
        return getattr(config, self.length), config.action_feature.shape[0]

    def embed(self, policy: Any, batch: Batch) -> Tensor:
        """(B, F)."""
        raise NotImplementedError


class Act(Kind):
    """ACT (arXiv 2304.13705): L1 of the actions, and of its VAE kl_weight times the divergence from N(0, 1)."""

    # No download of ImageNet weights at a build, on robots too. Dropout never acts here; see policy_lerobot.py.
    defaults = {"pretrained_backbone_weights": None, "dropout": 0.0, "normalization_mapping": _modes("MEAN_STD")}

    def noise(self, config: Any, batch_size: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        return {"latent": torch.randn(batch_size, config.latent_dim, generator=generator)} if config.use_vae else {}

    def losses(self, policy: Any, batch: Batch, noise: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | float]:
        batch = self._with_images(policy, batch)
        latent = noise.get("latent")
        with _Drawn(latent if latent is not None else torch.zeros(len(batch[ACTION]), policy.config.latent_dim)):
            policy.model.training = True  # of this module alone: it asks whether the VAE's encoder is to run
            try:
                actions_BHA, (mu_BF, log_var_BF) = policy.model(batch)
            finally:
                policy.model.training = False
        losses_BHA = (actions_BHA.float() - batch[ACTION]).abs()
        if mu_BF is None:
            return losses_BHA, 0.0
        mu_BF, log_var_BF = mu_BF.float(), log_var_BF.float()
        kl_B = -0.5 * (1 + log_var_BF - mu_BF**2 - log_var_BF.exp()).sum(-1)
        return losses_BHA, policy.config.kl_weight * kl_B

    def act(self, policy: Any, batch: Batch, start: Tensor | None) -> Tensor:
        actions_BHA: Tensor = policy.predict_action_chunk(batch)
        return actions_BHA

    def start_shape(self, config: Any) -> tuple[int, int] | None:
        return None

    def embed(self, policy: Any, batch: Batch) -> Tensor:
        """The mean of its encoder's tokens."""
        seen: list[Tensor] = []
        hook = policy.model.encoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            policy.model(self._with_images(policy, {k: v for k, v in batch.items() if k != ACTION}))
        finally:
            hook.remove()
        return seen[0].mean(0).float()

    def _with_images(self, policy: Any, batch: Batch) -> Batch:
        images = policy.config.image_features
        return {**batch, OBS_IMAGES: [batch[name] for name in images]} if images else batch


class _Drawn(TorchFunctionMode):
    """Gives ``value`` wherever ``torch.randn_like`` is called: ACT draws its latent so, and takes none from outside."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self._value = value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.randn_like:
            return self._value.to(args[0])
        return func(*args, **(kwargs or {}))


class Diffusion(Kind):
    """Diffusion Policy (arXiv 2303.04137): the squared error of the noise, or of the actions, at one random step."""

    length = "horizon"
    # DDIM draws nothing on its way. BatchNorm and random crops would make a row depend on the batch that it is in.
    defaults = {
        "n_obs_steps": 1,
        "noise_scheduler_type": "DDIM",
        "num_inference_steps": 10,
        "pretrained_backbone_weights": None,
        "use_group_norm": True,
        "crop_is_random": False,
        "normalization_mapping": _modes("MIN_MAX"),
    }

    def check(self, config: Any) -> None:
        super().check(config)
        if config.noise_scheduler_type != "DDIM":
            raise PolicyError(
                f"policy.noise_scheduler_type is {config.noise_scheduler_type!r}",
                rule="acting is a function of observation and noise: DDIM draws nothing on its way; training is the same",
                remedy="policy.config.policy.noise_scheduler_type=DDIM",
            )

    def noise(self, config: Any, batch_size: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        rows = (batch_size, config.horizon, config.action_feature.shape[0])
        return {
            "start": torch.randn(rows, generator=generator),
            "step": torch.randint(0, config.num_train_timesteps, (batch_size,), generator=generator),
        }

    def losses(self, policy: Any, batch: Batch, noise: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | float]:
        model, clean_BHA = policy.diffusion, batch[ACTION]
        noise_BHA, step_B = noise["start"].to(clean_BHA), noise["step"].to(clean_BHA.device)
        condition_BF = model._prepare_global_conditioning(self._stacked(policy, batch))
        noisy_BHA = model.noise_scheduler.add_noise(clean_BHA, noise_BHA, step_B)
        made_BHA = model.unet(noisy_BHA, step_B, global_cond=condition_BF)
        target_BHA = noise_BHA if policy.config.prediction_type == "epsilon" else clean_BHA
        return (made_BHA.float() - target_BHA) ** 2, 0.0

    def act(self, policy: Any, batch: Batch, start: Tensor | None) -> Tensor:
        actions_BHA: Tensor = policy.diffusion.conditional_sample(
            len(batch[OBS_STATE]), policy.diffusion._prepare_global_conditioning(self._stacked(policy, batch)), noise=start
        )
        return actions_BHA

    def embed(self, policy: Any, batch: Batch) -> Tensor:
        """What its U-Net is conditioned on."""
        features_BF: Tensor = policy.diffusion._prepare_global_conditioning(self._stacked(policy, batch))
        return features_BF.float()

    def _stacked(self, policy: Any, batch: Batch) -> Batch:
        """Every observation with an axis for the one step of its history; images of all cameras in one tensor."""
        config = policy.config
        out = {name: batch[name][:, None] for name in config.input_features if name not in config.image_features}
        if config.image_features:
            out[OBS_IMAGES] = torch.stack([batch[name][:, None] for name in config.image_features], -4)
        return out


class Flow(Kind):
    """SmolVLA (arXiv 2506.01844): flow matching by an action expert that looks into a vision-language model."""

    reads_text = True
    any_image_size = True
    state_is_seen = True  # by the vision-language model, beside images and text

    def check(self, config: Any) -> None:
        super().check(config)
        for name in ("compile_model", "use_relative_actions", "adapt_to_pi_aloha"):
            if getattr(config, name, False):
                raise PolicyError(f"policy.{name} is set", rule="not supported", remedy=f"policy.config.policy.{name}=false")
        if getattr(config, "time_sampling_beta_beta", 1.0) != 1.0:
            raise PolicyError(
                f"policy.time_sampling_beta_beta is {config.time_sampling_beta_beta}",
                rule="1: times are drawn from Beta(alpha, 1)",
            )

    def noise(self, config: Any, batch_size: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """ "start" (B, H, M), and "time" (B,): scaled draws of Beta(alpha, 1), whose distribution function is t^alpha."""
        alpha = getattr(config, "time_sampling_beta_alpha", 1.5)
        scale, offset = getattr(config, "time_sampling_scale", 0.999), getattr(config, "time_sampling_offset", 0.001)
        uniform_B = torch.rand(batch_size, generator=generator)
        start_BHM = torch.randn(batch_size, *self.start_shape(config), generator=generator)
        return {"start": start_BHM, "time": uniform_B ** (1 / alpha) * scale + offset}

    def start_shape(self, config: Any) -> tuple[int, int]:
        return config.chunk_size, config.max_action_dim

    def losses(self, policy: Any, batch: Batch, noise: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | float]:
        actions_BHM = policy.prepare_action(batch)
        drawn = noise["start"].to(actions_BHM), noise["time"].to(actions_BHM)
        losses_BHM = policy.model.forward(*self._inputs(policy, batch), actions_BHM, *drawn)
        return losses_BHM[..., : policy.config.action_feature.shape[0]].float(), 0.0

    def embed(self, policy: Any, batch: Batch) -> Tensor:
        """The mean of the last hidden states of the vision-language model."""
        seen = self._inputs(policy, batch)[: None if self.state_is_seen else 4]
        embs_BNF, pad_BN, att_BN = policy.model.embed_prefix(*seen)
        hidden_BNF = self._prefix(policy.model, embs_BNF, pad_BN, att_BN)
        weight_BN1 = pad_BN[..., None].float()
        return (hidden_BNF.float() * weight_BN1).sum(1) / weight_BN1.sum(1)

    def _inputs(self, policy: Any, batch: Batch) -> tuple[Any, ...]:
        """Images, their masks, tokens, their mask, state."""
        state_BS = policy.prepare_state(batch)
        return *policy.prepare_images(batch), batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK], state_BS

    def _prefix(self, model: Any, embs_BNF: Tensor, pad_BN: Tensor, att_BN: Tensor) -> Tensor:
        from lerobot.policies.common.vla_utils import make_att_2d_masks

        (hidden_BNF, _), _ = model.vlm_with_expert.forward(
            attention_mask=make_att_2d_masks(pad_BN, att_BN),
            position_ids=pad_BN.cumsum(1) - 1,
            past_key_values=None,
            inputs_embeds=[embs_BNF, None],
            use_cache=True,  # only so does it take a prefix alone
        )
        out: Tensor = hidden_BNF
        return out


class Pi0(Flow):
    """pi0 (arXiv 2410.24164): as SmolVLA, on PaliGemma."""

    state_is_seen = False

    def losses(self, policy: Any, batch: Batch, noise: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | float]:
        policy.model.training = True  # of this module alone: it asks whether to checkpoint gradients
        try:
            return super().losses(policy, batch, noise)
        finally:
            policy.model.training = False

    def _inputs(self, policy: Any, batch: Batch) -> tuple[Any, ...]:
        images, masks = policy._preprocess_images(batch)
        state_BS = policy.prepare_state(batch)
        return images, masks, batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK], state_BS

    def _prefix(self, model: Any, embs_BNF: Tensor, pad_BN: Tensor, att_BN: Tensor) -> Tensor:
        from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d

        language = model.paligemma_with_expert.paligemma.model.language_model
        language.config._attn_implementation = "eager"  # as LeRobot does: the masks are its own
        (hidden_BNF, _), _ = model.paligemma_with_expert.forward(
            attention_mask=prepare_attention_masks_4d(make_att_2d_masks(pad_BN, att_BN)),
            position_ids=pad_BN.cumsum(1) - 1,
            past_key_values=None,
            inputs_embeds=[embs_BNF.to(language.layers[0].self_attn.q_proj.weight.dtype), None],
            use_cache=False,
        )
        out: Tensor = hidden_BNF
        return out


class Pi05(Pi0):
    """pi0.5 (arXiv 2504.16054): as pi0, with the state among the text."""

    def _inputs(self, policy: Any, batch: Batch) -> tuple[Any, ...]:
        images, masks = policy._preprocess_images(batch)
        return images, masks, batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]


KINDS: dict[str, Kind] = {"act": Act(), "diffusion": Diffusion(), "smolvla": Flow(), "pi0": Pi0(), "pi05": Pi05()}


def mean_by_row(losses_BHA: Tensor, mask_BH: Tensor) -> Tensor:
    """(B,): the mean over valid actions, 0 where none is valid."""
    valid_BH = (mask_BH > 0).to(losses_BHA.dtype)
    return (losses_BHA.mean(-1) * valid_BH).sum(1) / valid_BH.sum(1).clamp(min=1)
