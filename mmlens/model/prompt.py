"""A prompt: a batch of questions about images as model inputs, with the token map that says what is where."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor

from mmlens.arguments import device_of, shown
from mmlens.data.chats import Chat
from mmlens.data.examples import Example
from mmlens.data.videos import Video
from mmlens.errors import (
    InvalidTypeError,
    MmlensWarning,
    PromptError,
)
from mmlens.model.choosing import Positions, chosen_positions
from mmlens.model.continuing import Continuation, continued
from mmlens.model.fingerprints import example_fingerprint, vision_fingerprints
from mmlens.token_map import TokenMap


@dataclass(eq=False)
class Spelling:
    """How a prompt's answers are written as tokens, and what another spelling of them would be.

    Many tokenizers tell " yes" from "yes". `tokens` are the answers' first tokens as the tokenizer writes them;
    `others` holds, per example, the first tokens that the answer and the candidates would have with the space
    before them that they lack, or without the one that they have, where these are no candidate's own. (One entry
    stands for all examples where the tokens are the same for all.)
    """

    tokens: list[str]
    blank: list[bool]
    """Whether the answer's or a candidate's first token is white space alone or a tag before answers, per example."""
    others: list[dict[int, str]]
    is_checked: bool = False

    def check(self, greedy: Sequence[int]) -> None:
        """Warn where a most probable token is the other spelling; of the first run of a prompt alone."""
        if self.is_checked:
            return
        self.is_checked = True
        rows = len(self.others)
        for row, token in enumerate(greedy):
            if token in self.others[row % rows]:
                warnings.warn(
                    f"the most probable token after a prompt is the first of {self.others[row % rows][token]!r}, and "
                    f"what is measured is {self.tokens[row % rows]!r}: the model writes its answers with another "
                    "space before them than the metric looks for. Choose it by model.prompt_examples(examples, "
                    "answer_start=' ') or '', or write the answers so",
                    MmlensWarning,
                    stacklevel=5,
                )
                return


@dataclass(frozen=True, repr=False)
class Prompt:
    """Model inputs for a batch, and what stands at each position.

    `inputs` are exactly the Hugging Face model's keyword inputs (tensors, or lists of numbers). `text` is each
    example's rendered template, image placeholders not yet expanded. The answer fields are set by `with_answers`.
    """

    inputs: dict[str, Any]
    token_map: TokenMap
    questions: list[str]
    images: list[list[Image.Image]]
    text: list[str]
    answers: list[str] | None = None
    candidates: list[tuple[str, ...]] | None = None
    answer_tokens: list[list[int]] | None = None
    """All tokens of each answer, as it follows the prompt (`with_answers`)."""
    candidate_tokens: list[list[list[int]]] | None = None
    start_tokens: list[list[int]] | None = None
    """Of each example the tokens of a tag that the chat template writes before every answer; most have none."""
    answer_ids: Int[Tensor, " batch"] | None = None
    """First token of each answer."""
    candidate_ids: list[Int[Tensor, " _"]] | None = None
    """First token of every candidate, per example."""
    answer_starts: list[str] | None = None
    """What stands between each prompt and its answer: "", or what the chat template writes there, such as a space."""
    spelling: Spelling | None = None
    """How the tokens of the answers are written, and the tokens that the other spelling would have."""
    examples: tuple[Example, ...] | None = None
    """What it was made of, evidence included; None for a prompt of questions and images, and for a corrupted one."""

    messages: list[list[dict[str, Any]]] | None = None
    """The chat of each example, with its images: what the prompt can be made of again. None where it was made of
    inputs (`prompt_from_inputs`)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options that it was made with: of the chat template and of the processor."""
    offsets: Int[Tensor, "batch pos 2"] | None = None
    """The characters (start, stop) of `text` that each position stands for; -1 where it stands for none."""

    image_features: Any = None
    """What the vision tower gave, where `HookedVLM.encode_images` has already run it."""
    encoded: Mapping[str, str] | None = None
    """Fingerprints of the inputs that it read, which are then no inputs any more."""
    processor: str = ""
    """Fingerprint of the processor that made it; "" where that is not known."""
    pad_id: int | None = None
    """The token that stands at padding; None where that is not known."""
    continuation: Continuation | None = None
    """Of a continued prompt, the one before its answer and what follows that."""
    values_after: Mapping[str, int] = field(default_factory=dict)
    """What inputs hold at positions after the prompt, where that is not what they hold at its last one."""

    def __len__(self) -> int:
        return len(self.token_map)

    def __repr__(self) -> str:
        """The questions, how many images and positions each has, and the token that stands for its answer."""
        n_positions = (~self.token_map.is_padding).sum(1).tolist()
        n_visual = self.token_map.is_image.sum(1).tolist()
        lines = []
        for row, question in enumerate(self.questions[:_MOST_SHOWN]):
            said = f"{_short(question)}, {len(self.images[row])} image(s), "
            n_videos = len(self.token_map.videos[row])
            said += (f"{n_videos} video(s), " if n_videos else "") + f"{n_positions[row]} positions"
            said += f" ({n_visual[row]} visual)" if n_visual[row] else ""
            if self.answers is not None and self.spelling is not None:
                said += f", answer {_short(self.answers[row])} as token {self.spelling.tokens[row]!r}"
            lines.append(said)
        more = len(self) - len(lines)
        lines += [f"and {more} more"] if more else []
        return f"Prompt({'; '.join(lines)})" if len(lines) == 1 else "\n  ".join(["Prompt(", *lines]) + ")"

    @property
    def videos(self) -> list[list[Video]]:
        """The videos of each example; of a prompt that does not hold its chats none."""
        chats = [[] for _ in self.questions] if self.messages is None else self.messages
        return [Chat(list(messages)).videos for messages in chats]

    @property
    def shape(self) -> torch.Size:
        """[batch, pos], as that of the tokens which TransformerLens' tools take in a prompt's place."""
        return self.token_map.image.shape

    @functools.cached_property
    def vision(self) -> dict[str, str]:
        """Fingerprints of what the model is given beside tokens and mask, the same after `encode_images`."""
        return {**(self.encoded or {}), **vision_fingerprints(self.inputs)}

    @functools.cached_property
    def fingerprints(self) -> tuple[str, ...]:
        """A fingerprint of each example: its tokens, images and answers, in whatever batch it stands."""
        return tuple(example_fingerprint(self, row) for row in range(len(self)))

    @property
    def last(self) -> Bool[Tensor, "batch pos"]:
        """The last position of each prompt, which predicts the first token of the answer; of a continued one too."""
        real = ~self.token_map.is_padding & ~self.token_map.is_answer
        length = real.shape[1]
        position = length - 1 - real.flip(1).int().argmax(dim=1, keepdim=True)
        return torch.arange(length, device=real.device) == position

    def continued(self, ids: Sequence[Sequence[int]]) -> Prompt:
        """The prompt with these tokens after each row, as positions that the token map calls answer: `continuing`."""
        return continued(self, ids)

    def positions(
        self,
        among: Positions = None,
        *,
        text: str | Sequence[str] | None = None,
        occurrence: int | None = None,
        role: str | None = None,
        turn: int | None = None,
        part: int | None = None,
        image: int | None = None,
        video: int | None = None,
        frames: tuple[int, int] | None = None,
        box: Sequence[float] | None = None,
    ) -> Bool[Tensor, "batch pos"]:
        """A mask of positions: of all that is said, what holds together.

        `among`: one of the names "prompt", "text", "template", "image", "video", "question", "evidence", "answer",
        "last", a role, or a mask. `text`: the positions that a text covers, of the prompt as the chat template writes
        it; where it stands there several times, `occurrence` counts them from 0 (from the end: negative) among the
        positions that the rest chooses. `turn` (negative: from the end) and `part` number the chat's messages and their
        parts, `image` and `box` an image and pixels of it, `video` and `frames` (first, stop) a video and its frames.

        Raises InvalidValueError for a text that is not there, or stands there several times without `occurrence`, and
        shows where; OutOfRangeError for a turn, image or occurrence that there is not.

        >>> import mmlens
        >>> model = mmlens.HookedVLM.from_pretrained("micro")
        >>> prompt = model.prompt("What colour is the letter K ?")
        >>> prompt.positions("question", text="letter").nonzero().tolist()
        [[0, 6]]
        """
        return chosen_positions(
            self,
            among,
            text=text,
            occurrence=occurrence,
            role=role,
            turn=turn,
            part=part,
            image=image,
            video=video,
            frames=frames,
            box=box,
        )

    def to(self, device: torch.device | str) -> Prompt:
        """The same prompt with inputs, token map and answer ids on `device`."""
        device = device_of(device)
        return replace(
            self,
            inputs={
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in self.inputs.items()
            },
            token_map=self.token_map.to(device),
            answer_ids=None if self.answer_ids is None else self.answer_ids.to(device),
            offsets=None if self.offsets is None else self.offsets.to(device),
            candidate_ids=None
            if self.candidate_ids is None
            else [ids.to(device) for ids in self.candidate_ids],
        )


def prompt_of(value: object, name: str = "prompt") -> Prompt:
    """A Prompt; InvalidTypeError for anything else, which says how to make one of it.

    >>> prompt_of("Who?")
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidTypeError: prompt is 'Who?' (str); expected a Prompt: model.prompt(question, images)
    """
    if isinstance(value, Prompt):
        return value
    hint = "model.prompt(question, images)"
    if isinstance(value, Mapping):
        hint += ", or of inputs that a processor made mmlens.model.prompt_from_inputs(...)"
    elif isinstance(value, Example):
        hint = "model.prompt_examples([example])"
    elif isinstance(value, (list, tuple)):
        hint = "model.prompt(questions, images) or model.prompt_examples(examples) make one of a whole batch"
    raise InvalidTypeError(f"{name} is {shown(value)}; expected a Prompt: {hint}")


def check_left_padding(attention_mask: Int[Tensor, "batch pos"]) -> None:
    """Raise PromptError where a row has padding on the right: the next token would follow the padding.

    >>> check_left_padding(torch.tensor([[0, 1, 1], [1, 1, 1]]))
    >>> check_left_padding(torch.tensor([[1, 1, 0], [1, 1, 1]]))
    Traceback (most recent call last):
        ...
    mmlens.errors.PromptError: example 0 is padded on the right (its last position is padding); ...
    """
    ends_padded = torch.nonzero(attention_mask[:, -1] == 0).flatten().tolist()
    if ends_padded:
        raise PromptError(
            f"example {ends_padded[0]} is padded on the right (its last position is padding); what reads or "
            "continues the last position needs padding on the left: tokenizer.padding_side = 'left'"
        )


_MOST_SHOWN = 4


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
