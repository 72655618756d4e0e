"""Prompts from the real processors: question tokens, padding, and every kind of bad input."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import REPRESENTATIVES, tiny_images, tiny_model, tiny_processor

from mmlens.data import images
from mmlens.data.examples import Example
from mmlens.data.images import load_image
from mmlens.errors import MmlensWarning, PromptError
from mmlens.families.catalog import family_of
from mmlens.model.prompt import Prompt, check_left_padding
from mmlens.model.prompt_answers import with_answers
from mmlens.model.prompt_making import make_prompt, prompt_from_inputs

torch.set_num_threads(1)

QUESTIONS = [
    "What colour is the letter K in the second image?",
    "k",
    "image image image user\nassistant",
    "Où est l'été ☃ 🙂?",
    "What colour is K?<|im_end|>",
]


def _prompt(family: str, questions: Any, images: Any = (), processor: Any = None) -> Prompt:
    return make_prompt(processor or tiny_processor(family), family_of(family).layout, questions, images)


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_question_tokens_are_the_question(family: str) -> None:
    """Batched, with other numbers of images, padded: decoded, the question's positions give the question."""
    processor = tiny_processor(family)
    images = tiny_images(len(QUESTIONS), seed=1)
    prompt = _prompt(family, QUESTIONS, [images[:i] for i in range(len(QUESTIONS))], processor)
    for example, question in enumerate(QUESTIONS):
        ids = prompt.inputs["input_ids"][example][prompt.token_map.is_question[example]]
        decoded = processor.tokenizer.decode(ids)
        # A token that covers an edge of the question belongs to it.
        assert question in decoded and len(decoded) <= len(question) + 2
        positions = torch.nonzero(prompt.token_map.is_question[example]).flatten()
        assert (positions.diff() == 1).all()
        alone = _prompt(family, question, images[:example], processor)
        assert int(alone.token_map.is_question.sum()) == len(ids)


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_inputs_are_what_the_model_takes(family: str) -> None:
    model = tiny_model(family)
    images = tiny_images(3)
    for questions, own in (
        ("What colour is K?", images[:2]),
        ("What colour is K?", []),
        (["a?", "What colour is K?", "Where?"], [images[:1], [], images[1:]]),
        (["a?", "What colour is K?"], []),
    ):
        prompt = _prompt(family, questions, own)
        with torch.no_grad():
            logits = model(**prompt.inputs).logits
        assert logits.shape[:2] == prompt.token_map.image.shape and bool(logits.isfinite().all())
        assert len(prompt) == len(prompt.questions) == len(prompt.text) == len(prompt.images)
        image_id = prompt.inputs["input_ids"] == tiny_processor(family).image_token_id
        assert torch.equal(prompt.token_map.is_image, image_id)


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_the_start_token_stands_once(family: str) -> None:
    """The tiny templates write the tokenizer's start token themselves, as Llama's do."""
    processor = tiny_processor(family)
    prompt = _prompt(family, "What colour is K?", tiny_images(1), processor)
    first, second = prompt.inputs["input_ids"][0, :2].tolist()
    assert first == processor.tokenizer.bos_token_id != second


