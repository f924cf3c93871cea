"""Fixtures and helpers of all tests: no network, small models of several architectures, games in forked processes."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import copy
import random
from pathlib import Path

import pytest
import torch
import transformers as tf

from spin.engines.packing import Continuations
from spin.models import tiny
from tests.games import Games, Place

SMALL = {"vocab_size": 97, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
BODY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TWO_LAYERS = {**BODY, "num_hidden_layers": 2}
SSM = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
EXPERTS = {"num_experts_per_tok": 2, "head_dim": 8}
CONFIGS = {
    "llama": tf.LlamaConfig(**SMALL, **BODY),
    "mistral": tf.MistralConfig(**SMALL, **BODY, sliding_window=256),
    "mistral-short-window": tf.MistralConfig(**SMALL, **BODY, sliding_window=8),
    "qwen2": tf.Qwen2Config(**SMALL, **BODY),
    "qwen3": tf.Qwen3Config(**SMALL, **BODY, head_dim=8),
    "gpt2": tf.GPT2Config(
        vocab_size=97, n_positions=256, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=1
    ),
    "gemma2": tf.Gemma2Config(**SMALL, **BODY, head_dim=8, sliding_window=8, final_logit_softcapping=2.0),
    "gemma3": tf.Gemma3TextConfig(**SMALL, **BODY, head_dim=8, sliding_window=256),
    "granite": tf.GraniteConfig(**SMALL, **BODY, logits_scaling=3.0),
    "cohere": tf.CohereConfig(**SMALL, **BODY, logit_scale=0.25),
    "falcon_h1": tf.FalconH1Config(
        **SMALL, **BODY, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8
    ),
    "phi3": tf.Phi3Config(**SMALL, **TWO_LAYERS, partial_rotary_factor=0.75, sliding_window=256),
    "olmo2": tf.Olmo2Config(**SMALL, **TWO_LAYERS),
    "gpt_neox": tf.GPTNeoXConfig(
        **SMALL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    ),
    "cohere2": tf.Cohere2Config(
        **SMALL,
        **TWO_LAYERS,
        logit_scale=0.25,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt_oss": tf.GptOssConfig(
        **SMALL,
        **TWO_LAYERS,
        **EXPERTS,
        num_local_experts=4,
        sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "mamba": tf.MambaConfig(**SSM, pad_token_id=1, bos_token_id=0, eos_token_id=1),
    "mamba2": tf.Mamba2Config(
        **SSM, num_heads=8, head_dim=8, n_groups=1, chunk_size=16, pad_token_id=1, bos_token_id=0, eos_token_id=1
    ),
    "qwen3_next": tf.Qwen3NextConfig(
        **SMALL,
        **TWO_LAYERS,
        **EXPERTS,
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "lfm2": tf.Lfm2Config(**SMALL, **TWO_LAYERS, layer_types=["conv", "full_attention"]),
    "mixtral": tf.MixtralConfig(**SMALL, **TWO_LAYERS, **EXPERTS, num_local_experts=4),
    "qwen3_moe": tf.Qwen3MoeConfig(**SMALL, **TWO_LAYERS, **EXPERTS, num_experts=4, moe_intermediate_size=16),
}


def small_model(name: str, dtype: torch.dtype = torch.float32) -> tf.PreTrainedModel:
    """Return a random model of an architecture in `CONFIGS`, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype)
        for weight in model.parameters():  # larger than the initial weights, so that a wrong mask changes the output
            if weight.ndim > 1:
                weight.data.normal_(0, 0.3)
    return model.eval()


def random_items(count: int, responses: int = 2, seed: int = 0, longest: int = 20) -> list[Continuations]:
    """Return `count` random prompts with `responses` responses each, all of 1 to `longest` tokens."""
    rng = random.Random(seed)

    def ids() -> tuple[int, ...]:
        return tuple(rng.randrange(2, 97) for _ in range(rng.randint(1, longest)))

    return [Continuations(ids(), tuple(ids() for _ in range(responses))) for _ in range(count)]


def model_folder(name: str, folder: Path) -> Path:
    """Write a random model of an architecture in `CONFIGS` to `folder`, with the tiny model's tokenizer."""
    tokenizer = tiny.tokenizer()
    config = copy.deepcopy(CONFIGS[name])
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config.update({"vocab_size": len(tokenizer), **special})
    if hasattr(config, "max_position_embeddings"):  # state-space models have none
        config.update({"max_position_embeddings": 1024})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.make_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def games(tmp_path_factory):
    games = Games(tmp_path_factory.mktemp("games"))
    yield games
    games.close()


@pytest.fixture
def place(tmp_path, games):
    return Place(tmp_path, games)
