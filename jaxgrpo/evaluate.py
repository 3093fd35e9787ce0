"""python -m jaxgrpo.evaluate --config FILE [--checkpoint RUN] [--split test | --suite NAME]
    [--samples K]

Measure the pass rate on a split, with its confidence interval. With --against, compare it with a
recorded evaluation on the same tasks. With --recorded, compare two recorded evaluations.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np

from jaxgrpo.config.checks import is_file_name
from jaxgrpo.config.load import load_config
from jaxgrpo.config.settings import NO_LORA, Config, ConfigError
from jaxgrpo.interruptions import interruptible, run_program
from jaxgrpo.learner.sharding import store
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.paths import absolute
from jaxgrpo.rollout.background import EventLoopThread
from jaxgrpo.rollout.episode import SamplingParams
from jaxgrpo.run import records, setup, summary
from jaxgrpo.run.agreement import agreement_check
from jaxgrpo.run.command_line import config_parser
from jaxgrpo.run.comparison import (
    Outcomes,
    Source,
    check_shared,
    outcomes,
    read_outcomes,
    report,
)
from jaxgrpo.run.evaluation import Evaluation, Evaluator
from jaxgrpo.run.folder import locked_folder, make_run_folder, run_folder
from jaxgrpo.run.ground_truth import record_ground_truth
from jaxgrpo.run.metrics import Recorder
from jaxgrpo.run.progress import EvaluationProgress
from jaxgrpo.run.samplers import open_sampler
from jaxgrpo.run.skipping import AllGroupsDroppedError
from jaxgrpo.run.terminal import Terminal
from jaxgrpo.run.weights import LogicalWeights
from jaxgrpo.samplers.base import Sampler, SamplerError
from jaxgrpo.storage.checkpoint import read_policy


@dataclasses.dataclass(frozen=True)
class Request:
    """What to evaluate: `samples` episodes per task, with the weights of a run's checkpoint at
    `step` (None: the newest), or without a checkpoint those of the config's model. `against` is the
    recorded evaluation to compare with."""

    evaluated: setup.Evaluated
    samples: int
    checkpoint: Path | None
    step: int | None
    against: Outcomes | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    start = Path.cwd()  # a config file or an environment may change it
    args = _parse(arguments)
    try:
        against = _read_against(args, start)
        if args.recorded:
            return _compare_recorded(args, start, against)
        config = load_config(args.config, args.set)
        setup.restrict_gpus(config)
        setup.enable_compilation_cache(config)
        checkpoint = args.checkpoint and absolute(args.checkpoint, start)
        samples = config.evaluation.samples if args.samples is None else args.samples
        evaluated = choose(config, args.split, args.suite)
        request = Request(evaluated, samples, checkpoint, args.step, against)
        check_request(request)
        folder = run_folder(args.run_dir, f"{config.name}-eval-{evaluated.name}", start)
        with interruptible(), locked_folder(folder):
            outcome = evaluate(request, folder)
        _report(outcome, against)
        (rate,) = summary.pass_rates({}, {evaluated.name: float(outcome.metrics["eval/pass_rate"])})
        Terminal().table(f"done: {rate}", summary.after_evaluation(folder))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (AllGroupsDroppedError, SamplerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.config is None and not args.recorded:
        parser.error("the following arguments are required: --config")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = config_parser(
        "python -m jaxgrpo.evaluate", "evaluation.temperature=0", __doc__, required=False
    )
    of_checkpoint = "a run's folder (default: evaluate the config's own model)"
    parser.add_argument("--checkpoint", metavar="RUN", help=of_checkpoint)
    of_step = "the step of the run's checkpoint (default: the newest)"
    parser.add_argument("--step", type=int, help=of_step)
    parser.add_argument("--split", help="a split of the environment's tasks (default: test)")
    parser.add_argument("--suite", help="in place of a split: a suite of evaluation.suites")
    of_samples = "episodes per task (default: the config's evaluation.samples)"
    parser.add_argument("--samples", type=int, help=of_samples)
    parser.add_argument("--run-dir", help="folder to record in (default: runs/NAME-eval-SPLIT)")
    of_against = "compare with the evaluation that is recorded in this run or evaluation"
    parser.add_argument("--against", metavar="FOLDER", help=of_against)
    of_against_step = "the step of that evaluation (default: the only one)"
    parser.add_argument("--against-step", type=int, metavar="STEP", help=of_against_step)
    of_recorded = "read the checkpoint's evaluation from its run too, and sample nothing"
    parser.add_argument("--recorded", action="store_true", help=of_recorded)
    return parser


def _read_against(args: argparse.Namespace, start: Path) -> Outcomes | None:
    """Return the recorded evaluation to compare with. Raises ConfigError."""
    problems = []
    if args.against is None and args.against_step is not None:
        problems.append("--against-step names an evaluation of a folder: give it with --against")
    if args.recorded and (args.against is None or args.checkpoint is None):
        problems.append("--recorded compares two folders: give --checkpoint and --against")
    unused = {"--samples": args.samples is not None, "--run-dir": args.run_dir, "--set": args.set}
    if args.recorded and any(unused.values()):
        given = ", ".join(option for option, is_given in unused.items() if is_given)
        problems.append(f"--recorded samples nothing: leave out {given}")
    if problems:
        raise ConfigError("; ".join(problems))
    if args.against is None:
        return None
    against = absolute(args.against, start)
    source = Source(against, args.against_step, "--against", "--against-step")
    return read_outcomes(source, _name(args))


def _compare_recorded(args: argparse.Namespace, start: Path, against: Outcomes | None) -> int:
    assert against is not None
    source = Source(absolute(args.checkpoint, start), args.step, "--checkpoint", "--step")
    ours = read_outcomes(source, _name(args))
    print(ours.name)
    print(*report(against, ours), sep="\n")
    return 0


def _name(args: argparse.Namespace) -> str:
    """Return the name of the evaluation, as in the names of its record files."""
    _check_not_both(args.split, args.suite)
    return args.suite or args.split or "test"


def _check_not_both(split: str | None, suite: str | None) -> None:
    if split is not None and suite is not None:
        raise ConfigError("--suite names a suite and its split: leave out --split")


def choose(config: Config, split: str | None, suite: str | None) -> setup.Evaluated:
    """Return what to evaluate: a split of the config's environment, or another of its suites."""
    _check_not_both(split, suite)
    if suite is None:
        name = "test" if split is None else split
        if not is_file_name(name):
            raise ConfigError(f"--split must be the name of a split, got {name!r}")
        return setup.Evaluated(name, name, config)
    known = {one.name: one for one in setup.suites(config)}
    if suite not in known:
        listed = ", ".join(known) or "none"
        raise ConfigError(f"--suite must be one of evaluation.suites ({listed}), got {suite!r}")
    return known[suite]


