"""A chat as its chat template writes it, and which characters of that are whose.

The template is rendered twice: as the chat is, and with two characters of Unicode's private use around each of its
texts. Where these stand in the second rendering says where each text stands in the first, whatever the texts say.
Chat templates trim texts, so the two may differ in white space at the edges of texts, and in nothing else.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import ProcessorMixin

from mmlens.data.chats import QUESTION, UNPLACED, Chat, Place
from mmlens.errors import MmlensWarning, PromptError, warn
from mmlens.families.placeholders import placeholders_of

_RENDER_ERRORS = (TemplateError, ValueError, TypeError, LookupError, AttributeError)
_PRIVATE = (range(0xE000, 0xF8FF), range(0xF0000, 0xFFFFD), range(0x100000, 0x10FFFD))
"""Unicode's characters for private use: no text has them, unless somebody put them there."""


@dataclass(frozen=True)
class TextSpan:
    """Where a text part stands in the rendered prompt: characters start to stop."""

    place: Place
    start: int
    stop: int


@dataclass(frozen=True)
class Rendered:
    """The text of a chat for the processor, placeholders of images not expanded, and where its text parts stand."""

    text: str
    spans: list[TextSpan]

    def span_of(self, place: Place) -> list[TextSpan]:
        return [span for span in self.spans if span.place == place]


def render(
    processor: ProcessorMixin, chat: Chat, options: Mapping[str, Any], where: str = "the prompt"
) -> Rendered:
    """The chat by the processor's chat template; `options` are the template's variables.

    A chat whose last turn is the assistant's is continued; else the beginning of the assistant's turn is added.
    Content given as a text is written as a list of one part, or the other way round, where the template drops or
    refuses it as it is, with a warning.

    Raises PromptError for a processor without a chat template, a chat that the template refuses, and a text that it
    drops or alters. Warns (MmlensWarning) where it writes a text twice, or parts in another order than the chat's.
    """
    if chat.is_rendered:
        return Rendered(chat.messages[0]["content"], [])
    if not getattr(processor, "chat_template", None):
        raise PromptError(
            f"the processor {type(processor).__name__} has no chat template; set processor.chat_template to the "
            "model's template"
        )
    messages = [for_template(message) for message in chat.messages]
    first: _RefusedError | None = None
    changed: set[int] = set()
    while True:
        try:
            rendered = _rendered(processor, chat, messages, options, where)
            break
        except _RefusedError as error:
            first = first or error
            other = _written_otherwise(messages, error.turn)
            if other is None or error.turn in changed:
                raise first from first.__cause__
            messages, changed = other, {*changed, error.turn}
    if first is not None:
        _warn(
            f"{where}: the content of turn(s) {', '.join(map(str, sorted(changed)))} was given to the chat template in "
            "its other form (a text as a list of one part, or the other way round), since as it is written: "
            f"{str(first).removeprefix(f'{where}: ')}"
        )
    _check_media(processor, chat, messages, options, rendered, where)
    return rendered


class _RefusedError(PromptError):
    """A chat that the template refuses, drops or alters from one turn on."""

    def __init__(self, message: str, turn: int) -> None:
        super().__init__(message)
        self.turn = turn


def _written_otherwise(messages: list[dict[str, Any]], turn: int) -> list[dict[str, Any]] | None:
    """The messages with one turn's text as a list of one part, or the other way round; None where it is neither.

    Several texts in one would need a separator that nobody wrote.
    """
    content = messages[turn].get("content")
    other: Any = None
    if isinstance(content, str):
        other = [{"type": "text", "text": content}]
    elif isinstance(content, list) and len(content) == 1 and content[0]["type"] == "text":
        other = content[0]["text"]
    if other is None:
        return None
    return [*messages[:turn], {**messages[turn], "content": other}, *messages[turn + 1 :]]


