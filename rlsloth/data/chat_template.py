"""Render a chat template with bounded time and text: it comes with the model, from anyone.

transformers' sandbox keeps a template from Python's attributes and from long ranges, but nested
loops and repeated text have no limit, and constants are computed while a template is compiled.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

SECONDS = 5.0
"""Longest time that a conversation's rendering may take."""
CHARACTERS = 50_000_000
"""Longest text that a template may make, in the end or on the way."""
_CHECKED_EVERY = 256
"""Number of loop iterations between two looks at the clock."""
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_WIDTHS = re.compile(r"\d{8,}")
"""A width in a format string that would make a text too long."""


class TemplateLimitError(jinja2.TemplateError):
    """A template took too long, or made too much text."""


class _Budget(threading.local):
    """The time that the thread's rendering has left."""

    deadline = 0.0
    ticks = 0


_budget = _Budget()


def apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    *,
    continue_final_message: bool = False,
    **kwargs: Any,
) -> str:
    """Render a conversation as ``tokenizer.apply_chat_template`` does, within the limits.

    Args:
        tokenizer: has the template and the special tokens.
        messages: the conversation.
        tools: JSON schemas of the tools.
        continue_final_message: render up to the end of the last message's text.
        kwargs: further arguments of the template.

    Raises:
        TemplateLimitError: the limits are passed.
        Exception: whatever the template raises.
    """
    tools = list(tools) if tools else None
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        text = tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False,
            continue_final_message=continue_final_message, **kwargs,
        )  # fmt: skip
        return str(text)
    chat: list[Any] = list(messages)
    last = ""
    if continue_final_message:
        chat = deepcopy(chat)
        last = str(chat[-1]["content"])
        chat[-1]["content"] = last + _TAG
    template = _compiled(tokenizer.get_chat_template(None, tools))
    kwargs.setdefault("add_generation_prompt", False)
    values = {**tokenizer.special_tokens_map, **kwargs}
    text = _bounded(template, messages=chat, tools=tools, documents=None, **values)
    return _before_tag(text, last) if continue_final_message else text


def _before_tag(text: str, last: str) -> str:
    """Cut a rendered text after the last message's text, as transformers does."""
    if last.strip() not in text or _TAG.strip() not in text:
        raise ValueError("the template drops the message that is to be continued")
    at = text.rindex(_TAG.strip())
    whole = text[at : at + len(_TAG)] == _TAG  # else the template strips white space
    return text[:at] if whole else text[:at].rstrip()


def _bounded(template: jinja2.Template, **values: Any) -> str:
    _budget.deadline, _budget.ticks = time.monotonic() + SECONDS, 0
    parts, size = [], 0
    for part in template.generate(**values):
        parts.append(part)
        size += len(part)
        if size > CHARACTERS:
            raise TemplateLimitError(f"the chat template writes more than {CHARACTERS} characters")
        _tick()
    return "".join(parts)


def _tick(steps: int = 1) -> str:
    """Count steps of a template; look at the clock now and then."""
    before = _budget.ticks // _CHECKED_EVERY
    _budget.ticks += steps
    if _budget.ticks // _CHECKED_EVERY > before and time.monotonic() > _budget.deadline:
        raise TemplateLimitError(f"the chat template takes longer than {SECONDS:.0f} s")
    return ""


@lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    """Compile a template in transformers' environment, with the limits added."""
    theirs = chat_template_utils._compile_jinja_template("").environment
    environment = _Limited.of(theirs)
    tree = environment._parse(source, None, None)
    _add_ticks(tree, environment)
    code = environment.compile(tree)
    return jinja2.Template.from_code(environment, code, environment.make_globals(None))


def _add_ticks(tree: nodes.Template, environment: jinja2.Environment) -> None:
    """Begin the body of every loop and macro with a tick, and bound the joining of texts."""
    for kind in (nodes.For, nodes.Macro, nodes.CallBlock):
        for node in tree.find_all(kind):
            _add_tick(node, environment)
    _Joins().visit(tree, environment)


def _add_tick(node: Any, environment: jinja2.Environment) -> None:
    call = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
    node.body.insert(0, nodes.ExprStmt(call).set_lineno(node.lineno))
    node.set_environment(environment)


