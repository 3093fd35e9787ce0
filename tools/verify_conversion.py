"""Compare two model folders, of either layout, tensor by tensor and bit for bit.

    python -m jaxgrpo.tools.verify_conversion /models/Qwen2.5-7B-Instruct /models/qwen-7b-orbax
    python -m jaxgrpo.tools.verify_conversion /models/Qwen2.5-0.5B /models/qwen-0.5b-orbax --logits

If tensors differ, the exit status is 1, and they are named. If the folders cannot be compared, it
is 2. `--logits` also compares this project's forward pass with the second folder to transformers
with the first, both in float32. This needs torch, and memory for both models.
"""

import argparse
import importlib.util
from pathlib import Path

import numpy as np

from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.paths import absolute
from jaxgrpo.storage import hf_mapping, pretrained
from jaxgrpo.tools.arguments import failed

_PROMPTS = ("def quicksort(items):", "The capital of France is", "1 2 3 5 8 13 21")
_SHOWN = 20


def differing_tensors(first: pretrained.WeightSource, second: pretrained.WeightSource) -> list[str]:
    """Return the Hugging Face names of the tensors whose bits differ. Raise ValueError if the two
    models differ in size."""
    if hf_mapping.leaf_shapes(first.config) != hf_mapping.leaf_shapes(second.config):
        raise ValueError(
            f"{first.folder} and {second.folder} are not models of one size: "
            f"{first.config} and {second.config}"
        )
    tensors = hf_mapping.hf_tensors(first.config)
    return [
        tensor.name
        for tensor in tensors
        if not hf_mapping.same_bits(first.read(tensor), second.read(tensor))
    ]


def our_logits(folder: Path, ids_T: np.ndarray) -> np.ndarray:
    """Return the float32 logits [T, V] of `jaxgrpo.models.qwen2.forward` for one sequence."""
    import jax
    import jax.numpy as jnp

    from jaxgrpo.models.qwen2 import cast_to, forward, head_table

    config = ModelConfig.from_folder(folder)
    params = jax.tree.map(jnp.asarray, pretrained.load_params(folder, config, np.float32))
    with jax.default_matmul_precision("highest"):
        hidden = forward(config, params, jnp.asarray(ids_T)[None], load=cast_to(jnp.float32))[0]
        return np.asarray(hidden @ head_table(params).T)


def their_logits(folder: Path, ids_T: np.ndarray) -> np.ndarray:
    """Return the float32 logits [T, V] of transformers for one sequence."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()
    with torch.no_grad():
        logits_TV: np.ndarray = model(torch.tensor(ids_T, dtype=torch.long)[None]).logits[0].numpy()
        return logits_TV


def prompt_ids(folder: Path) -> np.ndarray:
    """Return the ids [T] of the prompts as one sequence."""
    return np.array(pretrained.load_tokenizer(folder)("\n".join(_PROMPTS))["input_ids"], np.int32)


def compare_logits(hf_folder: Path, folder: Path) -> float:
    """Return the largest absolute difference of the logits at any position of the prompts."""
    ids_T = prompt_ids(hf_folder)
    return float(np.abs(our_logits(folder, ids_T) - their_logits(hf_folder, ids_T)).max())


def main() -> None:
    """Compare as the command line says, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", type=absolute, help="a Hugging Face folder (or an orbax folder)")
    parser.add_argument("second", type=absolute, help="an orbax folder (or a Hugging Face folder)")
    parser.add_argument(
        "--logits", action="store_true", help="compare logits with transformers too (needs torch)"
    )
    parser.add_argument(
        "--logits-bound",
        type=float,
        default=1e-2,
        help="largest difference that passes (default: 0.01)",
    )
    args = parser.parse_args()
    try:
        first, second = pretrained.open_weights(args.first), pretrained.open_weights(args.second)
        if args.logits and pretrained.is_orbax(args.first):
            raise ValueError(
                "--logits loads the first folder with transformers, "
                f"but {args.first} is an orbax folder: name it second"
            )
        if args.logits and importlib.util.find_spec("torch") is None:
            raise ValueError("--logits needs PyTorch, which is not installed")
        differing = differing_tensors(first, second)
    except (OSError, ValueError) as error:
        raise failed(error) from error
    count = len(hf_mapping.hf_tensors(first.config))
    if differing:
        more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise SystemExit(
            f"{len(differing)} of {count} tensors differ: {', '.join(differing[:_SHOWN])}{more}"
        )
    parameters = hf_mapping.parameter_count(first.config)
    print(f"{count} tensors, {parameters:,} parameters: every bit is the same")
    if args.logits:
        difference = compare_logits(args.first, args.second)
        print(
            f"logits: largest absolute difference from transformers in float32 is {difference:.3g}"
        )
        if not difference <= args.logits_bound:
            raise SystemExit(f"the logits differ by more than {args.logits_bound}")


if __name__ == "__main__":
    main()
