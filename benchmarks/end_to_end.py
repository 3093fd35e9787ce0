"""Compare the time of a whole GRPO batch on a CPU with TRL's GRPOTrainer.

    python -m benchmarks.end_to_end [--make-venv DIR | --python TRL_PYTHON] [--json] [--rounds 8]
    python -m benchmarks.end_to_end --python TRL_PYTHON --model FOLDER --prompts 1 --samples 4

A batch is rollout, reward, reference, update, and everything between. Both sides have the same
model folder, prompts (their token ids are compared), samples, tokens, reward, loss, AdamW and
clipping, in float32 on the same cores. End tokens are sampled but end nothing, so every completion
has `--tokens` tokens. TRL generates with transformers in an environment of its own. `--make-venv`
creates it (torch first, so that pip can take a CPU wheel), `--python` names an existing one. With
neither, only ours runs.

Each side is a process that plays and trains one batch per request. They alternate, and so does the
order. In the first batch, TRL is given the completions that ours sampled. Both must find the same
mean reward and, at each optimizer step, the same gradient norm. The next `--warm` batches are not
counted, because ours compiles in them. All batches have the prompts of the first tasks.

The table has these columns:

- min, median: seconds of a batch.
- rollout, passes, update: medians of its parts. A rollout is generation and scoring. Passes are the
  forward passes without gradients, for the log-probabilities of the reference and the old policy.
  The update is the rest.
- cpu: the minimum of a batch's processor seconds.
- others: the number of cores that other processes used, as a median. Above about 0.1, the machine
  was busy. This slows TRL more, because its threads wait for each other. Then use `--cores 1` and
  compare processor time.
- product: float32 GFLOP/s of a core in a matrix product of 4,096 x 1,024 x 1,024. PyTorch's MKL has
  slower kernels on processors that are not Intel's. This is no difference between the trainers.

Variant mu1 is one optimizer step per batch without KL, mu2-kl is two with a reference. TRL has the
settings that were fastest: no gradient checkpointing, sdpa, a micro-batch of one prompt's samples,
like ours. `--trl KEY=VALUE` sets an argument of its GRPOConfig (a value in JSON), `--set KEY=VALUE`
one of our settings, and `--preload` loads libraries into both, such as an allocator.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from benchmarks.batch_work import REFUSED, Conversation, Work
from benchmarks.processor import busy_seconds, described, processor
from jaxgrpo.configs.cpu_demo import CLASSES
from jaxgrpo.environment import TaskSuite
from jaxgrpo.envs.bfcl import Bfcl
from jaxgrpo.envs.procedural import Warehouse

ROOT = Path(__file__).parent.parent
TINY = ROOT / "assets" / "tiny-qwen2.5"
SUITES: dict[str, TaskSuite] = {
    "bfcl": Bfcl(docs="signatures", max_calls=1, classes=CLASSES),
    "warehouse": Warehouse(),
}
VARIANTS = {"mu1": (1, 0.0), "mu2-kl": (2, 0.001)}
"""Optimizer steps per batch, and the coefficient of the KL term."""
TORCH, TRL = "torch==2.13.0", ("trl==1.16.*", "accelerate", "datasets")
SETTLE = 0.3  # seconds between two batches, until the threads of one side stop spinning
COLUMNS = ("min", "median", "rollout", "passes", "update", "cpu", "others")
LEAST = {"prompts": 1, "samples": 2, "tokens": 1, "rounds": 1, "warm": 0, "cores": 1}
MAX_DIFFERENCE = 1e-3
"""Relative bound for the difference of gradient norms."""


class Worker:
    """One side, in its own process."""

    def __init__(self, name: str, python: str, module: str, work: Work, log: Path):
        self.name, self._log = name, log
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(work.threads),
            "HF_HUB_OFFLINE": "1",
        }
        if work.preload:
            environment["LD_PRELOAD"] = ":".join(work.preload)
        command = [python, "-m", module]
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                cwd=ROOT,
            )
        self.about = self.ask(dataclasses.asdict(work))

    def ask(self, request: Any) -> Any:
        """Send a request and return its reply.

        If the worker has exited, exit too: with status 2 and its error if it refused an option,
        otherwise with its last output.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status, written = self._process.wait(), self._log.read_text(errors="replace")
        if status == REFUSED:
            print(written[written.rindex("error: ") :].strip(), file=sys.stderr)
            raise SystemExit(REFUSED)
        last = "\n".join(written.splitlines()[-15:])
        raise SystemExit(f"{self.name} ended with status {status}:\n{last}")

    def batch(self, check: bool = False, **more: Any) -> dict[str, Any]:
        """Play and train a batch. Add its `seconds` and the cores used by `others` to the reply."""
        cores = os.sched_getaffinity(0)
        start, busy = time.perf_counter(), busy_seconds(cores)
        reply = self.ask({"check": check, **more})
        seconds, busy = time.perf_counter() - start, busy_seconds(cores) - busy
        return reply | {"seconds": seconds, "others": max(0.0, busy - reply["cpu"]) / seconds}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()


