"""Environments of OpenEnv as suites: `environment=OpenEnv("http://host:8000")`."""

from jaxgrpo.envs.openenv.suite import OpenEnv

__all__ = ["OpenEnv"]