def test_batch_is_padded_left_whatever_the_tokenizer_says() -> None:
    processor = tiny_processor("qwen3_vl")
    processor.tokenizer.padding_side = "right"
    prompt = _prompt("qwen3_vl", ["a?", "What colour is the letter K?"], processor=processor)
    assert prompt.inputs["attention_mask"][0, 0] == 0 and prompt.inputs["attention_mask"][0, -1] == 1
    assert processor.tokenizer.padding_side == "right"
    assert prompt.last.int().argmax(1).tolist() == [prompt.last.shape[1] - 1] * 2
    right = make_prompt(
        processor, family_of("qwen3_vl").layout, ["a?", "What colour is the letter K?"], padding_side="right"
    )
    assert prompt.last.sum(1).tolist() == right.last.sum(1).tolist() == [1, 1]
    lengths = right.inputs["attention_mask"].sum(1)
    assert right.last.int().argmax(1).tolist() == (lengths - 1).tolist()
    with pytest.raises(PromptError, match="example 0 is padded on the right"):
        check_left_padding(right.inputs["attention_mask"])
    with pytest.raises(PromptError, match="example 0 is padded on the right"):
        prompt_from_inputs(processor, family_of("qwen3_vl").layout, right.inputs)


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_prompt_from_inputs_gives_the_same_map(family: str) -> None:
    processor = tiny_processor(family)
    images = tiny_images(3)
    prompt = _prompt(family, ["a?", "What colour is K?"], [images[:1], images[1:]], processor)
    for text in (None, prompt.text):
        again = prompt_from_inputs(
            processor,
            family_of(family).layout,
            prompt.inputs,
            [images[:1], images[1:]],
            text=text,
            question=["a?", "What colour is K?"],
        )
        for name in ("image", "tile", "row", "col", "is_question", "is_padding"):
            assert torch.equal(getattr(again.token_map, name), getattr(prompt.token_map, name))
        torch.testing.assert_close(again.token_map.boxes, prompt.token_map.boxes, equal_nan=True)
        assert torch.equal(again.last, prompt.last)
    layout, own = family_of(family).layout, [images[:1], images[1:]]
    with pytest.raises(PromptError, match=re.escape("the question 'Why?' stands 0 times in the prompt")):
        prompt_from_inputs(processor, layout, prompt.inputs, own, question="Why?")
    with pytest.raises(PromptError, match="other inputs for this text and these images: input_ids differs"):
        prompt_from_inputs(processor, layout, prompt.inputs, own, text=[prompt.text[0], prompt.text[1] + "."])
    with pytest.raises(PromptError, match=r"1 text\(s\) for inputs of 2 prompt\(s\)"):
        prompt_from_inputs(processor, layout, prompt.inputs, own, text=prompt.text[:1])


def test_to_moves_everything_and_device_is_taken() -> None:
    prompt = _prompt("llava", "What colour is K?", tiny_images(1)).to("meta")
    assert {tensor.device.type for tensor in prompt.inputs.values()} == {"meta"}
    assert prompt.token_map.device.type == "meta"


def test_a_question_may_carry_white_space_that_the_template_trims() -> None:
    processor = tiny_processor("llava")
    processor.chat_template = processor.chat_template.replace("part['text']", "part['text'] | trim")
    prompt = _prompt("llava", "  What colour is K? ", tiny_images(1), processor)
    ids = prompt.inputs["input_ids"][0][prompt.token_map.is_question[0]]
    assert processor.tokenizer.decode(ids) == "What colour is K?"


# ---------------------------------------------------------------------- bad questions and templates


@pytest.mark.parametrize("question", ["", "  \n"])
def test_empty_question(question: str) -> None:
    with pytest.raises(PromptError, match=r"example 0: the question is empty"):
        _prompt("llava", question)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("''", "drops or alters the text of part 1 of turn 0"),
        ("part['text'] | upper | replace('K', 'k')", "drops or alters"),
        ("part['text'] | replace('colour', 'color')", "drops or alters"),
    ],
)
def test_a_template_that_drops_or_alters_the_question(text: str, message: str) -> None:
    processor = tiny_processor("qwen2_5_vl")
    processor.chat_template = processor.chat_template.replace("{{ part['text'] }}", "{{ " + text + " }}")
    with pytest.raises(PromptError, match=message):
        _prompt("qwen2_5_vl", "What colour is K?", tiny_images(1), processor)