def make_venv(folder: Path) -> str:
    """Create TRL's environment if it does not exist, and return its interpreter."""
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for packages in ((TORCH,), TRL):
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    return str(python)


def conversations(suite: TaskSuite, count: int) -> list[Conversation]:
    """Return the opening messages of the first tasks of the train split."""
    openings = [suite.create(task).observe() for task in suite.tasks("train")[:count]]
    return [
        [{"role": m.role, "content": m.content} for m in opening.messages] for opening in openings
    ]


def check_agreement(sides: Mapping[str, Worker]) -> dict[str, Any]:
    """Run each side's first batch on the completions of ours, and return what they agree on.

    Raises SystemExit if they do not agree.
    """
    expected = sides["ours"].batch(check=True)
    agreed = {
        "reward": expected["reward"],
        "grad_norms": expected["grad_norms"],
        "prompt_tokens": list(map(len, expected["prompts"])),
    }
    if min(expected["grad_norms"]) == 0:
        raise SystemExit(
            "there is no gradient to compare: all samples of each prompt score the same"
        )
    for name, side in sides.items():
        if name == "ours":
            continue
        got = side.batch(check=True, completions=expected["completions"])
        if got["prompts"] != expected["prompts"]:
            raise SystemExit(f"the prompts of {name} have other tokens than ours")
        apart = [
            abs(a / b - 1) for a, b in zip(got["grad_norms"], expected["grad_norms"], strict=True)
        ]
        if abs(got["reward"] - expected["reward"]) > 1e-5 or not max(apart) <= MAX_DIFFERENCE:
            raise SystemExit(
                f"{name} differs from ours on the same tokens: "
                f"mean reward {got['reward']} and {expected['reward']}, "
                f"gradient norms {got['grad_norms']} and {expected['grad_norms']}"
            )
        agreed[f"difference_{name}"] = max(apart)
    return agreed


