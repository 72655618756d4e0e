"""Attention mass and its relatives against the full patterns of the plain eager model, and small sums by hand."""

from __future__ import annotations

import functools
import math
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import REPRESENTATIVES, tiny_images, tiny_model, tiny_processor
from torch.utils._python_dispatch import TorchDispatchMode

from mmlens.data.examples import Evidence, Example
from mmlens.head_scores import HeadScores
from mmlens.model.hooked_vlm import HookedVLM
from mmlens.model.prompt import Prompt
from mmlens.scores.retrieval import (
    EvidenceAttention,
    attention_mass,
    evidence_attention,
    key_token_coverage,
    key_token_ratio,
    key_tokens,
    ram,
    vision_mass,
)
from mmlens.scores.rows import mass_of_rows, mean_of_rows


@functools.cache
def hooked(family: str) -> HookedVLM:
    return HookedVLM(tiny_model(family), tiny_processor(family))


@functools.cache
def plain_eager(family: str) -> Any:
    return tiny_model(family, attn_implementation="eager")


@torch.no_grad()
def full_patterns(family: str, prompt: Prompt) -> torch.Tensor:
    """[layer, batch, head, query, key] from the plain model: output_attentions, no mmlens."""
    return torch.stack(plain_eager(family)(**prompt.inputs, output_attentions=True).attentions)


def examples_of(family: str) -> list[Example]:
    """Three questions with one, two and one image, so that a batch needs padding; box and whole-image evidence."""
    a, b, c, d = tiny_images(4, seed=3)
    return [
        Example(
            "What colour is the letter K?", "red", (a,), (Evidence(0, (8, 8, 40, 40)),), kind="box", id="a"
        ),
        Example(
            "Which page?", "two", (b, c), (Evidence(1), Evidence(0, (10, 20, 30, 40))), kind="page", id="b"
        ),
        Example("Where is it, and what else?", "left", (d,), (Evidence(0),), kind="page", id="c"),
    ]


def slow_mass(pattern: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> np.ndarray:
    """Eq. 1 as it is written, with loops: [layer, head] of one batch row of `pattern` [layer, head, query, key]."""
    mass = np.zeros(pattern.shape[:2])
    for layer, head in np.ndindex(*mass.shape):
        per_query = [
            sum(float(pattern[layer, head, x, y]) for y in keys.nonzero().flatten())
            for x in queries.nonzero().flatten()
        ]
        mass[layer, head] = sum(per_query) / len(per_query)
    return mass


# ---------------------------------------------------------------------- by hand

TWO_BY_TWO = torch.tensor([[[[0.9, 0.1], [0.4, 0.6]], [[0.2, 0.8], [0.7, 0.3]]]])  # 1 example, 2 heads


def test_mass_of_two_heads_by_hand() -> None:
    both = torch.tensor([[True, True]])
    second = torch.tensor([[False, True]])
    assert mass_of_rows(TWO_BY_TWO, both, second).tolist() == [pytest.approx([0.35, 0.55])]
    first_query = torch.tensor([[True, False]])
    assert mass_of_rows(TWO_BY_TWO, first_query, second).tolist() == [pytest.approx([0.1, 0.8])]
    assert mean_of_rows(TWO_BY_TWO, both).flatten().tolist() == pytest.approx([0.65, 0.35, 0.45, 0.55])


def test_key_token_ratio_and_coverage_by_hand() -> None:
    """40 positions: 2 key tokens a head. Evidence at 10, 11, 12, 13; head 0 tops 10 and 30, head 1 tops 11, 12."""
    mean = torch.full((1, 2, 40), 0.001)
    mean[0, 0, [10, 30]] = 0.4
    mean[0, 1, [11, 12]] = 0.4
    hits = key_tokens(mean, torch.ones(1, 40, dtype=torch.bool))[0, :, 10:14]
    nothing = HeadScores(torch.zeros(1, 1, 2))
    read = EvidenceAttention(nothing, nothing, (hits[None],))
    assert read.key_token_ratio.values.tolist() == [[25.0, 50.0]]
    assert read.key_token_coverage([(0, 0)]).tolist() == [25.0]
    assert read.key_token_coverage([(0, 0), (0, 1)]).tolist() == [75.0]
    with pytest.raises(IndexError, match="head 2 is out of range"):
        read.key_token_coverage([(0, 2)])


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 4), st.integers(2, 9))
def test_rows_with_padding_equal_loops(seed: int, batch: int, width: int, length: int) -> None:
    generator = torch.manual_seed(seed)
    rows = torch.rand(batch, 2, width, length, generator=generator)
    mask = torch.rand(batch, width, generator=generator) < 0.6
    mask[:, 0] = True
    rows.masked_fill_(~mask[:, None, :, None], torch.nan)
    keys = torch.rand(batch, length, generator=generator) < 0.5
    mass, mean = mass_of_rows(rows, mask, keys), mean_of_rows(rows, mask)
    for example, head in np.ndindex(batch, 2):
        real = [rows[example, head, x] for x in range(width) if mask[example, x]]
        expected = sum(row[keys[example]].sum() for row in real) / len(real)
        assert float(mass[example, head]) == pytest.approx(float(expected), abs=1e-6)
        torch.testing.assert_close(mean[example, head], sum(real) / len(real))


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 130), st.integers(0, 30))
def test_key_tokens_are_the_highest_twentieth_of_the_real_positions(
    seed: int, length: int, padding: int
) -> None:
    generator = torch.manual_seed(seed)
    # Few different values, so that ties are met: the earlier position comes first.
    mean = torch.randint(0, 4, (1, 2, padding + length), generator=generator).float()
    real = torch.arange(padding + length)[None] >= padding
    chosen = key_tokens(mean, real)
    for head in range(2):
        order = sorted(
            range(padding, padding + length), key=lambda at, head=head: (-float(mean[0, head, at]), at)
        )
        expected = set(order[: max(1, math.floor(length * 5 / 100))])
        assert set(chosen[0, head].nonzero().flatten().tolist()) == expected


