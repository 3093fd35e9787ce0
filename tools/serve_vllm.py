"""Start the vLLM server of a config by hand, on any host. It runs until it is interrupted.

python -m jaxgrpo.tools.serve_vllm --config FILE [--set key=value ...] [--log FILE]
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from jaxgrpo.config.load import load_config
from jaxgrpo.config.settings import ConfigError
from jaxgrpo.interruptions import run_program
from jaxgrpo.run.samplers import server_plan
from jaxgrpo.run.setup import open_model_assets
from jaxgrpo.samplers.base import SamplerError
from jaxgrpo.samplers.vllm.auth import KEY_VARIABLE
from jaxgrpo.samplers.vllm.server import ServerError, VllmServer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the config's server until it is interrupted."""
    parser = argparse.ArgumentParser(prog="python -m jaxgrpo.tools.serve_vllm", description=__doc__)
    parser.add_argument("--config", required=True, help="a Python file with get_config()")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting, e.g. vllm.port=8000",
    )
    parser.add_argument("--log", help="file for vLLM's output (default: a temporary file)")
    args = parser.parse_args(arguments)
    try:
        config = load_config(args.config, args.set)
        log = Path(args.log or tempfile.mkstemp(prefix="vllm-", suffix=".log")[1])
        server = VllmServer(
            server_plan(config, open_model_assets(config), own_weights=True),
            log,
            os.environ.get(KEY_VARIABLE),
        )
        try:
            server.wait(config.vllm.start_seconds)
            print(f"serving at {server.url} (log: {log}); Ctrl-C ends it", flush=True)
            while (failure := server.failure()) is None:
                time.sleep(1)
            raise ServerError(failure)
        except KeyboardInterrupt:
            return 0
        finally:
            server.close()
    except (ConfigError, SamplerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    run_program(main)
