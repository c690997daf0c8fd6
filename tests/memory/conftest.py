"""Fixtures of the memory plan's tests."""

from helpers.plans import llama_folder

__all__ = ["llama_folder"]