def for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as the template sees it: parts without images and marks."""
    made = {key: value for key, value in message.items() if key not in (QUESTION, UNPLACED)}
    if isinstance(made.get("content"), list):
        made["content"] = [
            {"type": "text", "text": part["text"]} if part["type"] == "text" else {"type": part["type"]}
            for part in made["content"]
        ]
    return made


def _rendered(
    processor: ProcessorMixin,
    chat: Chat,
    messages: list[dict[str, Any]],
    options: Mapping[str, Any],
    where: str,
) -> Rendered:
    def apply(given: list[dict[str, Any]]) -> str:
        return _applied(processor, chat, given, options)

    try:
        text = apply(messages)
    except _RENDER_ERRORS as error:
        turn = _first_refused(processor, messages, options)
        content = messages[turn].get("content")
        form = (
            "a text" if isinstance(content, str) else f"parts ({', '.join(p['type'] for p in content or ())})"
        )
        raise _RefusedError(
            f"{where}: the chat template of {type(processor).__name__} refuses turn {turn} (role "
            f"{chat.roles[turn]!r}, content: {form}): {error}",
            turn,
        ) from error
    places = [(place, part["text"]) for place, part in chat.parts("text") if part["text"].strip()]
    spans = _located(apply, messages, text, places)
    _check_spans(chat, text, places, spans, where)
    return Rendered(text, spans)


def _applied(
    processor: ProcessorMixin, chat: Chat, messages: list[dict[str, Any]], options: Mapping[str, Any]
) -> str:
    """The messages as the template writes them, up to the answer or to the end of what is said of it."""
    asked = {"continue_final_message": True} if chat.is_continued else {"add_generation_prompt": True}
    return processor.apply_chat_template(_copied(messages), tokenize=False, **{**asked, **options})


def _copied(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages for the template: some versions of transformers write into what they are given."""
    return [
        {
            key: [dict(part) for part in value]
            if key == "content" and isinstance(value, list)
            else value
            if isinstance(value, str)
            else copy.deepcopy(value)
            for key, value in message.items()
        }
        for message in messages
    ]


def _first_refused(
    processor: ProcessorMixin, messages: list[dict[str, Any]], options: Mapping[str, Any]
) -> int:
    """The first turn that the template refuses; the last, where it refuses none of the turns before it alone."""
    for n in range(1, len(messages)):
        try:
            processor.apply_chat_template(_copied(messages[:n]), tokenize=False, **options)
        except _RENDER_ERRORS:
            return n - 1
    return len(messages) - 1


def _located(
    apply: Callable[[list[dict[str, Any]]], str],
    messages: list[dict[str, Any]],
    text: str,
    places: list[tuple[Place, str]],
) -> list[TextSpan]:
    """Where each text stands in the rendered `text`; a text has no span where the template drops or alters it."""
    characters = _unused(2 * len(places), text, *(said for _, said in places))
    around = {place: (next(characters), next(characters)) for place, _ in places}
    texts = dict(places)
    # Where a template looks into a text (whether it begins with a tag, say), the marks may change what it writes: then
    # one text goes without, and is looked for between the others.
    for without in (None, *reversed(texts)):
        marks = {place: pair for place, pair in around.items() if place != without}
        try:
            marked = apply(_marked(messages, marks))
        except _RENDER_ERRORS:
            continue
        # A list that is printed as one has its characters escaped.
        printed = {
            place
            for place, pair in (marks.items() if "\\" in marked else ())
            if any(escaped in marked for each in pair for escaped in _escapes(each))
        }
        spans = _aligned(_unprinted(marked, marks, printed), text, texts, marks)
        if spans is None:
            continue
        if without is not None:
            spans += _between(text, texts, spans, without)
        return [span for span in spans if span.place not in printed]
    return [span for place, said in places for span in _between(text, {place: said}, [], place)]


def _unprinted(marked: str, marks: Mapping[Place, tuple[str, str]], printed: set[Place]) -> str:
    """The rendering without the marks that are printed as escapes."""
    for place in printed:
        for escaped in (escaped for each in marks[place] for escaped in _escapes(each)):
            marked = marked.replace(escaped, "")
    return marked


def _escapes(character: str) -> tuple[str, str]:
    """A character as Python and JSON print it within a list."""
    return repr(character)[1:-1], json.dumps(character)[1:-1]


def _between(text: str, texts: Mapping[Place, str], spans: list[TextSpan], place: Place) -> list[TextSpan]:
    """Where the text of `place` stands between those before and after it, if it stands there once."""
    order = list(texts)
    before = [span.stop for span in spans if order.index(span.place) < order.index(place)]
    after = [span.start for span in spans if order.index(span.place) > order.index(place)]
    said, start, stop = texts[place].strip(), max(before, default=0), min(after, default=len(text))
    if text.count(said, start, stop) != 1:
        return []
    at = text.index(said, start, stop)
    return [TextSpan(place, at, at + len(said))]


def _unused(n: int, *texts: str) -> Iterator[str]:
    """`n` characters for private use that stand in none of the texts."""
    taken = set("".join(texts))
    free = (chr(code) for code in itertools.chain(*_PRIVATE) if chr(code) not in taken)
    return itertools.islice(free, n)


