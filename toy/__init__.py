"""The embedded default: a picture world with known truth, a tiny Qwen3-VL, `python -m toy`."""
