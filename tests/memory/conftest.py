"""Fixtures for tests of the memory plan."""

from helpers.plans import llama_folder

__all__ = ["llama_folder"]
