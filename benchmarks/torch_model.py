"""The Qwen2 model of transformers in a model's sizes, for the PyTorch sides of benchmarks."""

from transformers import Qwen2Config, Qwen2ForCausalLM

from jaxgrpo.models.model_config import ModelConfig


def new_causal_lm(model: ModelConfig) -> Qwen2ForCausalLM:
    """Create the model with random float32 weights and sdpa attention, on torch's device."""
    config = Qwen2Config(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=model.context_length,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        rms_norm_eps=model.norm_epsilon,
        tie_word_embeddings=model.tied_embeddings,
    )
    return Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa")
