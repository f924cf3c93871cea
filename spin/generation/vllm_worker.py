"""Runs vLLM in a process, and at need an environment, of its own: token ids in, token ids out. Imports nothing of spin.

    python -P spin/vllm_worker.py ENGINE.json < requests

ENGINE.json holds the arguments of `LLM` ("llm") and of a `LoRARequest` ("lora", or null). Each line of the input names a
file with requests (`prompts`: token ids, `sampling`: arguments of `SamplingParams`, one a prompt); the answers go beside
it, under its name with ".out" at the end, which is there when it is whole.
"""

import json
import os
import sys


def main(engine_path: str) -> None:
    import vllm  # tried with version 0.33.0: see `spin/vllm_engine.py`
    from vllm.lora.request import LoRARequest

    with open(engine_path) as file:
        asked = json.load(file)
    llm = vllm.LLM(**asked["llm"])
    adapter = LoRARequest(**asked["lora"]) if asked["lora"] else None
    for line in sys.stdin:
        path = line.rstrip("\n")
        with open(path) as file:
            request = json.load(file)
        outputs = llm.generate(
            [vllm.TokensPrompt(prompt_token_ids=ids) for ids in request["prompts"]],
            [vllm.SamplingParams(**sampling) for sampling in request["sampling"]],
            use_tqdm=False,
            lora_request=adapter,
        )
        with open(path + ".tmp", "w") as file:
            json.dump([read(output) for output in outputs], file)
        os.rename(path + ".tmp", path + ".out")


def read(output) -> dict:
    """Of a `RequestOutput` with one completion: its token ids, and why it ended."""
    (completion,) = output.outputs
    return {"token_ids": list(completion.token_ids), "finish_reason": completion.finish_reason}


if __name__ == "__main__":  # its engine's processes import this file, too
    main(sys.argv[1])
