"""Texts of prompts by the processor's chat template: before a question, the question, after it; before an answer."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import ProcessorMixin

from mmlens.errors import (
    PromptError,
)
from mmlens.families.placeholders import (
    placeholder_of,
)

Rendered = tuple[str, str, str]
"""The text before the question, the question, and the text after it."""


def render(
    processor: ProcessorMixin, question: str, n_images: int, where: str = "the prompt"
) -> tuple[str, str, str]:
    """The chat template's text before the question, the question as it stands there, and the text after it.

    Raises PromptError as `make_prompt` does.
    """
    if not question.strip():
        raise PromptError(f"{where}: the question is empty ({question!r})")
    marker = "QUESTIONGOESHERE"
    while marker in question:
        marker += "X"
    marked = _apply_template(processor, marker, n_images)
    text = _apply_template(processor, question, n_images)
    if marked.count(marker) != 1:
        raise PromptError(
            f"{where}: the chat template shows the question {marked.count(marker)} times instead of once: {marked!r}"
        )
    prefix, suffix = marked.split(marker)
    middle = text[len(prefix) : len(text) - len(suffix)]
    if prefix + middle + suffix != text or middle.strip() != question.strip():
        raise PromptError(
            f"{where}: the question {question!r} is not found in the rendered prompt, the chat template altered it: "
            f"{text!r}"
        )
    if "'type': 'text'" in prefix:
        raise PromptError(
            f"{where}: the chat template does not take message content as a list of parts: {text!r}"
        )
    if n_placeholders(processor, text) not in (0, n_images):
        raise placeholder_error(processor, text, n_images, where)
    return prefix, middle, suffix


def _apply_template(processor: ProcessorMixin, question: str, n_images: int) -> str:
    if not getattr(processor, "chat_template", None):
        raise PromptError(
            f"the processor {type(processor).__name__} has no chat template; set processor.chat_template to the "
            "model's template"
        )
    content: list[dict[str, str]] = [{"type": "image"}] * n_images + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def n_placeholders(processor: ProcessorMixin, text: str) -> int:
    placeholder = placeholder_of(processor)
    return text.count(placeholder) if placeholder else 0


def placeholder_error(processor: ProcessorMixin, text: str, n_images: int, where: str) -> PromptError:
    return PromptError(
        f"{where}: {n_images} image(s) were given, but the rendered prompt holds "
        f"{n_placeholders(processor, text)} placeholder(s) {placeholder_of(processor)!r}: {text!r}"
    )


def answer_start_of(processor: ProcessorMixin, text: str, n_images: int = 0) -> str:
    """The space that the chat template writes between the prompt for an answer and the answer: " ", or "".

    LLaVA's prompts end in "ASSISTANT:", and its assistant's turns are "ASSISTANT: yes": the model goes on with
    " yes". The conversation is rendered with an answer, and what stands before it compared with the end of the
    prompt `text`. A template that writes no assistant's turn is judged by the turns that it writes: where a role's
    colon is followed by a space there, it is before the answer. Whatever else such turns hold (a thought, other
    line breaks) is not in the prompt, and changes nothing: the answer follows the prompt as that stands.
    """
    if not getattr(processor, "chat_template", None) or not text.strip():
        return ""
    asked = _turns(processor, [("user", _ASKED, n_images), ("assistant", _ANSWERED, 0)])
    before = asked.partition(_ANSWERED)[0] if asked.count(_ANSWERED) == 1 else ""
    role, end = before.rstrip().split()[-1:], text.rstrip()
    if role == end.split()[-1:]:
        written = before
    elif end.endswith(":"):
        written = _turns(processor, [("user", _ASKED, 0)]).partition(_ASKED)[0]
        if not written.rstrip().endswith(":"):
            return ""
    else:
        return ""
    spaces, own = written[len(written.rstrip()) :], text[len(end) :]
    return " " if spaces == f"{own} " else ""


_ASKED, _ANSWERED = "QUESTIONGOESHERE", "ANSWERGOESHERE"


def _turns(processor: ProcessorMixin, turns: Sequence[tuple[str, str, int]]) -> str:
    """The chat template's text of a conversation of (role, text, number of images); "" where it takes none such."""
    for listed_parts in (True, False):
        messages = [
            {
                "role": role,
                "content": [{"type": "image"}] * n_images + [{"type": "text", "text": said}]
                if role == "user" or listed_parts
                else said,
            }
            for role, said, n_images in turns
        ]
        try:
            text = processor.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)
        except (TemplateError, ValueError, TypeError, LookupError):
            continue
        if turns[-1][1] in text and "'type': 'text'" not in text:
            return text
    return ""
