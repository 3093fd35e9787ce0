"""Trainer processes of two devices each, which publish the weights of a model folder.

Arguments: MODEL VERSION ROOT, and the flags of jaxgrpo.train.
"""

import argparse
from pathlib import Path

import jax

from jaxgrpo.learner.sharding import make_layout, make_mesh, store
from jaxgrpo.models.model_config import ModelConfig
from jaxgrpo.run.cluster import ClusterFlags, add_flags, join
from jaxgrpo.storage.pretrained import load_params
from jaxgrpo.storage.publish import publish_weights
from tests.processes import run_processes


def publish_by_processes(processes: int, model: Path, version: int, root: Path) -> Path:
    """Start them, wait for them; the folder that they wrote."""
    run_processes(processes, 2, "tests.publish_process", str(model), str(version), str(root))
    return root / f"{version:06d}"


def main(model: Path, version: int, root: Path) -> None:
    devices = jax.devices()
    assert len(devices) == 2 * jax.process_count() and len(jax.local_devices()) == 2
    config = ModelConfig.from_folder(model)
    mesh, layout = make_mesh(devices), make_layout(config, len(devices))
    folder = publish_weights(
        store(load_params(model, dtype="float32"), layout, mesh),
        layout,
        mesh,
        config,
        version,
        root,
    )
    assert (folder / "manifest.json").is_file()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("version", type=int)
    parser.add_argument("root", type=Path)
    add_flags(parser)
    args = parser.parse_args()
    join(ClusterFlags.of(args), None)
    main(args.model, args.version, args.root)
