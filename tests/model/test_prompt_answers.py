"""Which token is an answer's first, words that no token stands for, and a prompt's repr."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_images, tiny_model, tiny_processor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import mmlens
from mmlens.data.examples import Example
from mmlens.errors import InvalidValueError, MmlensWarning, PromptError
from mmlens.families.catalog import family_of
from mmlens.metrics.outcomes import (
    accuracy,
    answer_log_probability,
    invalid,
    logit_difference,
    logit_difference_of,
)
from mmlens.model.answer_start import answer_start_of
from mmlens.model.prompt import Prompt
from mmlens.model.prompt_answers import answer_ids_of, with_answers
from mmlens.model.prompt_making import make_prompt

# Chat templates by what stands before an answer. "{answer}" marks where the assistant's turn has it.
PARTS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER{% else %}ASSISTANT{% endif %}"
    "COLON{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}TEXT{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
LLAVA = PARTS.replace("COLON", ": ").replace("TEXT", "{{ c['text'] }}")
WITHOUT_SPACE = PARTS.replace("COLON", ":").replace("TEXT", "{{ c['text'] }}")
STRIPPED = PARTS.replace("COLON", ": ").replace("TEXT", "{{ c['text'] | trim }}")
NO_ASSISTANT = (
    "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}ASSISTANT:"
)
USER_ALONE = "{% if messages | length > 1 %}{{ raise_exception('users only') }}{% endif %}" + NO_ASSISTANT
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %} [/INST]"
    "{% else %} {{ m['content'][0]['text'] }}</s> {% endif %}{% endfor %}"
)
STRINGS = (  # the assistant's content as a string alone
    "{% for m in messages %}{% if m['role'] == 'user' %}User: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n"
    "{% else %}Assistant: {{ m['content'] + '' }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
LINES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nTHOUGHT{% endif %}"
)
PLAIN_LINES, THINKING = LINES.replace("THOUGHT", ""), LINES.replace("THOUGHT", "<think>\n")


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level pairs that know " yes" and "yes", and no " 7"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["USER: Is it red? ASSISTANT: yes", "USER: Is it red? ASSISTANT: no", "yes", "no", "maybe"] * 20
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    special = {"image_token": "<image>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<|im_start|>", eos_token="</s>",
        padding_side="left", extra_special_tokens=special,
    )  # fmt: skip


def processor_of(template: str) -> Any:
    processor = tiny_processor("llava")
    processor.tokenizer = spaced_tokenizer()
    processor.chat_template = template
    processor.image_token, processor.image_token_id = (
        "<image>",
        processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    return processor


def answered(template: str, *examples: Example, n_images: int = 1, answer_start: str | None = None) -> Prompt:
    processor = processor_of(template)
    images = [tiny_images(n_images) for _ in examples]
    prompt = make_prompt(processor, family_of("llava").layout, [e.question for e in examples], images)
    return with_answers(prompt, processor, examples, answer_start)


YES = Example("Is it red?", "yes", candidates=("yes", "no"))


@pytest.mark.parametrize("n_images", [0, 2])
@pytest.mark.parametrize(
    ("template", "space"),
    [
        (LLAVA, " "), (WITHOUT_SPACE, ""), (STRIPPED, " "), (NO_ASSISTANT, " "), (USER_ALONE, " "),
        (BRACKETS, " "), (STRINGS, " "), (PLAIN_LINES, ""), (THINKING, ""),
    ],
)  # fmt: skip
def test_the_first_token_is_that_of_the_rendered_turn(template: str, space: str, n_images: int) -> None:
    """Against the conversation rendered and tokenised whole, where the template renders the answer."""
    prompt = answered(template, YES, n_images=n_images)
    tokenizer = spaced_tokenizer()
    ids = {word: tokenizer(space + word)["input_ids"] for word in ("yes", "no")}
    assert all(len(own) == 1 for own in ids.values())
    assert prompt.answer_starts == [space]
    assert prompt.answer_ids is not None and prompt.candidate_ids is not None
    assert prompt.answer_ids.tolist() == ids["yes"]
    assert [own.tolist() for own in prompt.candidate_ids] == [ids["yes"] + ids["no"]]
    whole = tokenizer(prompt.text[0] + space + "yes", add_special_tokens=False)["input_ids"]
    alone = tokenizer(prompt.text[0], add_special_tokens=False)["input_ids"]
    assert whole == alone + ids["yes"]


def test_the_choice_is_open_and_an_answer_with_its_own_space_stands() -> None:
    tokenizer = spaced_tokenizer()
    bare, spaced = tokenizer("yes")["input_ids"], tokenizer(" yes")["input_ids"]
    own = Example("Is it red?", " yes", candidates=(" yes", " no"))
    for template, example, start, expected in (
        (LLAVA, YES, None, spaced), (LLAVA, YES, "", bare), (LLAVA, YES, " ", spaced), (LLAVA, own, None, spaced),
        (LLAVA, own, "", spaced), (PLAIN_LINES, YES, " ", spaced), (PLAIN_LINES, own, None, spaced),
        (PLAIN_LINES, YES, None, bare),
    ):  # fmt: skip
        prompt = answered(template, example, answer_start=start)
        assert prompt.answer_ids is not None and prompt.answer_ids.tolist() == expected
        assert repr("Ġyes" if expected == spaced else "yes") in repr(prompt)
    with pytest.raises(
        ValueError,
        match="answer_start is '  '",
    ):
        answered(LLAVA, YES, answer_start="  ")


def test_a_corrupted_question_keeps_the_choice(micro: mmlens.HookedVLM) -> None:
    prompt = micro.prompt_examples([Example("What colour is K", "red")], answer_start=" ")
    other = mmlens.interventions.other_question("What colour is Q")(micro, prompt)
    assert other.answer_starts == [" "] and repr(other).endswith("answer 'red' as token 'red')")


def logits_of(prompt: Prompt, token: str) -> torch.Tensor:
    tokenizer = spaced_tokenizer()
    logits = torch.zeros(*prompt.shape, len(tokenizer))
    logits[:, -1, tokenizer(token)["input_ids"][0]] = 5.0
    return logits


def test_a_model_that_writes_the_other_spelling_is_named_once() -> None:
    for template, written, measured in ((LLAVA, "yes", "Ġyes"), (PLAIN_LINES, " no", "yes")):
        prompt = answered(template, YES)
        with pytest.warns(MmlensWarning, match=f"first of '{written}', and what is measured is '{measured}'"):
            assert accuracy(logits_of(prompt, written), prompt).tolist() == [0]
        # Of the first run alone: the next may be under an intervention.
        answer_log_probability(logits_of(prompt, written), prompt)
        invalid(logits_of(prompt, written), prompt)
    for template, written in ((LLAVA, " yes"), (LLAVA, " no"), (LLAVA, "maybe"), (PLAIN_LINES, "yes")):
        prompt = answered(template, YES)
        accuracy(logits_of(prompt, written), prompt)
        logit_difference(logits_of(prompt, written), prompt)


def test_tokens_of_choice_are_compared_with_what_the_model_writes() -> None:
    model = mmlens.HookedVLM(tiny_model("llava"), processor_of(LLAVA))
    model.cfg.d_vocab = len(model.tokenizer)
    prompt = answered(LLAVA, YES)
    with pytest.warns(MmlensWarning, match="first of ' no', and what is measured is 'yes'"):
        logit_difference_of(model, "yes", "no")(logits_of(prompt, " no"), prompt)
    assert logit_difference_of(model, " yes", " no")(logits_of(prompt, " yes"), prompt).tolist() == [5]


def test_a_first_token_of_white_space_alone_is_no_measure() -> None:
    """The tokenizer has no " 7": it writes a space, then "7"."""
    seven = Example("How many?", "7", candidates=("7", "8"))
    prompt = answered(LLAVA, seven)
    for metric in (accuracy, answer_log_probability, logit_difference, invalid):
        with pytest.raises(ValueError, match="'7' or one of its candidates .* white space alone"):
            metric(logits_of(prompt, "7"), prompt)
    assert mmlens.generated_accuracy(["7"], prompt).tolist() == [1]
    bare = answered(LLAVA, seven, answer_start="")
    assert accuracy(logits_of(bare, "7"), bare).tolist() == [1]


# ---------------------------------------------------------------------- words that the tokenizer does not know


def test_unknown_words_are_named(micro: mmlens.HookedVLM) -> None:
    known = Example("What colour is K", "red", candidates=("red", "blue"))
    assert micro.prompt_examples([known]).answers == ["red"]
    for changes in ({"answer": "crimson", "candidates": ()}, {"candidates": ("red", "crimson")}):
        with pytest.raises(PromptError, match="does not know 'crimson'"):
            micro.prompt_examples([replace(known, **changes)])
    for call in (
        lambda: micro.to_single_token("crimson"),
        lambda: micro.tokens_to_residual_directions("crimson"),
        lambda: logit_difference_of(micro, "red", "crimson"),
        lambda: logit_difference_of(micro, "crimson", "red"),
    ):
        with pytest.raises(PromptError, match="does not know 'crimson'"):
            call()
    unknown = micro.tokenizer.unk_token
    assert micro.to_single_token(unknown) == micro.tokenizer.unk_token_id  # asked for by name
    with pytest.warns(MmlensWarning, match="example 1: the tokenizer does not know 'shade' in the text"):
        micro.prompt(["What colour is K", "What shade is K"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        micro.prompt("What colour is K")


# ---------------------------------------------------------------------- candidates


def test_candidates_that_are_no_list_of_different_answers() -> None:
    fields = {"question": "What?", "answer": "red"}
    for candidates, message in (
        (("red", "blue", "red"), "'red' and 'red' are one candidate given twice"),
        (("red", "red "), "'red' and 'red ' are one candidate given twice"),
        (("blue", "green"), "the answer 'red' is none of the candidates"),
        ((" red", " blue"), "the answer 'red' is none of the candidates"),
        (("red", " "), "a candidate is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            Example(**fields, candidates=candidates)  # type: ignore[arg-type]
    assert Example(**fields, candidates=("red", "Red", "dark red")).candidates == ("red", "Red", "dark red")  # type: ignore[arg-type]
    assert Example(**fields).candidates == ()  # type: ignore[arg-type]


# ---------------------------------------------------------------------- what is no question, and the repr

_BAD_CALLS = """
import warnings; warnings.simplefilter("error")
import numpy as np, torch
from PIL import Image
import mmlens
from mmlens.errors import MmlensError
model = mmlens.HookedVLM.from_pretrained("micro")
image, q = Image.new("RGB", (64, 64)), "What colour is K"
bad = [
    lambda: model.prompt(None), lambda: model.prompt(3), lambda: model.prompt({"a": 1}), lambda: model.prompt({q}),
    lambda: model.prompt([{"a": 1}]), lambda: model.prompt([None]), lambda: model.prompt([q, 3]),
    lambda: model.prompt(b"q"),
    lambda: model.prompt([q], image), lambda: model.prompt(q, {"a.png"}), lambda: model.prompt(q, {"image": image}),
    lambda: model.prompt(q, 3), lambda: model.prompt(q, [None]), lambda: model.prompt(q, [np.zeros((8, 8, 3))]),
    lambda: model.prompt(q, np.zeros((1, 8, 8, 3))), lambda: model.prompt([q, q], [[image], None]),
    lambda: model.prompt([q, q], [[image], image]), lambda: model.prompt([q, q], [{"a.png"}, [image]]),
    lambda: model.prompt([q, q], torch.zeros(2, 3, 8, 8)), lambda: model.prompt_examples(None),
    lambda: model.prompt_examples([]), lambda: model.prompt_examples([q]),
    lambda: model.prompt_examples(mmlens.Example(q, "red")), lambda: mmlens.Example(q, "red", candidates="red"),
    lambda: mmlens.Example(q, "red", candidates=("red", 3)), lambda: mmlens.Example(q, "red", candidates={"red"}),
    lambda: mmlens.Example(None, "red"), lambda: mmlens.Example(q, 3), lambda: mmlens.Example(q, "red", images=image),
    lambda: mmlens.Example(q, "red", images="a.png"), lambda: model.to_single_token(3),
]
for number, call in enumerate(bad):
    try:
        call()
    except MmlensError as error:
        assert len(str(error)) > 30, (number, error)
    else:
        raise AssertionError(f"call {number} passed")
