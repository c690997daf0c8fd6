"""Files of JSON lines."""

from __future__ import annotations

import json
from pathlib import Path


def lines(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
