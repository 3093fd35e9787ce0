"""Convert a Hugging Face Qwen2 or Qwen2.5 folder to an orbax folder, bit for bit.

    python -m jaxgrpo.tools.convert_hf_to_orbax /models/Qwen2.5-7B-Instruct /models/qwen-7b-orbax
    python -m jaxgrpo.tools.convert_hf_to_orbax Qwen/Qwen2.5-0.5B-Instruct OUT --revision COMMIT

The destination holds the weights (params/, an orbax checkpoint), config.json and the tokenizer. A
run can use it as its model, and jaxgrpo.tools.convert_orbax_to_hf converts it back without the
source.
Tensors are streamed, so that memory holds about the largest tensor of one layer.
"""

import argparse
import resource
import time

import absl.logging

from jaxgrpo.paths import absolute
from jaxgrpo.storage import hf_mapping, pretrained
from jaxgrpo.tools.arguments import failed


def main() -> None:
    """Convert as the command line says, and print what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a Hugging Face folder, or a name on the Hub")
    parser.add_argument(
        "destination", type=absolute, help="the new orbax folder; it must not exist"
    )
    parser.add_argument("--revision", help="commit, tag or branch on the Hub (default: main)")
    args = parser.parse_args()
    absl.logging.set_verbosity(absl.logging.ERROR)  # hides warnings about saves by many processes
    started = time.monotonic()
    try:
        folder = pretrained.locate(args.source, args.revision)
        if pretrained.is_orbax(folder):
            raise ValueError(
                f"{folder} is already an orbax folder: jaxgrpo.tools.convert_orbax_to_hf converts "
                "it back"
            )
        source = pretrained.open_weights(folder)
        pretrained.write_orbax(source, args.destination)
    except (OSError, ValueError) as error:
        raise failed(error) from error
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    count = hf_mapping.parameter_count(source.config)
    seconds = time.monotonic() - started
    print(
        f"{args.destination}: {count:,} parameters in {seconds:.1f} s, peak memory {peak:.2f} GiB"
    )


if __name__ == "__main__":
    main()
