"""Convert an orbax folder to a Hugging Face folder for transformers and vLLM, bit for bit.

    python -m jaxgrpo.tools.convert_orbax_to_hf /models/qwen-7b-orbax /models/qwen-7b-hf

Weights above the shard size are sharded, with an index. Tensors are streamed, so that memory holds
about two of the largest.
"""

import argparse
import resource
import time

from jaxgrpo.paths import absolute
from jaxgrpo.storage import hf_mapping, pretrained
from jaxgrpo.tools.arguments import failed, positive_number


def main() -> None:
    """Convert as the command line says, and print what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=absolute, help="an orbax folder")
    parser.add_argument(
        "destination", type=absolute, help="the new Hugging Face folder; it must not exist"
    )
    parser.add_argument(
        "--shard-gb",
        type=positive_number,
        default=5.0,
        help="largest weights file, in 10^9 bytes (default: 5)",
    )
    args = parser.parse_args()
    started = time.monotonic()
    try:
        if not pretrained.is_orbax(args.source):
            raise ValueError(
                f"{args.source} is not an orbax folder: "
                f"it has no {pretrained.ORBAX_SUBFOLDER}/_METADATA"
            )
        source = pretrained.open_weights(args.source)
        pretrained.write_hf(source, args.destination, max(round(args.shard_gb * 1e9), 1))
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