def take_turns(sides: Mapping[str, Worker], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Run a batch of each side per round, in alternating order.

    Raises SystemExit if they train on different numbers of tokens.
    """
    replies: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(rounds):
        order = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for name in order:
            time.sleep(SETTLE)
            replies[name].append(sides[name].batch())
        sizes = {
            (found[-1]["prompt_tokens"], found[-1]["trained_tokens"]) for found in replies.values()
        }
        if len(sizes) > 1:
            raise SystemExit(
                f"the sides differ in their (prompt, trained) token counts: {sorted(sizes)}"
            )
    return replies


def summed_up(replies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return minimum and median of a side's batches, and medians of their parts."""
    seconds = [reply["seconds"] for reply in replies]
    parts = {part: [reply[part] for reply in replies] for part in ("rollout", "passes", "others")}
    parts["update"] = [reply["seconds"] - reply["rollout"] - reply["passes"] for reply in replies]
    return {
        "min": min(seconds),
        "median": statistics.median(seconds),
        "cpu": min(reply["cpu"] for reply in replies),
        **{part: statistics.median(values) for part, values in parts.items()},
        "batches": [
            {part: round(reply[part], 4) for part in ("seconds", "cpu", "others")}
            for reply in replies
        ],
        "trained_tokens": replies[0]["trained_tokens"],
        "compilations_meanwhile": replies[-1].get("compilations", 0)
        - replies[0].get("compilations", 0),
    }


@contextlib.contextmanager
def opened(args: argparse.Namespace, work: Work) -> Iterator[dict[str, Worker]]:
    """Start the workers, ready for their first batch."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:

        def open_side(name: str, python: str, module: str, options: Sequence[str]) -> Worker:
            own = dataclasses.replace(work, options=options)
            return stack.enter_context(
                Worker(name, python, module, own, Path(folder) / f"{name}.log")
            )

        sides = {"ours": open_side("ours", sys.executable, "benchmarks.batch_ours", args.set)}
        if args.python:
            sides["trl"] = open_side("trl", args.python, "benchmarks.batch_trl", args.trl)
        yield sides


def measure(
    args: argparse.Namespace, variant: str, prompts: Sequence[Conversation]
) -> dict[str, Any]:
    """Measure one variant, and return its figures for the line of JSON."""
    iterations, beta = VARIANTS[variant]
    batches = 1 + args.warm + args.rounds
    work = Work(
        str(args.model.resolve()),
        prompts,
        args.samples,
        args.tokens,
        iterations,
        beta,
        batches,
        preload=args.preload,
        threads=args.cores,
    )
    with opened(args, work) as sides:
        agreed = check_agreement(sides)
        take_turns(sides, args.warm)
        replies = take_turns(sides, args.rounds)
        found: dict[str, Any] = {name: summed_up(of_side) for name, of_side in replies.items()}
        about = {name: side.about for name, side in sides.items()}
    result = {
        "iterations": iterations,
        "kl_beta": beta,
        "agreed": agreed,
        "sides": found,
        "about": about,
    }
    if "trl" in found:
        result["ratio"] = {
            key: round(found["trl"][key] / found["ours"][key], 3)
            for key in ("min", "median", "cpu")
        }
    return result


def show(variant: str, result: Mapping[str, Any]) -> None:
    for name, side in result["sides"].items():
        rate = result["about"][name]["product_gflops"]
        parts = "".join(f"{side[part]:>10.3f}" for part in COLUMNS)
        compiled = (
            f"  {side['compilations_meanwhile']} shapes compiled meanwhile"
            if side["compilations_meanwhile"]
            else ""
        )
        print(f"{variant:<8}{name:<6}{parts}{side['trained_tokens']:>8}{rate:>9.0f}{compiled}")
    if "ratio" in result:
        ratio, apart = result["ratio"], result["agreed"]["difference_trl"]
        by = f"{ratio['min']:.2f} by minimum, {ratio['median']:.2f} by median"
        line = f"trl / ours: {by}, {ratio['cpu']:.2f} in processor time"
        print(f"{variant:<8}{line}; gradient norms differ by {apart:.1g}", flush=True)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--python", help="the interpreter of TRL's environment")
    where.add_argument("--make-venv", type=Path, metavar="DIR", help="create it there, and use it")
    add("--model", type=Path, default=TINY, metavar="FOLDER", help="default: the tiny model")
    add("--tasks", choices=list(SUITES), default="bfcl", help="source of the prompts")
    add("--prompts", type=int, default=8)
    add("--samples", type=int, default=8, help="completions of each prompt")
    add("--tokens", type=int, default=128, help="of each completion")
    add("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    add("--rounds", type=int, default=8)
    add("--warm", type=int, default=2, help="uncounted batches after the one that is compared")
    add("--cores", type=int, default=2, help="cores of each side, and its number of threads")
    add("--preload", nargs="+", default=[], metavar="LIBRARY", help="into both sides' processes")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="one of our settings")
    add("--trl", action="append", default=[], metavar="KEY=VALUE", help="one of TRL's, in JSON")
    add("--json", action="store_true", help="end with one line of JSON")
    return parser


def parsed() -> argparse.Namespace:
    """Parse the command line. Bad input exits with one line and status 2."""
    parser = arguments()
    args = parser.parse_args()
    for name, least in LEAST.items():
        if (given := getattr(args, name)) < least:
            parser.error(f"--{name} must be at least {least}, got {given}")
    if not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model} has no config.json: give a Hugging Face folder")
    if missing := [library for library in args.preload if not Path(library).is_file()]:
        parser.error(f"--preload {missing[0]} is no file: give the path of a shared library")
    if args.python and not Path(args.python).is_file():
        parser.error(f"--python {args.python} is no file: give an interpreter, or --make-venv DIR")
    if args.trl and not (args.python or args.make_venv):
        parser.error("--trl needs TRL: give --python or --make-venv too")
    if args.prompts > (there := len(SUITES[args.tasks].tasks("train"))):
        parser.error(f"--prompts is {args.prompts}, --tasks {args.tasks} has {there}")
    return args


def main() -> None:
    args = parsed()
    if args.make_venv:
        args.python = make_venv(args.make_venv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])  # the workers inherit it
    prompts = conversations(SUITES[args.tasks], args.prompts)
    size = f"{args.prompts} prompts x {args.samples} samples of {args.tokens} tokens"
    print(f"{args.model.name}, {size}, {args.cores} cores; {described(processor())}")
    columns = "".join(f"{name:>10}" for name in COLUMNS)
    print(f"{'variant':<8}{'side':<6}{columns}{'tokens':>8}{'product':>9}", flush=True)
    results = {}
    for variant in args.variants:
        results[variant] = measure(args, variant, prompts)
        show(variant, results[variant])
    if args.json:
        record = {"benchmark": "end_to_end", "model": args.model.name, "tasks": args.tasks}
        record |= {name: getattr(args, name) for name in LEAST}
        record["preload"] = [Path(library).name for library in args.preload]
        print(json.dumps(record | {"processor": processor(), "variants": results}))


if __name__ == "__main__":
    main()
