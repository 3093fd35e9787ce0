"""Serve a suite as an environment of OpenEnv, for clients of any trainer.

    python -m jaxgrpo.tools.serve_openenv --suite jaxgrpo.envs.bfcl:Bfcl
    python -m jaxgrpo.tools.serve_openenv --config configs/cpu_demo.py --set environment.max_turns=2

Prints its URL and serves until it is interrupted. Needs the package openenv
(pip install 'jaxgrpo[openenv]'). See docs/openenv.md.
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgrpo.config.files import add_import_folders, find
from jaxgrpo.config.load import apply_override, load_config
from jaxgrpo.config.settings import Config, ConfigError, ModelSettings
from jaxgrpo.envs.openenv.in_process import package_fault
from jaxgrpo.interruptions import interruptible, run_program
from jaxgrpo.tools.arguments import positive_integer

KEY_VARIABLE = "JAXGRPO_OPENENV_KEY"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxgrpo.tools.serve_openenv",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="a Python file with get_config(), or a run's config.json")
    source.add_argument("--suite", help="the import path of a suite, with its default settings")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting, e.g. environment.max_turns=2",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help=f"where to listen; other machines must send the key in ${KEY_VARIABLE}",
    )
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument(
        "--splits", nargs="+", default=["train", "test"], help="default: train test"
    )
    parser.add_argument(
        "--sessions", type=positive_integer, default=64, help="most episodes at once"
    )
    parser.add_argument(
        "--max-turns",
        type=positive_integer,
        help="policy turns after which an episode is scored (default: rollout.max_turns)",
    )
    return parser.parse_args(arguments)


def suite_config(args: argparse.Namespace) -> Config:
    """Return the config whose environment is served. Raises ConfigError."""
    if args.config:
        return load_config(args.config, args.set)
    add_import_folders([str(Path.cwd())])
    if ":" not in args.suite:
        raise ConfigError(f"--suite must be like jaxgrpo.envs.bfcl:Bfcl, got {args.suite!r}")
    try:
        suite = find(args.suite, None)()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{args.suite} cannot be made without settings: {error}") from error
    config = Config(name="served", model=ModelSettings(source=""), environment=suite)
    for override in args.set:
        config = apply_override(config, override)
    return config


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises ConfigError."""
    if host not in LOOPBACK and not os.environ.get(KEY_VARIABLE):
        raise ConfigError(
            f"{host} can be reached from other machines: set {KEY_VARIABLE} to a key that clients "
            "must send, or listen on 127.0.0.1"
        )
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(128)
    except (OSError, OverflowError) as error:
        found.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error}; choose another --port"
        ) from error
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until interrupted. Return the exit status."""
    args = parse(arguments)
    try:
        config = suite_config(args)
        if fault := package_fault():  # the folder of the config is searched first from now on
            raise ConfigError(fault)
        counts = {split: len(config.environment.tasks(split)) for split in args.splits}
        bound = listening(args.host, args.port)
    except (ConfigError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    import uvicorn

    from jaxgrpo.tools.openenv_server import Guard, application

    turns = args.max_turns or config.rollout.max_turns
    hosts = LOOPBACK if args.host in LOOPBACK else ()
    served = application(config.environment, args.sessions, turns, args.splits)
    app = Guard(served, hosts, os.environ.get(KEY_VARIABLE, ""))
    shown = f"[{args.host}]" if ":" in args.host else args.host
    tasks = ", ".join(f"{count} tasks of {split}" for split, count in counts.items())
    url = f"http://{shown}:{bound.getsockname()[1]}"
    print(f"{type(config.environment).__name__} with {tasks} at {url}", flush=True)
    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=2
    )
    with interruptible():
        uvicorn.Server(settings).run(sockets=[bound])
    return 0


if __name__ == "__main__":
    run_program(main)
