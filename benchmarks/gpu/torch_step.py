"""The optimizer step of part "mfu" in PyTorch, on the same groups, as in TRL's GRPOTrainer.

Every row has the prompt, and is padded to the longest of its group. Weights are float32 under
bfloat16 autocast. Logits are computed for completions only, a micro-batch is one group, AdamW is
fused, and there is no KL term, as in part "mfu". A unit is one or more models.

Attention is PyTorch's sdpa. "padded" has the padding mask that TRL passes. "causal" has none, which
allows PyTorch's flash kernel; padding is on the right, so real tokens do not attend to it. Each is
measured with gradient checkpointing (TRL's default) and without.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from transformers import Qwen2ForCausalLM

from benchmarks.gpu.rollouts import TINY, Lengths
from benchmarks.gpu.rows import Context, Row, in_time
from benchmarks.torch_model import new_causal_lm
from jaxgrpo.config.settings import LossSettings, OptimizerSettings
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.tools.model_sizes import QWEN2_5

_PROMPTS, _TINY_PROMPTS = (1024, 4096), (64,)
_TINY_MODEL = ModelConfig(512, 64, 2, 4, 2, 16, 128, 4096, 1e6, 1e-6, True)
_GIB = 2**30


def run(unit: str, context: Context) -> Iterator[Row]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not context.tiny:
        yield {"row": "left out", "why": "this PyTorch sees no GPU"}
        return
    prompts = _TINY_PROMPTS if context.tiny else _PROMPTS
    lengths = (TINY if context.tiny else Lengths()).draw()
    plan = itertools.product(unit.split(", "), (True, False), prompts, (True, False))
    for name, checkpointing, prompt, masked in plan:
        model = _TINY_MODEL if context.tiny else QWEN2_5[name]
        what: Row = {"row": "step", "model": name, "prompt": prompt}
        what |= {"mask": "padded" if masked else "causal", "checkpointing": checkpointing}
        yield from in_time(context, _rows(what, model, lengths, device), what)


def _rows(
    what: Row, model: ModelConfig, lengths: list[list[int]], device: torch.device
) -> Iterator[Row]:
    try:
        yield {**what, **_step(what, model, lengths, device)}
    except torch.cuda.OutOfMemoryError as error:
        yield {**what, "row": "failed", "why": str(error).splitlines()[0][:300]}
    gc.collect()
    torch.cuda.empty_cache()


def _step(what: Row, model: ModelConfig, lengths: list[list[int]], device: torch.device) -> Row:
    torch.manual_seed(0)
    policy = causal_lm(model, device, what["checkpointing"])
    settings = OptimizerSettings()
    optimizer = torch.optim.AdamW(
        policy.parameters(),
        lr=settings.learning_rate,
        betas=(settings.b1, settings.b2),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    total = sum(map(sum, lengths))
    groups = [
        _Group(what["prompt"], rows, model.vocab_size, device, what["mask"] == "padded")
        for rows in lengths
    ]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for group in groups:
            with torch.autocast(device.type, torch.bfloat16):
                logprobs = group.logprobs(policy)
            group.loss(logprobs, total).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
        optimizer.step()

    taken = [_seconds(step, device) for _ in range(4)]
    peak = torch.cuda.max_memory_allocated() / _GIB if device.type == "cuda" else None
    return {"seconds": statistics.median(taken[1:]), "first_seconds": taken[0], "peak_gib": peak}


def causal_lm(model: ModelConfig, device: torch.device, checkpointing: bool) -> Qwen2ForCausalLM:
    """Create the model of transformers with random weights, in float32."""
    with device:
        policy = new_causal_lm(model)
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    return policy.train()


class _Group:
    """The rows of one group, padded to the longest."""

    def __init__(
        self, prompt: int, lengths: list[int], vocab: int, device: torch.device, masked: bool
    ):
        rows, self.longest = len(lengths), max(lengths)
        columns = torch.arange(self.longest, device=device)
        self.real = columns[None] < torch.tensor(lengths, device=device)[:, None]
        ids = torch.randint(vocab, (rows, self.longest), device=device)
        prompts = torch.randint(vocab, (1, prompt), device=device).expand(rows, -1)
        self.ids = torch.cat([prompts, ids], 1)
        self.mask = torch.cat([torch.ones_like(prompts), self.real.long()], 1) if masked else None
        self.completions = ids
        self.advantages = torch.randn(rows, 1, device=device)

    def logprobs(self, policy: Qwen2ForCausalLM) -> torch.Tensor:
        """Return the log-probabilities of the completions [G, C] in float32."""
        kept = self.longest + 1
        logits = policy(
            self.ids, attention_mask=self.mask, logits_to_keep=kept, use_cache=False
        ).logits[:, :-1]
        of_row = [
            torch.log_softmax(row.float(), -1).gather(-1, ids[:, None])[:, 0]
            for row, ids in zip(logits, self.completions, strict=True)
        ]  # one row at a time, to save memory, as in TRL
        return torch.stack(of_row)

    def loss(self, logprobs: torch.Tensor, total: int) -> torch.Tensor:
        """Return the clipped loss, divided by all tokens of the step."""
        clip = LossSettings()
        ratio = torch.exp(logprobs - logprobs.detach())
        held = torch.clamp(ratio, 1 - clip.clip_low, 1 + clip.clip_high)
        objective = torch.minimum(ratio * self.advantages, held * self.advantages)
        return -(objective * self.real).sum() / total


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
