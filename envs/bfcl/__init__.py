"""BFCL's multi-turn tasks as an environment: `Bfcl(...)` is what a config names."""

from envs.bfcl.suite import Bfcl

__all__ = ["Bfcl"]
