from jaxgrpo import startup  # noqa: F401 - first of all
