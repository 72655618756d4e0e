"""Copy and visual head scores against a slow loop: the plain eager model, run anew on the whole text at each step."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from tiny import REPRESENTATIVES, tiny_images, tiny_model, tiny_processor

import mmlens
from mmlens.data.examples import Evidence, Example
from mmlens.model.answering import before_the_end
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.scores.decoding import (
    _decode,
    _question_positions,
    copy_score,
    visual_head_score,
)


@functools.cache
def hooked(family: str) -> HookedVLM:
    return HookedVLM(tiny_model(family), tiny_processor(family))


@torch.no_grad()
def slow_decode(family: str, example: Example, n_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens of one example alone and the argmax keys [step, layer, head], without a cache."""
    model = tiny_model(family, attn_implementation="eager")
    inputs = dict(hooked(family).prompt_examples([example]).inputs)
    tokens, keys = [], []
    for _ in range(n_tokens):
        out = model(**inputs, output_attentions=True, use_cache=False)
        tokens.append(int(out.logits[0, -1].argmax()))
        keys.append(torch.stack([pattern[0, :, -1].argmax(-1) for pattern in out.attentions]))
        for name, value in inputs.items():
            if (
                isinstance(value, torch.Tensor)
                and value.ndim == 2
                and value.shape == inputs["attention_mask"].shape
            ):
                new = {"input_ids": tokens[-1], "attention_mask": 1}.get(name, 0)
                grown = torch.cat([value, torch.full((1, 1), new, dtype=value.dtype)], dim=1)
                inputs = {**inputs, name: grown} if name != "attention_mask" else {**inputs, "grown": grown}
        inputs["attention_mask"] = inputs.pop("grown")
    return tokens, torch.stack(keys)


def three_examples() -> list[Example]:
    a, b, c, d = tiny_images(4, seed=3)
    return [
        Example("What colour is the letter K?", "red", (a,), (Evidence(0, (8, 8, 40, 40)),), id="a"),
        Example("Which page?", "two", (b, c), (Evidence(1),), id="b"),
        Example("Where is it, and what else?", "left", (d,), (Evidence(0),), id="c"),
    ]


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_decoding_reads_what_every_head_attends_to_most(family: str) -> None:
    """A padded batch with a cache and the fast path, against each example alone without either."""
    model, examples = hooked(family), three_examples()
    prompt = model.prompt_examples(examples)
    ids, attended = _decode(model, prompt, 4)
    agree = []
    for row, example in enumerate(examples):
        tokens, keys = slow_decode(family, example, 4)
        padding = int(prompt.token_map.is_padding[row].sum())
        for step in range(4):
            if ids[row, :step].tolist() != tokens[:step]:
                break
            own = torch.stack([attended[layer][step, row] for layer in attended]) - padding
            agree.append((own == keys[step]).float().mean())
        assert int(ids[row, 0]) == tokens[0]
    # Near ties may fall the other way in another order of summation.
    assert len(agree) >= 9
    assert float(torch.stack(agree).mean()) > 0.98


