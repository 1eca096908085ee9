"""pi0 and pi0.5, made small by replacing what LeRobot fixes: sizes of Gemma and SigLIP, and the tokenizer of the hub."""

import pytest

pytest.importorskip("lerobot", reason="lerobot is not installed here: make test-lerobot has an environment for it")

import torch
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi05 import modeling_pi05
from lerobot.processor import tokenizer_processor

from algorithms.policies.registry import published
from tests.algorithms.policies import cases, test_conformance
from tests.algorithms.policies.cases import make, noise, observe, targets
from tests.lerobot.tiny_policies import READS, A, H, vlm_folder

MODULES = {"pi0": modeling_pi0, "pi05": modeling_pi05}
SETTINGS = {
    "chunk_size": H,
    "max_state_dim": 8,
    "max_action_dim": 4,
    "num_inference_steps": 3,
    "image_resolution": [28, 28],
    "dtype": "float32",
    "train_expert_only": True,
    "tokenizer_max_length": 96,
}
TESTS = (
    "test_shapes_and_dtypes",
    "test_a_chunk_is_a_function_of_observation_and_noise",
    "test_rows_do_not_depend_on_each_other",
    "test_imitation_loss_is_of_valid_actions_only",
    "test_parts_of_a_batch_sum_to_the_whole",
    "test_a_release_holds_all_that_acting_needs",
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for kind, module in MODULES.items():
        sizes = module.GemmaConfig(width=32, depth=2, mlp_dim=48, num_heads=8, num_kv_heads=1, head_dim=8)
        monkeypatch.setattr(module, "get_gemma_config", lambda variant, sizes=sizes: sizes)
        whole = module.PaliGemmaForConditionalGenerationWithPiGemma

        def shrunk(config, whole=whole):
            for name, value in {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}.items():
                setattr(config.vision_config, name, value)
            config.vision_config.projection_dim, config.vision_config.intermediate_size = 32, 32
            config.text_config.vocab_size = 300
            config.image_token_index = 299
            return whole(config=config)

        monkeypatch.setattr(module, "PaliGemmaForConditionalGenerationWithPiGemma", shrunk)
        config = {"reads": READS, "action_dim": A, "kind": kind, "policy": SETTINGS}
        monkeypatch.setitem(cases.CASES, kind, ("lerobot", config))
    load = tokenizer_processor.AutoTokenizer.from_pretrained
    monkeypatch.setattr(tokenizer_processor.AutoTokenizer, "from_pretrained", lambda name: load(vlm_folder()))


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("test", TESTS)
def test_the_contract(test, kind):
    getattr(test_conformance, test)(kind)


@pytest.mark.parametrize("kind", MODULES)
def test_the_loss_is_lerobots_forward(kind, monkeypatch):
    policy = make(kind)
    obs, drawn, (chunk, _) = observe(policy.spec), noise(policy), targets(policy.spec)
    mask_BH = torch.ones(cases.B, H)
    batch = policy._processors.before(obs, chunk.actions_BHA)
    monkeypatch.setattr(policy.lerobot.model, "sample_noise", lambda shape, device: drawn["start"])
    monkeypatch.setattr(policy.lerobot.model, "sample_time", lambda size, device: drawn["time"])
    expected_B = policy.lerobot(batch, reduction="none")[0]
    torch.testing.assert_close(policy.imitation_loss(obs, chunk, mask_BH, drawn), expected_B, rtol=1e-5, atol=1e-6)
    assert policy.frozen == ("lerobot.model.paligemma_with_expert.paligemma",)
    assert not any("paligemma.model" in name for name in published(policy))
