"""LeRobot's policies at sizes for tests, with random weights: nothing is downloaded."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

CAMERA, WRIST = "observation.images.front", "observation.images.wrist"
READS = {"observation.state": [6], CAMERA: [32, 40, 3]}
VECTORS = {"observation.state": [6], "observation.environment_state": [4]}
A, H, B = 3, 4, 3


@functools.cache
def vlm_folder() -> str:
    """A SmolVLM of 60 thousand parameters: configuration, a tokenizer of bytes, and an image processor; no weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, SmolVLMConfig, SmolVLMImageProcessor, SmolVLMProcessor

    special = ["<pad>", "<bos>", "<end>", "<image>", "<fake_token_around_image>", "<global-img>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<end>",
        extra_special_tokens={
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
        },
    )
    folder = Path(tempfile.mkdtemp(prefix="tiny-smolvlm-"))
    text = {
        "model_type": "llama",
        "vocab_size": len(special) + len(alphabet),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config = SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=2, image_token_id=3, pad_token_id=0)
    config.save_pretrained(folder)
    size = {"longest_edge": 32}
    images = SmolVLMImageProcessor(size=size, max_image_size=size)
    SmolVLMProcessor(images, fast, video_processor(), image_seq_len=4).save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


def video_processor() -> Any:
    from transformers import SmolVLMVideoProcessor

    return SmolVLMVideoProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 32})


def tiny(kind: str, **more: Any) -> dict[str, Any]:
    """Config of the family "lerobot"; ``more`` are fields of it, but for ``policy``, whose fields are added."""
    policy = {
        "act": {"chunk_size": H, "dim_model": 32, "n_heads": 2, "dim_feedforward": 32, "n_encoder_layers": 1, "latent_dim": 4},
        "diffusion": {"horizon": H, "down_dims": [16, 32], "diffusion_step_embed_dim": 16, "spatial_softmax_num_keypoints": 4},
        "smolvla": {
            "chunk_size": H,
            "max_state_dim": 8,
            "max_action_dim": 4,
            "resize_imgs_with_padding": [32, 32],
            "num_vlm_layers": 2,
            "num_steps": 4,
            "tokenizer_max_length": 48,
        },
    }[kind]
    if kind == "act":
        policy["n_vae_encoder_layers"] = 1
    if kind == "smolvla":
        policy["vlm_model_name"] = vlm_folder()
    policy = {**policy, **more.pop("policy", {})}
    return {"reads": READS, "action_dim": A, **more, "kind": kind, "policy": policy}


def observed(spec: Any, seed: int = 2) -> dict[str, Any]:
    """A batch of B observations by our names, with texts of several lengths."""
    from tests.algorithms.policies.cases import observe

    return observe(spec, B, seed)


def lerobot_batch(obs: dict[str, Any]) -> dict[str, Any]:
    """The same as a batch of LeRobot's datasets: images (B, channels, height, width) in [0, 1], the task as a text."""
    from algorithms.policies.text import texts_in

    batch: dict[str, Any] = {}
    for name, value in obs.items():
        if name == "instruction_text":
            batch["task"] = texts_in(value)
        else:
            batch[name] = value.permute(0, 3, 1, 2).float() / 255 if value.dim() == 4 else value
    return batch
