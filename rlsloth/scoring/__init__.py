"""Rewards in killable worker processes, their checked scores, and the shaping of rewards."""
