"""Make qwen2_untied.npz and qwen2_tied.npz: tiny random Qwen2 models and what transformers computes with them, in float32 on a CPU.

    python -m tests.golden.make_golden

Made with torch 2.13.0 and transformers 5.23.0. Each file holds config (JSON), the weights by their Hugging Face names, and:

    ids_BT, logits_BTV                             plain sequences
    long_ids_T, long_positions_K, long_logits_KV   one sequence longer than a block of queries, at some positions
    prompt_NP, prompt_lengths_N, completions_NGC, completion_lengths_NG, row_logits_NGCV
        right-padded groups; row_logits at [n, g, c] predict completions[n, g, c], computed without padding; NaN at padding
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).parent
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "intermediate_size": 24,
    "num_attention_heads": 4,
}
CONFIGS = {
    "qwen2_untied": {
        **_SIZES,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
    },
    "qwen2_tied": {
        **_SIZES,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "tie_word_embeddings": True,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-3,
    },
}


def random_model(config: Qwen2Config, seed: int) -> Qwen2ForCausalLM:
    """Weights large enough that attention is far from uniform; biases and norm scales that are not their initial zeros and ones."""
    model = Qwen2ForCausalLM(config).eval().float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if "norm" in name else 0.4 * noise)
    return model


@torch.no_grad()
def logits(model: Qwen2ForCausalLM, ids: np.ndarray) -> np.ndarray:
    """Float32 logits [T, V] of one sequence [T]."""
    return model(torch.tensor(ids, dtype=torch.long)[None]).logits[0].numpy()


def make(name: str, seed: int) -> None:
    """Write one file."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    config = Qwen2Config(**CONFIGS[name], max_position_embeddings=1024, attn_implementation="eager")
    model = random_model(config, seed)
    weights = {
        key: value.numpy()
        for key, value in model.state_dict().items()
        if not (config.tie_word_embeddings and key == "lm_head.weight")
    }
    ids_BT = rng.integers(0, 64, (2, 12)).astype(np.int32)
    long_ids_T = rng.integers(0, 64, 600).astype(np.int32)
    long_positions_K = np.array([0, 1, 511, 512, 513, 599])
    prompt_NP = rng.integers(0, 64, (2, 7)).astype(np.int32)
    prompt_lengths_N = np.array([7, 4], np.int32)
    completions_NGC = rng.integers(0, 64, (2, 3, 6)).astype(np.int32)
    completion_lengths_NG = np.array([[6, 3, 1], [2, 6, 5]], np.int32)
    row_logits_NGCV = np.full((2, 3, 6, 64), np.nan, np.float32)
    for n, g in np.ndindex(2, 3):
        p, c = prompt_lengths_N[n], completion_lengths_NG[n, g]
        row = logits(model, np.concatenate([prompt_NP[n, :p], completions_NGC[n, g, :c]]))
        row_logits_NGCV[n, g, :c] = row[p - 1 : p - 1 + c]
    np.savez_compressed(
        HERE / f"{name}.npz",
        config=json.dumps(config.to_dict()),
        ids_BT=ids_BT,
        logits_BTV=np.stack([logits(model, ids) for ids in ids_BT]),
        long_ids_T=long_ids_T,
        long_positions_K=long_positions_K,
        long_logits_KV=logits(model, long_ids_T)[long_positions_K],
        prompt_NP=prompt_NP,
        prompt_lengths_N=prompt_lengths_N,
        completions_NGC=completions_NGC,
        completion_lengths_NG=completion_lengths_NG,
        row_logits_NGCV=row_logits_NGCV,
        **weights,
    )


if __name__ == "__main__":
    for i, file in enumerate(CONFIGS):
        make(file, seed=i)
