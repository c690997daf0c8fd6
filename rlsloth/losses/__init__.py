"""Policy losses on per-token log-probs, and in ``preference`` the preference losses."""
