"""Videos through the families' real processors: their inputs, and which frames and pixels each token shows."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from clips import made_clip, written_clip
from occlusion import embeddings_of, painted, region_in
from PIL import Image
from transformers.utils import is_torchvision_available

import mmlens
from mmlens.data.videos import Video
from mmlens.errors import MmlensError, PromptError, UnsupportedError
from mmlens.families.catalog import FAMILIES
from mmlens.model.hooked_vlm import HookedVLM

needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision")

WITH_VIDEOS = tuple(name for name, record in FAMILIES.items() if record.video_layout is not None)
ALWAYS = (
    "qwen2_5_vl",
    "qwen3_vl",
    "glm4v",
    "llava_onevision",
    "llava_next_video",
    "video_llava",
    "internvl",
    "smolvlm",
)
every_family = pytest.mark.parametrize("family", tiny.others_slow(ALWAYS, of=WITH_VIDEOS))

SIZE = (96, 80)

FEW: dict[str, dict[str, Any]] = {"gemma4": {"num_frames": 4}}
"""Options without which a processor takes no clip as short as these: Gemma 4 chooses 32 frames."""


@functools.cache
def _model(family: str) -> HookedVLM:
    return HookedVLM(tiny.tiny_model(family), tiny.tiny_processor(family))


def _chat(video: Any, *, fps: float | None = 2, before: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
    part = {"type": "video", "video": video} | ({} if fps is None else {"fps": fps})
    question = {"type": "text", "text": "Where is the letter?"}
    return [{"role": "user", "content": [{"type": "text", "text": "Look at"}, *before, part, question]}]


def _by_transformers(
    processor: Any, chat: Any, metadata: list[dict[str, Any]], **options: Any
) -> dict[str, Any]:
    return processor.apply_chat_template(
        chat,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"video_metadata": metadata, **options},
    )


def _metadata(frames: np.ndarray, fps: float) -> dict[str, Any]:
    n, height, width, _ = frames.shape
    return {
        "total_num_frames": n, "fps": fps, "duration": n / fps, "width": width, "height": height,
        "frames_indices": list(range(n)),
    }  # fmt: skip


def _assert_same(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(given) == set(expected)
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(given[name]), torch.as_tensor(value)), name


# ---------------------------------------------------------------------- inputs


@needs_torchvision
@every_family
def test_inputs_are_those_of_the_processors_own_chat(family: str) -> None:
    processor, frames = tiny.tiny_processor(family), made_clip(9, SIZE)
    few = FEW.get(family, {})
    prompt = _model(family).prompt(_chat(frames), **few)
    expected = _by_transformers(processor, _chat(frames, fps=None), [_metadata(frames, 2)], **few)
    _assert_same(prompt.inputs, expected)


@needs_torchvision
@every_family
def test_sampled_frames_are_those_of_the_processors_own_chat(family: str) -> None:
    processor, frames = tiny.tiny_processor(family), made_clip(24, SIZE)
    options = FEW.get(family, {"fps": 1})
    prompt = _model(family).prompt(_chat(frames, fps=4), **options)
    expected = _by_transformers(processor, _chat(frames, fps=None), [_metadata(frames, 4)], **options)
    _assert_same(prompt.inputs, expected)
    (grid,) = prompt.token_map.videos[0]
    shown = {frame for own in grid.shown for frame in own}
    # GLM-4.6V's chooses by the length of a video alone.
    assert grid.n_frames == 24 and (4 <= len(shown) <= 7 or family in ("glm46v", "glm_ocr"))
    # What is not shown may be anything.
    other = frames.copy()
    other[[frame for frame in range(24) if frame not in shown]] = 0
    _assert_same(_model(family).prompt(_chat(other, fps=4), **options).inputs, prompt.inputs)


@needs_torchvision
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl"])
def test_a_number_of_frames_is_an_option_of_one_prompt(family: str) -> None:
    processor, frames = tiny.tiny_processor(family), made_clip(24, SIZE)
    prompt = _model(family).prompt(_chat(frames, fps=4), num_frames=6)
    expected = _by_transformers(
        processor, _chat(frames, fps=None), [_metadata(frames, 4)], num_frames=6, fps=None
    )
    _assert_same(prompt.inputs, expected)
    assert sum(map(len, prompt.token_map.videos[0][0].shown)) == 6


@needs_torchvision
@every_family
def test_images_and_videos_keep_their_order(family: str) -> None:
    """An image before each of two videos of different sizes, in a batch with a shorter row."""
    model, processor = _model(family), tiny.tiny_processor(family)
    clips = [made_clip(4, SIZE, seed=1), made_clip(4, SIZE, seed=2)]
    image = {"type": "image", "image": tiny.tiny_images(1)[0]}
    chats = [
        [{"role": "user", "content": [
            image, {"type": "video", "video": clips[0], "fps": 2}, image, {"type": "text", "text": "Where?"},
            {"type": "video", "video": clips[1], "fps": 2},
        ]}],
        [{"role": "user", "content": [{"type": "text", "text": "What?"}]}],
    ]  # fmt: skip
    if family == "smolvlm" or family.startswith("glm"):
        with pytest.raises(UnsupportedError, match="images or videos in a prompt, not both"):
            model.prompt(chats[0])
        return
    few = FEW.get(family, {})
    prompt = model.prompt(chats, **few)
    expected = _by_transformers(processor, chats[0], [_metadata(clip, 2) for clip in clips], **few)
    _assert_same(model.prompt(chats[0], **few).inputs, expected)
    token_map = prompt.token_map
    runs = [
        (image, video)
        for image, video in zip(token_map.image[0].tolist(), token_map.video[0].tolist(), strict=True)
        if image >= 0 or video >= 0
    ]
    assert list(dict.fromkeys(runs)) == [(0, -1), (-1, 0), (1, -1), (-1, 1)]
    assert torch.equal(token_map.is_image, model.image_mask(prompt).cpu())
    places = [(int(t), int(p)) for t, p in zip(token_map.turn[0], token_map.part[0], strict=True)]
    assert {places[at] for at in torch.nonzero(token_map.video[0] == 1).flatten()} == {(0, 4)}
    for row in range(2):
        alone = model(model.prompt(chats[row], **few))[0]
        torch.testing.assert_close(model(prompt)[row, -len(alone) :], alone, atol=2e-4, rtol=2e-4)


@needs_torchvision
@every_family
def test_a_file_is_shown_as_its_frames_are(family: str, tmp_path: Path) -> None:
    path = written_clip(tmp_path / "clip.mp4", made_clip(9, (96, 80)), fps=3)
    model, frames = _model(family), Video(path).read(range(9))
    few = FEW.get(family, {})
    one, other = model.prompt(_chat(path, fps=None), **few), model.prompt(_chat(frames, fps=3), **few)
    _assert_same(one.inputs, other.inputs)
    assert one.token_map.labels() == other.token_map.labels()
    again = model.prompt(one.messages, **few)
    _assert_same(again.inputs, one.inputs)


# ---------------------------------------------------------------------- which frames and pixels

CELL = {"video_llava": tiny.base.PATCH}
"""Pixels of the model's view that a token of a frame shows; 2 patches where nothing is said."""


