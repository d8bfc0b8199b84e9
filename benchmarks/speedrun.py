"""Compare recipes by the evaluation loss that they reach: the speed run, and what each of its changes gains.

    python benchmarks/speedrun.py --data data/stdlib --minutes 10 [--recipes baseline,loop,speedrun] [--seeds 0,1,2]
    python benchmarks/speedrun.py --data data/stdlib --steps 600 --recipes baseline,loop,quickstart
    python benchmarks/speedrun.py --data data/stdlib --steps 240 --recipes quickstart --without all

Recipes:

* `loop`: a minimal loop in DDP around LlamaForCausalLM, with torch's defaults for AdamW, a constant learning rate and
  float32; model and batch of `baseline`;
* `baseline`: the settings of configs/quickstart.toml until 2026-11-28;
* `quickstart`: configs/quickstart.toml;
* `speedrun`: configs/speedrun_cpu.toml.

`--without` runs each recipe again without one of its changes, or without each in turn. Every run has two processes with
one thread each. The loss is that of the same windows of the evaluation file for every recipe, once at the end. With
`--minutes`, two short runs measure a step of each recipe first, and `total_steps` is what fits into these minutes, the
start and the evaluation included.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

EVAL_WINDOWS = 2048
PROBE_STEPS = (20, 80)  # of the runs that measure a step
PROCESSES = 2
Settings = dict[str, Any]

BASELINE: Settings = {
    "lr_max": 3e-3, "lr_min": 3e-4, "warmup_iters": 20, "batch_size": 16, "micro_batch_size": 8, "context_len": 128,
    "num_layers": 4, "num_heads": 4, "d_model": 128,
}  # fmt: skip
# what undoes each change of the other recipes; an optimizer without Muon gets the rates that suited it best
CHANGES: dict[str, Settings] = {
    "Muon": {"optimizer": "adamw", "lr_max": 3e-3, "param_groups": ["model.embed_tokens.*, lm_head.*: lr_factor=8"]},
    "larger learning rate of embedding and head": {"param_groups": []},
    "learning rate": {"lr_max": 3e-3, "param_groups": ["model.embed_tokens.*, lm_head.*: lr_factor=6"]},
    "linear to 0": {"schedule": "cosine", "lr_min": 6e-4},
    "QK norm": {"qk_norm": False},
    "betas": {"betas": [0.9, 0.95]},
    "momentum": {"muon_momentum": 0.95},
    "3 steps of Newton-Schulz": {"muon_steps": 5},
    "shuffle": {"sampling": "random"},
    "bf16": {"precision": "fp32"},
    "model": {"num_layers": 4, "num_heads": 4, "d_model": 128},
}
OF_MUON = ("muon_momentum", "muon_steps")  # refused without it
CONFIGS = {"quickstart": "quickstart.toml", "speedrun": "speedrun_cpu.toml"}
RECIPES = ("baseline", "loop", *CONFIGS)
OF_A_RUN = (
    "target_dir",
    "train_data",
    "val_data",
    "total_steps",
    "log_every",
    "eval_every",
    "eval_steps",
    "ckpt_every",
)


@dataclass
class Outcome:
    """What one run reached. `seconds`: from its command to its end."""

    loss: float
    seconds: float


@dataclass
class Recipe:
    """A way to train. `settings`: of the trainer; the loop uses those of the baseline."""

    name: str
    settings: Settings = field(default_factory=dict)

    def without(self, change: str) -> Recipe:
        """Return this recipe without one of its changes."""
        settings = self.settings | CHANGES[change]
        if settings.get("optimizer", "adamw") == "adamw":
            settings = {name: value for name, value in settings.items() if name not in OF_MUON}
        return Recipe(f"{self.name} without: {change}", settings)


def recipe(name: str) -> Recipe:
    """Return the recipe with this name."""
    if name not in CONFIGS:
        return Recipe(name, BASELINE)
    with open(ROOT / "configs" / CONFIGS[name], "rb") as file:
        sections = tomllib.load(file)
    settings = {key: value for section in sections.values() for key, value in section.items()}
    return Recipe(name, {key: value for key, value in settings.items() if key not in OF_A_RUN})


def run(options: argparse.Namespace, recipe: Recipe, steps: int, seed: int, folder: str) -> Outcome:
    """Train once and return what the run reached. Ends the program if the run fails."""
    start = time.monotonic()
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if recipe.name == "loop":
        command = loop_command(options, steps, seed)
    else:
        command = trainer_command(options, recipe, steps, seed, folder)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=folder)
    losses = re.findall(r"eval loss ([\d.]+)", done.stdout)
    if done.returncode or not losses:
        sys.exit(f"{recipe.name} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return Outcome(float(losses[-1]), time.monotonic() - start)


def trainer_command(options: argparse.Namespace, recipe: Recipe, steps: int, seed: int, folder: str) -> list[str]:
    """Return the command of a run of this project, which evaluates once, at its end."""
    settings = recipe.settings | {
        "train_data": f"{options.data}/train.npy", "val_data": f"{options.data}/val.npy",
        "target_dir": f"{folder}/run-{steps}-{seed}", "total_steps": steps, "seed": seed, "ckpt_every": 10**9,
        "eval_every": 10**9, "eval_steps": EVAL_WINDOWS // recipe.settings["batch_size"],
    }  # fmt: skip
    config = Path(folder) / "config.toml"
    config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()), encoding="utf-8")
    return [sys.executable, "-m", "tinytrain_dist", "train", str(config), "--nproc", str(PROCESSES)]


def loop_command(options: argparse.Namespace, steps: int, seed: int) -> list[str]:
    """Return the command of the minimal loop."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}", __file__]
    return [sys.executable, *launch, "--loop", str(steps), "--seeds", str(seed), "--data", options.data]


