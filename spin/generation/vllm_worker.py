"""Run vLLM in a separate process, and often a separate environment: token ids in, token ids out. Imports nothing of spin.

    python -P spin/generation/vllm_worker.py ENGINE.json < requests

ENGINE.json holds the arguments of `LLM` ("llm") and of a `LoRARequest` ("lora", or null). Each line of the input names a
file of requests ("prompts": token ids; "sampling": arguments of `SamplingParams`, one a prompt). The outputs are written
to the same name plus ".out", atomically.
"""

import json
import os
import sys


def main(engine_path: str) -> None:
    import vllm  # for the version that spin/generation/vllm.py names
    from vllm.lora.request import LoRARequest

    with open(engine_path) as file:
        arguments = json.load(file)
    llm = vllm.LLM(**arguments["llm"])
    adapter = LoRARequest(**arguments["lora"]) if arguments["lora"] else None
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
    """The token ids and finish reason of a `RequestOutput` with one completion."""
    (completion,) = output.outputs
    return {"token_ids": list(completion.token_ids), "finish_reason": completion.finish_reason}


if __name__ == "__main__":  # vLLM's own processes import this file, too
    main(sys.argv[1])