def _trials(
    family: str, size: tuple[int, int], n_trials: int, **options: Any
) -> list[tuple[set[int], set[int]]]:
    """(changed, expected) positions for some pixels of one frame repainted, vision attention off."""
    model, frames = _model(family), made_clip(12, size)
    generator = np.random.default_rng(0)
    prompt = model.prompt(_chat(frames, fps=4), **options)
    clean, token_map = embeddings_of(family, prompt), prompt.token_map
    boxes, (grid,) = token_map.boxes[0], token_map.videos[0]
    patches = torch.nonzero((token_map.video[0] == 0) & (token_map.row[0] >= 0)).flatten().tolist()
    step = dict(
        zip(torch.nonzero(token_map.video[0] == 0).flatten().tolist(), grid.step.tolist(), strict=True)
    )
    scale = float((boxes[patches, 2:] - boxes[patches, :2]).max() / CELL.get(family, 2 * tiny.base.PATCH))
    margin = (3 if family == "smolvlm" else 2) * max(scale, 1) + 1
    trials = []
    for position in generator.permutation(patches)[: 6 * n_trials].tolist():
        if len(trials) == n_trials:
            break
        region = region_in(boxes[position].tolist(), (margin, margin), generator)
        if region is None:
            continue
        left, top, right, bottom = region
        reach = (
            max(0, left - margin),
            max(0, top - margin),
            min(size[0], right + margin),
            min(size[1], bottom + margin),
        )
        frame = int(generator.choice(grid.shown[step[position]]))
        inside = token_map.video_tokens(0, (frame, frame + 1), region)[0]
        if not torch.equal(inside, token_map.video_tokens(0, (frame, frame + 1), reach)[0]):
            continue
        changed = frames.copy()
        changed[frame] = np.asarray(painted(Image.fromarray(frames[frame]), region))
        occluded = embeddings_of(family, model.prompt(_chat(changed, fps=4), **options))
        differ = (occluded - clean).abs().amax(-1)[0] > 1e-4
        trials.append(
            (set(torch.nonzero(differ).flatten().tolist()), set(torch.nonzero(inside).flatten().tolist()))
        )
        assert position in trials[-1][1]
    return trials