def train_loop(options: argparse.Namespace) -> None:
    """Train as in a tutorial, and print the loss on the evaluation windows. Runs in each process."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from transformers import LlamaConfig, LlamaForCausalLM

    from tinytrain_dist.config.model_config import ModelConfig
    from tinytrain_dist.data.window_sampling import EVAL_STREAM, window_starts

    dist.init_process_group("gloo")
    seed, length = int(options.seeds), BASELINE["context_len"]
    train, val = (np.load(f"{options.data}/{name}.npy", mmap_mode="r") for name in ("train", "val"))
    ffn_dim = ModelConfig(d_model=BASELINE["d_model"]).ffn_dim
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=json.loads(Path(options.data, "meta.json").read_text(encoding="utf-8"))["vocab_size"],
        hidden_size=BASELINE["d_model"], intermediate_size=ffn_dim, num_hidden_layers=BASELINE["num_layers"],
        num_attention_heads=BASELINE["num_heads"], max_position_embeddings=length, tie_word_embeddings=False,
        use_cache=False,
    )  # fmt: skip
    model = DistributedDataParallel(LlamaForCausalLM(shape), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    rng = np.random.default_rng([seed, dist.get_rank()])
    for _ in range(options.loop):
        starts = rng.integers(0, len(train) - length, BASELINE["batch_size"] // PROCESSES)
        loss_of(model, train, starts, length).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    starts = window_starts(0, 0, range(dist.get_rank(), EVAL_WINDOWS, PROCESSES), len(val) - length, EVAL_STREAM)
    with torch.no_grad():
        losses = [loss_of(model, val, part, length) for part in np.split(starts, EVAL_WINDOWS // 64)]
    total = torch.stack(losses).mean()
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        print(f"eval loss {float(total) / PROCESSES:.4f}", flush=True)
    os._exit(0)  # a library leaves threads that do not end


def loss_of(model: Any, tokens: Any, starts: Any, length: int) -> Any:
    """Return the mean loss of the `length` targets of each window that begins at `starts`."""
    import torch

    rows = torch.from_numpy(np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64))
    logits = model(input_ids=rows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def steps_in(options: argparse.Namespace, recipe: Recipe, minutes: float, folder: str) -> int:
    """Return how many steps of a recipe fit into these minutes: from the time of two short runs."""
    short, long = (run(options, recipe, steps, 0, folder).seconds for steps in PROBE_STEPS)
    step = (long - short) / (PROBE_STEPS[1] - PROBE_STEPS[0])
    fixed = short - PROBE_STEPS[0] * step  # start, evaluation and end
    return max(1, int((60 * minutes - fixed) / step))


def recipes(options: argparse.Namespace) -> Iterator[Recipe]:
    """Yield the recipes to run, in order."""
    for name in options.recipes.split(","):
        whole = recipe(name)
        yield whole
        for change in CHANGES if options.without == "all" else filter(None, options.without.split(",")):
            yield whole.without(change)


def main() -> None:
    """Run what the command line asks for, and print a line for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/stdlib", help="folder that tinytrain prepare wrote (data/stdlib)")
    parser.add_argument("--recipes", default="baseline,loop,speedrun", help=f"of {', '.join(RECIPES)}")
    parser.add_argument(
        "--without", default="", help=f"changes to undo, one at a time, with commas: all, or of {', '.join(CHANGES)}"
    )
    parser.add_argument("--seeds", default="0,1,2", help="seeds of weights and windows, with commas (0,1,2)")
    parser.add_argument("--steps", type=int, help="steps of every run")
    parser.add_argument("--minutes", type=float, help="minutes of every run, instead of --steps")
    parser.add_argument("--loop", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.data = str(Path(options.data).resolve())
    if options.loop is not None:
        train_loop(options)
        return
    if unknown := set(options.recipes.split(",")) - set(RECIPES):
        parser.error(f"--recipes: got {', '.join(sorted(unknown))}; expected names from {', '.join(RECIPES)}")
    if options.without != "all" and (unknown := set(filter(None, options.without.split(","))) - set(CHANGES)):
        parser.error(f"--without: got {', '.join(sorted(unknown))}; expected all, or of {', '.join(CHANGES)}")
    if (options.steps is None) == (options.minutes is None):
        parser.error("give either --steps or --minutes")
    print("| recipe | steps | tokens | evaluation loss | seconds |\n|---|---|---|---|---|", flush=True)
    for wanted in recipes(options):
        with tempfile.TemporaryDirectory() as folder:
            steps = options.steps or steps_in(options, wanted, options.minutes, folder)
            outcomes = [run(options, wanted, steps, int(seed), folder) for seed in options.seeds.split(",")]
        tokens = steps * wanted.settings["batch_size"] * wanted.settings["context_len"]
        losses = [outcome.loss for outcome in outcomes]
        seconds = statistics.median(outcome.seconds for outcome in outcomes)
        loss = f"{statistics.mean(losses):.3f} ({min(losses):.3f} .. {max(losses):.3f})"
        print(f"| {wanted.name} | {steps:,} | {tokens:,} | {loss} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