def _marked(messages: list[dict[str, Any]], around: Mapping[Place, tuple[str, str]]) -> list[dict[str, Any]]:
    """The messages with every text of `around` between its two characters."""
    made = []
    for turn, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, str):
            left, right = around.get(Place(turn, 0), ("", ""))
            content = f"{left}{content}{right}"
        elif content is not None:
            parts = []
            for number, part in enumerate(content):
                left, right = around.get(Place(turn, number), ("", ""))
                parts.append({**part, "text": f"{left}{part['text']}{right}"} if left else part)
            content = parts
        made.append(message if content is None else {**message, "content": content})
    return made


# ---------------------------------------------------------------------- where texts stand


def _aligned(
    marked: str, text: str, said: Mapping[Place, str], around: Mapping[Place, tuple[str, str]]
) -> list[TextSpan] | None:
    """Where each text stands in `text`, by the rendering with marks; None where the two are not alike."""
    opening = {left: place for place, (left, _) in around.items()}
    closing = {right: place for place, (_, right) in around.items()}
    if not opening:
        return [] if not marked or marked == text else None
    # Literal text and marks in turn. What stands between a text's two marks is the text.
    pieces = re.split(f"([{''.join((*opening, *closing))}])", marked)
    if "".join(pieces[::2]) == text:
        as_it_is = _between_marks(pieces, opening, closing)
        if as_it_is is not None:
            return as_it_is
    pattern, places, at = [], [], 0
    while at < len(pieces):
        piece = pieces[at]
        mark = pieces[at + 1] if at + 1 < len(pieces) else ""
        if mark in opening:
            place = opening[mark]
            pattern.append(re.escape(piece))
            inside, end = pieces[at + 2], pieces[at + 3] if at + 3 < len(pieces) else ""
            if closing.get(end) == place:
                whole, at = inside, at + 4
            else:
                # The template writes the beginning of the text alone.
                whole, at = _common_start(inside, said[place]), at + 2
                pieces[at] = inside[len(whole) :]
        elif mark in closing:
            # The template writes the end of the text alone, as of an answer after its thoughts.
            place = closing[mark]
            whole = _common_start(piece[::-1], said[place][::-1])[::-1]
            pattern.append(re.escape(piece[: len(piece) - len(whole)]))
            at += 2
        else:
            pattern.append(re.escape(piece))
            break
        pattern.append(rf"(\s*{re.escape(whole.strip())}\s*)" if whole.strip() else "()")
        places.append(place)
    match = re.fullmatch("".join(pattern), text)
    if match is None:
        return None
    return [
        TextSpan(place, *match.span(group))
        for group, place in enumerate(places, start=1)
        if match.group(group).strip()
    ]


def _between_marks(
    pieces: Sequence[str], opening: Mapping[str, Place], closing: Mapping[str, Place]
) -> list[TextSpan] | None:
    """Where the texts stand once the marks are taken out; None where a text is not between its two marks."""
    spans = []
    at = len(pieces[0])
    for number in range(1, len(pieces) - 3, 4):
        left, inside, right, after = pieces[number : number + 4]
        place = opening.get(left)
        if place is None or closing.get(right) != place:
            return None
        if inside.strip():
            spans.append(TextSpan(place, at, at + len(inside)))
        at += len(inside) + len(after)
    return spans if len(pieces) % 4 == 1 else None


def _common_start(one: str, other: str) -> str:
    n = next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    return one[: min(len(one), len(other)) if n is None else n]


def _check_spans(
    chat: Chat, text: str, places: list[tuple[Place, str]], spans: list[TextSpan], where: str
) -> None:
    """Raise PromptError for a text that is missing or altered; warn of one that stands in part, twice, or elsewhere."""
    found: dict[Place, list[TextSpan]] = {place: [] for place, _ in places}
    for span in spans:
        found[span.place].append(span)
    for place, said in places:
        own = found[place]
        shown = text[own[0].start : own[0].stop].strip() if own else ""
        if not shown or shown not in said:
            raise _RefusedError(
                f"{where}: the chat template drops or alters the text of {chat.named(place)}, {_short(said)}: the "
                f"prompt is {text!r}",
                place.turn,
            )
        if len(own) > 1:
            _warn(
                f"{where}: the chat template writes the text of {chat.named(place)} {len(own)} times: {text!r}"
            )
        elif shown != said.strip():
            _warn(
                f"{where}: the chat template writes only {_short(shown)} of the text of {chat.named(place)}, "
                f"{_short(said)}"
            )
    order = [span.place for span in sorted(spans, key=lambda span: span.start)]
    wanted = [place for place, _ in places]
    once = list(dict.fromkeys(order))
    if once != wanted:
        moved = next(place for place, other in zip(once, wanted, strict=True) if place != other)
        _warn(
            f"{where}: the chat template writes the text of {chat.named(moved)} in another place than the chat has it: "
            f"{text!r}"
        )