@needs_torchvision
@every_family
@pytest.mark.parametrize(("size", "options"), [((96, 80), {}), ((130, 100), {"fps": 2})])
def test_pixels_of_a_frame_change_the_tokens_of_its_temporal_patch_alone(
    family: str, size: tuple[int, int], options: dict[str, Any]
) -> None:
    trials = _trials(family, size, 6, **FEW.get(family, options))
    assert len(trials) >= 4
    for changed, expected in trials:
        assert changed == expected


@needs_torchvision
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "internvl"])
@torch.no_grad()
def test_a_video_is_visual_to_hook_points_evidence_and_positions(family: str) -> None:
    model = _model(family)
    prompt = model.prompt(_chat(made_clip(6, SIZE)))
    token_map = prompt.token_map
    is_video = token_map.video >= 0
    assert torch.equal(prompt.positions("video"), is_video) and torch.equal(token_map.is_image, is_video)
    logits, cache = model.run_with_cache(prompt)
    torch.testing.assert_close(logits, model(prompt), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cache["image.hook_embed"], cache["hook_embed"][is_video])
    torch.testing.assert_close(
        cache.decompose_resid().sum(0), cache["resid_post", model.cfg.n_layers - 1], atol=1e-4, rtol=1e-4
    )
    evidence = [mmlens.Evidence(video=0, frames=(2, 4), box=(0, 0, 40, 40))]
    chosen = token_map.evidence(evidence)
    assert torch.equal(chosen, prompt.positions(video=0, frames=(2, 4), box=(0, 0, 40, 40)))
    assert 0 < chosen.sum() < is_video.sum()
    mass = mmlens.attention_mass(model, prompt, prompt.last, chosen)
    patterns = torch.stack([cache["pattern", layer] for layer in range(model.cfg.n_layers)])
    by_hand = (patterns[:, :, :, -1] * chosen[:, None]).sum(-1).transpose(0, 1)
    torch.testing.assert_close(mass, by_hand, atol=1e-5, rtol=1e-4)