def test_copy_score_counts_steps_by_hand(micro: HookedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needle of positions 5 and 6, which hold tokens 77 and 78; the answer is 77, 78, end, 77."""
    example = mmlens.scene_examples("text_recall", 1, seed=0)[0]
    prompt = micro.prompt_examples([example])
    ids, stop = prompt.inputs["input_ids"].clone(), micro.hf_model.generation_config.eos_token_id
    ids[0, 5:7] = torch.tensor([77, 78])
    keys = torch.full((4, 1, 8), 0)
    keys[0, 0, :] = torch.tensor([5, 6, 4, 7, 5, 5, 0, 0])
    keys[1, 0, :] = torch.tensor([6, 6, 6, 5, 5, 0, 6, 0])
    keys[3, 0, :] = 5
    decoded = torch.tensor([[77, 78, stop, 77]]), dict.fromkeys(range(8), keys)
    monkeypatch.setattr("mmlens.scores.decoding._decode", lambda *args: decoded)
    monkeypatch.setattr("mmlens.scores.decoding._question_positions", lambda *args: [5, 6])
    planted = dataclasses.replace(prompt, inputs={**prompt.inputs, "input_ids": ids})
    scores = copy_score(micro, planted, progress=False)
    expected = [1.0, 0.5, 0.5, 0.0, 0.5, 0.5, 0.5, 0.0]
    assert scores.per_example[0].tolist() == [expected] * 8


def test_copy_score_on_micro_against_teacher_forcing(micro: HookedVLM) -> None:
    """Each example alone: argmax keys of the full pattern at the prompt's end, needle found by its token id."""
    examples = mmlens.scene_examples("text_recall", 6, seed=3)
    scores = copy_score(micro, examples, batch_size=4, progress=False)
    for index, example in enumerate(examples):
        prompt = micro.prompt_examples([example])
        assert prompt.answer_ids is not None
        answer = int(prompt.answer_ids[0])
        with torch.no_grad():
            logits, cache = micro.run_with_cache(
                prompt, names_filter=lambda name: name.endswith("hook_pattern")
            )
        assert int(logits[0, -1].argmax()) == answer
        for layer in range(8):
            keys = cache["pattern", layer][0, :, -1].argmax(-1)
            # The needle is one token, so the first step is the only one that can score.
            expected = (prompt.inputs["input_ids"][0][keys] == answer).float()
            assert torch.equal(scores.per_example[index, layer], expected)
    assert scores.values.max() > 0


def test_visual_head_score_on_micro_against_full_patterns(micro: HookedVLM) -> None:
    examples = [e for kind in ("documents", "frames") for e in mmlens.scene_examples(kind, 3, seed=3)]
    scores = visual_head_score(micro, examples, batch_size=4, progress=False)
    n_right = 0
    for index, example in enumerate(examples):
        prompt = micro.prompt_examples([example])
        assert prompt.answer_ids is not None
        evidence = prompt.token_map.evidence([example])[0]
        with torch.no_grad():
            logits, cache = micro.run_with_cache(
                prompt, names_filter=lambda name: name.endswith("hook_pattern")
            )
        right = int(logits[0, -1].argmax()) == int(prompt.answer_ids[0])
        n_right += right
        for layer in range(8):
            keys = cache["pattern", layer][0, :, -1].argmax(-1)
            expected = evidence[keys].float() / evidence.sum() * right
            torch.testing.assert_close(scores.per_example[index, layer], expected)
    assert n_right >= 4
    assert scores.values.max() > 0


def test_words_of_a_transcript(micro: HookedVLM) -> None:
    """A token that stands in two words scores in neither; the word's own region counts, not the evidence."""
    example = mmlens.scene_examples("documents", 1, seed=3)[0]
    answer = micro.answer(micro.prompt_examples([example]))[0]
    at, elsewhere = example.evidence[0], Evidence(1 - example.evidence[0].image)
    default = visual_head_score(micro, [example], progress=False)
    same = visual_head_score(micro, [example], words=[[(answer, at), ("other", elsewhere)]], progress=False)
    assert torch.equal(same.per_example, default.per_example)
    twice = visual_head_score(micro, [example], words=[[(answer, at), (f"x{answer}", at)]], progress=False)
    assert not twice.per_example.any()
    moved = visual_head_score(micro, [example], words=[[(answer, elsewhere)]], progress=False)
    assert not torch.equal(moved.per_example, default.per_example)


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_needles_are_found_behind_images(family: str) -> None:
    model = hooked(family)
    a, b, c, _ = tiny_images(4, seed=3)
    example = Example("Is it yellow, or red? Then say what it is.", "red", (a, b), (Evidence(0),))
    prompt = model.prompt([example.question, "Where?"], [[a, b], [c]])
    start = example.question.index("red")
    found = _question_positions(prompt, 0, (start, start + 3))
    text = model.tokenizer.decode(prompt.inputs["input_ids"][0][found])
    assert "red" in text
    assert len(text.strip()) <= len("red?")
    assert bool(prompt.token_map.is_question[0][found].all())
    shorter = model.prompt([example.question], [[a, b]])
    shift = prompt.shape[1] - shorter.shape[1]
    assert found == [at + shift for at in _question_positions(shorter, 0, (start, start + 3))]


def test_steps_after_the_end_do_not_count(micro: HookedVLM) -> None:
    stop = micro.hf_model.generation_config.eos_token_id
    ids = torch.tensor([[9, stop, 9], [9, 9, 9], [stop, 9, stop]])
    expected = [[True, False, False], [True, True, True], [False, False, False]]
    assert before_the_end(micro.hf_model, ids).tolist() == expected


def test_bad_input_is_refused(micro: HookedVLM) -> None:
    example = Example("Say tea, teak or tea.", "tea", id="t")
    with pytest.raises(ValueError, match="example 't': its question holds the needle 'tea' 2 times"):
        copy_score(micro, [example], progress=False)
    with pytest.raises(ValueError, match="'cat' 0 times"):
        copy_score(micro, [example], needles=["cat"], progress=False)
    with pytest.raises(ValueError, match="1 needles for 2 examples"):
        copy_score(micro, [example] * 2, needles=["teak"], progress=False)
    with pytest.raises(ValueError, match="no prompts given"):
        copy_score(micro, [])
    with pytest.raises(ValueError, match="max_new_tokens is 0; expected"):
        copy_score(micro, [example], needles=["teak"], max_new_tokens=0)
    with pytest.raises(ValueError, match="have no evidence"):
        visual_head_score(micro, [example])
    seen = three_examples()
    with pytest.raises(ValueError, match="words for 1 examples, but there are 3"):
        visual_head_score(micro, seen, words=[[("a", Evidence(0))]])


def test_nothing_stays_hooked(micro: HookedVLM) -> None:
    examples: Any = mmlens.scene_examples("text_recall", 1, seed=0)
    copy_score(micro, examples, progress=False)
    assert not any(point.is_live for point in micro.hook_dict.values())
