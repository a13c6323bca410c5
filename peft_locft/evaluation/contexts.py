"""The same prompts in named contexts: a wrapper, examples, a conversation, or text before them.

Two published figures for one method often differ by such a context alone. Its texts are the same for every edit and
every data set, so that figures can be compared, and so that their tokens are computed once.
"""

from __future__ import annotations

from collections.abc import Callable

from ..data.edits import Message, Prompt

CONTEXTS = ("question_answer", "few_shot", "chat", "after_paragraph", "second_turn")
NEEDS_CHAT = ("chat", "second_turn")
NEEDS_ENGLISH = ("question_answer", "few_shot", "after_paragraph", "second_turn")

NUM_TOKENS = 16  # of an answer, or what the target needs: five contexts are five times the work
EXAMPLES = (
    ("How many days are in a week?", "Seven"),
    ("The opposite of hot is", "cold"),
    ("Water freezes to", "ice"),
)
PARAGRAPH = (
    "The kitchen was quiet in the early morning. A kettle stood on the stove, and two cups were on the table next to "
    "a bowl of apples. Outside it had begun to rain, so the windows were closed. After a while somebody came down the "
    "stairs, opened the cupboard, and looked for the sugar."
)
FIRST_TURN = (Message("user", "How many days are in a week?"), Message("assistant", "A week has seven days."))


def as_question(text: str) -> str:
    """Return a prompt as a question in plain text, whose answer follows.

    Example:
        >>> as_question("Who wrote Hamlet?")
        'Question: Who wrote Hamlet?\\nAnswer:'
    """
    return f"Question: {text.rstrip()}\nAnswer:"


def _few_shot(text: str) -> str:
    answered = "".join(f"{as_question(question)} {answer}\n\n" for question, answer in EXAMPLES)
    return answered + as_question(text)


WRAPPERS: dict[str, Callable[[str], str]] = {
    "question_answer": as_question,
    "few_shot": _few_shot,
    "after_paragraph": lambda text: f"{PARAGRAPH}\n\n{text}",
}


def in_context(prompt: Prompt, context: str) -> Prompt:
    """Return a prompt in a context.

    Args:
        prompt: the prompt, in plain text or at the end of a conversation.
        context: `"question_answer"`: as "Question: … Answer:". `"few_shot"`: so, after three answered questions.
            `"after_paragraph"`: after an unrelated paragraph. `"chat"`: as the first message of a conversation, unless
            it is part of one. `"second_turn"`: after an unrelated question and its answer.

    Example:
        >>> in_context(Prompt("Who wrote Hamlet?"), "chat")
        Prompt(text='Who wrote Hamlet?', history=())
    """
    history = prompt.history or ()
    if context == "chat":
        return Prompt(prompt.text, history)
    if context == "second_turn":
        return Prompt(prompt.text, (*history, *FIRST_TURN))
    return Prompt(WRAPPERS[context](prompt.text), prompt.history)
