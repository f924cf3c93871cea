"""Write small versions of the paper's hub repositories, UltraChat-200k and Zephyr-7B-SFT, with the same files and formats.

The data set has four splits in eight parquet files, and a dataset card that names them. `prompt` is the content of the first
message, `prompt_id` its sha256, and `messages` a conversation of several rounds, which ends with a user message in the `gen`
splits. The model is a random Mistral with bf16 weights in two shards and an index, and a tokenizer of Mistral's type with
Zephyr's settings and chat template.
"""

import hashlib
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import MistralConfig, MistralForCausalLM

# --- UltraChat-200k ---------------------------------------------------------------------------------------------------

FILES = {
    "train_sft": [
        "00000-of-00003-a3ecf92756993583",
        "00001-of-00003-0a1804bcb6ae68c6",
        "00002-of-00003-ee46ed25cfae92c6",
    ],
    "test_sft": ["00000-of-00001-f7dfac4afe5b93f4"],
    "train_gen": [
        "00000-of-00003-a6c9fb894be3e50b",
        "00001-of-00003-d6a0402e417f35ca",
        "00002-of-00003-c0db75b92a2f48fd",
    ],
    "test_gen": ["00000-of-00001-3d4cd8309148a71f"],
}
SIZES = {"train_sft": 30, "test_sft": 8, "train_gen": 30, "test_gen": 8}
NOUNS = "lighthouse garden engine library river orchard market bridge theatre village café 日本".split()
VERBS = "explain describe compare outline summarise explore".split()
SCHEMA = pa.schema(
    {
        "prompt": pa.string(),
        "prompt_id": pa.string(),
        "messages": pa.list_(pa.struct({"content": pa.string(), "role": pa.string()})),
    }
)


def conversations() -> dict[str, list[list[str]]]:
    """Return the conversations of each split as texts with alternating roles, user first."""
    rng = random.Random(0)
    splits: dict[str, list[list[str]]] = {}
    number = 0
    for split, size in SIZES.items():
        splits[split] = []
        for _ in range(size):
            number += 1
            first, second = rng.sample(NOUNS, 2)
            messages = [
                f"Can you {rng.choice(VERBS)} case {number}, the {first} and the {second}?",
                f"Case {number}:\n\n1. The {first} is older.\n2. The {second} is {rng.randint(2, 90)} years old! I hope this helps.",
                f"Later question {number}: and the {second}?",
                f"Later answer {number}: the {second} stays where it is.",
                f"Last question {number}?",
            ]
            splits[split].append(messages if split.endswith("gen") else messages[:4])
    # Edge cases: two conversations with the same first round, an overlong answer, an overlong prompt.
    splits["train_gen"][0][:2] = splits["train_sft"][0][:2]
    splits["train_sft"][1][1] = LONG_ANSWER
    splits["test_gen"][0][0] = "Summarise this text. " + 600 * "The river is long. "
    return splits


LONG_ANSWER = "A very long list. " + " ".join(f"{n}. The market and the bridge." for n in range(400))


def write_ultrachat(folder: Path) -> dict[str, list[list[str]]]:
    """Write the data set in the hub's layout and return its `conversations`."""
    splits = conversations()
    (folder / "data").mkdir(parents=True)
    counts = []
    for split, names in FILES.items():
        rows = [
            {
                "prompt": texts[0],
                "prompt_id": hashlib.sha256(texts[0].encode()).hexdigest(),
                "messages": [{"content": text, "role": ("user", "assistant")[n % 2]} for n, text in enumerate(texts)],
            }
            for texts in splits[split]
        ]
        for number, name in enumerate(names):
            table = pa.Table.from_pylist(rows[number :: len(names)], schema=SCHEMA)
            pq.write_table(table, folder / "data" / f"{split}-{name}.parquet")
        counts.append(f"  - name: {split}\n    num_bytes: 1\n    num_examples: {len(rows)}\n")
    files = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in FILES)
    features = "".join(f"  - name: {name}\n    dtype: string\n" for name in ("prompt", "prompt_id"))
    features += "  - name: messages\n    list:\n" + "".join(
        f"    - name: {name}\n      dtype: string\n" for name in ("content", "role")
    )
    (folder / "README.md").write_text(
        "---\nlanguage:\n- en\nlicense: mit\npretty_name: UltraChat 200k\nconfigs:\n- config_name: default\n"
        f"  data_files:\n{files}dataset_info:\n  features:\n{features}  splits:\n{''.join(counts)}---\n\n"
        "# Dataset Card for UltraChat 200k\n"
    )
    return splits


# --- Zephyr-7B-SFT ----------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
SPECIALS = ["<unk>", "<s>", "</s>"]


def _write_tokenizer(folder: Path) -> int:
    """Train and write a BPE tokenizer with byte fallback, like Mistral's. Returns the vocabulary size."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = [text for split in conversations().values() for messages in split for text in messages[:2]]
    texts += [
        "### Instruction: Explain it.",
        "### Response: Sure! Here is an answer.",
        "<|user|> <|assistant|> <|system|>",
    ]
    trained.train_from_iterator(
        [" ".join(text.split()) for text in texts if text.isascii()],
        trainers.BpeTrainer(vocab_size=260, show_progress=False),
    )
    state = json.loads(trained.to_str())["model"]
    pieces = sorted(state["vocab"], key=state["vocab"].get)
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in state["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(n): {"content": token, **flags} for n, token in enumerate(SPECIALS)},
        "additional_special_tokens": [],
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": True,
        "model_max_length": 2048,
        "pad_token": "</s>",
        "padding_side": "left",
        "truncation_side": "right",
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(marks, indent=2))
    return len(tokens)


def write_zephyr(folder: Path) -> None:
    """Write the model in the hub's layout."""
    folder.mkdir(parents=True)
    sizes = {
        "vocab_size": _write_tokenizer(folder),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    settings = {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.35.0",
        "use_cache": False,
        **sizes,
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    (folder / "generation_config.json").write_text(
        json.dumps({"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.35.0"})
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = MistralForCausalLM(MistralConfig(**sizes)).to(torch.bfloat16).state_dict()
    names = list(weights)
    shards = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    for file, shard in shards.items():
        save_file({name: weights[name].contiguous() for name in shard}, folder / file, {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(2 * weight.numel() for weight in weights.values())},
        "weight_map": {name: file for file, shard in shards.items() for name in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
