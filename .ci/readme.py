"""Run every `run.py` command in the README and docs with its groups and keys, but with a tiny model and tiny data."""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Settings that make any game small. They override those of the command.
SMALL = {
    "model.path": "builtin:tiny",
    "data.size": "12",
    "data.held_out": "4",
    "data.validation": "4",
    "data.max_prompt_length": "128",
    "data.max_response_length": "96",
    "data.max_length": "256",
    "data.min_response_length": "1",
    "data.template": "paper",
    "evaluation.bootstrap": "50",
}
RECORD = '{"prompt": "Name number %d.", "chosen": "It is %d!", "rejected": "Number %d."}\n'
QUESTION = '{"question_id": 1, "category": "writing", "turns": ["Write a line.", "Shorter, please."]}\n'


def commands(text: str) -> list[str]:
    """Return the `python run.py ...` and `torchrun ... run.py ...` commands in a page's code blocks, on one line each."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if re.match(r"\s*(python|torchrun .*) run\.py", line)]


def shrink(command: str, folder: Path) -> list[str]:
    """Return the command that runs with a tiny model, and with data, questions and results in `folder`."""
    launcher, *words = shlex.split(command)
    words = words[words.index("run.py") + 1 :]
    flags = [word for word in words if "=" not in word]  # -m, --cfg job
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    if "experiment" not in settings or settings["experiment"] != "smoke":
        if settings.get("data", "sharegpt") in ("sharegpt", "chitchat", "ultrachat"):
            settings["data"] = "tiny"
            settings.pop("data.splits", None)
        if settings["data"] == "local":
            settings["data.path"] = str(folder / "data.jsonl")
        settings |= SMALL
    if settings.get("evaluation") == "open_llm_leaderboard":
        # Use a local task, because the benchmarks' data would have to be downloaded.
        settings |= {"evaluation.harness": "[spin_choice:2:acc_norm]", "evaluation.harness_include": "tests/tasks"}
    if "evaluation.questions" in settings:
        settings |= {"evaluation.questions": str(folder / "question.jsonl"), "generation.max_new_tokens": "16"}
    for key in ("evaluation.judge", "evaluation.judge_model"):  # these servers are not free
        settings.pop(key, None)
    settings.pop("publish.hub", None)  # uploads need an account
    if "evaluation.against" in settings:
        settings["evaluation.against"] = "builtin:tiny"
    if settings.get("hydra/launcher") == "cluster":  # run the jobs on this machine
        settings = {key: value for key, value in settings.items() if not key.startswith("hydra.launcher.")}
        settings["hydra/launcher"] = "submitit_local"
    settings |= {"store.path": str(folder / "store"), "tracking.wandb": "offline"}
    settings |= {"hydra.run.dir": str(folder / "run"), "hydra.sweep.dir": str(folder / "sweep")}
    program = [sys.executable]
    if launcher == "torchrun":  # two processes for any number of GPUs
        program += "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    return [*program, "run.py", *flags, *(f"{key}={value}" for key, value in settings.items())]


def run(command: str) -> str:
    """Run a command in its own folder with one thread. Returns the command and its last line; exits if it fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "question.jsonl").write_text(QUESTION)
        (folder / "data.jsonl").write_text("".join(RECORD % (i, i, i) for i in range(40)))
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        words = shrink(command, folder)
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600, env=env)
        if done.returncode:
            sys.exit(f"{shlex.join(done.args)}\n{done.stdout}\n{done.stderr}\nexit status {done.returncode}")
        return f"$ {command}\n  ok: " + (done.stdout.strip().splitlines() or ["(no output)"])[-1]


def main() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    unique = list(dict.fromkeys(command for page in pages for command in commands(page.read_text())))
    assert unique, "README and docs have no command"
    pool = ThreadPoolExecutor(2)
    try:
        for line in pool.map(run, unique):
            print(line, flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure, cancel the waiting commands
    print(f"{len(unique)} passed, 0 failed")


if __name__ == "__main__":
    main()
