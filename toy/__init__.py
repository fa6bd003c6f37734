"""The embedded default: a procedural picture world with known truth, a tiny Qwen3-VL, and `python -m toy`."""
