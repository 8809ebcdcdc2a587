"""The parts of InfiniteBench: prompts, lengths of answers and kinds of answers.

Zhang et al. 2024, "InfiniteBench: Extending Long Context Evaluation Beyond 100K Tokens" (arXiv
2402.13718, github.com/OpenBMB/InfiniteBench). Lengths, scores and the order of instructions,
context, question and cue are those that it publishes for open models; the wording of the
instructions is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from commvq_core.evaluation.tasks.benchmark import Part

_TEXT = str | list[str]
_NUMBER = int | float | str | list[int | float | str]
_NUMBERS = list[int | str] | list[list[int | str]]


@dataclass(frozen=True)
class Template:
    """A part's prompt; `context` holds {context}, `question` and `answer` what is asked.

    `kind` is what a row's answer must be (see evaluation.data), `options` whether rows have some.
    """

    context: str
    question: str
    answer: str = ""
    kind: Any = _TEXT
    options: bool = False


_HIDDEN = (
    "Something important is hidden in a long text that is irrelevant otherwise. Find it and "
    "memorize it. I will ask you about it.\n\n{context}"
)
_OPTIONS = "A. {A}\nB. {B}\nC. {C}\nD. {D}\n\n"

TEMPLATES = {
    "passkey": Template(_HIDDEN, "\n\n{input}\n\n", "The pass key is"),
    "number_string": Template(_HIDDEN, "\n\n{input}\n\n", "The sequence of digits is"),
    "kv_retrieval": Template(
        "Find the value that belongs to a key in the JSON object below.\n\n{context}",
        "\n\n{input}",
    ),
    "longdialogue_qa_eng": Template(
        "In the script below one mention of a character's name, taken at random, was replaced by "
        '"$$MASK$$". Guess who that is.\n\n{context}',
        "\n\n",
        "The name behind $$MASK$$ is most likely",
    ),
    "longbook_sum_eng": Template("Summarize the book below.\n\n{context}", "\n\n", "Summary:"),
    "longbook_choice_eng": Template(
        "Read the book and answer the question after it.\n\n{context}",
        f"\n\nQuestion: {{input}}\n{_OPTIONS}",
        "The letter of the right answer is",
        options=True,
    ),
    "longbook_qa_eng": Template(
        "Read the book and answer the question after it in as few words as you can.\n\n{context}",
        "\n\nQuestion: {input}\n",
        "Answer:",
    ),
    "longbook_qa_chn": Template(
        "请先阅读下面的书，再回答问题。\n\n{context}", "\n\n问题：{input}\n", "答案："
    ),
    "math_find": Template("{wanted}\n\n{context}", "\n\n{input}", kind=_NUMBER),
    "math_calc": Template(
        "Give the value of an expression after each of its numbers.\n\n"
        "Expression: 2 + 5 - 1\nValues: [2, 7, 6]\n\n"
        "Expression: 9 - 4 + 3 + 1\nValues: [9, 5, 8, 9]\n\nExpression: {context}",
        "\n",
        "Values:",
        kind=_NUMBERS,
    ),
    "code_run": Template(
        "One of the functions in the Python code below is called {function}.\n\n{context}",
        "\n\nWork out the exact value of {call}. ",
        "The value of {call} is",
        kind=_NUMBER,
    ),
    "code_debug": Template(
        "In the Python code below exactly one function or method has an error that was put there "
        "on purpose and makes it crash.\n\n{context}",
        f"\n\nOptions:\n{_OPTIONS}",
        "The right option is:",
        options=True,
    ),
}

_NEW_TOKENS = {
    "passkey": 6,
    "number_string": 12,
    "kv_retrieval": 50,
    "longdialogue_qa_eng": 40,
    "longbook_sum_eng": 1200,
    "longbook_choice_eng": 40,
    "longbook_qa_eng": 40,
    "longbook_qa_chn": 40,
    "math_find": 3,
    "math_calc": 30000,
    "code_run": 5,
    "code_debug": 5,
}

# Lengths this short want answers that go on where the cue ends, so no chat template by default.
PARTS = {name: Part(tokens, chat=False) for name, tokens in _NEW_TOKENS.items()}
