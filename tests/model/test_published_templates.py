"""Chats by the chat templates that models are published with: each part stands once and in order, or somebody is told.

The templates are third parties' and not part of this repository; a test skips where they are absent. What a template
does with a chat is read off transformers' own rendering of it, in which every text of the chats here is a word that
stands nowhere else: how often each stands there, in which order, and where the placeholders of images stand among
them. Where that is as the chat has it, the prompt is made without a word and is the processor's own to the bit; where
it is not, there is a PromptError or a warning that names the turn and the part.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from plain_chats import Chat, check_equal_inputs, check_positions, parts_of, plain_inputs, says
from tiny import TINY, tiny_images
from tiny.base import tokenizer_of
from transformers import ProcessorMixin

from mmlens.errors import MmlensWarning, PromptError
from mmlens.families.catalog import family_of
from mmlens.families.placeholders import placeholder_of
from mmlens.model.prompt import Prompt
from mmlens.model.prompt_making import make_prompt

torch.set_num_threads(1)
# Two templates write "<\\s>" in a Jinja string.
pytestmark = pytest.mark.filterwarnings("ignore:.*invalid escape sequence:DeprecationWarning")

FOLDER = Path(__file__).parents[3] / "shared" / "artefacts" / "templates"


@dataclasses.dataclass(frozen=True)
class Published:
    """A published template: the family whose processor it is tried on, and what it is known to do."""

    family: str
    mark: str = ""
    """What it writes for an image, where that is not what the tiny processor of the family looks for."""
    is_own: bool = True
    """False where the family of its model has no tiny processor, and another one's stands in."""
    facts: tuple[str, ...] = ()
    """What section 3 of the collection's README says that it does: chat and what becomes of it."""


def _stand_in(mark: str, *facts: str) -> Published:
    return Published("llava", mark, is_own=False, facts=facts)


_STRINGS = ("system string", "answer string", "question string")
_LOSES_STRINGS = tuple(f"{name}: lost" for name in _STRINGS)
_REFUSES_STRINGS = ("system string: refused", "answer string: refused", "question string: lost")
_IMAGES_FIRST = ("text first: moved", "between: moved")
_NO_SYSTEM = ("c: refused", "system string: refused")
_NO_LISTS = ("a: refused", "b: refused", "c: refused", "d: refused", "f: refused")

PUBLISHED = {
    "aria": Published("aria", "<|img|>"),
    "deepseek-vl-1.3b-chat": Published("deepseek_vl", facts=_LOSES_STRINGS),
    "gemma-3-it": Published("gemma3", facts=("two system texts: lost", "two questions: refused")),
    "gemma-3n-it": _stand_in("<image_soft_token>", "two system texts: lost", "two questions: refused"),
    "gemma-4-31b-it": Published("gemma4", facts=("c: printed",)),
    "glm-4.5v": Published("glm4v_moe", facts=("thought: lost",)),
    "granite-vision-3.2-2b-tokenizer": _stand_in("<image>", *_NO_LISTS),
    "idefics3-8b-llama3": Published("idefics3", facts=_LOSES_STRINGS),
    "internvl3-8b": _stand_in("<IMG_CONTEXT>", *_NO_LISTS),
    "internvl3-8b-hf": Published("internvl"),
    "lfm2-vl-tests": _stand_in("<image>"),
    "lfm2.5-vl-450m": _stand_in("<image>"),
    "llama-3.2-11b-vision-instruct": Published("mllama", facts=("c: printed",)),
    "llama-3.2-11b-vision-instruct-converter": Published("mllama"),
    "llama-4-scout-17b-16e-instruct": _stand_in("<|image|>", "two system texts: lost"),
    "llama-guard-3-11b-vision": Published(
        "mllama", facts=(*_NO_SYSTEM, "d: fewer images", "answer string: lost")
    ),
    "llava-1.5-7b-hf": Published("llava", facts=(*_LOSES_STRINGS, *_IMAGES_FIRST)),
    "llava-next-video-34b": Published("llava_next_video", facts=(*_LOSES_STRINGS, *_IMAGES_FIRST)),
    "llava-next-video-7b": Published(
        "llava_next_video", facts=(*_LOSES_STRINGS, *_IMAGES_FIRST, "c: doubled")
    ),
    "llava-next-video-7b-32k": Published("llava_next_video", facts=(*_NO_SYSTEM, "answer string: refused")),
    "llava-onevision-qwen2-7b-ov-hf-converter": Published(
        "llava_onevision", facts=(*_LOSES_STRINGS, *_IMAGES_FIRST)
    ),
    "llava-onevision-qwen2-7b-ov-hf-tests": Published(
        "llava_onevision", facts=(*_LOSES_STRINGS, *_IMAGES_FIRST)
    ),
    "llava-v1.6-mistral-7b-hf": Published(
        "llava_next", facts=(*_REFUSES_STRINGS, *_IMAGES_FIRST, "two system texts: lost")
    ),
    "llava-v1.6-mistral-7b-hf-variant": Published(
        "llava_next", facts=(*_REFUSES_STRINGS, *_IMAGES_FIRST, "two system texts: lost")
    ),
    "minicpm-v-2_6": _stand_in("<image>", *_NO_LISTS),
    "mistral-small-3.1-24b-instruct-2503-tests": Published(
        "mistral3", facts=("system string: refused", "two system texts: lost")
    ),
    "mistral-small-3.2-24b-instruct-2506": Published("mistral3", facts=("two system texts: lost",)),
    "mistral3-converter": Published(
        "mistral3",
        facts=("c: refused", "system string and few-shot: moved", "system string and prefill: lost"),
    ),
    "molmo2-8b": _stand_in("<|image|>", *_NO_SYSTEM, *_IMAGES_FIRST, "d: moved"),
    "ovis2-hf": Published("ovis2"),
    "phi-4-multimodal-instruct": _stand_in("<|image|>"),
    "qwen2.5-omni-7b": Published("qwen2_5_omni_thinker"),
    "qwen2.5-vl-7b-instruct": Published("qwen2_5_vl"),
    "qwen3-vl-instruct": Published("qwen3_vl", facts=("image of a system turn: fewer images",)),
    "qwen3-vl-thinking": Published("qwen3_vl", facts=("thought: lost",)),
    "qwen3.5-4b": Published("qwen3_5", facts=("thought: lost",)),
    "smolvlm-default": Published("smolvlm", facts=_LOSES_STRINGS),
    "smolvlm-instruct": Published("smolvlm", facts=_LOSES_STRINGS),
}


