"""Run jaxgrpo.train so that its second process runs out of memory.

That happens in its third optimizer step, when the first process is already in it.
"""

import sys

import jax

from jaxgrpo.learner.update import Update
from jaxgrpo.train import main

if __name__ == "__main__":
    take = Update.optimizer_step

    def short_of_memory(self, state, *rest):
        if state.step == 2 and jax.process_index() == 1:
            raise MemoryError("there is no more")
        return take(self, state, *rest)

    Update.optimizer_step = short_of_memory
    sys.exit(main())
