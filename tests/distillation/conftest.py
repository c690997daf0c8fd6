"""A server for tests of an endpoint, and a workplace with a tiny model as the local teacher."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from helpers.distillation import CONFIG, Distill
from helpers.endpoint import REWARD, Server
from helpers.tiny import save_sampled_model
from rlsloth.cli.read_config import read_config
from rlsloth.config.distill import DistillConfig
from rlsloth.distillation import chat_api, pipeline

LETTERS_REWARD = """
LETTERS = range(67, 93)  # the ids of a to z

def letters(completion_ids, **_):
    return [sum(t in LETTERS for t in ids) / len(ids) for ids in completion_ids]

def ended(finish_reasons, **_):
    return [float(reason == "stop") for reason in finish_reasons]
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Also the working directory, with ten questions and a reward."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(chat_api, "FIRST_WAIT", 0.01)
    rows = [{"question": f"What is {i} + {i + 1}?", "answer": str(2 * i + 1)} for i in range(10)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("reward.py").write_text(REWARD)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, data, rewards and a configuration; it is the working directory."""
    folder = tmp_path_factory.mktemp("work")
    save_sampled_model(folder / "model")
    rows = [{"question": f"Question {i}?", "answer": str(i), "text": "t"} for i in range(16)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(LETTERS_REWARD)
    (folder / "mine.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def distill(workplace: Path) -> Distill:
    """Run the command and return the dataset's file."""

    def run(out: str, *flags: str) -> Path:
        return pipeline.distill(
            read_config(DistillConfig, ["mine.yaml", "--out", out, *flags], "rlsloth distill")
        )

    return run


@pytest.fixture(scope="module")
def whole(distill: Distill) -> Path:
    """The folder of a distillation without interruption."""
    return distill("whole", "--traces.keep", "2").parent