def _check_media(
    processor: ProcessorMixin,
    chat: Chat,
    messages: list[dict[str, Any]],
    options: Mapping[str, Any],
    rendered: Rendered,
    where: str,
) -> None:
    """Raise PromptError where placeholders are not as many as images; warn where they stand among other texts."""
    placeholders = placeholders_of(processor)
    if not (chat.images or chat.videos) and not any(each in rendered.text for each in placeholders.values()):
        return
    unplaced = sum(len(message.get(UNPLACED, ())) for message in chat.messages)
    for kind, placeholder in placeholders.items():
        given = len(chat.parts(kind)) + (unplaced if kind == "image" else 0)
        n_written = rendered.text.count(placeholder)
        if n_written not in (0, given) or (
            n_written == 0 and given and (kind == "video" or len(chat.messages) > 1)
        ):
            why = _media_unlike(processor, chat, messages, options, rendered, kind, placeholder)
            raise placeholder_error(processor, rendered.text, given, where, kind, why)
    if unplaced:
        return
    written = sorted(
        [(span.start, span.place) for span in rendered.spans]
        + [
            (match.start(), kind)
            for kind, placeholder in placeholders.items()
            for match in re.finditer(re.escape(placeholder), rendered.text)
            if not any(span.start <= match.start() < span.stop for span in rendered.spans)
        ],
        key=lambda entry: entry[0],
    )
    order = [entry for _, entry in written]
    shown = {span.place for span in rendered.spans}
    wanted = [
        place if part["type"] == "text" else part["type"]
        for place, part in chat.parts()
        if part["type"] in placeholders or place in shown
    ]
    is_placed = len([entry for entry in order if isinstance(entry, str)]) == len(chat.parts()) - len(
        chat.parts("text")
    )
    texts_alike = [e for e in order if not isinstance(e, str)] == [
        e for e in wanted if not isinstance(e, str)
    ]
    if is_placed and texts_alike and order != wanted:
        at = next(
            number for number, pair in enumerate(zip(order, wanted, strict=False)) if pair[0] != pair[1]
        )
        said = [entry if isinstance(entry, str) else str(entry) for entry in (order[at], wanted[at])]
        _warn(
            f"{where}: the chat template writes images in another order among the texts than the chat has them: "
            f"{said[0]} stands where the chat has {said[1]}: {rendered.text!r}"
        )


def _media_unlike(
    processor: ProcessorMixin,
    chat: Chat,
    messages: list[dict[str, Any]],
    options: Mapping[str, Any],
    rendered: Rendered,
    kind: str,
    placeholder: str,
) -> str:
    """Which turn has another number of placeholders than of images, in words; "" where that cannot be told."""
    for span in rendered.spans:
        if placeholder in rendered.text[span.start : span.stop]:
            return f"; the text of {chat.named(span.place)} holds {placeholder!r}, which stands for {kind}s"
    for turn, message in enumerate(messages):
        content = message.get("content")
        own = [part for part in content if part["type"] == kind] if isinstance(content, list) else []
        if not own:
            continue
        rest = {**message, "content": [part for part in content or () if part["type"] != kind]}
        fewer = [*messages[:turn], rest, *messages[turn + 1 :]]
        try:
            text = _applied(processor, chat, fewer, options)
        except _RENDER_ERRORS:
            continue
        n_written = rendered.text.count(placeholder) - text.count(placeholder)
        if n_written != len(own):
            return (
                f"; of the {len(own)} {kind}(s) of turn {turn} (role {chat.roles[turn]!r}) the chat template writes "
                f"{n_written}"
            )
    return ""


def placeholder_error(
    processor: ProcessorMixin, text: str, n_given: int, where: str, kind: str = "image", why: str = ""
) -> PromptError:
    placeholder = placeholders_of(processor).get(kind)
    count = text.count(placeholder) if placeholder else 0
    return PromptError(
        f"{where}: {n_given} {kind}(s) were given, but the rendered prompt holds {count} placeholder(s) "
        f"{placeholder!r}{why}: {text!r}"
    )


def _warn(message: str) -> None:
    warn(message, MmlensWarning, stacklevel=8)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