@needs_torchvision
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "internvl"])
@torch.no_grad()
def test_examples_with_videos_are_scored_intervened_on_and_continued(family: str) -> None:
    model = _model(family)
    examples = [
        mmlens.Example(
            messages=_chat(made_clip(6, SIZE, seed)),
            answer="red",
            candidates=("red", "blue"),
            evidence=(mmlens.Evidence(video=0, frames=(2, 4)),),
            id=str(seed),
        )
        for seed in range(2)
    ]
    prompt = model.prompt_examples(examples)
    assert len(set(prompt.fingerprints)) == 2
    scores = mmlens.ram(model, examples, progress=False)
    chosen, question = prompt.token_map.evidence(examples), prompt.token_map.is_question
    assert 0 < chosen.sum() < prompt.positions("video").sum()
    by_hand = mmlens.attention_mass(model, prompt, question, chosen)
    torch.testing.assert_close(torch.as_tensor(scores.per_example).float(), by_hand, atol=1e-5, rtol=1e-4)
    # Encoding ahead leaves a prompt with a video as it is.
    assert model.encode_images(prompt) is prompt
    cut = mmlens.knockout(prompt.last, chosen, layers=[1])
    effects = mmlens.sweep(model, prompt, {"cut": cut}, mmlens.logit_difference, progress=False)
    whole = mmlens.effect(model, prompt, cut, mmlens.logit_difference)
    np.testing.assert_allclose(effects["value"], whole.values, atol=1e-4, rtol=1e-3)
    continued = model.continue_prompt(prompt, max_new_tokens=3)
    plain = model.hf_model.generate(**prompt.inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(continued.inputs["input_ids"][:, -3:], plain[:, -3:])
    assert int(continued.token_map.is_answer.sum()) == 6


@needs_torchvision
@every_family
def test_inputs_of_a_call_of_ones_own_are_mapped_as_the_chat_is(family: str) -> None:
    model, processor, few = _model(family), tiny.tiny_processor(family), FEW.get(family, {})
    clip = Video(made_clip(8, SIZE), fps=4)
    metadata, chat = [_metadata(clip.source, 4)], _chat(clip.source, fps=None)
    call = _by_transformers(processor, chat, metadata, return_metadata=True, **few)
    expected = model.prompt(_chat(clip, fps=None), **few)
    asked = {"question": "Where is the letter?"}
    # SmolVLM's chat chooses frames, and its metadata do not say which.
    again = [model.prompt_from_inputs(call, videos=[clip], **asked)] if family != "smolvlm" else []
    if not few:
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        plain = _by_transformers(processor, chat, metadata)
        read = model.prompt_from_inputs(plain, videos=[clip], text=text, **asked)
        read_again = model.prompt(read.messages[0])
        _assert_same(read_again.inputs, read.inputs)
        again.append(read)
    for made in again:
        for name in ("is_image", "video", "frames", "row", "col"):
            assert torch.equal(getattr(made.token_map, name), getattr(expected.token_map, name)), name
        torch.testing.assert_close(made.token_map.boxes, expected.token_map.boxes, equal_nan=True)
        assert made.token_map.videos[0][0].shown == expected.token_map.videos[0][0].shown
        _assert_same(made.inputs, {name: call[name] for name in made.inputs})
    # InternVL and SmolVLM show videos at the token of images.
    with pytest.raises(MmlensError, match=r"give the videos of the call too, videos=\[\.\.\.\]|predicts 0"):
        model.prompt_from_inputs(call)


@needs_torchvision
def test_a_batch_of_ones_own_with_videos_and_what_does_not_fit() -> None:
    model = _model("qwen2_5_vl")
    clips = [made_clip(4, SIZE, seed=1), made_clip(6, SIZE, seed=2)]
    examples = [
        mmlens.Example(
            messages=[{"role": "user", "content": _chat(clip)[0]["content"][1:]}],
            answer="red",
            id=str(len(clip)),
        )
        for clip in clips
    ]
    made = model.prompt_examples(examples)
    again = model.prompt_from_inputs(made.inputs, examples=examples)
    assert torch.equal(again.token_map.frames, made.token_map.frames) and again.answers == ["red", "red"]
    with pytest.raises(MmlensError, match="are not the 2 temporal patches"):
        model.prompt_from_inputs(made.inputs, videos=[[clips[1]], [clips[0]]])
    with pytest.raises(PromptError, match="3 lists of videos for inputs of 2 prompt"):
        model.prompt_from_inputs(made.inputs, videos=[[clips[0]]] * 3)
    image = {"type": "image", "image": tiny.tiny_images(1)[0]}
    both = model.prompt(_chat(clips[0], before=(image,)))
    with pytest.raises(PromptError, match=r"whose order is not known without the text"):
        model.prompt_from_inputs(both.inputs, [image["image"]], videos=[clips[0]])
    text = model.prompt_from_inputs(
        both.inputs, [image["image"]], videos=[Video(clips[0], 2)], text=both.text
    )
    assert torch.equal(text.token_map.video, both.token_map.video)


# ---------------------------------------------------------------------- refused


@needs_torchvision
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "glm4v", "smolvlm"])
def test_a_video_without_a_rate_is_refused_where_times_are_made_of_it(family: str) -> None:
    with pytest.raises(
        PromptError, match="part 1 of turn 0 .*has no rate, and .* makes the frames' times of it"
    ):
        _model(family).prompt(_chat(made_clip(4, SIZE), fps=None))


