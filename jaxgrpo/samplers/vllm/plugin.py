"""Runs inside vLLM: the weight-transfer backend `orbax`, registered as a `vllm.general_plugins`.

    vllm ... --weight-transfer-config '{"backend": "orbax"}'
    POST /start_weight_update
    POST /update_weights {"update_info": {"path": "/dev/shm/.../000007", "version": 7}}
    POST /finish_weight_update

`update_weights` does all the work, in three stages:

1. compare the manifest with the served model,
2. map every array and verify its checksums,
3. load the model's parameters through vLLM's layerwise reload.

A failure in stage 1 or 2 changes nothing. After a failure in stage 3, the worker reads the previous
version again from its folder, or exits if it cannot, so a mixture is never served. The workers of a
tensor-parallel server share the outcome of each stage, and therefore continue or roll back
together. Each of them reads all arrays, and vLLM's loaders take its part.

This module does not import JAX. Three rules of vLLM shape it:

- `start_weight_update` must leave the model servable, because the client may never come back.
- An exception in `finish_weight_update` would leave the session open for ever.
- An exception in `update_weights` ends the session.
"""

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vllm
from vllm.distributed.parallel_state import get_world_group
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from jaxgrpo.storage.published_manifest import WeightError, read_manifest
from jaxgrpo.storage.published_reader import check_fit, read_tensors

BACKEND = "orbax"
SUPPORTED_VLLM = "0.32."
EXIT_STATUS = 17
"""Exit status of a worker that ends itself rather than serve a mixture of weights."""

_log = logging.getLogger("vllm.jaxgrpo")

Weights = dict[str, tuple[torch.Tensor, bool]]
"""Hugging Face name -> (the tensor as it is stored, whether it must be transposed)."""


