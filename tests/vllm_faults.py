"""Loaded into vLLM's workers by the tests (`--worker-extension-cls tests.vllm_faults.Faults`): failures that no message can cause."""

from collections.abc import Iterator
from typing import Any


class Faults:
    """Methods that a worker gets; called through `/collective_rpc`."""

    weight_transfer_engine: Any
    rank: int

    def echo(self, value: str) -> str:
        """What each worker answers to this very call, unless its answers lag behind."""
        return value

    def fail_in_next_apply(self, after: int, rank: int = 0) -> None:
        """The worker `rank` fails when it has been given `after` tensors of the next version."""
        engine = self.weight_transfer_engine
        outgoing = engine._outgoing

        def failing(weights: Any) -> Iterator[Any]:
            engine._outgoing = outgoing
            for i, item in enumerate(outgoing(weights)):
                if i == after and self.rank == rank:
                    raise OSError("no space left on the device")
                yield item

        engine._outgoing = failing
