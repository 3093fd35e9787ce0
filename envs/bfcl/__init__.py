"""BFCL's multi-turn tasks as an environment. A config names `Bfcl(...)`."""

from jaxgrpo.envs.bfcl.suite import Bfcl

__all__ = ["Bfcl"]
