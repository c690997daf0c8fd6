"""Formats in which chat templates write tool calls, each with its parser.

The renderer takes the first format in which it finds a call that the template wrote. A parser
returns the calls of a completion in their order, and a call with an ``error`` for each that is
malformed. Sources: the models' chat templates on the hub, and OpenAI's Harmony response format.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from rlsloth.data.tool_calls import ToolCall, call_message
from rlsloth.errors import UserError
from rlsloth.records import Message

Tools = Sequence[Any]
"""JSON schemas of the tools, which give the arguments' types where a format writes all as text."""


class ToolFormat(NamedTuple):
    """A format of tool calls."""

    name: str
    parse: Callable[[str], list[ToolCall]]
    """Function from the text after the reasoning to the calls."""
    textual: bool = False
    """Whether arguments are written without types, as text."""


_MARK = "placeholder7391"
_HERMES = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)


def parse_hermes(text: str) -> list[ToolCall]:
    """Qwen 2.5 and 3, SmolLM3: ``<tool_call>{"name": "f", "arguments": {}}</tool_call>``."""
    return [_hermes_call(written, closed=bool(end)) for written, end in _HERMES.findall(text)]


def _hermes_call(written: str, closed: bool) -> ToolCall:
    try:
        return _call(json.loads(written))
    except (ValueError, RecursionError) as error:
        return _malformed("it has no </tool_call>" if not closed else f"it is not JSON ({error})")


