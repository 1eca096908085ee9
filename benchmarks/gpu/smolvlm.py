"""A folder in which LeRobot's SmolVLA finds its backbone: configuration, a tokenizer of bytes, an image processor; no weights.

The sizes of SmolVLM2-500M, whose first 16 layers SmolVLA takes (arXiv 2506.01844), but for the vocabulary: its embedding of
47 million weights is looked up, never multiplied, where only actions come out. Needs the extra ``lerobot``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FULL_TEXT = {
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "head_dim": 64,
}
FULL_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 512,
    "patch_size": 16,
}
TINY_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
SPECIAL = ("<pad>", "<bos>", "<end>", "<image>", "<fake_token_around_image>", "<global-img>")


def make_backbone(folder: Path, full: bool) -> dict[str, Any]:
    """Writes the folder; returns what ``policy.config.policy`` of the kind smolvla says about it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        SmolVLMConfig,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, _, end, image, fake, whole = SPECIAL
    extra = {"image_token": image, "fake_image_token": fake, "global_image_token": whole}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=end, extra_special_tokens=extra)
    text, vision = (FULL_TEXT, FULL_VISION) if full else (TINY_TEXT, TINY_VISION)
    words = {"model_type": "llama", "vocab_size": len(SPECIAL) + len(alphabet), "pad_token_id": 0}
    scale = 4 if full else 2
    SmolVLMConfig(
        text_config={**text, **words}, vision_config=vision, scale_factor=scale, image_token_id=3, pad_token_id=0
    ).save_pretrained(folder)
    size = {"longest_edge": vision["image_size"]}
    images = SmolVLMImageProcessor(size=size, max_image_size=size)
    videos = SmolVLMVideoProcessor(size=size, max_image_size=size)
    SmolVLMProcessor(images, fast, videos, image_seq_len=4).save_pretrained(folder)
    fast.save_pretrained(folder)
    sizes: dict[str, Any] = {"vlm_model_name": str(folder)}
    if not full:
        small = {"max_state_dim": 8, "max_action_dim": 4, "num_vlm_layers": 2, "tokenizer_max_length": 48}
        sizes |= {**small, "resize_imgs_with_padding": [vision["image_size"]] * 2}
    return sizes
