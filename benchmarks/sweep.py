"""Compare the cost of a sweep, by default of 3 values of beta and 3 learning rates, with the same number of separate runs.

    python benchmarks/sweep.py                       a tiny model: half a minute of sweep, two of separate runs
    python benchmarks/sweep.py --model smollm2       the default game, `experiment=beta_lr`: an hour or two on two cores
    python benchmarks/sweep.py --model smollm2 iter=0

The sweep is one command; each separate run has its own store. Model and data are downloaded and converted first. The
policies of both are compared bit by bit. Then the finished sweep is run again. All files are in a folder that is removed
afterwards. Prints a markdown table.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.workload import ROOT, describe_machine, timed

# Settings and learning rates: for the tiny model, rates that change random weights; otherwise those of beta_lr.yaml.
GAMES = {
    "tiny": (["experiment=smoke"], "1e-4,1e-3,5e-3"),
    "smollm2": ([], "1e-6,5e-6,2.5e-5"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=GAMES, default="tiny")
    parser.add_argument("--betas", default="0.05,0.1,0.5", help="values of loss.beta, separated by commas")
    parser.add_argument(
        "--rates", help="values of optimizer.lr, separated by commas; default: three that suit the model"
    )
    parser.add_argument("settings", nargs="*", help="settings of the game, as for run.py")
    options = parser.parse_args()
    game, rates = GAMES[options.model]
    rates = options.rates or rates
    words = [*game, *options.settings, "tracking.wandb=disabled"]
    points = list(product(options.betas.split(","), rates.split(",")))
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".sweep-") as name:
        folder = Path(name)
        play(*words, "plan=true", f"store.path={folder}/none", f"hydra.run.dir={folder}/none")  # downloads, converts
        grid = [f"loss.beta={options.betas}", f"optimizer.lr={rates}", f"store.path={folder}/store"]
        subfolders = "hydra.sweep.subdir='${loss.beta}-${optimizer.lr}'"
        command = ["-m", *words, *grid, subfolders, f"hydra.sweep.dir={folder}/sweep"]
        sweep_seconds, again_seconds = play(*command), play(*command)
        run_seconds, run_stages, different = 0.0, Counter[str](), []
        for beta, rate in points:
            point = f"{float(beta)}-{float(rate)}"
            settings = [f"loss.beta={beta}", f"optimizer.lr={rate}", f"store.path={folder}/{point}/store"]
            run_seconds += play(*words, *settings, f"hydra.run.dir={folder}/{point}/run")
            run_stages += count_stages(folder / point / "store")
            if not have_same_policies(folder / "sweep" / point, folder / point / "run"):
                different.append(point)
        sweep_stages = count_stages(folder / "store")

    print(f"\n`{shlex.join(['python', 'benchmarks/sweep.py', *sys.argv[1:]])}`: {describe_machine()}\n")
    print("| | seconds | of the separate runs | stages played |\n|---|---|---|---|")
    print(f"| {len(points)} separate runs | {run_seconds:.0f} | 1 | {listed(run_stages)} |")
    print(f"| the sweep | {sweep_seconds:.0f} | {sweep_seconds / run_seconds:.2f} | {listed(sweep_stages)} |")
    print(f"| the sweep again, all done | {again_seconds:.1f} | {again_seconds / run_seconds:.3f} | none |")
    print(f"\nThe policies of {len(points) - len(different)} of {len(points)} points are equal bit by bit.")
    if different:
        sys.exit(f"different: {', '.join(different)}")


def play(*words: str) -> float:
    """Run `python run.py *words` and return its duration in seconds."""
    command = [sys.executable, "run.py", *words]
    done, seconds = timed(lambda: subprocess.run(command, cwd=ROOT, capture_output=True, text=True))
    if done.returncode:
        sys.exit(f"run.py {shlex.join(words)}\n{done.stdout}\n{done.stderr}")
    return seconds


def count_stages(store: Path) -> Counter[str]:
    return Counter(path.parent.parent.name for path in store.glob("*/*/manifest.json"))


def listed(stages: Counter[str]) -> str:
    names = ("sft", "generate", "score", "train", "evaluate")
    return ", ".join(f"{stages[name]} {name}" for name in names if stages[name])


def have_same_policies(run: Path, other_run: Path) -> bool:
    """Return whether both run folders have the same policies, bit by bit."""
    from spin.runtime.artifacts import file_digest

    digests = [
        {path.relative_to(folder): file_digest(path) for path in folder.glob("iter*/policy/*.safetensors")}
        for folder in (run, other_run)
    ]
    return bool(digests[0]) and digests[0] == digests[1]


if __name__ == "__main__":
    main()
