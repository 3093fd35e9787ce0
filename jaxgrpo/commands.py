"""The installed command `jaxgrpo`: `jaxgrpo train ...` runs `python -m jaxgrpo.train ...`, and so
on."""

import importlib
import sys

COMMANDS = {
    "train": ("jaxgrpo.train", "train a policy"),
    "evaluate": ("jaxgrpo.evaluate", "measure the pass rate of a policy"),
    "view": ("jaxgrpo.viewer.__main__", "see the episodes of a run"),
    "check": ("jaxgrpo.check", "try an environment before training"),
    "init": ("jaxgrpo.init", "write an environment, a config and a test to start from"),
}
"""The module of each subcommand, and what it does."""


def main() -> None:
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if name in COMMANDS:
        _run(COMMANDS[name][0], arguments)
    listed = "\n".join(f"  {one:10}{what}" for one, (_, what) in COMMANDS.items())
    usage = f"usage: jaxgrpo COMMAND ...\n\n{listed}\n\njaxgrpo COMMAND --help says more."
    if name in ("", "-h", "--help"):
        print(usage)
        sys.exit(0 if name else 2)
    print(f"error: no command {name!r}: there are {', '.join(COMMANDS)}", file=sys.stderr)
    sys.exit(2)


def _run(module: str, arguments: list[str]) -> None:
    """Import and run a module. The import takes seconds, so Ctrl-C is handled there too."""
    try:
        program = importlib.import_module(module)
        interruptions = importlib.import_module("jaxgrpo.interruptions")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    interruptions.run_program(lambda: program.main(arguments))
