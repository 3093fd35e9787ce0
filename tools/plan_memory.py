"""Plan what a run needs: memory, operations, traffic, time and cost.

    python -m jaxgrpo.tools.plan_memory --config configs/h200x4.py
    python -m jaxgrpo.tools.plan_memory --config h200x4 --prompt 4096 --completion 1024 --table
    python -m jaxgrpo.tools.plan_memory --config configs/h200x4.py --rollout-tokens-per-second 9000

The train step is compiled from shapes alone, without weights. If jax's CUDA wheels are installed,
it is compiled for the GPU, which need not be there, and the memory is the compiler's. Otherwise it
is compiled for simulated CPU devices. The state and the batch are then exact, but temporaries and
the peak are estimates, and too high.

If the step does not fit, the exit status is 2, and the settings to change are printed. With --json,
the last line is a JSON object, in which `peak_gib` is per device.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from jaxgrpo.config.settings import ConfigError
from jaxgrpo.tools.arguments import positive_integer, positive_number
from jaxgrpo.tools.plan_report import as_json, describe, notes, refusal, table
from jaxgrpo.tools.plans import Planner
from jaxgrpo.tools.targets import TARGETS, simulate

TABLE_GPUS = (4, 8, 64, 512)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_run_flags(parser)
    _add_cluster_flags(parser)
    rows = ", ".join(map(str, TABLE_GPUS))
    parser.add_argument("--table", action="store_true", help=f"also plan for {rows} GPUs")
    parser.add_argument("--json", action="store_true", help="also print the plan as JSON")
    args = parser.parse_args(arguments)
    args.link = args.link or TARGETS[args.target].link / 1e9
    args.network = args.network or TARGETS[args.target].network / 1e9
    return args


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    of_config = "a Python file with get_config(), or the config.json of a run"
    parser.add_argument("--config", required=True, help=of_config)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting"
    )
    for flag, of_flag in {
        "--devices": "training devices (default: the config's)",
        "--prompt": "prompt tokens per group (default: rollout.max_prompt_tokens)",
        "--completion": "tokens per completion (default: rollout.max_completion_tokens)",
    }.items():
        parser.add_argument(flag, type=positive_integer, help=of_flag)


def _add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", choices=sorted(TARGETS), default="h200")
    of_compiler = "auto: gpu if jax's CUDA wheels are installed, else cpu"
    compilers = ("auto", "gpu", "cpu")
    parser.add_argument("--compiler", choices=compilers, default="auto", help=of_compiler)
    of_mfu = "expected model FLOPs utilization (default: 0.4)"
    parser.add_argument("--mfu", type=positive_number, default=0.4, help=of_mfu)
    parser.add_argument(
        "--rollout-tokens-per-second", type=positive_number, help="of all samplers together"
    )
    parser.add_argument("--gpu-hour-price", type=positive_number, help="in any currency")
    for flag, network in {"--link": "NVLink", "--network": "InfiniBand"}.items():
        of_network = f"{network} per GPU, one direction (default: the target's)"
        parser.add_argument(flag, type=positive_number, metavar="GB/S", help=of_network)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Return the exit status."""
    args = parse(arguments)
    try:
        planner = Planner(args)
        simulate(1 if planner.gpu else max(TABLE_GPUS) if args.table else planner.devices)
        plan = planner.main_plan()
        plans = [planner.scaled(gpus) for gpus in TABLE_GPUS] if args.table else []
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([*describe(planner, plan), *notes(planner, plan)]))
    if plans:
        print("\n" + "\n".join(table(plans)))
    refused = refusal(planner, plan)
    if refused:
        print("error: " + "\n".join(refused), file=sys.stderr)
    if args.json:
        print(json.dumps(as_json(planner, plan, plans)))
    return 2 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
