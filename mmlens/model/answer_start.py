"""What a chat template writes between a prompt and its answer: a space, the end of a thought, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import ProcessorMixin

from mmlens.data.chats import RENDERED
from mmlens.model.rendering import for_template

_LEFT, _RIGHT = "\ue000", "\ue001"
_ANSWERED = f"{_LEFT}ANSWERGOESHERE{_RIGHT}"
_ASKED = [{"role": "user", "content": [{"type": "text", "text": "QUESTIONGOESHERE"}]}]


def answer_start_of(
    processor: ProcessorMixin,
    text: str,
    messages: Sequence[Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """What stands between the rendered prompt `text` and the answer in an assistant's turn with that answer.

    LLaVA's prompts end in "ASSISTANT:", and its assistant's turns are "ASSISTANT: yes": the model goes on with
    " yes". A prompt for a thinking model may end in "<think>", where the turn of an answer without a thought goes on
    with the end of the thought. The chat is rendered with an answer, and what stands before that compared with the
    prompt. Where the turn does not go on from the prompt, the answer follows the prompt as that stands, and only the
    space before it counts. A template that writes no assistant's turn is judged by the turns that it writes: where a
    role's colon is followed by a space there, it is before the answer. After a turn of the assistant's that is to be
    continued comes a space, if the turn ends in a letter, a digit or a mark that a space follows.

    `messages` are the chat of the prompt, None where it is not known: then a chat of one question stands for it.
    """
    if not getattr(processor, "chat_template", None) or not text.strip():
        return ""
    chat = list(_ASKED if not messages or messages[0]["role"] == RENDERED else messages)
    if chat[-1]["role"] == "assistant":
        return " " if text[-1].isalnum() or text[-1] in ".,:;?!" else ""
    written = _written(processor, chat, options or {})
    before = written.partition(_ANSWERED)[0] if written.count(_ANSWERED) == 1 else ""
    if before.startswith(text):
        return before[len(text) :]
    role, end = before.rstrip().split()[-1:], text.rstrip()
    if role != end.split()[-1:]:
        if not end.endswith(":"):
            return ""
        before = _turn(processor, _ASKED).partition("QUESTIONGOESHERE")[0]
        if not before.rstrip().endswith(":"):
            return ""
    spaces, own = before[len(before.rstrip()) :], text[len(end) :]
    return " " if spaces == f"{own} " else ""


def _written(processor: ProcessorMixin, chat: list[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
    """The chat with an answer, which templates read as a text or as parts; "" where the template takes none."""
    for answer in ([{"type": "text", "text": _ANSWERED}], _ANSWERED):
        text = _turn(processor, [*chat, {"role": "assistant", "content": answer}], options)
        if _ANSWERED in text:
            return text
    return ""


def _turn(
    processor: ProcessorMixin, chat: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None = None
) -> str:
    plain = [for_template(message) for message in chat]
    try:
        return processor.apply_chat_template(plain, tokenize=False, **(options or {}))
    except (TemplateError, ValueError, TypeError, LookupError, AttributeError):
        return ""
