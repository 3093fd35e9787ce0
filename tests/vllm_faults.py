"""Faults that no message can cause, loaded into vLLM's workers by tests.

vllm ... --worker-extension-cls tests.vllm_faults.Faults
"""

from collections.abc import Iterator
from typing import Any


class Faults:
    """Methods that a worker gets; called through `/collective_rpc`."""

    weight_transfer_engine: Any
    rank: int

    def echo(self, value: str) -> str:
        """Return the value: a worker whose answers lag behind returns something else."""
        return value

    def fail_in_next_apply(self, after: int, rank: int = 0) -> None:
        """Make worker `rank` fail after it was given `after` tensors of the next version."""
        engine = self.weight_transfer_engine
        outgoing = engine._outgoing

        def failing(weights: Any) -> Iterator[Any]:
            engine._outgoing = outgoing
            for i, item in enumerate(outgoing(weights)):
                if i == after and self.rank == rank:
                    raise OSError("no space left on the device")
                yield item

        engine._outgoing = failing