good = [
    model.prompt(q, (each for each in [image])), model.prompt((each for each in [q]), ([image] for _ in range(1))),
    model.prompt([q], ((image,),)), model.prompt(np.array([q]), [iter([image])]),
]
assert all(torch.equal(each.inputs["pixel_values"], good[0].inputs["pixel_values"]) for each in good)
assert model.prompt(q, None).images == [[]]
assert len(model.prompt_examples(mmlens.Example(q, "red") for _ in range(2))) == 2
assert mmlens.Example(q, "red", candidates=["red", "blue"]).candidates == ("red", "blue")
print("all as expected")
"""


def test_what_is_no_question_and_no_list_is_refused_and_what_can_be_listed_is_taken() -> None:
    """In a process of its own: here the annotations are checked first, by the tests' type checker."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _BAD_CALLS], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "all as expected", done.stderr


def test_a_prompt_shows_what_it_is_and_not_its_tensors(micro: mmlens.HookedVLM) -> None:
    examples = mmlens.scene_examples("objects", 6, seed=0)
    short = repr(micro.prompt_examples(examples[:1]))
    assert repr(examples[0].question) in short and "tensor" not in short and "1 image(s)" in short
    n_visual = int(micro.prompt_examples(examples[:1]).token_map.is_image.sum())
    assert f"({n_visual} visual)" in short and f"answer {examples[0].answer!r} as token" in short
    long = repr(micro.prompt([e.question for e in examples] + ["What colour is K " * 9]))
    assert long.count("\n") == 5 and "and 3 more" in long and len(long) < 500
    assert len(repr(micro.prompt("What colour is K " * 99))) < 150


