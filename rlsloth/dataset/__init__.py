"""Given answers: rows to token ids with a mask of what is learnt."""
