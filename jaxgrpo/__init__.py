from jaxgrpo import startup  # noqa: F401 - takes Ctrl-C while the rest is imported
