"""Make the tiny model of configs/cpu_demo.py.

    python -m jaxgrpo.tools.make_tiny_model DESTINATION [--until P] [--seed S]

The model has the architecture of Qwen2.5 and its own byte-level BPE tokenizer, in Hugging Face
layout. It has a warm start: supervised training on demonstrations of the first queries of BFCL's
train split, never of the test split. Training stops early, so that the model solves only some of
these tasks some of the time. Unlike the article's model, it needs this to show within minutes on a
CPU that reinforcement learning works.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jaxgrpo.envs.bfcl import Bfcl
from jaxgrpo.learner.batching import bucket
from jaxgrpo.learner.losses import Head, token_logprobs
from jaxgrpo.learner.sharding import Replicated, embed
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import (
    GroupTokens,
    ParamLoader,
    Params,
    forward_shared_prompt,
    head_table,
    init_params,
)
from jaxgrpo.paths import absolute
from jaxgrpo.rollout.chat import Chat
from jaxgrpo.storage.pretrained import load_tokenizer, save_hf
from jaxgrpo.tools.arguments import failed, positive_integer, positive_number
from jaxgrpo.types import Task

WORDS = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+")
CONTEXT = 4096
ROW_CONTEXT = 160
"""Most prompt tokens in which the demonstrations of a family may differ."""
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

CHAT_TEMPLATE = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}\
{% set rest = messages[1:] %}
{%- else %}{% set system = 'You are a helpful assistant.' %}{% set rest = messages %}{% endif -%}
<|im_start|>system
{{ system }}
{%- if tools %}

# Tools
Call a tool by its name with a JSON object of arguments inside <tool_call></tool_call>.
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>
{%- endif %}<|im_end|>
{% for message in rest %}
{%- if message.role == 'tool' %}
{%- if loop.first or loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}
<tool_response>
{{ message.content }}
</tool_response>
{%- if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>
{% endif %}
{%- else %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocab_size` tokens with Qwen's special tokens. Tokens have at most
    16 bytes, and each digit is a token."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(WORDS, behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    plain = ["<tool_call>", "</tool_call>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special) - len(plain),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=16,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.model_max_length = CONTEXT
    return fast


def demonstration_ids(
    suite: Any, task: Task, tokenizer: Any, chat: Chat
) -> tuple[np.ndarray, np.ndarray]:
    """Return a demonstrated episode as token ids [T], and which of them are the policy's [T]."""
    environment = suite.create(task)
    opening = environment.observe()
    pieces = [chat.opening(opening.messages, opening.tools)]
    ours = [np.zeros(len(pieces[0]), bool)]
    for text in suite.demonstration(task):
        ids = np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int32)
        result = environment.step(text)
        pieces.append(ids)
        ours.append(np.ones(len(ids), bool))
        if result.observation is not None:
            pieces.append(chat.continuation(result.observation.messages, ended_with_eos=False))
            ours.append(np.zeros(len(pieces[-1]), bool))
    return np.concatenate(pieces), np.concatenate(ours)


def corpus(suite: Bfcl, tasks: Sequence[Task]) -> Iterator[str]:
    """Yield the texts of the demonstrated episodes."""
    for task in tasks:
        environment = suite.create(task)
        yield from (message.content for message in environment.observe().messages)
        for text in suite.demonstration(task):
            yield text
            result = environment.step(text)
            if result.observation is not None:
                yield from (message.content for message in result.observation.messages)


@dataclasses.dataclass(frozen=True)
class Family:
    """Demonstrations with the same beginning (the same tools), as one group.

    `prompt_P` is the beginning, `rows_GC` the tokens after it, and `weights_GC` their weights: 1
    for the policy's tokens, less for others, 0 for padding.
    """

    prompt_P: np.ndarray
    rows_GC: np.ndarray
    weights_GC: np.ndarray


