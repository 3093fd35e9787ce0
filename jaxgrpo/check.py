"""python -m jaxgrpo.check --config FILE [--set KEY=VALUE] [--play [TASK]] [--policy [N]]

Try an environment before training: open every task twice, play scripted episodes, and say what is
wrong and what to try. With --play, you are the policy. With --policy, the config's model is.
"""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from jaxgrpo.config.load import load_config
from jaxgrpo.config.settings import Config, ConfigError
from jaxgrpo.interruptions import interruptible, run_program
from jaxgrpo.rollout.background import preserve_streams
from jaxgrpo.run import setup
from jaxgrpo.run.by_hand import play_by_hand
from jaxgrpo.run.check_report import as_json, print_report
from jaxgrpo.run.command_line import config_parser
from jaxgrpo.run.environment_check import TRIED, check_environment
from jaxgrpo.run.policy_trial import try_policy


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 if all is well, 1 if there are errors."""
    args = _parser().parse_args(arguments)
    try:
        _check_arguments(args)
        config = load_config(args.config, args.set)
        setup.restrict_gpus(config)
        setup.enable_compilation_cache(config)
        with interruptible(), preserve_streams():
            return _check(config, args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = config_parser("python -m jaxgrpo.check", "rollout.max_turns=4", __doc__)
    of_tasks = f"tasks of each split to play scripts on (default: {TRIED})"
    parser.add_argument("--tasks", type=int, default=TRIED, metavar="N", help=of_tasks)
    of_play = "play an episode by hand, of this task (default: the first of the train split)"
    parser.add_argument("--play", nargs="?", const="", metavar="TASK", help=of_play)
    of_policy = "sample at least N episodes by the config's model (default: four groups)"
    parser.add_argument("--policy", type=int, nargs="?", const=0, metavar="N", help=of_policy)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _check_arguments(args: argparse.Namespace) -> None:
    if args.tasks < 1:
        raise ConfigError(f"--tasks must be at least 1, got {args.tasks}")
    if args.policy is not None and args.policy < 0:
        raise ConfigError(f"--policy must be at least 1, got {args.policy}")
    modes = {"--play": args.play is not None, "--policy": args.policy is not None}
    given = [mode for mode, wanted in {**modes, "--json": args.json}.items() if wanted]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} cannot be combined: give one of them")


def _check(config: Config, args: argparse.Namespace) -> int:
    console = Console(file=sys.stdout)
    setup.check_rewards(config)
    if args.policy is not None:
        return try_policy(config, args.policy, console)
    assets = setup.open_model_assets(config, weights=False)
    if args.play is not None:
        return play_by_hand(config, assets, args.play, console)
    report = check_environment(config, assets, args.tasks)
    if args.json:
        print(as_json(report))
    else:
        print_report(report, console)
    return 1 if report.errors else 0


if __name__ == "__main__":
    run_program(main)
