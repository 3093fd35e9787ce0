"""What a run is made of: parts that do not belong together are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.config import ConfigError
from jaxgrpo.model import ModelConfig
from jaxgrpo.packing import PackingSettings, pack
from jaxgrpo.setup import build_update, open_policy, served_dtype
from tests.episodes import random_groups
from tests.random_weights import random_params
from tests.training import CONFIG_JSON, changed, make_model, small_config


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    model = make_model(tmp_path)
    tokens = len(open_policy(small_config(model)).tokenizer)
    config = {**CONFIG_JSON, "vocab_size": tokens}
    (model / "config.json").write_text(json.dumps(config))
    assert open_policy(small_config(model)).config.vocab_size == tokens
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": tokens - 1}))
    with pytest.raises(ConfigError, match=rf"its tokenizer has {tokens} tokens, its weights have {tokens - 1} "):
        open_policy(small_config(model))


def test_what_servers_hold_is_bfloat16_and_with_adapters_nothing_that_the_trainer_has(tmp_path):
    model = make_model(tmp_path)
    assert served_dtype(small_config(model)) is None
    assert served_dtype(changed(tmp_path, model, "sampler=vllm")) == jnp.bfloat16
    assert served_dtype(changed(tmp_path, model, "sampler=vllm", "lora.rank=2")) is None


def test_the_policy_that_a_server_samples_from_is_the_one_that_is_trained(tmp_path):
    """In float32, with bfloat16 weights: its log-probabilities are those of the rounded weights, of which the embedded sampler's run knows
    nothing; the weights that are kept are not rounded."""
    model = make_model(tmp_path)
    sizes = ModelConfig.from_folder(model)
    params = random_params(sizes, scale=0.2)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(np.float32), params)
    (batch,) = pack(random_groups(0, 2, 2, 260, 8, 8), 2, 8, PackingSettings(prompt_multiple=8, completion_multiple=8))
    served = build_update(changed(tmp_path, model, "sampler=vllm", "model.compute_dtype=float32"), sizes)
    embedded = build_update(small_config(model), sizes)
    state = served.init(params)
    ours = np.asarray(served.logprobs(served.policy(state), batch))
    of_rounded, of_whole = (np.asarray(embedded.logprobs(embedded.policy(embedded.init(tree)), batch)) for tree in (rounded, params))
    np.testing.assert_array_equal(ours, of_rounded)
    assert np.abs(ours - of_whole).max() > 1e-3
    (scored,) = served.reference_logprobs(state, [batch])
    np.testing.assert_array_equal(scored, of_rounded)
    for kept, given in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(kept).reshape(-1), given.reshape(-1))
