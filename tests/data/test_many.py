"""Examples that are read when they are used: late images, streams, and the same numbers as of a list."""

from __future__ import annotations

import gc
import io
import pickle
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mmlens
from mmlens.boxes import TokenMapError
from mmlens.data import (
    Example,
    Examples,
    ExampleStream,
    LateImage,
    load_examples,
    save_examples,
    scene_examples,
)
from mmlens.data.images import load_image
from mmlens.data.splits import group_of, split_examples
from mmlens.errors import InvalidTypeError, InvalidValueError, MissingFileError, OutOfRangeError, PromptError
from mmlens.model.batches import Batches
from mmlens.provenance import data_fingerprint


@pytest.fixture(scope="module")
def micro() -> mmlens.HookedVLM:
    return mmlens.HookedVLM.from_pretrained("micro")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scenes = scene_examples("objects", 5, seed=0) + scene_examples("documents", 4, seed=1)
    return save_examples(scenes, tmp_path_factory.mktemp("scenes"))


def photograph(size: tuple[int, int] = (40, 30)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3))
    return Image.fromarray(values.astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def turned(orientation: int) -> bytes:
    """A JPEG file with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photograph(), "JPEG", exif=exif)


# ---------------------------------------------------------------------- late images


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_late_image_has_the_size_of_the_upright_image(orientation: int) -> None:
    late = LateImage(turned(orientation))
    assert late.size == late.open().size == ((40, 30) if orientation < 5 else (30, 40))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1", "LA", "I;16"])
def test_a_late_image_shows_what_the_file_would(mode: str, tmp_path: Path) -> None:
    image = photograph().convert("L").point(lambda value: value // 2) if mode == "I;16" else photograph()
    image = image.convert(mode)
    path = tmp_path / f"image.{'tiff' if mode in ('CMYK', 'I;16') else 'png'}"
    image.save(path)
    data = path.read_bytes()
    expected = load_image(path)
    for file in (
        path,
        str(path),
        data,
        lambda: data,
        lambda: {"bytes": data, "path": None},
        lambda: {"path": str(path)},
    ):
        late = LateImage(file)
        assert late.size == expected.size and late.open() == expected and late.open().mode == "RGB"
        assert late == LateImage(path) and late.fingerprint == LateImage(path).fingerprint


def test_a_late_image_is_opened_when_it_is_used_and_let_go() -> None:
    opened = []

    def read() -> bytes:
        opened.append(1)
        return encoded(photograph())

    example = Example("What?", "x", (LateImage(read),))
    assert len(example.images) == 1 and repr(example) and not opened
    image = example.images[0]
    assert example.images[0] is image and len(opened) == 1
    held = weakref.ref(image)
    del image
    gc.collect()
    assert held() is None
    assert example.images[0].size == (40, 30) and len(opened) == 2


def test_boxes_in_a_late_image_are_checked_when_it_opens() -> None:
    late = LateImage(encoded(photograph()), "row 7")
    good, bad = (mmlens.Evidence(0, (0, 0, width, 20)) for width in (40, 41))
    assert Example("What?", "x", (late,), (good,)).images[0].size == (40, 30)
    example = Example("What?", "x", (late,), (bad,), id="a")
    with pytest.raises(TokenMapError, match="row 7: the box .* inside the image of 40 x 30"):
        example.images[0]
    with pytest.raises(TokenMapError, match="row 7"):
        example.check_images()
    # Another example of the same image has its own boxes.
    assert replace(example, evidence=(good,)).images[0].size == (40, 30)
    with pytest.raises(InvalidValueError, match="evidence names image 1"):
        Example("What?", "x", (late,), (mmlens.Evidence(1),))


def test_boxes_in_the_late_images_of_a_chat_are_checked(micro: mmlens.HookedVLM) -> None:
    parts = [
        {"type": "image", "image": LateImage(encoded(photograph((96, 96))))},
        {"type": "text", "text": "What colour is K"},
    ]
    chat = [{"role": "user", "content": parts}]
    fine = Example(messages=chat, answer="red", evidence=(mmlens.Evidence(0, (0, 0, 9, 9)),))
    given = Example(
        messages=[{"role": "user", "content": [{"type": "image"}, parts[1]]}],
        images=[parts[0]["image"]],
        answer="red",
    )
    assert torch.equal(
        micro.prompt_examples([fine]).inputs["pixel_values"],
        micro.prompt_examples([given]).inputs["pixel_values"],
    )
    wrong = replace(fine, evidence=(mmlens.Evidence(0, (0, 0, 99, 9)),))
    with pytest.raises(TokenMapError, match="96 x 96"):
        micro.prompt_examples([wrong])


@pytest.mark.parametrize(
    ("file", "error", "message"),
    [
        (b"no image", PromptError, "row 3 is no image"),
        (encoded(photograph())[:-400], PromptError, "row 3 is broken"),
        ("missing.png", MissingFileError, r"row 3 \(missing.png\) does not exist"),
        (lambda: 3, PromptError, "row 3: its file is 3"),
        (lambda: {"bytes": None, "path": None}, PromptError, "row 3: its file is None"),
    ],
)
def test_a_late_image_that_does_not_open_is_named(file: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LateImage(file, "row 3").open()
    with pytest.raises(InvalidTypeError, match="the file of row 3 is 3"):
        LateImage(3, "row 3")


def test_late_images_travel_between_processes(folder: Path) -> None:
    example = load_examples(folder)[0]
    example.images[0]
    again = pickle.loads(pickle.dumps(example))
    assert again == example and again.images[0] == example.images[0]


def test_a_late_image_stands_wherever_an_image_does(micro: mmlens.HookedVLM, folder: Path) -> None:
    late = load_examples(folder)
    opened = [replace(example, images=tuple(example.images)) for example in late]
    assert data_fingerprint(late) == data_fingerprint(opened)
    prompts = [micro.prompt_examples(examples[:4]) for examples in (late, opened)]
    assert all(torch.equal(prompts[0].inputs[name], prompts[1].inputs[name]) for name in prompts[0].inputs)
    of_late = micro.prompt("What colour is K", images=[late[0].images.given[0]])
    assert torch.equal(
        of_late.inputs["pixel_values"],
        micro.prompt("What colour is K", images=[opened[0].images[0]]).inputs["pixel_values"],
    )
    results = []
    for examples in (late, opened):
        swapped = mmlens.interventions.other_image(examples, seed=1)(micro, prompts[0])
        resampled = mmlens.effect(
            micro,
            examples[:4],
            mmlens.ablate([(0, 1)], "resample", reference=examples),
            mmlens.answer_log_probability,
        )
        results.append((swapped.inputs["pixel_values"], resampled.values))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


# ---------------------------------------------------------------------- streams


def test_measurements_of_a_stream_are_those_of_a_list(micro: mmlens.HookedVLM, folder: Path) -> None:
    listed = load_examples(folder)
    read: list[int] = []

    def start() -> Iterator[Example]:
        for number, example in enumerate(listed):
            read.append(number)
            yield example

    numbered = Examples(len(listed), listed.__getitem__, "mine")
    measured = []
    for examples in (listed, ExampleStream(start), numbered):
        options = {"batch_size": 4}
        ram = mmlens.ram(micro, examples, progress=False, **options)
        ablated = mmlens.ablate([(0, 1)])
        found = mmlens.effect(micro, examples, ablated, mmlens.answer_log_probability, **options)
        table = mmlens.sweep(
            micro, examples, {"a": ablated}, mmlens.answer_log_probability, progress=False, **options
        )
        means = mmlens.mean_activations(micro, examples, hooks=["blocks.0.hook_mlp_out"], **options)
        attention = mmlens.scores.evidence_attention(micro, examples, progress=False, **options)
        tested = mmlens.scores.ram_significance(micro, examples, n_resamples=1300, progress=False, **options)
        numbers = [ram.per_example, found.values, found.clean, means["blocks.0.hook_mlp_out"]]
        numbers += [attention.key_token_ratio.per_example, torch.tensor(tested.p_values)]
        measured.append([*numbers, torch.tensor(table["value"].to_numpy())])
        assert ram.kinds == tuple(example.kind for example in listed)
        assert len(found.examples) == len(listed) and found.report["fired"].tolist() == [3]
    for other in measured[1:]:
        assert all(torch.equal(one, two) for one, two in zip(measured[0], other, strict=True))
    # Each measurement goes through the stream once.
    assert read == list(range(len(listed))) * 6


def test_what_a_score_lacks_is_named_in_a_stream_before_it_runs(micro: mmlens.HookedVLM) -> None:
    examples = [*scene_examples("objects", 2, seed=0), Example("What colour is K", "red", id="bare")]
    with pytest.raises(InvalidValueError, match="have no evidence.*bare"):
        mmlens.ram(micro, ExampleStream(lambda: iter(examples)), progress=False)


def test_a_stream_of_nothing_is_an_error(micro: mmlens.HookedVLM) -> None:
    nothing = ExampleStream(lambda: iter(()), "mine")
    with pytest.raises(InvalidValueError, match=r"ExampleStream\(mine\) holds no example"):
        mmlens.ram(micro, nothing, progress=False)
    with pytest.raises(InvalidValueError, match="holds no example"):
        mmlens.effect(micro, Examples(0, [].__getitem__), None, mmlens.accuracy)


def test_examples_by_their_numbers() -> None:
    many = Examples(100, lambda at: Example(f"Question {at}?", "yes", id=str(at)), "mine")
    assert (len(many), many[-1].id, many[3].id) == (100, "99", "3")
    assert [example.id for example in many[10:20:5]] == ["10", "15"]
    assert [example.id for example in many.take(2)] == ["0", "1"] and len(many.take(200)) == 100
    shuffled = [example.id for example in many.shuffled(1)]
    assert sorted(shuffled, key=int) == [str(at) for at in range(100)] and shuffled != sorted(
        shuffled, key=int
    )
    assert shuffled == [example.id for example in many.shuffled(1)] != [e.id for e in many.shuffled(2)]
    with pytest.raises(OutOfRangeError, match="mine are 100, numbered 0 to 99; no 100"):
        many[100]
    assert list(ExampleStream(lambda: iter(many)).take(3)) == list(many)[:3]


def test_a_stream_is_split_by_its_groups_alone() -> None:
    """The same whatever else is there and in whichever order, and about the share that was asked for."""
    many = [Example("What?", "x", id=str(at), group=f"page {at // 2}") for at in range(2000)]
    streams = [ExampleStream(lambda own=own: iter(own)) for own in (many, many[::-1], many[500:700])]
    first, second = split_examples(streams[0], 0.3, seed=1)
    ids = {example.id for example in first}
    assert ids.isdisjoint(example.id for example in second) and len(ids) + len(list(second)) == 2000
    assert {group_of(e) for e in first}.isdisjoint(group_of(e) for e in second)
    assert 0.25 < len(ids) / 2000 < 0.35
    assert {example.id for example in split_examples(streams[1], 0.3, seed=1)[0]} == ids
    assert {example.id for example in split_examples(streams[2], 0.3, seed=1)[0]} == ids & {
        e.id for e in many[500:700]
    }
    assert {example.id for example in split_examples(streams[0], 0.3, seed=2)[0]} != ids


def test_a_stream_is_read_no_further_than_it_is_used(micro: mmlens.HookedVLM) -> None:
    read = []

    def start() -> Iterator[Example]:
        for at in range(10**6):
            read.append(at)
            yield Example("What colour is K", "red", id=str(at))

    batches = Batches(micro, ExampleStream(start), 2, by_size=True)
    assert batches.n_examples is None and batches.n_batches is None and not read
    for _, prompt in batches:
        assert len(prompt) == 2
        break
    assert len(read) < 1000