def test_the_end_of_a_thought_stands_before_an_answer() -> None:
    """As in thinking models' templates: the prompt opens a thought, which the turn of an answer without one closes."""
    closed = LINES.replace("THOUGHT", "<think>\n").replace(
        "{% for c in", "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{% for c in"
    )
    prompt = answered(closed, YES)
    assert prompt.answer_starts == ["\n</think>\n\n"]
    tokenizer = spaced_tokenizer()
    whole = tokenizer(prompt.text[0] + "\n</think>\n\nyes", add_special_tokens=False)["input_ids"]
    before = tokenizer(prompt.text[0], add_special_tokens=False)["input_ids"]
    assert prompt.answer_tokens == [whole[len(before) :]]
    with pytest.raises(
        InvalidValueError, match=r"writes '\\n</think>\\n\\n' before answers.*enable_thinking"
    ):
        answer_ids_of(prompt)


def test_a_beginning_of_the_answer_is_followed_by_a_space() -> None:
    processor = processor_of(LLAVA)
    for said, space in (("It is", " "), ("It is:", " "), ("It is (", ""), ("Option-", "")):
        chat = [
            {"role": "user", "content": [{"type": "text", "text": "Is it red?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": said}]},
        ]
        prompt = make_prompt(processor, family_of("llava").layout, chat)
        assert prompt.text[0].endswith(f"ASSISTANT: {said}")
        assert with_answers(prompt, processor, [YES]).answer_starts == [space]


def test_no_template_no_space() -> None:
    processor = processor_of(LLAVA)
    assert answer_start_of(processor, "USER: Is it red? ASSISTANT:") == " "
    assert answer_start_of(processor, "") == ""
    processor.chat_template = None
    assert answer_start_of(processor, "USER: Is it red? ASSISTANT:") == ""