# ---------------------------------------------------------------------- what is tried


def processor_of(name: str) -> ProcessorMixin:
    """The family's tiny processor with the published template, and with its placeholder for its own."""
    published = PUBLISHED[name]
    tiny = TINY[published.family]
    if published.mark:
        tiny = dataclasses.replace(tiny, special={**tiny.special, "image_token": published.mark})
    template = (FOLDER / f"{name}.jinja").read_text()
    return tiny.processor({"tokenizer": tokenizer_of(tiny), "chat_template": template})


def mark_of(name: str, processor: ProcessorMixin) -> str:
    """What the template writes for an image, and the processor looks for."""
    return PUBLISHED[name].mark or str(placeholder_of(processor))


def chats() -> dict[str, Chat]:
    """The chats a to f of the collection's README, and others. No word stands twice, nor in a template."""
    images = iter(tiny_images(40, seed=5))

    def image() -> dict[str, Any]:
        return {"type": "image", "image": next(images)}

    def shown() -> dict[str, Any]:
        return says("user", image(), "Kwestion zwei?")

    return {
        "a": [says("user", "Kwestion eins?")],
        "b": [shown()],
        "c": [says("system", "Bejbrief."), shown()],
        "d": [says("user", image(), "Wan vrag?"), says("assistant", "antwoord"), shown()],
        "f": [shown(), says("assistant", "Ze antwoord is")],
        "system string": [{"role": "system", "content": "Bejbrief."}, shown()],
        "answer string": [
            says("user", image(), "Wan vrag?"),
            {"role": "assistant", "content": "antwoord"},
            shown(),
        ],
        "question string": [{"role": "user", "content": "Kwestion eins?"}],
        "prefill string": [shown(), {"role": "assistant", "content": "Ze antwoord is"}],
        "text first": [says("user", "Luuk:", image(), "Kwestion zwei?")],
        "between": [says("user", "Erst", image(), "zweit", image(), "dritt?")],
        "two images": [says("user", image(), image(), "Kwestion zwei?")],
        "two system texts": [says("system", "Bejbrief.", "Undkind."), shown()],
        "two questions": [says("user", "Hallo."), shown()],
        "two answers": [
            shown(),
            says("assistant", "Antwoord eins."),
            says("assistant", "Antwoord zwei."),
            says("user", "Vrag drei?"),
        ],
        "late system": [
            says("user", "Hallo."),
            says("assistant", "antwoord"),
            says("system", "Bejbrief."),
            shown(),
        ],
        "image of a system turn": [says("system", "Bejbrief.", image()), shown()],
        "image of an answer": [
            says("user", "Zeichne!"),
            says("assistant", "Hier:", image()),
            says("user", "Vat?"),
        ],
        "thought": [
            says("user", image(), "Wan vrag?"),
            says("assistant", "<think>\nGrubel grubel\n</think>\n\nantwoord"),
            shown(),
        ],
        "blanks": [says("user", image(), "  Kwestion zwei? \n")],
        "system string and few-shot": [
            {"role": "system", "content": "Bejbrief."},
            says("user", image(), "Wan vrag?"),
            says("assistant", "antwoord"),
            shown(),
        ],
        "system string and prefill": [
            {"role": "system", "content": "Bejbrief."},
            shown(),
            says("assistant", "Ze antwoord is"),
        ],
    }


# ---------------------------------------------------------------------- what transformers makes of them

_RAISED = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError)