@needs_torchvision
@pytest.mark.parametrize("family", ["llava_onevision", "internvl"])
def test_a_video_needs_no_rate_where_nothing_is_made_of_it(family: str) -> None:
    model, frames = _model(family), made_clip(4, SIZE)
    _assert_same(model.prompt(_chat(frames, fps=None)).inputs, model.prompt(_chat(frames, fps=2)).inputs)
    with pytest.raises(PromptError, match="has no rate"):
        model.prompt(_chat(frames, fps=None), fps=1)


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is there")
def test_without_torchvision_a_video_is_refused_with_the_command_that_mends_it() -> None:
    with pytest.raises(UnsupportedError, match="part 1 of turn 0 .*pip install torchvision"):
        _model("qwen3_vl").prompt(_chat(made_clip(4, SIZE)))


def test_a_family_whose_videos_are_not_mapped_is_refused_by_name() -> None:
    assert FAMILIES["llava"].video_layout is None
    with pytest.raises(
        UnsupportedError, match="how LlavaProcessor lays out the tokens of a video is not known here"
    ):
        _model("llava").prompt(_chat(made_clip(4, SIZE)))


@needs_torchvision
@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision"])
def test_a_template_that_drops_videos_is_an_error(family: str) -> None:
    processor = tiny.tiny_processor(family)
    processor.chat_template = tiny.base.chat_template(tiny.TINY[family].image_text)
    model = HookedVLM(_model(family).hf_model, processor)
    with pytest.raises(
        PromptError, match=r"1 video\(s\) were given, but the rendered prompt holds 0 placeholder"
    ):
        model.prompt(_chat(made_clip(4, SIZE)))


def test_the_page_on_prompts_names_the_families_that_take_videos() -> None:
    page = (Path(__file__).parents[2] / "docs" / "prompts.md").read_text()
    (named,) = re.findall(r"^Families that take videos: (.*?)\.\n", page, re.M | re.S)
    assert sorted(re.findall(r"\w+", named)) == sorted(WITH_VIDEOS)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "video"}, "a video part without a video"),
        ({"type": "video", "video": "https://example.org/clip.mp4"}, "nothing is downloaded"),
        ({"type": "video", "url": "https://example.org/clip.mp4"}, "nothing is downloaded"),
        ({"type": "video", "video": []}, "has no frame"),
        ({"type": "video", "video": np.zeros((4, 3, 8, 8), np.uint8), "fps": 2}, "the channels come last"),
        ({"type": "video", "path": "no/such.mp4"}, "does not exist"),
    ],
)
def test_what_is_no_video_is_refused_by_turn_and_part(part: dict[str, Any], message: str) -> None:
    chat = [{"role": "user", "content": [part, {"type": "text", "text": "Where?"}]}]
    with pytest.raises((PromptError, FileNotFoundError), match=f"part 0 of turn 0.*{message}"):
        _model("qwen3_vl").prompt(chat)
