"""Print a memory plan as JSON, with sizes in bytes."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rlsloth.memory.findings import TOKENS, Findings
from rlsloth.memory.longest import Longest
from rlsloth.memory.plan import ACTIVATION_TOLERANCE
from rlsloth.memory.terms import Term
from rlsloth.policy.activations.placement import describe


def print_json(findings: Findings) -> None:
    """Print a plan as JSON. Keys of the rollout are left out if nothing is sampled."""
    plan, request = findings.plan, findings.request
    sampling = request.sampling
    update = plan.peak("update")
    row: dict[str, Any] = {
        "fits": plan.fits,
        "model": findings.model,
        "engine": plan.engine,
        "total": plan.total,
        "left": plan.left,
        "peak": {"rollout": plan.peak("rollout"), "update": update} if sampling else update,
        "terms": [_term(term, sampling is not None) for term in plan.terms],
        "kv_cache": None if plan.cache is None else asdict(plan.cache),
        TOKENS: request.microbatch,
        "gradient_checkpointing": request.model.gradient_checkpointing,
        "layers": None if request.placements is None else describe(request.placements),
        "offload_layers": request.streamed,
        "offload_embeddings": request.model.offload_embeddings is True,
        "host": plan.host,
        "host_total": plan.host_total,
    }
    if sampling is not None:
        tokens = sampling.workload.longest_prompt
        row["longest_prompt"] = {"tokens": tokens, "source": findings.source.longest}
        row["max_sequences"] = sampling.at_once
    else:
        for key in ("model", "engine", "kv_cache"):
            del row[key]
        row["longest_example"] = request.longest_example
    row["largest_that_fits"] = dict(findings.largest)
    row["longest_update"] = _longest(findings.longest_text)
    if findings.longest_completion is not None:
        row["longest_completion"] = _longest(findings.longest_completion)
    row["knobs"] = [asdict(freed) for freed in findings.freed]
    row["fits_with"] = list(findings.together)
    row["host_enough"] = findings.host_enough
    if sampling is not None:
        row["activations"] = f"estimate, within {ACTIVATION_TOLERANCE:.0%} of measured on a CPU"
    print(json.dumps(row, indent=2))


def _term(term: Term, samples: bool) -> dict[str, Any]:
    return {name: value for name, value in asdict(term).items() if samples or name != "rollout"}


def _longest(longest: Longest) -> dict[str, Any]:
    layers = describe(longest.placements) if longest.tokens else None
    found = {"tokens": longest.tokens, "layers": layers, "host": longest.host}
    return found | {"offload_layers": longest.streamed, "limited_by_context": longest.limited}
