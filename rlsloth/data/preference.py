"""The function that reads a run's rows, by the method that it trains with."""

from __future__ import annotations

from rlsloth.config.sft import SupervisedConfig
from rlsloth.data.examples import Reader
from rlsloth.data.labelled import labelled_examples
from rlsloth.data.pairs import pair_examples
from rlsloth.data.sft import sft_examples
from rlsloth.losses.preference.methods import method_of


def reader(cfg: SupervisedConfig) -> Reader:
    """Choose the function that makes examples from the rows of a run's dataset."""
    method = method_of(cfg)
    return READERS[method.examples] if method else sft_examples


READERS: dict[str, Reader] = {"pairs": pair_examples, "labelled": labelled_examples}
"""Value of ``PreferenceMethod.examples`` -> the function that reads such rows."""