def check_request(request: Request) -> None:
    """Raise ConfigError that lists what is wrong with a request."""
    problems = []
    if not 1 <= request.samples < 2**31:
        problems.append(f"--samples must be from 1 to {2**31 - 1}, got {request.samples}")
    if request.step is not None and request.checkpoint is None:
        problems.append(
            f"--step {request.step} names one of a run's checkpoints: give the run's folder with "
            "--checkpoint"
        )
    if problems:
        raise ConfigError("; ".join(problems))


def evaluate(request: Request, folder: Path) -> Evaluation:
    """Evaluate, and record the metrics and episodes in `folder`."""
    config = request.evaluated.config
    setup.check_rewards(config)
    assets = setup.open_model_assets(config)
    tasks = setup.split_tasks(config, request.evaluated.split)
    if request.against is not None:
        check_shared(request.against, [task.id for task in tasks], request.evaluated.name)
    prompts = setup.check_episodes(config, assets, tasks)
    params, step = _read_weights(config, assets, request)
    make_run_folder(folder)
    record_ground_truth([(config, tasks)], folder)
    weights = LogicalWeights(params, assets.config, step // config.training.iterations)
    sampling = SamplingParams(config.evaluation.temperature, config.evaluation.top_p)
    with (
        EventLoopThread() as loop,
        Terminal() as terminal,
        ExitStack() as stack,
    ):
        sampler = open_sampler(config, assets, weights, loop, folder, stack)
        check = _check_sampler(config, weights, prompts.first_P, loop, sampler)
        rollout = setup.build_rollout(config, assets, sampler, sampling)
        progress = EvaluationProgress(terminal, len(tasks) * request.samples)
        work = f"{len(tasks)} {request.evaluated.name} tasks x {request.samples} samples"
        terminal.say(f"evaluating the policy of step {step} on {work}")
        terminal.start(progress.status)
        evaluator = Evaluator(rollout, loop, request.samples, config.seed, progress.episodes)
        outcome = evaluator.evaluate(tasks, request.evaluated.name, step)
    trajectories, name = folder / "trajectories", request.evaluated.name
    for fault in records.write_evaluation(trajectories, outcome.result, name, step):
        print(fault, file=sys.stderr)
    recorder = Recorder(folder, tensorboard=False, wandb_project=None, name=config.name)
    recorder.record(step, outcome.metrics | check)
    recorder.close()
    return outcome


def _read_weights(
    config: Config, assets: setup.ModelAssets, request: Request
) -> tuple[Params, int]:
    """Return the logical tree of the weights to evaluate, and their step: 0 for the config's own
    model."""
    dtype, checkpoint = setup.compute_dtype(config), request.checkpoint
    base = functools.partial(setup.initial_params, assets, dtype)
    if checkpoint is None:
        return base(), 0
    try:
        params, step = read_policy(checkpoint / "checkpoints", assets.config, request.step, base)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"--checkpoint {checkpoint}: {error}") from error
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params), step


def _check_sampler(
    config: Config,
    weights: LogicalWeights,
    prompt_ids_P: np.ndarray,
    loop: EventLoopThread,
    sampler: Sampler,
) -> dict[str, float]:
    """Compare the sampler with a forward pass on one device, as training does after a publish.
    Adapters are merged already. Raises MismatchError if the sampler serves other weights."""
    on_one = dataclasses.replace(config.training, devices=1, groups_per_device=1)
    config = dataclasses.replace(config, training=on_one, lora=NO_LORA)
    update = setup.build_update(config, weights.model)
    check = agreement_check(config, update, prompt_ids_P)
    if check is None:
        return {}
    stored = store(weights.params, update.layout, update.mesh, update.compute_dtype)
    return check.run(loop, sampler, stored, weights.version)


def _report(outcome: Evaluation, against: Outcomes | None) -> None:
    """Print the metrics and the comparison."""
    for key, value in outcome.metrics.items():
        print(f"{key:40} {value:.4f}" if isinstance(value, float) else f"{key:40} {value}")
    print(outcome.headline)
    if against is not None:
        played = (t for group in outcome.result.groups for t in group.trajectories)
        print(*report(against, outcomes("this evaluation", played)), sep="\n")


if __name__ == "__main__":
    run_program(main)
