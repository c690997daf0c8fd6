"""Miniature rows in the schemas of well-known datasets load as they are, with the right example."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helpers.examples import renderer, shown
from rlsloth.config import EnvConfig
from rlsloth.config.data import KtoDataConfig, PreferenceDataConfig, SftDataConfig
from rlsloth.data.labelled import labelled_examples
from rlsloth.data.pairs import pair_examples
from rlsloth.data.prompts import make_prompts
from rlsloth.data.reading import Reading
from rlsloth.data.sft import sft_examples
from rlsloth.errors import UserError

Row = dict[str, Any]


def turn(role: str, text: Any, **more: Any) -> Row:
    return {"role": role, "content": text, **more}


def said(who: str, text: Any, **more: Any) -> Row:
    return {"from": who, "value": text, **more}


Q, A, B = "Two plus two?", "Four.", "Five."
ASKED = [turn("user", Q), turn("assistant", A)]
SAID = [said("human", Q), said("gpt", A)]
WRONG = turn("assistant", B)
PLAIN = "user: Two plus two? | Four."
CALL = '{"name": "add", "arguments": {"a": 2, "b": 2}}'
TOOL = {"name": "add", "description": "Sums", "parameters": {"a": {"type": "int"}}}

SFT: dict[str, tuple[Row, str]] = {
    "gsm8k": ({"question": Q, "answer": "2+2=4\n#### 4"},
              "user: Two plus two? | 2+2=4\n#### 4"),
    "MATH": ({"problem": Q, "level": "1", "type": "Algebra", "solution": A}, PLAIN),
    "MATH-500": ({"problem": Q, "solution": A, "answer": "4", "level": 1}, PLAIN),
    "alpaca": ({"instruction": "Add.", "input": "2 and 2", "output": A, "text": "Below ..."},
               "user: Add.\n\n2 and 2 | Four."),
    "alpaca, no input": ({"instruction": Q, "input": "", "output": A}, PLAIN),
    "alpaca with history": (
        {"instruction": Q, "input": "", "output": A, "history": [["Hi.", "Ho."]]},
        "user: Hi. assistant\nHo. user\nTwo plus two? | Four."),
    "python_code_instructions": (
        {"instruction": "Add.", "input": "2, 2", "output": A, "prompt": "Below ... Four."},
        "user: Add.\n\n2, 2 | Four."),
    "dolly": ({"instruction": "Who?", "context": "Ann ran.", "response": "Ann.", "category": "qa"},
              "user: Who?\n\nAnn ran. | Ann."),
    "sharegpt": ({"id": "a", "conversations": SAID}, PLAIN),
    "ultrachat": ({"prompt": Q, "prompt_id": "a", "messages": ASKED}, PLAIN),
    "OpenR1-Math": ({"problem": "p", "solution": "s", "answer": "4", "messages": ASKED}, PLAIN),
    "open-thoughts": (
        {"system": "Think.",
         "conversations": [said("user", Q), said("assistant", A)]},
        "system: Think. user: Two plus two? | Four."),
    "open-thoughts metadata": (
        {"problem": Q, "deepseek_reasoning": "two and two", "deepseek_solution": A,
         "ground_truth_solution": "4"},
        "user: Two plus two? | <think>\ntwo and two\n</think>\n\nFour."),
    "NuminaMath": ({"source": "a", "problem": "p", "solution": "s", "messages": ASKED}, PLAIN),
    "MetaMath": ({"type": "a", "query": Q, "original_question": "o", "response": A},
                 PLAIN),
    "SQuAD": ({"id": "1", "title": "t", "context": "Ann ran.", "question": "Who?",
               "answers": {"text": ["Ann", "Ann ran"], "answer_start": [0, 0]}},
              "user: Who?\n\nAnn ran. | Ann"),
    "guanaco": ({"text": "### Human: a### Assistant: b"}, " | ### Human: a### Assistant: b"),
    "no_robots": ({"prompt": "p", "prompt_id": "1", "messages": ASKED, "category": "c"}, PLAIN),
    "capybara": ({"source": "s", "conversation": [{"input": Q, "output": A}]}, PLAIN),
    "firefly": ({"conversation": [{"human": Q, "assistant": A}]}, PLAIN),
    "tulu-3": ({"id": "1", "messages": ASKED, "source": "s"}, PLAIN),
    "SlimOrca": (
        {"conversations": [said("system", "Count.", weight=None), said("human", "a", weight=0.0),
                           said("gpt", "b", weight=1.0)]},
        "system: Count. user: a | b"),
    "OpenOrca": ({"id": "1", "system_prompt": "Count.", "question": "a", "response": "b"},
                 "system: Count. user: a | b"),
    "code-alpaca": ({"prompt": "print", "completion": "(1)"}, "print | (1)"),
    "wizardlm": ({"instruction": Q, "output": A}, PLAIN),
    "lima": ({"conversations": [Q, A], "source": "s"}, PLAIN),
    "hermes": (
        {"id": "1", "conversations": [said("system", "s"), said("human", "q"),
                                      said("gpt", "<tool_call>\n{}\n</tool_call>"),
                                      said("tool", ""), said("gpt", "Done.")]},
        "system: s user: q | <tool_call>\n{}\n</tool_call> + Done."),
    "glaive toolcall": (
        {"conversations": [said("human", "q"), said("function_call", CALL),
                           said("observation", "4"), said("gpt", A)], "tools": "[]"},
        f"user: q | <tool_call>\n{CALL}\n</tool_call> + Four."),
    "xlam": ({"id": 0, "query": "2+2?", "answers": f"[{CALL}]", "tools": json.dumps([TOOL])},
             f"... user: 2+2? | <tool_call>\n{CALL}\n</tool_call>"),
    "OpenAI tools": (
        {"messages": [turn("user", "q"),
                      turn("assistant", None, tool_calls=[
                          {"id": "1", "type": "function",
                           "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}]),
                      turn("tool", "4", tool_call_id="1"), turn("assistant", A)]},
        f"user: q | <tool_call>\n{CALL}\n</tool_call> + Four."),
    "DeepMath": ({"question": Q, "final_answer": "4", "topic": "t", "r1_solution_1": A},
                 PLAIN),
    "OpenMathReasoning": (
        {"problem": Q, "generated_solution": A, "expected_answer": "4"}, PLAIN),
    "Nemotron": ({"input": [turn("user", Q)], "output": A, "reasoning": "off"}, PLAIN),
    "flan": ({"inputs": Q, "targets": A, "task": "t"}, PLAIN),
    "medical-o1": ({"Question": Q, "Complex_CoT": "two and two", "Response": A},
                   "user: Two plus two? | <think>\ntwo and two\n</think>\n\nFour."),
    "camel": ({"role_1": "a", "message_1": Q, "message_2": A}, PLAIN),
    "WildChat": ({"conversation": [{**m, "language": "e", "toxic": False} for m in ASKED]},
                 PLAIN),
    "messages as JSON": ({"messages": json.dumps(ASKED)}, PLAIN),
    "content in parts": (
        {"messages": [turn(m["role"], [{"type": "text", "text": m["content"]}]) for m in ASKED]},
        PLAIN),
    "vLLM's reasoning": (
        {"messages": [ASKED[0], turn("assistant", A, reasoning="two and two")]},
        "user: Two plus two? | <think>\ntwo and two\n</think>\n\nFour."),
    "dict of lists": ({"conversations": {"from": ["human", "gpt"], "value": ["a", "b"]}},
                      "user: a | b"),
    "tinystories": ({"text": "Once."}, " | Once."),
}  # fmt: skip

PAIRS: dict[str, tuple[Row, str]] = {
    "ultrafeedback": (
        {"prompt": Q, "prompt_id": "a", "messages": ASKED, "chosen": ASKED,
         "rejected": [ASKED[0], WRONG], "score_chosen": 9.0}, PLAIN),
    "Orca pairs": ({"system": "", "question": Q, "chosen": A, "rejected": B},
                   PLAIN),
    "distilabel": ({"system": "Sum.", "input": Q, "chosen": A, "rejected": B},
                   "system: Sum. user: Two plus two? | Four."),
    "HH-RLHF": ({"chosen": "\n\nHuman: q\n\nAssistant: yes",
                 "rejected": "\n\nHuman: q\n\nAssistant: no"},
                "\n\nHuman: q\n\nAssistant: |  yes"),
    "orpo-dpo-mix": ({"source": "s", "prompt": "q", "question": "q", "chosen": ASKED,
                      "rejected": [ASKED[0], WRONG]}, PLAIN),
    "sharegpt pairs": ({"conversations": SAID[:1], "chosen": said("gpt", A),
                        "rejected": said("gpt", B)}, PLAIN),
    "alpaca pairs": (
        {"instruction": "Add.", "input": "2 and 2", "chosen": A, "rejected": B},
        "user: Add.\n\n2 and 2 | Four."),
    "stack-exchange": ({"question": Q, "response_j": A, "response_k": B}, PLAIN),
    "UltraInteract": ({"trajectory": SAID[:1], "chosen": A, "rejected": B}, PLAIN),
    "PKU-SafeRLHF": (
        {"prompt": "q ", "response_0": B, "response_1": A, "is_response_0_safe": True,
         "better_response_id": 1, "safer_response_id": 0}, "q | Four."),
    "SHP": ({"post_id": "a", "domain": "d", "history": Q, "human_ref_A": A, "human_ref_B": B,
             "labels": 1, "score_A": 9, "score_B": 2, "score_ratio": 4.5}, PLAIN),
    "SHP, the other": ({"history": Q, "human_ref_A": B, "human_ref_B": A, "labels": 0}, PLAIN),
    "Nectar": (
        {"prompt": "\n\nHuman: q\n\nAssistant: ", "num_responses": 3, "source": ["s"],
         "answers": [{"answer": "no", "model": "m", "rank": 2.0},
                     {"answer": "yes", "model": "n", "rank": 1.0},
                     {"answer": B, "model": "o", "rank": 3.0}]},
        "\n\nHuman: q\n\nAssistant: | yes"),
}  # fmt: skip

KTO: dict[str, tuple[Row, str]] = {
    "kto-mix": ({"prompt": ASKED[:1], "completion": ASKED[1:], "label": True}, PLAIN),
    "kto of LLaMA-Factory": ({"messages": ASKED, "kto_tag": True}, PLAIN),
}

PROMPTS: dict[str, tuple[Row, str, Any]] = {
    "gsm8k": ({"question": Q, "answer": "#### 4"}, "user: Two plus two?", "#### 4"),
    "dapo-math": (
        {"data_source": "d", "prompt": ASKED[:1],
         "reward_model": {"ground_truth": "4", "style": "rule"}, "extra_info": {"index": "1"}},
        "user: Two plus two?", "4"),
    "big-math": ({"problem": Q, "answer": "4", "llama8b_solve_rate": 0.5},
                 "user: Two plus two?", "4"),
    "DeepMath": ({"question": Q, "final_answer": "4", "r1_solution_1": "s"},
                 "user: Two plus two?", "4"),
    "OpenR1-Math": ({"problem": Q, "solution": "s", "answer": "4", "messages": ASKED},
                    "user: Two plus two?", "4"),
    "tulu-3": ({"messages": ASKED, "ground_truth": "4"}, "user: Two plus two?", "4"),
}  # fmt: skip


def text_of(example: Any) -> str:
    """Shorten an example to ``role: text | learnt text``."""
    whole = shown(example)
    prompt, _, rest = whole.partition(" | ")
    for part in ("<|im_start|>", "<|im_end|>\n"):
        prompt = prompt.replace(part, " " if part.startswith("<|im_end") else "")
    prompt = prompt.removesuffix("assistant\n").strip(" ")
    for role in ("system", "user"):
        prompt = prompt.replace(f"{role}\n", f"{role}: ", 1)
    learnt = [part.split("]<|", 1)[0] for part in rest.split("[") if "<|im_end|>]" in part]
    return f"{prompt} | {' + '.join(p.split('<|im_end|>]')[0] for p in learnt)}"


@pytest.mark.parametrize("name", SFT)
def test_rows_of_supervised_datasets(name: str) -> None:
    row, wanted = SFT[name]
    (example,) = sft_examples([row], SftDataConfig(), renderer(), "d")
    found = text_of(example)
    if " | ### Human" in wanted or wanted.startswith(" | Once"):
        found = " | " + shown(example).replace(" | [", "").removesuffix("<|im_end|>]")
    if wanted.startswith("... "):
        assert found.endswith(wanted.removeprefix("... "))
        assert "Sums" in found
        return
    assert found == wanted


@pytest.mark.parametrize("name", PAIRS)
def test_rows_of_preference_datasets(name: str) -> None:
    row, wanted = PAIRS[name]
    (pair,) = pair_examples([row], PreferenceDataConfig(), renderer(), "d")
    assert text_of(pair) == wanted
    assert shown(pair, 0) != shown(pair, 1)
    both = labelled_examples([row], KtoDataConfig(), renderer(), "d")
    assert [example.label for example in both] == [True, False]


@pytest.mark.parametrize("name", KTO)
def test_rows_of_labelled_datasets(name: str) -> None:
    row, wanted = KTO[name]
    (example,) = labelled_examples([row], KtoDataConfig(), renderer(), "d")
    assert (text_of(example), example.label) == (wanted, True)


@pytest.mark.parametrize("name", PROMPTS)
def test_rows_of_datasets_with_gold_answers(name: str) -> None:
    row, wanted, gold = PROMPTS[name]
    (prompt,) = make_prompts([row], EnvConfig(), "d", gold=True)
    assert not isinstance(prompt.messages, str)
    assert " ".join(f"{m['role']}: {m['content']}" for m in prompt.messages) == wanted
    assert prompt.columns["answer"] == gold


@pytest.mark.parametrize(
    ("row", "option", "setting"),
    [
        ({"nums": [1, 2], "target": 3}, "--env.prompt-template",
         {"prompt_template": "Make {target} of {nums}."}),
        ({"enquiry": "Make 3 of 1, 2."}, "--env.prompt-column", {"prompt_column": "enquiry"}),
        ({"prompt": "p", "prompts": "x"}, "--env.drop-columns", {"drop_columns": ["prompts"]}),
    ],
)  # fmt: skip
def test_other_prompts_need_one_option(row: Row, option: str, setting: Row) -> None:
    """The first one is Countdown's."""
    with pytest.raises(UserError, match=option) as refused:
        make_prompts([row], EnvConfig(), "d")
    assert "\n" not in str(refused.value)
    (prompt,) = make_prompts([row], EnvConfig(**setting), "d")
    assert prompt.messages in ("p", (turn("user", "Make 3 of 1, 2."),))