def families(
    episodes: Sequence[tuple[np.ndarray, np.ndarray]], rows: int, context_weight: float
) -> list[Family]:
    """Group episodes (ids, which of them are the policy's) whose prompts differ only near the end,
    with at most `rows` episodes per group."""
    groups: list[list[tuple[np.ndarray, np.ndarray]]] = []
    for episode in sorted(episodes, key=lambda episode: episode[0].tolist()):
        room = int(np.argmax(episode[1])) - ROW_CONTEXT
        if groups and len(groups[-1]) < rows and _common(groups[-1][0][0], episode[0]) >= room:
            groups[-1].append(episode)
        else:
            groups.append([episode])
    return [_family(group, rows, context_weight) for group in groups]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Return the length of the common beginning."""
    n = min(len(a), len(b))
    return int(np.argmin(np.append(a[:n] == b[:n], False)))


def _family(
    group: Sequence[tuple[np.ndarray, np.ndarray]], rows: int, context_weight: float
) -> Family:
    shared = min(
        [_common(group[0][0], ids) for ids, _ in group[1:]],
        default=int(np.argmax(group[0][1])) - ROW_CONTEXT,
    )
    length = bucket(max(len(ids) for ids, _ in group) - shared, 128)
    rows_GC, weights_GC = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.float32)
    for i, (ids, ours) in enumerate(group):
        rows_GC[i, : len(ids) - shared] = ids[shared:]
        weights_GC[i, : len(ids) - shared] = np.where(ours[shared:], 1.0, context_weight)
    return Family(group[0][0][:shared], rows_GC, weights_GC)


@partial(jax.jit, static_argnames=("config", "optimizer"), donate_argnums=(2, 3))
def train_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    params: Params,
    opt_state: Any,
    tokens: GroupTokens,
    weights_NGC: Array,
) -> tuple[Params, Any, Array]:
    """Take one step on the weighted mean of the next-token cross-entropy of the rows.

    Returns the new weights and optimizer state, and the log-probability [N, G] of each row's own
    tokens (those of weight 1).
    """
    rows_NGC = tokens.completions_NGC
    whole = Replicated(jnp.dtype(jnp.float32))
    head = Head((config.vocab_size, config.hidden_size), whole, 2048, 1.0)
    loader = dataclasses.replace(
        ParamLoader.whole(jnp.float32),
        embed=lambda tree, ids: embed(tree["embed"]["embedding"], ids, head.shape, whole),
    )

    def loss(p: Params) -> tuple[Array, Array]:
        hidden = forward_shared_prompt(config, p, tokens, loader)
        logprobs, _ = token_logprobs(
            hidden.reshape(-1, config.hidden_size), head_table(p), rows_NGC.reshape(-1), head
        )
        logprobs_NGC = logprobs.reshape(rows_NGC.shape)
        return -jnp.sum(weights_NGC * logprobs_NGC) / jnp.sum(weights_NGC), jnp.sum(
            logprobs_NGC * (weights_NGC == 1), axis=-1
        )

    (_, own_NG), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, own_NG


def hf_config(vocab_size: int, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the content of config.json."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        **SIZES,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }


def write_skeleton(folder: Path, texts: Sequence[str], vocab_size: int) -> ModelConfig:
    """Write the tokenizer and config.json, and return the sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts, vocab_size)
    tokenizer.save_pretrained(folder)
    config = hf_config(len(tokenizer), tokenizer)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return ModelConfig.from_hf(config)


def warm_start(
    config: ModelConfig,
    params: Params,
    episodes: Sequence[tuple[np.ndarray, np.ndarray]],
    args: argparse.Namespace,
) -> Params:
    """Train weights on the demonstrations until their mean probability reaches `args.until`. This
    is about the fraction of tasks that the model solves."""
    schedule = optax.linear_schedule(0.0, args.learning_rate, 50)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, 0.9, 0.98, weight_decay=0.05)
    )
    opt_state = optimizer.init(params)
    rng = np.random.default_rng(args.seed)
    groups = families(episodes, args.rows, args.context_weight)
    for epoch in range(args.max_epochs):
        start, own = time.perf_counter(), []
        for i in rng.permutation(len(groups)):
            g = groups[i]
            prompt = np.zeros((1, bucket(len(g.prompt_P), 256)), np.int32)
            prompt[0, : len(g.prompt_P)] = g.prompt_P
            tokens = GroupTokens(prompt, np.array([len(g.prompt_P)]), g.rows_GC[None])
            params, opt_state, own_NG = train_step(
                config, optimizer, params, opt_state, tokens, g.weights_GC[None]
            )
            own += np.asarray(own_NG)[0, g.weights_GC.any(axis=1)].tolist()
        probability = float(np.mean(np.exp(own)))
        seconds = time.perf_counter() - start
        means = f"log-probability {np.mean(own):.2f}  probability {probability:.3f}"
        print(f"epoch {epoch + 1}  {means}  {seconds:.1f} s", flush=True)
        if probability >= args.until:
            return params
    raise RuntimeError(
        f"the probability of the demonstrations did not reach {args.until} "
        f"within {args.max_epochs} epochs"
    )


def main() -> None:
    """Make the model as the command line says."""
    args = parse()
    if args.destination.exists():  # before the model is trained
        there = f"{args.destination} exists: remove it, or use another destination"
        raise failed(FileExistsError(there))
    suite = Bfcl(docs="signatures")
    tasks = suite.tasks("train")
    with tempfile.TemporaryDirectory() as skeleton:
        config = write_skeleton(Path(skeleton), list(corpus(suite, tasks)), args.vocab)
        tokenizer = load_tokenizer(skeleton)
        chat = Chat(tokenizer)
        episodes = [demonstration_ids(suite, task, tokenizer, chat) for task in tasks]
        lengths = [len(ids) for ids, _ in episodes]
        tokens = f"{np.median(lengths):.0f} tokens (median; longest {max(lengths)})"
        print(f"{len(episodes)} episodes of {tokens}")
        params = init_params(config, jax.random.key(args.seed))
        params = warm_start(config, params, episodes, args)
        save_hf(jax.device_get(params), skeleton, args.destination)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxgrpo.tools.make_tiny_model", description=__doc__.splitlines()[0]
    )
    parser.add_argument("destination", type=absolute)
    parser.add_argument(
        "--until",
        type=positive_number,
        default=0.1,
        help="mean probability of the demonstrations at which training stops",
    )
    add_training_flags(parser)
    parser.add_argument("--vocab", type=positive_integer, default=2048)
    return parser.parse_args()


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `warm_start`, except `--until`."""
    parser.add_argument("--max-epochs", type=positive_integer, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rows", type=positive_integer, default=4, help="demonstrations per training step"
    )
    parser.add_argument("--learning-rate", type=positive_number, default=1e-3)
    parser.add_argument(
        "--context-weight",
        type=float,
        default=0.1,
        help="weight of tokens that are not the policy's",
    )


if __name__ == "__main__":
    main()
