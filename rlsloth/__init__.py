"""rlsloth: train reasoning models from reward scripts on one GPU."""

__version__ = "0.1.0"
