"""report.html: curves and samples on one page that nothing can be made to run in."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import math
import os
import re

import pytest

from rlsloth.config import GrpoConfig
from rlsloth.records import Group, Prompt, Rollout, Score
from rlsloth.run.report.page import write_report
from rlsloth.run.report.samples import MAX_CHARACTERS, MAX_ROWS, MAX_STEPS
from rlsloth.run.run import Run

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp; \ud800\x00"
NAMES = ["correct", "tags"]


def rollout(value, text="4", finish="stop"):
    scores = (Score("correct", value), Score("tags", 0.5))
    reward = None if value is None else value + 0.5
    return Rollout(
        [1],
        [True],
        [-1.0],
        [0],
        finish,
        text,
        [],
        scores=scores,
        reward=reward,
        advantages=[value or 0.0],
    )


def start(folder, steps=3, rewards=NAMES):
    cfg = GrpoConfig(steps=steps, rewards=rewards, run={"dir": folder, "show_samples": 0})
    return Run.start(cfg)


class Page(html.parser.HTMLParser):
    """Elements of a page, and the text of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self._script = [], [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._script = ""

    def handle_data(self, data):
        if self._script is not None:
            self._script += data

    def handle_endtag(self, tag):
        if tag == "script":
            self.scripts.append(self._script)
            self._script = None

    def attributes(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def read(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 20 steps with everything in it, hostile text included."""
    folder = tmp_path_factory.mktemp("runs") / "<b>run"
    with start(folder, 20, ["correct", "<i>tags"]) as run:
        run.log_eval(0, "", {"accuracy": 0.2, "accuracy_low": 0.1, "accuracy_high": 0.3})
        for step in run.steps(1, 20):
            with run.timed("rollout"):
                pass
            metrics = {
                "reward": step / 20,
                "reward_std": 0.1,
                "rewards/correct/mean": 0.5,
                "rewards/correct/std": 0.1,
                "rewards/correct/failures": 1.0,
                "rewards/<i>tags/mean": 0.5,
                "rewards/<i>tags/std": math.nan,
                "completions/mean_length": 40.0 - step,
                "completions/clipped_ratio": 0.1,
                "entropy": 1.0,
                "kl": 1e-4,
                "grad_norm": math.nan if step == 5 else 0.5,
                "sampling/sampling_logp_difference/mean": 0.004,
                "num_tokens": 100.0 * step,
            }
            run.log(step, metrics)
            prompt = Prompt(step, HOSTILE, {})
            run.log_samples(
                step, [Group(prompt, [1], [rollout(1.0, HOSTILE), rollout(None)])], NAMES
            )
        run.log_eval(20, "", {"accuracy": 0.7, "accuracy_low": 0.6, "accuracy_high": 0.8})
        run.warn(HOSTILE)
        run.finish(
            {
                "accuracy_before": 0.2,
                "accuracy_after": 0.7,
                "interval_before": [0.1, 0.3],
                "interval_after": [0.6, 0.8],
                "problems": 100,
                "note": HOSTILE,
            }
        )
    return folder


def test_hostile_text_stays_text(finished):
    text, page = read(finished)
    assert len(page.scripts) == 3  # two of data, one of code: none was added
    assert page.attributes("img") == []
    assert "<b>run" not in text
    assert "<i>tags" not in text
    assert "onerror=alert(2)>" not in text
    samples = json.loads(page.scripts[1])
    stored = samples["steps"][0]["rows"][0]["completion"]
    assert stored == HOSTILE.replace("\ud800", "\\ud800")


def test_the_content_policy_allows_its_own_script_alone(finished):
    _, page = read(finished)
    (policy,) = [
        meta["content"]
        for meta in page.attributes("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy
    (digest,) = re.findall(r"script-src 'sha256-([^']+)'", policy)
    # A browser hashes the script's text exactly as it is in the page.
    assert base64.b64encode(hashlib.sha256(page.scripts[2].encode()).digest()).decode() == digest


def test_the_page_needs_nothing_from_outside(finished):
    text, page = read(finished)
    assert "http://" not in text
    assert "https://" not in text
    assert not any({"src", "href"} & set(attrs) for _, attrs in page.tags)
    assert "@import" not in text
    assert "url(" not in text


def test_every_curve_is_there_without_a_script(finished):
    text, page = read(finished)
    labels = [attrs["aria-label"] for attrs in page.attributes("svg")]
    titles = [label.split(":")[0] for label in labels]
    for title in (
        "Reward",
        "correct",
        "Failed rewards",
        "Accuracy",
        "Length",
        "Cut off",
        "Entropy",
        "KL to the start",
        "Gradient norm",
        "Log-prob gap",
        "Seconds a step",
        "Tokens a second",
    ):
        assert title in titles, title
    classes = [attrs["class"] for attrs in page.attributes("path")]
    assert {"band c0", "dots c0", "curve c0", "bars c0", "area c0"} <= set(classes)
    assert all(re.fullmatch(r"[MLVhZ0-9. -]+", attrs["d"]) for attrs in page.attributes("path"))
    charts = json.loads(page.scripts[0])
    assert len(charts) == len(labels) == text.count('class="chart"')
    assert charts[0]["steps"] == list(range(1, 21))
    assert charts[0]["lines"][0]["values"][9] == "0.5"


def test_headline_has_accuracy_and_intervals(finished):
    text, _ = read(finished)
    assert "20\N{NARROW NO-BREAK SPACE}%" in text
    assert "70\N{NARROW NO-BREAK SPACE}%" in text
    assert "95 % intervals do not overlap" in text
    assert "Accuracy on 100 held-out problems" in text


def test_an_empty_and_a_half_run_have_reports(tmp_path):
    run = start(tmp_path / "run")
    write_report(run.dir)
    assert "No step has been logged yet" in read(run.dir)[0]
    for step in run.steps(1, 1):
        run.log(step, {"reward": math.nan, "grad_norm": 0.0})
    text, page = read(write_report(run.dir).parent)
    run.finish({})
    assert "not finished" in text
    assert any("Gradient norm" in attrs["aria-label"] for attrs in page.attributes("svg"))


@pytest.mark.parametrize("name", ["config.yaml", "environment.json"])
def test_a_damaged_file_does_not_cost_the_report(tmp_path, name):
    run = start(tmp_path / "run")
    run.log(1, {"reward": 0.5})
    (run.dir / name).write_text("{: [")
    run.finish({"accuracy_before": 0.2, "accuracy_after": 0.7})
    assert "70" in read(run.dir)[0]


def test_embedded_samples_are_capped_and_the_page_says_so(tmp_path):
    run = start(tmp_path / "run", MAX_STEPS + 40)
    many = [rollout(1.0) for _ in range(MAX_ROWS + 5)]
    many[0] = rollout(0.0, "start " + "x" * 10 * MAX_CHARACTERS + " end")
    for step in range(1, MAX_STEPS + 41):
        run.log_samples(step, [Group(Prompt(0, "q", {}), [1], many)], NAMES)
    run.finish({})
    text, page = read(run.dir)
    samples = json.loads(page.scripts[1])
    steps = [step["step"] for step in samples["steps"]]
    assert (len(steps), steps[0], steps[-1]) == (MAX_STEPS, 1, MAX_STEPS + 40)
    assert samples["steps_total"] == MAX_STEPS + 40
    assert samples["steps"][0]["total"] == MAX_ROWS + 5
    assert len(samples["steps"][0]["rows"]) == MAX_ROWS
    completion = samples["steps"][0]["rows"][0]["completion"]
    assert len(completion) < MAX_CHARACTERS + 100
    assert completion.startswith("start ")
    assert completion.endswith(" end")
    assert "characters left out" in completion
    assert "evenly spaced" in text


def test_a_failing_report_leaves_the_old_one(tmp_path, monkeypatch):
    with start(tmp_path / "run") as run:
        path = write_report(run.dir)
        old = path.read_bytes()

        def full(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            with pytest.raises(OSError, match="No space"):
                write_report(run.dir)
        assert path.read_bytes() == old


# --- drawing


def test_a_value_logged_twice_counts_once(tmp_path):
    with start(tmp_path / "run") as run:
        run.log_eval(0, "", {"accuracy": 0.1})
        run.log_eval(0, "", {"accuracy": 0.3})
    _, page = read(run.dir)
    assert json.loads(page.scripts[0])[0]["lines"][0]["values"] == ["30\N{NARROW NO-BREAK SPACE}%"]
