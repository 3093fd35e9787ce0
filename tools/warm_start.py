"""Train a model on the demonstrations of a suite, so that reinforcement learning finds a signal.

    python -m jaxgrpo.tools.warm_start DESTINATION --config FILE [--until P] [--tasks N]

The config's environment must have `demonstration(task)`, which returns policy turns that solve a
task. Only tasks of its train split are demonstrated. Training starts from the config's model and
stops once the mean probability of the demonstrations reaches `--until`.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp

from jaxgrpo.config.load import load_config
from jaxgrpo.config.settings import Config, ConfigError
from jaxgrpo.paths import absolute
from jaxgrpo.run import setup
from jaxgrpo.storage.pretrained import save_hf
from jaxgrpo.tools.arguments import failed, positive_integer, positive_number
from jaxgrpo.tools.make_tiny_model import add_training_flags, demonstration_ids, warm_start


def main() -> None:
    """Train as the command line says."""
    args = _parse()
    if args.destination.exists():  # before the model is trained
        there = f"{args.destination} exists: remove it, or use another destination"
        raise failed(FileExistsError(there))
    try:
        config = load_config(args.config, args.set)
        suite = _demonstrated(config)
        assets = setup.open_model_assets(config)
        tasks = setup.open_tasks(config, "train")[: args.tasks]
    except ConfigError as error:
        raise failed(error) from None
    episodes = [demonstration_ids(suite, task, assets.tokenizer, assets.chat) for task in tasks]
    lengths = [len(ids) for ids, _ in episodes]
    print(f"{len(episodes)} demonstrations of at most {max(lengths)} tokens", flush=True)
    params = jax.tree.map(jnp.asarray, setup.initial_params(assets, jnp.float32))
    params = warm_start(assets.config, params, episodes, args)
    save_hf(jax.device_get(params), assets.folder, args.destination)


def _demonstrated(config: Config) -> Any:
    """Return the config's suite. Raises ConfigError if it does not demonstrate its tasks."""
    suite: Any = config.environment
    if not callable(getattr(suite, "demonstration", None)):
        kind = type(suite).__name__
        raise ConfigError(f"{kind} has no method demonstration(task): it cannot be shown")
    return suite


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jaxgrpo.tools.warm_start", description=__doc__.splitlines()[0]
    )
    parser.add_argument("destination", type=absolute)
    parser.add_argument("--config", required=True, help="config whose model is trained")
    of_set = "override a setting, as for training"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=of_set)
    parser.add_argument(
        "--until",
        type=positive_number,
        default=0.1,
        help="mean probability of the demonstrations at which training stops",
    )
    of_tasks = "demonstrate only this many first tasks (default: all)"
    parser.add_argument("--tasks", type=positive_integer, help=of_tasks)
    add_training_flags(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
