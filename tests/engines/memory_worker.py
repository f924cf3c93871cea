"""One process of test_memory.py, or one rank of it under torchrun: `python -m tests.engines.memory_worker CASE` (JSON).

It trains for two steps and prints its peak memory and the memory after the engine is closed, in bytes above the memory
before the model was loaded. A tiny model is trained first: the estimate excludes what libraries allocate for themselves.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from spin.config.schema import EngineConfig, ModelConfig, OptimizerConfig
from spin.engines.deepspeed import DeepSpeedEngine
from spin.engines.device_memory import release_free_memory, resident_bytes
from spin.engines.logps import Forward
from spin.engines.packing import Continuations
from spin.engines.single import SingleEngine
from spin.models.adapters import Lora
from spin.models.find import fresh_adapter
from spin.models.policy import Policy, with_quantization
from spin.runtime.process_group import exit_process, join_group, leave_group


def train(case: dict, folder: Path, vocabulary: int) -> None:
    policy = with_quantization(Policy("start", folder, "x"), case["quantization"])
    if case["rank"]:
        lora = Lora(case["rank"], 8, "all-linear")
        policy = fresh_adapter(policy, lora, 0, ModelConfig.from_defaults(path=str(folder)), folder / "adapter")
    name = "deepspeed" if "RANK" in os.environ else "single"
    ranks = join_group(name, "cpu")
    options = EngineConfig.from_defaults(name=name, gradient_checkpointing=case["checkpointing"], **case["engine"])
    optimizer = OptimizerConfig.from_defaults(name=case["optimizer"])
    arguments = (policy, getattr(torch, case["dtype"]), torch.device("cpu"), options, optimizer)
    engine = DeepSpeedEngine(*arguments, ranks) if name == "deepspeed" else SingleEngine(*arguments)
    forward = Forward("packed", "chunked", case["tokens"], case["chunk"])
    n = case["row"] // 3
    ids = [tuple((7 * i + k) % (vocabulary - 5) + 3 for i in range(n)) for k in range(3)]
    items = [Continuations(ids[0], (ids[1], ids[2]))] * (case["passes"] * case["tokens"] // case["row"] * ranks.size)
    for _ in range(2):
        for batch, weight in engine.micro_batches(items, forward):
            engine.backward(engine.logps(batch, forward).sum() * weight)
        engine.step(1e-6)
    if name == "deepspeed":
        with tempfile.TemporaryDirectory() as state:
            engine.save_state(Path(state))
    engine.close()


def main(case: dict) -> None:
    train(case, Path(case["tiny"]), 258)
    release_free_memory()
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    train(case, Path(case["folder"]), case["vocabulary"])
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    release_free_memory()
    line = json.dumps({"peak": peak - before, "left": resident_bytes() - before}) + "\n"
    os.write(1, line.encode())  # in one write, because ranks share the pipe
    leave_group()
    exit_process()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