def test_other_examples_need_one_option() -> None:
    chat = {"system": "s", "chat": "USER: q ASSISTANT: a"}
    with pytest.raises(UserError, match=r"--data\.columns\.messages"):
        sft_examples([chat], SftDataConfig(), renderer(), "d")
    (text,) = sft_examples([chat], SftDataConfig(columns={"text": "chat"}), renderer(), "d")
    assert shown(text) == "U | [SER: q ASSISTANT: a<|im_end|>]"
    pair = {"enquiry": "Is 4 even?", "chosen": "It is yes", "rejected": "It is no"}
    with pytest.raises(UserError, match=r"enquiry; .*--data\.prompt-column enquiry"):
        pair_examples([pair], PreferenceDataConfig(), renderer(), "d")
    (made,) = pair_examples([pair], PreferenceDataConfig(prompt_column="enquiry"), renderer(), "d")
    assert text_of(made) == "user: Is 4 even? | It is yes"
    (inside,) = pair_examples(
        [pair], PreferenceDataConfig(drop_columns=["enquiry"]), renderer(), "d"
    )
    assert shown(inside).startswith("It is | [ yes")


def test_columns_read_and_not_used_are_named_once() -> None:
    reading = Reading()
    rows = [{"instruction": "Add.", "input": "2", "output": "Two.", "text": "t", "id": 1}] * 3
    sft_examples(rows, SftDataConfig(), renderer(), "d", reading)
    assert reading.notes() == (
        "columns read: instruction + input, output",
        "columns not used: text, id",
    )
    reading = Reading()
    sft_examples([SFT["WildChat"][0]], SftDataConfig(), renderer(), "d", reading)
    assert reading.notes()[1].endswith("template may read: language, toxic")
