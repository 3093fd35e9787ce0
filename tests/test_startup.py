"""What importing the package does."""

import logging

import jaxgrpo


def test_only_the_announcement_about_pytorch_is_kept_back() -> None:
    assert jaxgrpo.startup
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        logger.warning("PyTorch was not found. Models won't be available.")
        logger.warning("a real warning")
    finally:
        logger.removeHandler(handler)
    assert said == ["a real warning"]
