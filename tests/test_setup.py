"""What a run is made of: parts that do not belong together are refused."""

import json

import jax.numpy as jnp
import pytest

from jaxgrpo.config import ConfigError
from jaxgrpo.setup import open_policy, served_dtype
from tests.training import CONFIG_JSON, changed, make_model, small_config


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    model = make_model(tmp_path)
    tokens = len(open_policy(small_config(model)).tokenizer)
    config = {**CONFIG_JSON, "vocab_size": tokens}
    (model / "config.json").write_text(json.dumps(config))
    assert open_policy(small_config(model)).config.vocab_size == tokens
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": tokens - 1}))
    with pytest.raises(ConfigError, match=rf"its tokenizer's ids need {tokens} rows, its weights have {tokens - 1} "):
        open_policy(small_config(model))


def test_what_servers_hold_is_bfloat16_and_with_adapters_nothing_that_the_trainer_has(tmp_path):
    model = make_model(tmp_path)
    assert served_dtype(small_config(model)) is None
    assert served_dtype(changed(tmp_path, model, "sampler=vllm")) == jnp.bfloat16
    assert served_dtype(changed(tmp_path, model, "sampler=vllm", "lora.rank=2")) is None
