"""One of several trainer processes, with two devices each, that publish the same weights: ROOT COORDINATOR PROCESSES PROCESS."""

import sys
from pathlib import Path

import jax

from jaxgrpo.sharding import make_layout, make_mesh, store
from jaxgrpo.weights import publish_weights
from tests.test_weights import TINY, random_params


def main(root: Path, coordinator: str, processes: int, process: int) -> None:
    jax.distributed.initialize(coordinator, num_processes=processes, process_id=process)
    assert len(jax.devices()) == 2 * processes and len(jax.local_devices()) == 2
    mesh, layout = make_mesh(jax.devices()), make_layout(TINY, 2 * processes)
    folder = publish_weights(store(random_params(), layout, mesh), layout, mesh, TINY, 7, root)
    assert (folder / "manifest.json").is_file()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
