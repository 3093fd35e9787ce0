"""Define the command-line arguments that both commands take."""

import argparse

from jaxgrpo.config.describe import HelpConfig


def config_parser(
    program: str, example: str, description: str | None = None, required: bool = True
) -> argparse.ArgumentParser:
    """Return a parser with --config, --set and --help-config. `example` shows an override,
    `required` says whether --config must be given."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    of_config = (
        "a Python file with get_config(), the config.json of a run, or the name of a config that "
        "comes with jaxgrpo, such as cpu_demo"
    )
    parser.add_argument("--config", required=required, help=of_config)
    parser.add_argument("--help-config", action=HelpConfig, help="list all settings and exit")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"override a setting, e.g. {example}",
    )
    return parser
