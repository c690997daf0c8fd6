"""Read datasets by the library datasets: those of the hub, and folders of save_to_disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlsloth.data.formats import Row, guarded, without_nulls
from rlsloth.errors import UserError, first_line, nearest

_PASS_A_FILE = "pass a .jsonl, .json or .parquet file instead"


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` of the library datasets has written a folder."""
    one = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return one or (folder / "dataset_dict.json").is_file()


def read_saved(folder: Path, split: str) -> Iterator[Row]:
    """Read a folder of ``save_to_disk``: a dataset, or one of several splits. Raises UserError."""
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # a damaged folder raises errors of every type
        raise UserError(
            f"{folder}: cannot read this folder of save_to_disk: {type(error).__name__}: "
            f"{first_line(error)}; save it again"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(
                f"folder {folder} has no split {split!r}{nearest(split, list(data))} "
                f"(splits: {', '.join(data)})"
            )
        data = data[split]
    return _rows(data, str(folder))


def read_hub(source: str, split: str) -> Iterator[Row]:
    """Read a dataset of the hub, ``id[:config]``. Raises UserError."""
    import datasets
    import huggingface_hub

    name, _, config = source.partition(":")
    try:
        # Without a network, load_dataset would retry for half a minute; one request fails at once.
        if not _cached(name, Path(datasets.config.HF_DATASETS_CACHE)):
            huggingface_hub.HfApi().dataset_info(name, timeout=10)
        data = datasets.load_dataset(name, config or None, split=split)
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise UserError(
            f"the hub has no dataset {name!r}, or it needs a login: check the name, or "
            f"{_PASS_A_FILE}"
        ) from None
    except ValueError as error:  # not a hub id, or no such config or split, which the text lists
        raise UserError(
            f"cannot load dataset {source!r}, split {split!r}: {first_line(error)}; check the name "
            f"and the split, or {_PASS_A_FILE}"
        ) from error
    except Exception as error:  # errors of the hub's HTTP library, which changes
        raise UserError(
            f"cannot load dataset {source!r} (no network? {first_line(error)}): {_PASS_A_FILE}"
        ) from error
    return _rows(data, source)


def _rows(data: Any, source: str) -> Iterator[Row]:
    """Iterate over a dataset's rows; pictures and sounds stay the bytes that they are."""

    def read() -> Iterator[Row]:
        plain = data.with_format(None)
        for name, feature in (data.features or {}).items():
            if getattr(feature, "decode", False) is True:
                plain = plain.cast_column(name, type(feature)(decode=False))
        return map(without_nulls, plain)

    return guarded(read, f"{source}: the library datasets cannot read it", "pass its files instead")


def _cached(name: str, cache: Path) -> bool:
    """Tell whether the library datasets has this dataset in its cache.

    The cache has a folder for each, named owner___name_in_snake_case.
    """
    plain = name.replace("/", "").replace("_", "").lower()
    return any(p.name.replace("_", "").lower() == plain for p in cache.glob("*"))
