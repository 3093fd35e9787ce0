"""The update in plain PyTorch, as TRL's GRPOTrainer computes it, for benchmarks.update.

The prompt is in every row; logits only for completions (`logits_to_keep`); selective log-softmax;
clipped objective with k3 KL; gradient clipping; fused AdamW; attention by sdpa.
"""

import numpy as np
import torch
from transformers import Qwen2ForCausalLM

from benchmarks.processor import PRODUCT, product_gflops
from benchmarks.torch_model import new_causal_lm
from jaxgrpo.config.settings import LossSettings, OptimizerSettings
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.models.qwen2 import Params
from jaxgrpo.storage.hf_mapping import params_from_hf, params_to_hf
from jaxgrpo.types import MicroBatch


def causal_lm(config: ModelConfig, params: Params) -> Qwen2ForCausalLM:
    """The model of transformers with these weights (the logical tree), float32, on the CPU."""
    model = new_causal_lm(config)
    state = {
        name: torch.tensor(np.asarray(tensor))
        for name, tensor in params_to_hf(config, params).items()
    }
    model.load_state_dict(state, strict=not config.tied_embeddings)
    return model.train()


def product_rate() -> float:
    """float32 GFLOP/s of a core, by PyTorch on the product that all libraries are asked for."""
    rows, inner, columns = PRODUCT
    left, right = torch.ones(rows, inner), torch.ones(columns, inner)
    return product_gflops(lambda: torch.nn.functional.linear(left, right))


class TorchUpdate:
    """The update of one group, and its passes without gradients.

    `checkpointing` is transformers' gradient checkpointing, which is TRL's default.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        loss: LossSettings,
        optimizer: OptimizerSettings,
        batch: MicroBatch,
        checkpointing: bool,
    ):
        self.config, self.loss, self.max_grad_norm = config, loss, optimizer.max_grad_norm
        self.model = causal_lm(config, params)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optimizer.learning_rate,
            betas=(optimizer.b1, optimizer.b2),
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        self.completions = torch.tensor(np.asarray(batch.completions_NGC[0]), dtype=torch.long)
        prompt = torch.tensor(np.asarray(batch.prompt_NP[0]), dtype=torch.long)
        self.ids = torch.cat([prompt.expand(len(self.completions), -1), self.completions], dim=1)
        self.mask = torch.ones_like(self.ids)
        self.weights = torch.tensor(np.asarray(batch.loss_weights_NGC[0]))
        self.advantages = torch.tensor(np.asarray(batch.advantages_NG[0]))[:, None]

    def logprobs(self) -> torch.Tensor:
        """Log-probabilities of the completions [G, C]."""
        kept = self.completions.shape[1]
        logits = self.model(
            self.ids, attention_mask=self.mask, logits_to_keep=kept + 1, use_cache=False
        ).logits[:, :-1]
        return logits.gather(-1, self.completions[..., None])[..., 0] - torch.logsumexp(
            logits, dim=-1
        )

    def score(self) -> np.ndarray:
        """The same without gradients: the reference's or the old policy's pass."""
        with torch.no_grad():
            return self.logprobs().numpy()

    def step(self, reference: torch.Tensor) -> tuple[float, float]:
        """One on-policy optimizer step; the loss and the gradient's norm before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        train = self.logprobs()
        ratio = torch.exp(train - train.detach())
        held = torch.clamp(ratio, 1 - self.loss.clip_low, 1 + self.loss.clip_high)
        objective = torch.minimum(ratio * self.advantages, held * self.advantages)
        delta = reference - train
        kl = torch.exp(delta) - delta - 1
        loss = ((self.loss.kl_beta * kl - objective) * self.weights).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        return float(loss.detach()), float(norm)

    def gradients(self) -> Params:
        """The clipped gradients of the last step in the logical tree."""
        tensors = {
            name: p.grad.numpy() for name, p in self.model.named_parameters() if p.grad is not None
        }
        return params_from_hf(self.config, tensors)
