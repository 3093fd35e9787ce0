"""Convert a Hugging Face Qwen2 or Qwen2.5 folder to an orbax folder, bit for bit.

    python -m tools.convert_hf_to_orbax /models/Qwen2.5-7B-Instruct /models/qwen-7b-orbax
    python -m tools.convert_hf_to_orbax Qwen/Qwen2.5-0.5B-Instruct /models/qwen-0.5b-orbax --revision <commit>

The destination holds the weights (params/, an orbax checkpoint), config.json and the tokenizer: it can be given as the model of a run, and
tools.convert_orbax_to_hf turns it back without the source. Tensors are streamed: memory holds about one layer's largest tensor.
"""

import argparse
import resource
import time

import absl.logging

from jaxgrpo.paths import absolute
from jaxgrpo.storage import hf_mapping, pretrained
from tools.arguments import failed


def main() -> None:
    """Read the arguments, convert, say what was written. Exits with the reason when it cannot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a Hugging Face folder, or a hub name")
    parser.add_argument(
        "destination", type=absolute, help="the orbax folder to make; it must not exist"
    )
    parser.add_argument("--revision", help="commit, tag or branch of a hub name (default: main)")
    args = parser.parse_args()
    absl.logging.set_verbosity(
        absl.logging.ERROR
    )  # orbax warns of what a one-process save does not need
    started = time.monotonic()
    try:
        folder = pretrained.locate(args.source, args.revision)
        if pretrained.is_orbax(folder):
            raise ValueError(
                f"{folder} is an orbax folder already: tools.convert_orbax_to_hf turns it back"
            )
        source = pretrained.open_weights(folder)
        pretrained.write_orbax(source, args.destination)
    except (OSError, ValueError) as error:
        raise failed(error) from error
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    count = hf_mapping.parameter_count(source.config)
    print(
        f"{args.destination}: {count:,} parameters in {time.monotonic() - started:.1f} s, peak memory {peak:.2f} GiB"
    )


if __name__ == "__main__":
    main()