# ---------------------------------------------------------------------- against the plain model


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_attention_mass_is_exact_in_a_padded_batch(family: str) -> None:
    model, examples = hooked(family), examples_of(family)
    prompt = model.prompt_examples(examples)
    assert bool(prompt.token_map.is_padding.any()), "the batch is meant to hold padding"
    patterns = full_patterns(family, prompt)
    question, evidence = prompt.token_map.is_question, prompt.token_map.evidence(examples)
    mass = attention_mass(model, prompt, question, evidence)
    from_keywords = attention_mass(model, prompt.inputs, question, evidence)
    looked_at = vision_mass(model, prompt, progress=False).per_example
    assert mass.shape == (3, model.cfg.n_layers, model.cfg.n_heads)
    assert float(mass.max()) > 1e-3
    for example in range(3):
        pattern = patterns[:, example]
        expected = slow_mass(pattern, question[example], evidence[example])
        np.testing.assert_allclose(mass[example], expected, atol=1e-6)
        expected = slow_mass(pattern, question[example], prompt.token_map.is_image[example])
        np.testing.assert_allclose(looked_at[example], expected, atol=1e-6)
    assert torch.equal(mass, from_keywords)


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_one_pass_gives_ram_vision_mass_and_key_tokens(family: str) -> None:
    """Every example alone, from its full pattern; the library in padded batches."""
    model, examples = hooked(family), examples_of(family)
    scores = ram(model, examples, batch_size=2, progress=False)
    read = evidence_attention(model, examples, batch_size=3, progress=False)
    heads = [(0, 1), (2, 3), (1, 0)]
    coverage = read.key_token_coverage(heads)
    for index, example in enumerate(examples):
        prompt = model.prompt_examples([example])
        pattern = full_patterns(family, prompt)[:, 0]
        question, evidence = prompt.token_map.is_question[0], prompt.token_map.evidence([example])[0]
        expected = slow_mass(pattern, question, evidence)
        np.testing.assert_allclose(scores.per_example[index], expected, atol=1e-6)
        np.testing.assert_allclose(read.ram.per_example[index], expected, atol=1e-6)
        expected = slow_mass(pattern, question, prompt.token_map.is_image[0])
        np.testing.assert_allclose(read.vision_mass.per_example[index], expected, atol=1e-6)
        mean = pattern[:, :, question].mean(2)
        n_top = max(1, math.floor(len(question) * 5 / 100))
        evidence_positions = set(evidence.nonzero().flatten().tolist())
        covered: set[int] = set()
        for layer, head in np.ndindex(*mean.shape[:2]):
            top = set(np.argsort(-mean[layer, head].numpy(), kind="stable")[:n_top].tolist())
            found = top & evidence_positions
            ratio = float(read.key_token_ratio.per_example[index, layer, head])
            assert ratio == pytest.approx(100 * len(found) / len(evidence_positions), abs=1e-4)
            covered |= found if (layer, head) in heads else set()
        assert float(coverage[index]) == pytest.approx(100 * len(covered) / len(evidence_positions), abs=1e-4)
    assert scores.kinds == read.key_token_ratio.kinds == ("box", "page", "page")


def test_ram_does_not_depend_on_order_or_batches() -> None:
    model, examples = hooked("qwen3_vl"), examples_of("qwen3_vl")
    scores = ram(model, examples, batch_size=3, progress=False)
    backwards = ram(model, examples[::-1], batch_size=1, progress=False)
    torch.testing.assert_close(scores.per_example, backwards.per_example.flip(0), atol=1e-6, rtol=0)
    assert (scores.name, len(scores)) == ("RAM", 3)


