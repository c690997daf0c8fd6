"""Losses on per-token log-probs: policy losses and, in ``preference``, preference losses."""