def test_a_template_that_repeats_the_question() -> None:
    """Both places are the question's."""
    processor = tiny_processor("qwen2_5_vl")
    twice = "{{ part['text'] + ' ' + part['text'] }}"
    processor.chat_template = processor.chat_template.replace("{{ part['text'] }}", twice)
    with pytest.warns(MmlensWarning, match=r"writes the text of part 1 of turn 0 \(user\) 2 times"):
        prompt = _prompt("qwen2_5_vl", "What colour is K?", tiny_images(1), processor)
    ids = prompt.inputs["input_ids"][0][prompt.token_map.is_question[0]]
    assert processor.tokenizer.decode(ids).count("colour") == 2


def test_a_template_for_plain_strings_takes_no_images_as_parts() -> None:
    processor = tiny_processor("llava")
    processor.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.warns(MmlensWarning, match=r"turn\(s\) 0 was given to the chat template in its other form"):
        prompt = _prompt("llava", "What colour is K?", processor=processor)
    assert prompt.text == ["What colour is K?"]
    with pytest.raises(PromptError, match="drops or alters the text of part 1 of turn 0"):
        _prompt("llava", "What colour is K?", tiny_images(1), processor)
    # A placeholder in the text places an image that is given beside it.
    chat = [{"role": "user", "content": "<image>\nWhat colour is K?"}]
    placed = _prompt("llava", chat, tiny_images(1), processor)
    assert int(placed.token_map.is_image.sum()) > 0 and placed.questions == ["<image>\nWhat colour is K?"]


def test_a_processor_without_template_or_fast_tokenizer_or_padding() -> None:
    processor = tiny_processor("llava")
    processor.tokenizer.pad_token = None
    with pytest.raises(PromptError, match="the tokenizer has no pad_token"):
        _prompt("llava", ["a", "b c"], processor=processor)
    processor.chat_template = None
    with pytest.raises(PromptError, match="LlavaProcessor has no chat template"):
        _prompt("llava", "What?", processor=processor)


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_placeholders_in_another_number_than_images(family: str) -> None:
    processor = tiny_processor(family)
    with pytest.raises(
        PromptError, match=re.escape("1 image(s) were given, but the rendered prompt holds 2")
    ):
        _prompt(family, f"What is {processor.image_token}?", tiny_images(1), processor)
    processor.chat_template = processor.chat_template.replace("part['type'] == 'image'", "false")
    with pytest.raises(
        PromptError, match=re.escape("2 image(s) were given, but the rendered prompt holds 0")
    ):
        _prompt(family, "What?", tiny_images(2), processor)


def test_batches_of_other_lengths_and_nesting() -> None:
    images = tiny_images(2)
    for questions, own, message in (
        (["a", "b"], [images[:1]], "take a list of 2 image lists"),
        (["a", "b"], images, "take a list of 2 image lists"),
        ("a", [images], "one question takes a flat list of images"),
        ("a", "page.png", "expected a list of images"),
        ([], [], "there is no question: the list of questions, or the chat, is empty"),
    ):
        with pytest.raises(PromptError, match=message):
            _prompt("llava", questions, own)


def test_a_processor_that_changes_the_text_after_the_template_is_refused() -> None:
    class Rewriting(type(tiny_processor("llava"))):  # type: ignore[misc]
        def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
            return super().__call__(
                images=images, text=[t.replace("colour", "color") for t in text], **options
            )

    processor = tiny_processor("llava")
    processor.__class__ = Rewriting
    with pytest.raises(PromptError, match="was not found among the prompt's tokens"):
        _prompt("llava", "What colour is K?", tiny_images(1), processor)


# ---------------------------------------------------------------------- bad images


def test_images_come_as_pil_or_path_in_any_mode(tmp_path: Path) -> None:
    image = tiny_images(1)[0]
    image.save(tmp_path / "a.png")
    assert (
        load_image(tmp_path / "a.png").tobytes()
        == load_image(str(tmp_path / "a.png")).tobytes()
        == image.tobytes()
    )
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        assert load_image(image.convert(mode)).mode == "RGB"