def register() -> None:
    """Register the backend. vLLM calls this in each of its processes, perhaps more than once."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, __name__, OrbaxWeightTransfer.__name__)


@dataclass
class OrbaxInitInfo(WeightTransferInitInfo):
    """Empty: the backend needs no set-up."""


@dataclass
class OrbaxUpdateInfo(WeightTransferUpdateInfo):
    """The folder of a version that jaxgrpo.storage.publish wrote, and its expected number."""

    path: str
    version: int


class OrbaxWeightTransfer(WeightTransferEngine[OrbaxInitInfo, OrbaxUpdateInfo]):
    """One worker's side of an update.

    `served` is the version in the model's parameters, None for what vLLM itself loaded.
    """

    init_info_cls = OrbaxInitInfo
    update_info_cls = OrbaxUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module):
        if not vllm.__version__.startswith(SUPPORTED_VLLM):
            raise RuntimeError(
                f"the weight-transfer backend {BACKEND!r} is for vLLM {SUPPORTED_VLLM}*, this is"
                f" {vllm.__version__}"
            )
        super().__init__(config, vllm_config, device, model)
        self.served: OrbaxUpdateInfo | None = None
        self._expected = _hf_shapes(self.model_config.hf_config)

    def init_transfer_engine(self, init_info: OrbaxInitInfo) -> None:
        """Do nothing."""

    def start_weight_update(self) -> None:
        """Nothing to do, on purpose."""

    def finish_weight_update(self) -> None:
        """Nothing to do, on purpose."""

    def shutdown(self) -> None:
        """Do nothing: no resources are held."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Update as the base class does, but without `synchronize` on a CPU, which has none."""
        info, failure = _attempt(lambda: self.parse_update_info(update_info))
        if failure is not None:  # the same in all workers
            return _refuse(f"the update is not understood: {failure}", failure)
        self.receive_weights(info)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: OrbaxUpdateInfo) -> None:
        """Serve the version in the given folder.

        Raise WeightError, in the last worker, if the old version is still served.
        """
        began = time.perf_counter()
        weights, failure = _attempt(lambda: self._stage(update_info))
        if (reason := _failure_of_any(failure)) is not None:
            return _refuse(f"version {update_info.version} is refused: {reason}", failure)
        staged = time.perf_counter()
        _, failure = _attempt(lambda: self._apply(weights))
        if (reason := _failure_of_any(failure)) is not None:
            self._roll_back(failure)
            return _refuse(
                f"version {update_info.version} could not be applied, the one before it was put"
                f" back: {reason}",
                failure,
            )
        self.served = update_info
        applied = time.perf_counter()
        _log.info(
            "version %d from %s: read and checked in %.2f s, applied in %.2f s",
            update_info.version,
            update_info.path,
            staged - began,
            applied - staged,
        )

    def _stage(self, info: OrbaxUpdateInfo) -> Weights:
        folder = Path(info.path)
        manifest = read_manifest(folder, info.version)
        check_fit(manifest, self._expected, str(self.model_config.dtype).removeprefix("torch."))
        return {
            name: (_to_torch(array), transposed)
            for name, (array, transposed) in read_tensors(folder, manifest).items()
        }

    @torch.no_grad()
    def _apply(self, weights: Weights) -> None:
        """Load the weights into the model.

        vLLM packs linear weights on CPUs. Its layerwise reload unpacks, fills and packs them again
        in place.
        """
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        initialize_layerwise_reload(self.model)
        loaded = self.model.load_weights(self._outgoing(weights))
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_shared(self.model)
        names = {name for name, _ in self.model.named_parameters()}
        if loaded is not None and names - loaded:
            raise WeightError(f"vLLM's loader left out {', '.join(sorted(names - loaded)[:3])}")

    def _outgoing(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """Return the weights on the device, transposed there: an accelerator does that much
        faster."""
        for name, (tensor, transposed) in weights.items():
            on_device = tensor.to(self.device)
            yield name, on_device.t() if transposed else on_device

    def _roll_back(self, failure: Exception | None) -> None:
        """Load the last good version again on this worker, or end the worker."""
        _log.error(
            "the weights could not be applied, rolling back to %s", self.served, exc_info=failure
        )
        _, still = _attempt(self._reapply_served)
        if _failure_of_any(still) is not None:
            _log.critical(
                "the rollback failed too: this worker ends rather than serve a mixture of weights",
                exc_info=still,
            )
            logging.shutdown()
            os._exit(EXIT_STATUS)

    def _reapply_served(self) -> None:
        if self.served is None:
            raise WeightError("no version was served before this one")
        weights = self._stage(self.served)
        _abandon_reload(self.model)
        self._apply(weights)


def _attempt(function: Any) -> tuple[Any, Exception | None]:
    """Return the result, or the exception, which the other workers must learn of before it is
    raised."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def _failure_of_any(failure: Exception | None) -> str | None:
    """Return the failure of this worker or of another one of this server, or None if all
    succeeded."""
    text = None if failure is None else _describe(failure)
    group = get_world_group()
    if group.world_size == 1:
        return text
    texts: list[str | None] = [None] * group.world_size
    torch.distributed.all_gather_object(texts, text, group=group.cpu_group)
    return next(
        (f"worker {rank}: {found}" for rank, found in enumerate(texts) if found is not None), None
    )


def _describe(failure: Exception) -> str:
    known = isinstance(failure, WeightError)
    return str(failure) if known else f"{type(failure).__name__}: {failure}"


def _refuse(message: str, cause: Exception | None) -> None:
    """Raise in the last worker, and only log in the others.

    vLLM 0.32 reads the workers' answers in order and stops at the first failure. It would take the
    answers after it for those to its next call. The other workers leave their session open; the
    client ends it with `finish_weight_update`.
    """
    group = get_world_group()
    if group.rank_in_group == group.world_size - 1:
        raise WeightError(message) from cause
    _log.error(message)


def _hf_shapes(hf_config: Any) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the served model's checkpoint, from its config; without a tied
    head."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _to_torch(array: np.ndarray) -> torch.Tensor:
    """Convert without a copy. The reader gives the bits of bfloat16 as int16."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.int16 else tensor


def _repack_shared(model: torch.nn.Module) -> None:
    """Pack the weights of tied modules again.

    A tied head is a module that shares the embedding's parameter. The layerwise reload sees no
    weight of its own there. On CPUs it would leave the head with its packed copy of the old weight,
    which the head would silently continue to use.
    """
    seen: set[int] = set()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.nn.Parameter):
            continue
        if id(weight) in seen and hasattr(module, "cpu_linear"):
            method: Any = module.quant_method
            method.process_weights_after_loading(module)
        seen.add(id(weight))


def _abandon_reload(model: torch.nn.Module) -> None:
    """End a layerwise reload that failed, so that the next one can begin.

    Every layer gets its own tensors back, with old or new values.
    """
    from vllm.model_executor.model_loader.reload import layerwise

    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load() and info.kernel_tensors is not None:
            layerwise._place_kernel_tensors(layer, info)
            info.reset()
    layerwise.LOADING_LAYERS.clear()
