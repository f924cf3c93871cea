"""What the standard sweep costs, 3 values of beta by 3 learning rates, against nine runs that share nothing.

    python benchmarks/sweep.py                       a tiny model: half a minute of sweep, two of separate runs
    python benchmarks/sweep.py --model smollm2       the default game, `experiment=beta_lr`; an hour or two on two cores
    python benchmarks/sweep.py --model smollm2 iter=0

The sweep is one command; the runs are nine, each with a store of its own. Both start with model and data fetched and converted.
The policies of both are compared bit by bit. Then the sweep is started once more, with nothing left to do. All in a
folder that is removed afterwards. Printed as a table in markdown, with what made it.
"""

import argparse
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Learning rates that move a random model; the others are those of conf/experiment/beta_lr.yaml.
GAMES = {
    "tiny": (["experiment=smoke"], ["0.05", "0.1", "0.5"], ["1e-4", "1e-3", "5e-3"]),
    "smollm2": ([], ["0.05", "0.1", "0.5"], ["1e-6", "5e-6", "2.5e-5"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=GAMES, default="tiny")
    parser.add_argument("settings", nargs="*", help="of the game, as for run.py")
    given = parser.parse_args()
    words, betas, rates = GAMES[given.model]
    words = [*words, *given.settings, "tracking.wandb=disabled"]
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".sweep-") as name:
        folder = Path(name)
        play(*words, "plan=true", f"store.path={folder}/none", f"hydra.run.dir={folder}/none")  # fetches, converts
        swept = [f"loss.beta={','.join(betas)}", f"optimizer.lr={','.join(rates)}", f"store.path={folder}/store"]
        points = "hydra.sweep.subdir='${loss.beta}-${optimizer.lr}'"
        command = ["-m", *words, *swept, points, f"hydra.sweep.dir={folder}/sweep"]
        together = play(*command)
        again = play(*command)
        apart, alone = 0.0, Counter[str]()
        differ = []
        for beta, rate in product(betas, rates):
            run = f"{float(beta)}-{float(rate)}"
            point = [f"loss.beta={beta}", f"optimizer.lr={rate}"]
            apart += play(*words, *point, f"store.path={folder}/{run}/store", f"hydra.run.dir={folder}/{run}/run")
            alone += stages(folder / run / "store")
            if not same(folder / "sweep" / run, folder / run / "run"):
                differ.append(run)
        shared = stages(folder / "store")

    import torch

    command_line = shlex.join(["python", "benchmarks/sweep.py", *sys.argv[1:]])
    print(f"\n`{command_line}`:")
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}; {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads.\n"
    )
    print("| | seconds | of the nine runs | stages played |\n|---|---|---|---|")
    print(f"| nine runs, nothing shared | {apart:.0f} | 1 | {counted(alone)} |")
    print(f"| the sweep | {together:.0f} | {together / apart:.2f} | {counted(shared)} |")
    print(f"| the sweep again, all done | {again:.1f} | {again / apart:.3f} | none |")
    print(
        f"\nPolicies of both compared: {9 - len(differ)} of 9 pairs are equal bit by bit."
        + (" Not: " + ", ".join(differ) if differ else "")
    )


def play(*words: str) -> float:
    """Seconds that `python run.py *words` takes."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "run.py", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"run.py {shlex.join(words)}\n{done.stdout}\n{done.stderr}")
    return time.perf_counter() - started


def stages(store: Path) -> Counter[str]:
    return Counter(path.parent.parent.name for path in store.glob("*/*/manifest.json"))


def counted(found: Counter[str]) -> str:
    return ", ".join(
        f"{found[name]} {name}" for name in ("sft", "generate", "score", "train", "evaluate") if found[name]
    )


def same(one: Path, other: Path) -> bool:
    """Have both runs the same policies, in the same bits?"""
    from spin.runtime.artifacts import file_digest

    files = [sorted(path.relative_to(run) for path in run.glob("iter*/policy/*.safetensors")) for run in (one, other)]
    return (
        bool(files[0])
        and files[0] == files[1]
        and all(file_digest(one / path) == file_digest(other / path) for path in files[0])
    )


if __name__ == "__main__":
    main()