def rendering(processor: ProcessorMixin, chat: Chat) -> str | Exception:
    prefilled = chat[-1]["role"] == "assistant"
    try:
        return processor.apply_chat_template(
            copy.deepcopy(chat),
            tokenize=False,
            add_generation_prompt=not prefilled,
            continue_final_message=prefilled,
        )
    except _RAISED as error:
        return error


def what_becomes(processor: ProcessorMixin, mark: str, chat: Chat) -> str:
    """Of the chat's parts in transformers' own rendering: "whole", or what is wrong, in one word or two."""
    text = rendering(processor, chat)
    if isinstance(text, Exception):
        return "refused"
    if "'type': 'text'" in text:
        return "printed"
    parts = [part for _, _, part in parts_of(chat)]
    said = [part["text"].strip() for part in parts if part["type"] == "text"]
    if any(text.count(each) == 0 for each in said):
        return "lost"
    if any(text.count(each) > 1 for each in said):
        return "doubled"
    if text.count(mark) != len(parts) - len(said):
        return "fewer images"
    pattern = "|".join(re.escape(each) for each in (*said, mark))
    wanted = [mark if part["type"] == "image" else part["text"].strip() for part in parts]
    return "whole" if re.findall(pattern, text) == wanted else "moved"


def in_other_forms(chat: Chat) -> Iterator[Chat]:
    """The chat with turns of one text written as a string or as a list of it, in every way."""
    ways = []
    for message in chat:
        content, both = message["content"], [message]
        if isinstance(content, str):
            both.append({**message, "content": [{"type": "text", "text": content}]})
        elif len(content) == 1 and content[0]["type"] == "text":
            both.append({**message, "content": content[0]["text"]})
        ways.append(both)
    yield from (list(turns) for turns in itertools.product(*ways))


# ---------------------------------------------------------------------- the tests

present = pytest.mark.skipif(not FOLDER.is_dir(), reason="the published templates are not here")
_NAMES = sorted(PUBLISHED)


def _made(name: str, processor: ProcessorMixin, chat: Chat) -> tuple[Prompt | PromptError, list[str]]:
    """The prompt or why there is none, and what was warned of."""
    layout = family_of(PUBLISHED[name].family).layout
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            made: Prompt | PromptError = make_prompt(processor, layout, chat)
        except PromptError as error:
            made = error
    return made, [str(each.message) for each in caught if issubclass(each.category, MmlensWarning)]


@present
def test_every_template_is_tried() -> None:
    assert {path.stem for path in FOLDER.glob("*.jinja")} == set(PUBLISHED)


@present
@pytest.mark.parametrize("name", _NAMES)
def test_what_is_said_of_the_template_is_so(name: str) -> None:
    """The facts of its record, by transformers alone: else the next test proves less than it says."""
    processor, own = processor_of(name), chats()
    mark = mark_of(name, processor)
    for fact in PUBLISHED[name].facts:
        chat, _, expected = fact.rpartition(": ")
        assert what_becomes(processor, mark, own[chat]) == expected, fact
    if not PUBLISHED[name].facts:
        assert {what_becomes(processor, mark, own[chat]) for chat in "abcdf"} == {"whole"}


@present
@pytest.mark.parametrize("name", _NAMES)
def test_nothing_is_lost_in_silence(name: str) -> None:
    processor = processor_of(name)
    mark = mark_of(name, processor)
    n_made = 0
    for title, chat in chats().items():
        became = what_becomes(processor, mark, chat)
        made, warned = _made(name, processor, chat)
        told = [*warned, *([str(made)] if isinstance(made, PromptError) else [])]
        if became == "whole":
            assert not told, (title, told)
        else:
            assert told and all(re.search(r"turn\(?s?\)? \d", each) for each in told), (title, became, told)
        if isinstance(made, PromptError):
            continue
        n_made += 1
        forms = [chat] if became == "whole" else in_other_forms(chat)
        assert any(_is_plain(processor, made, form) for form in forms), title
        if became == "whole":
            check_positions(processor, made, [chat])
    assert n_made >= 1


def _is_plain(processor: ProcessorMixin, prompt: Prompt, chat: Chat) -> bool:
    """Whether the prompt's inputs are what the processor gives for the chat."""
    try:
        check_equal_inputs(prompt, plain_inputs(processor, [chat]))
    except (AssertionError, *_RAISED):
        return False
    return True


@present
@pytest.mark.parametrize("name", _NAMES)
def test_the_readme_chats_of_a_whole_template_make_one_batch(name: str) -> None:
    processor, own = processor_of(name), chats()
    mark = mark_of(name, processor)
    whole = [own[chat] for chat in ("b", "c", "d") if what_becomes(processor, mark, own[chat]) == "whole"]
    if len(whole) < 2:
        pytest.skip("fewer than two of its chats render whole")
    prompt = make_prompt(processor, family_of(PUBLISHED[name].family).layout, whole)
    check_equal_inputs(prompt, plain_inputs(processor, whole))
    check_positions(processor, prompt, whole)