class _Joins(NodeTransformer):
    """Replace the operator ~ by a call that is bounded."""

    def visit_Concat(self, node: nodes.Concat, environment: jinja2.Environment) -> nodes.Node:  # noqa: N802
        """Replace one operator, with those inside it."""
        self.generic_visit(node, environment)
        call = nodes.Call(nodes.EnvironmentAttribute("joined"), node.nodes, [], None, None)
        return call.set_lineno(node.lineno).set_environment(environment)


class _Limited(ImmutableSandboxedEnvironment):
    """transformers' environment, in which each operation is bounded."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    @classmethod
    def of(cls, theirs: jinja2.Environment) -> _Limited:
        """Copy transformers' environment: its options, extensions, filters and globals."""
        made = cls(
            trim_blocks=theirs.trim_blocks,
            lstrip_blocks=theirs.lstrip_blocks,
            extensions=[type(extension) for extension in theirs.extensions.values()],
            optimized=False,  # constants would be computed before any limit
        )
        made.filters = {name: _limited(call) for name, call in theirs.filters.items()}
        made.globals = dict(theirs.globals)
        made.tests = dict(theirs.tests)
        return made

    @staticmethod
    def tick() -> str:
        """Count a step."""
        return _tick()

    @staticmethod
    def joined(*values: Any) -> str:
        """Join values as text, as the operator ~ does."""
        texts = [str(value) for value in values]
        _refuse_length(sum(map(len, texts)))
        return "".join(texts)

    def wrap_str_format(self, value: Any) -> Any:
        """Refuse a format string with enormous widths."""
        if isinstance(text := getattr(value, "__self__", None), str):
            _refuse_widths(text, ())
        return super().wrap_str_format(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a binary operation whose result is not too large."""
        del context
        if operator == "**" and not (abs(left) <= 2**32 and abs(right) <= 64):
            raise TemplateLimitError(f"the chat template computes {left} ** {right}")
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, (str, list, tuple)) and isinstance(times, int):
                    _refuse_length(len(text) * times)
        if operator == "%" and isinstance(left, str):
            _refuse_widths(left, right)
        return _checked(self.binop_table[operator](left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a function or method of the template with bounded arguments."""
        _check_call(__obj, args, kwargs)
        return _checked(super().call(__context, __obj, *args, **kwargs))


def _limited(call: Any) -> Any:
    """Wrap a filter, so that its arguments and its result are bounded."""
    from functools import wraps

    @wraps(call)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_call(call, args, kwargs)
        return _checked(call(*args, **kwargs))

    return bounded


def _check_call(call: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a call whose result would be too large to make."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and value > CHARACTERS:
            raise TemplateLimitError(f"the chat template calls a function with {value}")
    owner = getattr(call, "__self__", None)
    texts = [value for value in (owner, *args) if isinstance(value, str)]
    name = getattr(call, "__name__", "")
    if "replace" in name and len(texts) == 3:
        _refuse_length(texts[0].count(texts[1]) * len(texts[2]))
    if "format" in name and texts:
        _refuse_widths(texts[0], args)
    if "join" in name:
        lists = [value for value in (owner, *args) if isinstance(value, (list, tuple))]
        glue = max(map(len, texts), default=0)
        for items in lists:
            sizes = sum(len(item) for item in items if isinstance(item, str))
            _refuse_length(len(items) * glue + sizes)


def _refuse_widths(text: str, values: Any) -> None:
    numbers = values if isinstance(values, (list, tuple)) else (values,)
    wide = "*" in text and any(isinstance(n, int) and n > CHARACTERS for n in numbers)
    if wide or _WIDTHS.search(text):
        raise TemplateLimitError(f"the chat template pads a text beyond {CHARACTERS} characters")


def _checked(value: Any) -> Any:
    size = len(value) if isinstance(value, (str, list, tuple)) else 0
    _refuse_length(size)
    _tick(1 + size // 1000)
    return value


def _refuse_length(length: int) -> None:
    if length > CHARACTERS:
        raise TemplateLimitError(f"the chat template makes a text of {length} characters")
