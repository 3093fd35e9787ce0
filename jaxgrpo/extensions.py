"""Load what users add to a run by object or by import path: their own sampler, loss or reward.

An import path is `module:name`, such as `my_losses:reinforce`. If it names a class, it stands for
an instance with default settings.
"""

import abc
import dataclasses
import importlib
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

LossFunction = Callable[[Any, Any], Any]
"""A loss of a user's own. It takes a `jaxgrpo.learner.losses.LossInputs` of one micro-batch and the
`LossSettings`, and returns a scalar to minimize: a plain sum over tokens, each times its
`loss_weights_NGC`. The weights hold the denominator of the whole batch, so that micro-batches and
devices add up. It is traced by jax and runs on each device, for the groups of that device."""


@dataclasses.dataclass(frozen=True)
class SamplerContext:
    """What a sampler serves.

    - `config` is the run's `Config`, and `folder` its run folder.
    - `model_folder` has the model's config.json and tokenizer. The weights arrive by `publish`.
    - `tokenizer` is the tokenizer of transformers.
    - `eos_token_ids` are the tokens that end a turn.
    """

    config: Any
    folder: Path
    model_folder: Path
    tokenizer: Any
    eos_token_ids: tuple[int, ...]


class SamplerFactory(abc.ABC):
    """Opens a sampler of a user's own. Derive a frozen dataclass from it, and give an instance to
    `Config.sampler`. Its fields are recorded in config.json."""

    @abc.abstractmethod
    def open(self, context: SamplerContext) -> Any:
        """Return a `jaxgrpo.samplers.base.Sampler`. The trainer publishes version 0 to it before
        the first request, and closes it at the end."""


def is_import_path(value: object) -> bool:
    """Return whether a value is a string of the form `module:name`. Both may have dots."""
    if not isinstance(value, str):
        return False
    module, _, name = value.partition(":")
    return all(part.isidentifier() for part in (*module.split("."), *name.split(".")))


def find_object(path: str) -> Any:
    """Return what an import path names. Raise ValueError that says why it cannot be had."""
    module, _, name = path.partition(":")
    try:
        return operator.attrgetter(name)(importlib.import_module(module))
    except Exception as error:  # the edge to a user's module
        raise _refusal(path, error) from error


def import_object(path: str) -> Any:
    """Return what an import path names, and of a class an instance. Raise ValueError that says why
    it cannot be had."""
    found = find_object(path)
    try:
        return found() if isinstance(found, type) else found
    except Exception as error:  # the edge to a user's class
        raise _refusal(path, error) from error


def _refusal(path: str, error: Exception) -> ValueError:
    return ValueError(f"{path!r} cannot be imported ({type(error).__name__}: {error})")
