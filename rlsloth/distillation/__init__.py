"""Distillation: traces of a teacher, the verified ones as a dataset, and a student."""
