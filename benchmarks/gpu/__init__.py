"""One prepared program for a machine with one GPU: `python -m benchmarks.gpu` (see `__main__.py`
and docs/gpu.md)."""