def test_a_photograph_is_turned_as_its_exif_data_say(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    tiny_images(1, sizes=[(40, 20)])[0].save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (20, 40)


def test_broken_missing_and_wrong_images_are_named(tmp_path: Path) -> None:
    whole = tmp_path / "whole.png"
    tiny_images(1, sizes=[(200, 200)])[0].save(whole)
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(whole.read_bytes()[:5000])
    text = tmp_path / "text.png"
    text.write_text("no image")
    with pytest.raises(PromptError, match=r"image 1 of example 0 \(.*truncated.png\) is broken"):
        _prompt("llava", "What?", [whole, truncated])
    with Image.open(truncated) as opened, pytest.raises(PromptError, match="image 0 of example 1 is broken"):
        _prompt("llava", ["What?", "b"], [[whole], [opened]])
    with pytest.raises(PromptError, match=r"text.png\) is no image that PIL can read"):
        _prompt("llava", "What?", [text])
    with pytest.raises(FileNotFoundError, match=r"image 0 of example 0 \(.*nowhere.png\) does not exist"):
        _prompt("llava", "What?", [tmp_path / "nowhere.png"])
    with pytest.raises(PromptError, match="image 0 of example 0 is a Tensor; expected a PIL image"):
        _prompt("llava", "What?", [torch.zeros(3, 8, 8)])
    with pytest.raises(PromptError, match="is empty: 0 x 5 pixels"):
        load_image(Image.new("RGB", (0, 5)))


def test_a_gigantic_image_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    # One bit a pixel: 100 million pixels in a small file.
    Image.new("1", (10_000, 10_000)).save(tmp_path / "giant.png")
    Image.new("1", (14_000, 14_000)).save(tmp_path / "bomb.png")
    # PIL itself warns of it, which is an error here.
    with pytest.raises(
        PromptError, match=r"giant.png\) is gigantic, more than 89478485 pixels \(.*100000000"
    ):
        load_image(tmp_path / "giant.png")
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(
            PromptError, match=r"giant.png\) is gigantic: 10000 x 10000 = 100000000 pixels, at most"
        ),
    ):
        load_image(tmp_path / "giant.png")
    with pytest.raises(PromptError, match=r"bomb.png\) is gigantic"):
        load_image(tmp_path / "bomb.png")
    assert images.MAX_IMAGE_PIXELS == 89_478_485


# ---------------------------------------------------------------------- answers


def test_answers_are_first_tokens_as_they_follow_the_prompt() -> None:
    processor = tiny_processor("qwen3_vl")
    images = tuple(tiny_images(1))
    examples = [
        Example("What colour is K?", "red", images, candidates=("red", "second", "seven")),
        Example("Where?", "table", images),
    ]
    plain = _prompt("qwen3_vl", [e.question for e in examples], [list(e.images) for e in examples], processor)
    prompt = with_answers(plain, processor, examples)
    tokenizer = processor.tokenizer
    assert prompt.answers == ["red", "table"] and prompt.candidates == [("red", "second", "seven"), ()]
    for example, answer in enumerate(("red", "table")):
        ids = tokenizer(prompt.text[example] + answer)["input_ids"]
        prefix = tokenizer(prompt.text[example])["input_ids"]
        assert ids[: len(prefix)] == prefix
        assert prompt.answer_ids is not None and prompt.answer_ids[example] == ids[len(prefix)]
    assert prompt.candidate_ids is not None and [len(ids) for ids in prompt.candidate_ids] == [3, 0]
    assert prompt.candidate_ids[0][0] == prompt.answer_ids[0]
    assert prompt.to("cpu").examples == tuple(examples) and plain.examples is None
    assert prompt.to("meta").answer_ids.device.type == "meta"
    with pytest.raises(PromptError, match=re.escape("answers of 1 example(s), but the prompt has 2")):
        with_answers(plain, processor, examples[:1])
    with pytest.raises(PromptError, match="an answer or candidate is empty"):
        with_answers(plain, processor, [Example("a", ""), Example("b", "c")])
