"""Free host memory inside a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlsloth.memory import machine
from rlsloth.memory.terms import GIB


@pytest.mark.parametrize("name", ["inactive_file", "total_inactive_file"])
def test_a_containers_page_cache_counts_as_free(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, used = tmp_path / "limit", tmp_path / "used"
    monkeypatch.setattr(machine, "CGROUPS", ((limit, used),))
    limit.write_text(f"{GIB // 8}\n")
    used.write_text(f"{GIB // 16}\n")
    assert machine.host_bytes() == int(machine.HOST_SHARE * GIB // 16)
    (tmp_path / "memory.stat").write_text(f"anon 5\n{name} {GIB // 32}\nfile 7\n")
    assert machine.host_bytes() == int(machine.HOST_SHARE * (GIB // 16 + GIB // 32))
    limit.write_text("max\n")
    assert machine.host_bytes() > GIB // 8
