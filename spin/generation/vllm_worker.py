"""Run vLLM in a separate process and environment. Prompts and answers are token ids. Imports nothing from spin.

    python -P spin/generation/vllm_worker.py check NAMES       print version, devices and missing arguments as JSON
    python -P spin/generation/vllm_worker.py ENGINE.json PATH  process the requests that appear at PATH, in a loop

NAMES is a JSON object with the names of the arguments in use, by class. ENGINE.json has the arguments of `LLM` ("llm")
and of `LoRARequest` ("lora", or null). A request is created atomically at PATH, with "prompts" (token ids) and
"sampling" (arguments of `SamplingParams` per prompt). The worker removes it and writes the outputs atomically to
PATH.out. The process group ends when standard input is closed, which also happens when the parent is killed.
"""

import inspect
import json
import os
import select
import signal
import sys
import time


def check(names: dict[str, list[str]]) -> dict:
    """Return vLLM's version, its number of devices (None on a CPU), and the arguments in `names` that it lacks."""
    import torch
    import vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform

    owners = {
        "LLM": (vllm.LLM, vllm.LLM.generate, EngineArgs),  # LLM passes unknown arguments on to EngineArgs
        "SamplingParams": (vllm.SamplingParams,),
        "LoRARequest": (LoRARequest,),
    }
    known = {
        owner: {n for part in parts for n in inspect.signature(part).parameters} for owner, parts in owners.items()
    }
    missing = [f"{owner}({name}=)" for owner, group in names.items() for name in group if name not in known[owner]]
    devices = None if current_platform.is_cpu() else torch.accelerator.device_count()
    return {"version": vllm.__version__, "devices": devices, "missing": missing}


def watch(worker: int) -> None:
    """Exit with the status of the process `worker`. Kill the process group when standard input is closed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process ends after the worker
    while not (ended := os.waitpid(worker, os.WNOHANG))[0]:
        if select.select([0], [], [], 0.1)[0] and not os.read(0, 1):
            os.killpg(0, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(ended[1])
    sys.exit(status if status >= 0 else 128 - status)  # reports a signal as a shell does


def settings_for_cpu(is_alone: bool) -> dict:
    """Set environment variables of vLLM's CPU build, and return additional arguments of `LLM`."""
    if is_alone:  # run the engine in this process, which halves the startup time
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else all engines of a machine share the same cores
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB; else a share of all memory, which others also use
    return {
        "enforce_eager": True,  # compilation costs a minute per start and needs a C++ compiler
        "enable_chunked_prefill": False,  # it rewinds random generators, which those of a CPU do not support
    }


def main(engine_path: str, path: str) -> None:
    import vllm
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform

    with open(engine_path) as file:
        arguments = json.load(file)
    is_alone = arguments["llm"]["tensor_parallel_size"] == 1
    llm = vllm.LLM(**arguments["llm"], **(settings_for_cpu(is_alone) if current_platform.is_cpu() else {}))
    adapter = LoRARequest(**arguments["lora"]) if arguments["lora"] else None
    while True:
        while not os.path.exists(path):
            time.sleep(0.02)
        with open(path) as file:
            request = json.load(file)
        os.unlink(path)
        outputs = llm.generate(
            [vllm.TokensPrompt(prompt_token_ids=ids) for ids in request["prompts"]],
            [vllm.SamplingParams(**sampling) for sampling in request["sampling"]],
            use_tqdm=False,
            lora_request=adapter,
        )
        completions = [completion for (completion,) in (output.outputs for output in outputs)]
        with open(path + ".tmp", "w") as file:
            json.dump([{"token_ids": list(c.token_ids), "finish_reason": c.finish_reason} for c in completions], file)
        os.rename(path + ".tmp", path + ".out")


if __name__ == "__main__":  # vLLM's own processes also import this file
    if sys.argv[1] == "check":
        print(json.dumps(check(json.loads(sys.argv[2]))))
    elif worker := os.fork():
        watch(worker)
    else:
        main(*sys.argv[1:])