def test_the_short_ways_equal_the_one_pass() -> None:
    model, examples = hooked("llava"), examples_of("llava")
    read = evidence_attention(model, examples, progress=False)
    ratio = key_token_ratio(model, examples, progress=False)
    assert torch.equal(ratio.per_example, read.key_token_ratio.per_example)
    coverage = key_token_coverage(model, examples, [(0, 0), (1, 1)], progress=False)
    assert torch.equal(coverage, read.key_token_coverage([(0, 0), (1, 1)]))


def test_half_precision_models_give_float32_scores() -> None:
    model = HookedVLM(tiny_model("qwen2_5_vl", dtype=torch.bfloat16), tiny_processor("qwen2_5_vl"))
    scores = ram(model, examples_of("qwen2_5_vl"), progress=False)
    assert scores.per_example.dtype == torch.float32
    exact = ram(hooked("qwen2_5_vl"), examples_of("qwen2_5_vl"), progress=False)
    assert scores.spearman(exact) > 0.8


class _LargestFloat(TorchDispatchMode):
    """The largest floating-point tensor that any operation made, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            # Views and expansions make nothing: count what is laid out in memory.
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.is_contiguous():
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_full_pattern_is_ever_made() -> None:
    model = hooked("llava")
    image = tiny_images(1)[0]
    prompt = model.prompt("What is it? " + "and what else, " * 300, images=[image])
    length = prompt.inputs["input_ids"].shape[1]
    queries = torch.zeros(1, length, dtype=torch.bool)
    queries[0, -3:] = True
    with _LargestFloat() as watch:
        attention_mass(model, prompt, queries, prompt.token_map.is_image)
    rows = model.cfg.n_heads * 3 * length
    largest_activation = length * max(model.cfg.d_mlp, model.cfg.d_vocab)
    full_pattern = model.cfg.n_heads * length**2
    assert watch.elements <= max(rows, largest_activation) < full_pattern / 4


# ---------------------------------------------------------------------- bad input


def test_bad_positions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests' type checker would refuse a wrong type before mmlens can.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model, examples = hooked("llava"), examples_of("llava")
    prompt = model.prompt_examples(examples[:2])
    question, image = prompt.token_map.is_question, prompt.token_map.is_image
    nothing = torch.zeros_like(question)
    with pytest.raises(TypeError, match=r"queries is a boolean tensor \[batch, pos\], not torch.int64"):
        attention_mass(model, prompt, question.long(), image)
    with pytest.raises(TypeError, match=r"keys is a boolean tensor .* not list"):
        attention_mass(model, prompt, question, [0, 1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keys has shape"):
        attention_mass(model, prompt, question, image[:, 1:])
    with pytest.raises(ValueError, match=r"queries marks no position in batch row\(s\) \[0, 1\]"):
        attention_mass(model, prompt, nothing, image)
    with pytest.raises(ValueError, match="keys marks no position"):
        attention_mass(model, prompt, question, nothing)
    with pytest.raises(ValueError, match=r"keys marks padding in batch row\(s\) \[0\]"):
        attention_mass(model, prompt, question, ~nothing)
    text_only = model.prompt("What colour?")
    with pytest.raises(ValueError, match="the prompt's images marks no position"):
        vision_mass(model, text_only)
    with pytest.raises(ValueError, match="1 of 1 examples have no image"):
        vision_mass(model, [Example("What colour?", "red")])


@pytest.mark.parametrize("score", [ram, evidence_attention])
def test_bad_examples_are_refused(score: Any) -> None:
    model, examples = hooked("llava"), examples_of("llava")
    with pytest.raises(ValueError, match="no prompts given"):
        score(model, [])
    control = Example("Which word?", "K", id="text-7")
    with pytest.raises(ValueError, match=r"2 of 3 examples have no evidence .*: text-7, number 2"):
        score(model, [examples[0], control, Example("Which?", "K", images=(Image.new("RGB", (9, 9)),))])
    with pytest.raises(ValueError, match="batch_size is 0; expected"):
        score(model, examples, batch_size=0)
    with pytest.raises(ValueError, match="paper_floor"):
        score(model, examples, mapping="paper_floor", progress=False)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**31))
def test_mass_on_all_keys_is_one(seed: int) -> None:
    model = hooked("internvl")
    prompt = model.prompt_examples(examples_of("internvl")[:2])
    real = ~prompt.token_map.is_padding
    queries = real & (torch.rand(real.shape, generator=torch.manual_seed(seed)) < 0.3)
    queries[:, -1] = True
    mass = attention_mass(model, prompt, queries, real)
    torch.testing.assert_close(mass, torch.ones_like(mass), atol=1e-5, rtol=0)
