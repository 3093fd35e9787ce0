"""BFCL's multi-turn tasks as an environment. A config names `Bfcl(...)`."""

from envs.bfcl.suite import Bfcl

__all__ = ["Bfcl"]