_XML = re.compile(r"<tool_call>\s*(?:<function=([^>\n]+)>(.*?))?(</tool_call>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def _xml(text: str) -> list[ToolCall]:
    """Qwen3-Coder and Qwen3.5: ``<function=f><parameter=a>1</parameter></function>``."""
    calls = []
    for name, body, end in _XML.findall(text):
        if not name or not end or "</function>" not in body:
            calls.append(_malformed("it needs <function=NAME>...</function> inside <tool_call>"))
            continue
        calls.append(_written(name, _PARAMETER.findall(body)))
    return calls


_KEYS = re.compile(r"<tool_call>\s*([^<\n]*)(.*?)(</tool_call>|\Z)", re.DOTALL)
_KEY = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def _arg_keys(text: str) -> list[ToolCall]:
    """GLM 4.5 and later: ``f<arg_key>a</arg_key><arg_value>1</arg_value>`` in ``<tool_call>``."""
    calls = []
    for name, body, end in _KEYS.findall(text):
        if not name.strip() or not end or _KEY.sub("", body).strip():
            calls.append(_malformed("it needs a name, then <arg_key> and <arg_value> in turn"))
            continue
        calls.append(_written(name, _KEY.findall(body)))
    return calls


def _written(name: str, pairs: Sequence[tuple[str, str]]) -> ToolCall:
    return ToolCall(name.strip(), {key.strip(): value for key, value in pairs})


def _typed(call: ToolCall, tools: Tools) -> ToolCall:
    """A call whose arguments, all text, are read as JSON unless the schema says string."""
    types = _types(call.name, tools)
    arguments: dict[str, Any] = {}
    for key, written in call.arguments.items():
        arguments[key] = written
        if types.get(key) != "string":
            with suppress(ValueError, RecursionError):
                arguments[key] = json.loads(written)
    return replace(call, arguments=arguments)


def _types(name: str, tools: Tools) -> dict[str, Any]:
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        if isinstance(function, Mapping) and function.get("name") == name:
            properties = (function.get("parameters") or {}).get("properties") or {}
            return {key: kind.get("type") for key, kind in properties.items()}
    return {}


_PYTHONIC = re.compile(r"<\|tool_call_start\|>(.*?)(<\|tool_call_end\|>|\Z)", re.DOTALL)
_CONSTANTS = {"true": True, "false": False, "null": None}


def _pythonic(text: str) -> list[ToolCall]:
    """LFM2: ``<|tool_call_start|>[f(a=1)]<|tool_call_end|>``."""
    calls: list[ToolCall] = []
    for written, end in _PYTHONIC.findall(text):
        try:
            if not end:
                raise ValueError("it has no <|tool_call_end|>")
            calls += [_python_call(node) for node in _list(written)]
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            calls.append(_malformed(f"it is no list of Python calls ({error})"))
    return calls


def _list(written: str) -> list[ast.expr]:
    body = ast.parse(written.strip(), mode="eval").body
    return body.elts if isinstance(body, ast.List) else [body]


def _python_call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args or any(k.arg is None for k in node.keywords):
        raise ValueError("a call is NAME(key=value, ...)")
    arguments = {str(k.arg): ast.literal_eval(_Constants().visit(k.value)) for k in node.keywords}
    return ToolCall(ast.unparse(node.func), arguments)


class _Constants(ast.NodeTransformer):
    """JSON's constants, which a model mixes into Python."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        known = node.id in _CONSTANTS
        return ast.copy_location(ast.Constant(_CONSTANTS[node.id]), node) if known else node


_HARMONY = re.compile(
    r"(?: to=functions\.([\w.-]+))?<\|channel\|>commentary(?: to=functions\.([\w.-]+))?[^<]*"
    r"(?:<\|constrain\|>[^<]*)?<\|message\|>(.*?)(?=<\|call\|>|<\|end\|>|<\|start\|>|\Z)",
    re.DOTALL,
)


def _harmony(text: str) -> list[ToolCall]:
    """gpt-oss: ``<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}``."""
    found = ((before or after, body) for before, after, body in _HARMONY.findall(text))
    return [_json_arguments(name, body) for name, body in found if name]


_DEEPSEEK = re.compile(
    r"<\uff5ctool▁call▁begin\uff5c>(.*?)<\uff5ctool▁sep\uff5c>(.*?)"
    r"(<\uff5ctool▁call▁end\uff5c>|\Z)",
    re.DOTALL,
)
_FENCED = re.compile(r"\s*(\S+)\s*```json\s*(.*?)\s*```\s*", re.DOTALL)


def _deepseek(text: str) -> list[ToolCall]:
    """DeepSeek V3.1: a name and JSON; R1 and V3: the type, a name and JSON in a fence."""
    calls = []
    for head, body, _ in _DEEPSEEK.findall(text):
        fenced = _FENCED.fullmatch(body)
        calls.append(_json_arguments(*fenced.groups()) if fenced else _json_arguments(head, body))
    return calls


def _mistral(text: str) -> list[ToolCall]:
    """Mistral: ``[TOOL_CALLS]``, then a JSON list of calls, or ``f[ARGS]{}``."""
    return [call for part in text.split("[TOOL_CALLS]")[1:] for call in _mistral_part(part.strip())]


def _mistral_part(part: str) -> Iterator[ToolCall]:
    if not part.startswith("["):
        name, _, written = part.partition("{")
        yield _json_arguments(name.removesuffix("[ARGS]"), "{" + written)
        return
    try:
        calls = json.loads(part)
    except (ValueError, RecursionError) as error:
        yield _malformed(f"it is no JSON list ({error})")
        return
    yield from (_call(call) for call in calls)


def _bare_json(text: str) -> list[ToolCall]:
    """Llama 3.1 and 3.2: the whole turn is ``{"name": "f", "parameters": {}}``."""
    written = text.strip().removeprefix("<|python_tag|>").strip()
    if not re.match(r'\{\s*"name"', written):
        return []
    try:
        call = json.loads(written)
    except (ValueError, RecursionError) as error:
        return [_malformed(f"it is not JSON ({error})")]
    return [_call(call)]


def _json_arguments(name: str, written: str) -> ToolCall:
    try:
        arguments = json.loads(written)
    except (ValueError, RecursionError) as error:
        return _malformed(f"its arguments are not JSON ({error})", name.strip())
    return _call({"name": name.strip(), "arguments": arguments})


def _call(call: Any) -> ToolCall:
    """A call from JSON; Llama calls the arguments parameters."""
    name = call.get("name") if isinstance(call, dict) else None
    if not isinstance(name, str) or not name:
        return _malformed('it has no "name"')
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(arguments, dict):
        return _malformed("arguments must be a JSON object", name)
    return ToolCall(name, arguments)


def _malformed(reason: str, name: str = "") -> ToolCall:
    return ToolCall(name, {}, f"the tool call is malformed: {reason}")


HERMES = ToolFormat("hermes", parse_hermes)
FORMATS = (
    HERMES,
    ToolFormat("xml", _xml, textual=True),
    ToolFormat("arg_keys", _arg_keys, textual=True),
    ToolFormat("pythonic", _pythonic),
    ToolFormat("harmony", _harmony),
    ToolFormat("mistral", _mistral),
    ToolFormat("deepseek", _deepseek),
    ToolFormat("bare_json", _bare_json),
)
"""All formats. A new one is one entry here."""


def find_format(render: Callable[..., str], bare: Callable[[str], str]) -> ToolFormat | None:
    """Return the format in which a chat template writes calls.

    None: it does not render tools, or writes calls in no format of ``FORMATS``.

    Args:
        render: renders messages with tools; further arguments go to the template.
        bare: removes the end token from a turn's text.
    """
    function = {"name": "f", "description": _MARK, "parameters": {"type": "object"}}
    tools = [{"type": "function", "function": function}]
    call = ToolCall("f", {"value": "b"})
    calls = [call_message("0" * 9, call)]
    user: Message = {"role": "user", "content": "a"}
    calling: Message = {"role": "assistant", "content": "", "tool_calls": calls}
    result: Message = {"role": "tool", "name": "f", "content": "c", "tool_call_id": "0" * 9}
    try:
        before = render([user], tools, "tools", add_generation_prompt=True)
        whole = render([user, calling], tools, "tools")
        render([user, calling, result], tools, "tools")
    except UserError:
        return None
    if _MARK not in before:
        return None
    written = bare(whole.removeprefix(before) if whole.startswith(before) else whole)
    return next((form for form in FORMATS if call in form.parse(written)), None)


def calls_in(form: ToolFormat | None, text: str, tools: Tools) -> list[ToolCall]:
    """Parse the calls of a completion, after its reasoning (``</think>``).

    Args:
        form: the template's format; None: Hermes, in which tools are shown to other templates.
        text: the completion.
        tools: JSON schemas of the tools.
    """
    form = form or HERMES
    calls = form.parse(text.rpartition("</think>")[2])
    if form.textual:
        calls = [_typed(call, tools) for call in calls]
    return [
        _malformed("it holds half of a surrogate pair") if _lone_surrogate(call) else call
        for call in calls
    ]


def _lone_surrogate(call: ToolCall) -> bool:
    text = json.dumps([call.name, call.arguments], ensure_ascii=False, default=str)
    return any("\ud800" <= c <= "\udfff" for c in text)
