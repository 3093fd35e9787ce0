"""What a run is made of: parts that do not belong together are refused."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.config.settings import BatchingSettings, ConfigError
from jaxgrpo.environment import Observation
from jaxgrpo.learner.batching import make_micro_batches
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.run.setup import build_update, check_episodes, open_model_assets, served_dtype
from jaxgrpo.storage.pretrained import load_tokenizer
from jaxgrpo.train import main
from jaxgrpo.types import Message, Task
from tests.byte_chat import END, END_OF_TEXT, START
from tests.episodes import random_groups
from tests.random_weights import random_params
from tests.rollout.test_chat_template import GATHERING, WITHOUT_TOOLS
from tests.training import (
    CONFIG_JSON,
    Letters,
    LettersEnvironment,
    changed,
    make_model,
    small_config,
    write_config,
)


@dataclasses.dataclass(frozen=True)
class WithTools(Letters):
    def create(self, task: Task) -> LettersEnvironment:
        return EnvironmentWithTools(self, "q", fails=False)


class EnvironmentWithTools(LettersEnvironment):
    def observe(self) -> Observation:
        return Observation((Message("user", "q"),), tools=({"name": "add"}, {"name": "sub"}))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    tokens = len(open_model_assets(small_config(model)).tokenizer)
    config = {**CONFIG_JSON, "vocab_size": tokens}
    (model / "config.json").write_text(json.dumps(config))
    assert open_model_assets(small_config(model)).config.vocab_size == tokens
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": tokens - 1}))
    said = rf"its tokenizer's ids need {tokens} rows, its weights have {tokens - 1} "
    with pytest.raises(ConfigError, match=said):
        open_model_assets(small_config(model))


def test_what_servers_hold_is_bfloat16_and_with_adapters_nothing_that_the_trainer_has(
    tmp_path: Path,
) -> None:
    model = make_model(tmp_path)
    assert served_dtype(small_config(model)) is None
    assert served_dtype(changed(tmp_path, model, "sampler=vllm")) == jnp.bfloat16
    assert served_dtype(changed(tmp_path, model, "sampler=vllm", "lora.rank=2")) is None


def test_tools_that_the_template_never_shows_are_refused_before_a_run(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    config = dataclasses.replace(small_config(model), environment=WithTools())
    tasks = config.environment.tasks("train")
    assert check_episodes(config, open_model_assets(config), tasks).longest == 55
    (model / "chat_template.jinja").write_text(WITHOUT_TOOLS)
    said = r"prompt of task 'train_0': the chat template does not show the tools .* \(add, sub\)"
    with pytest.raises(ConfigError, match=said):
        check_episodes(config, open_model_assets(config), tasks)


def test_a_template_that_gathers_system_texts_is_refused_when_it_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(tmp_path)
    (model / "chat_template.jinja").write_text(GATHERING)
    assert main(["--config", str(write_config(tmp_path, model)), "--dry-run"]) == 2
    captured = capsys.readouterr()
    said = "the chat template leaves out or moves a message of role 'system' of ('system',) after"
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_a_token_beyond_the_weights_is_refused_however_few_there_are(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["ab"] = 300  # was 256: the same number of tokens, with a gap
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert len(load_tokenizer(model)) == 260
    with pytest.raises(ConfigError, match="ids need 301 rows, its weights have 260 "):
        open_model_assets(small_config(model))


def test_where_others_end_a_generation_the_policy_ends_it_too(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    assert open_model_assets(small_config(model)).chat.eos_ids == (END_OF_TEXT, END)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [START, END, 33]}))
    assert open_model_assets(small_config(model)).chat.eos_ids == (END_OF_TEXT, START, END)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": "<|im_end|>"}))
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id must be a"):
        open_model_assets(small_config(model))


def test_the_policy_that_a_server_samples_from_is_the_one_that_is_trained(tmp_path: Path) -> None:
    """In float32, with bfloat16 weights: its log-probabilities are those of the rounded weights.

    The embedded sampler's run does not round. The weights that are kept are not rounded.
    """
    model = make_model(tmp_path)
    sizes = ModelConfig.from_folder(model)
    params = random_params(sizes, scale=0.2)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(np.float32), params)
    (batch,) = make_micro_batches(
        random_groups(0, 2, 2, 260, 8, 8),
        2,
        8,
        BatchingSettings(prompt_multiple=8, completion_multiple=8),
    )
    served = build_update(
        changed(tmp_path, model, "sampler=vllm", "model.compute_dtype=float32"), sizes
    )
    embedded = build_update(small_config(model), sizes)
    state = served.init(params)
    ours = np.asarray(served.logprobs(served.policy(state), batch))
    of_rounded, of_whole = (
        np.asarray(embedded.logprobs(embedded.policy(embedded.init(tree)), batch))
        for tree in (rounded, params)
    )
    np.testing.assert_array_equal(ours, of_rounded)
    assert np.abs(ours - of_whole).max() > 1e-3
    (scored,) = served.reference_logprobs(state, [batch])
    np.testing.assert_array_equal(scored, of_rounded)
    for kept, given in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(kept).reshape(-1), given.reshape(-1))
