"""Images as models are shown them: modes, transparency, frames, orientation, and shapes that layouts must take."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tiny import TINY, others_slow, record_of, tiny_images, tiny_processor
from torch import Tensor

from mmlens.data.examples import Evidence, Example, load_examples, save_examples
from mmlens.data.images import as_rgb, load_image
from mmlens.errors import MissingFileError, MmlensError, MmlensWarning, PromptError
from mmlens.interventions.image_edits import blank_region, evidence_of
from mmlens.model.prompt import Prompt
from mmlens.model.prompt_making import make_prompt

WITH_PROCESSOR = [
    family for family in TINY if TINY[family].processor is not None and record_of(family).layout is not None
]
ALWAYS = ("llava", "llava_onevision", "qwen3_vl", "idefics2", "deepseek_vl", "fuyu", "mllama", "gemma3")
QUESTION = "What is it?"


def transparent(mode: str = "RGBA") -> Image.Image:
    """Colours under an alpha channel of every value, with black wherever nothing is to be seen."""
    pixels = np.array(tiny_images(1, seed=3, sizes=[(64, 48)])[0])
    alpha = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    pixels[alpha < 60] = 0
    rgba = Image.fromarray(np.dstack([pixels, alpha]), "RGBA")
    if mode != "P":
        return rgba.convert(mode)
    palette = Image.fromarray(pixels).convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    palette.info["transparency"] = palette.getpixel((0, 0))
    return palette


def plain_inputs(processor: Any, image: Image.Image) -> dict[str, Tensor]:
    """What plain transformers makes of the PIL image."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    options = {"add_special_tokens": False} if text.startswith(processor.tokenizer.bos_token) else {}
    encoded = processor(text=[text], images=[[image]], return_tensors="pt", **options)
    return {name: value for name, value in encoded.items() if isinstance(value, Tensor) and name != "labels"}


def own(family: str, image: Any, processor: Any = None) -> Prompt:
    return make_prompt(processor or tiny_processor(family), record_of(family).layout, QUESTION, [image])


def assert_equal(made: dict[str, Any], plain: dict[str, Tensor]) -> None:
    for name, value in plain.items():
        assert torch.equal(made[name], value), name


# ---------------------------------------------------------------------- transparency and modes


@pytest.mark.parametrize("family", others_slow(ALWAYS, WITH_PROCESSOR))
def test_a_transparent_image_is_what_plain_transformers_makes_of_it(family: str, tmp_path: Path) -> None:
    """By every mode with transparency, and alike from a file. Three kinds of processors cannot serve as a measure:
    those without a conversion to RGB fail on anything else, or take more channels than the model; Idefics2's drops
    the alpha channel. For these the measure is the image laid over white by hand."""
    processor = tiny_processor(family)
    for mode in ("RGBA", "LA", "PA", "P"):
        image = transparent(mode)
        over_white = Image.new("RGB", image.size, "white")
        over_white.paste(image.convert("RGBA"), mask=image.convert("RGBA").getchannel("A"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", MmlensWarning)
            prompt = own(family, image, processor)
        converts = bool(getattr(processor.image_processor, "do_convert_rgb", False))
        drops = family == "idefics2"
        assert [type(each.message) for each in caught] == [MmlensWarning] * drops
        assert_equal(
            prompt.inputs, plain_inputs(processor, image if converts and not drops else as_rgb(image))
        )
        difference = np.array(prompt.images[0][0]).astype(int) - np.array(over_white)
        assert np.abs(difference).max() <= 1
        if mode == "PA":  # no format of files keeps it
            continue
        image.save(tmp_path / f"{mode}.png")
        assert_equal(own(family, tmp_path / f"{mode}.png", processor).inputs, prompt.inputs)
        with Image.open(tmp_path / f"{mode}.png") as opened, warnings.catch_warnings():
            warnings.simplefilter("ignore" if drops else "error", MmlensWarning)
            assert opened.mode == mode
            assert_equal(own(family, opened, processor).inputs, prompt.inputs)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "internvl"])
def test_opaque_modes_are_what_plain_transformers_makes_of_them(family: str, mode: str) -> None:
    image = tiny_images(1)[0]
    if mode in ("I", "F", "I;16"):  # whole numbers from 0 to 255 reach the model unharmed
        image = Image.fromarray(
            np.array(image.convert("L")).astype({"I": "i4", "F": "f4", "I;16": "u2"}[mode])
        )
    else:
        image = image.convert(mode)
    assert image.mode == mode
    processor = tiny_processor(family)
    assert_equal(own(family, image, processor).inputs, plain_inputs(processor, image))


def test_images_that_would_be_clipped_are_refused(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 48).reshape(48, 64)
    for array in (
        ramp.astype(np.uint16),
        ramp.astype(np.int32),
        (ramp / 65535).astype(np.float32),
        (ramp / 257 + 0.25).astype(np.float32),
        (ramp / 65535 - 1).astype(np.float32),
        np.full((4, 4), np.nan, dtype=np.float32),
    ):
        with pytest.raises(PromptError, match="models take whole numbers from 0 to 255"):
            load_image(Image.fromarray(array))
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(PromptError, match=r"deep.png\) has the mode 'I;16' and values from 0 to 65535"):
        load_image(tmp_path / "deep.png")
    for mode, way in (("RGBa", "RGBA"), ("LAB", "RGB")):
        image = transparent().convert("RGBa") if mode == "RGBa" else Image.new("LAB", (4, 4))
        with pytest.raises(PromptError, match=f"has the mode '{mode}'.*convert\\('{way}'\\)"):
            load_image(image)
        assert load_image(image.convert(way)).mode == "RGB"


@pytest.mark.parametrize("suffix", ["gif", "tiff", "png", "webp"])
def test_several_frames_are_refused_and_one_chosen_is_taken(suffix: str, tmp_path: Path) -> None:
    frames = tiny_images(3, sizes=[(32, 24)])
    several, single = tmp_path / f"several.{suffix}", tmp_path / f"single.{suffix}"
    frames[0].save(several, save_all=True, append_images=frames[1:])
    frames[0].save(single)
    with pytest.raises(PromptError, match=r"holds 3 frames, .*image.seek\(0\)"):
        load_image(several)
    with Image.open(several) as image:
        with pytest.raises(PromptError, match="holds 3 frames"):
            load_image(image)
        image.seek(2)
        assert load_image(image.copy()).tobytes() == as_rgb(image).tobytes()
    assert load_image(single).size == (32, 24)
    with Image.open(single) as image:
        assert load_image(image).tobytes() == load_image(single).tobytes()


def test_the_preview_after_a_photograph_is_no_second_frame(tmp_path: Path) -> None:
    photograph, preview = tiny_images(2, sizes=[(64, 48), (16, 12)])
    photograph.save(tmp_path / "phone.mpo", save_all=True, append_images=[preview])
    with Image.open(tmp_path / "phone.mpo") as image:
        assert image.n_frames == 2
        assert load_image(image).size == load_image(tmp_path / "phone.mpo").size == (64, 48)


def test_what_is_no_image_is_named_with_a_way_out(tmp_path: Path) -> None:
    for given, message in (
        (np.zeros((8, 8, 3)), r"is a ndarray; .*PIL.Image.fromarray\(array\)"),
        (torch.zeros(3, 8, 8), "is a Tensor; .*to_pil_image"),
        (b"\x89PNG", "is a bytes; .*io.BytesIO"),
        ({"bytes": b""}, "is a dict; .*row"),
        (None, "is a NoneType; expected a PIL image or the path"),
    ):
        with pytest.raises(PromptError, match=message):
            own("llava", given)
    with pytest.raises(MissingFileError, match="is a folder"):
        load_image(tmp_path)


# ---------------------------------------------------------------------- orientation


def tagged(orientation: int, folder: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = folder / f"{orientation}.png"
    tiny_images(1, sizes=[(64, 40)])[0].save(file, exif=exif)
    return file


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_way_in_turns_a_photograph_upright(orientation: int, tmp_path: Path) -> None:
    file = tagged(orientation, tmp_path)
    with Image.open(file) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        by_path = load_image(file)
        assert by_path.tobytes() == upright.tobytes() and by_path.size == upright.size
        if orientation == 1:
            assert load_image(image).tobytes() == upright.tobytes()
            return
        # A conversion keeps the tag, as it keeps the pixels as they lie.
        for given in (image, image.convert("RGB"), image.convert("RGBA")):
            with pytest.warns(
                MmlensWarning, match=rf"turned upright.*\({orientation}\).*{upright.size[0]} x"
            ):
                assert load_image(given).tobytes() == upright.tobytes()
        with pytest.warns(MmlensWarning, match="turned upright"):
            example = Example("What?", "red", (image,), (Evidence(0, (0, 0, *upright.size)),), id="a")
    # Turned once and for all: nothing is said again, on disk neither.
    assert own("llava", example.images[0]).images[0][0].tobytes() == upright.tobytes()
    (loaded,) = load_examples(save_examples([example], tmp_path / "folder"))
    assert loaded.images[0].tobytes() == upright.tobytes()
    assert Example("What?", "red", (file,)).images[0].tobytes() == upright.tobytes()


def test_a_folder_of_examples_holds_photographs_upright(tmp_path: Path) -> None:
    tagged(6, tmp_path)
    evidence = [{"image": 0, "box": [0, 41, 40, 64]}]  # lies outside the image as its pixels are stored
    line = {"question": "What?", "answer": "red", "images": ["6.png"], "evidence": evidence}
    (tmp_path / "examples.jsonl").write_text(json.dumps(line) + "\n")
    (example,) = load_examples(tmp_path)
    assert example.images[0].tobytes() == load_image(tmp_path / "6.png").tobytes()


def test_a_tag_that_is_taken_away_as_the_warning_says_is_gone(tmp_path: Path) -> None:
    with Image.open(tagged(6, tmp_path)) as opened:
        image = opened.convert("RGB").rotate(-90, expand=True)
    with pytest.warns(MmlensWarning, match="del image.getexif"):
        load_image(image)
    del image.getexif()[0x0112]
    image.info.pop("exif", None)
    assert load_image(image).tobytes() == image.tobytes()


# ---------------------------------------------------------------------- what else reads images


def test_a_region_of_a_transparent_image_is_corrupted_as_the_model_saw_it(micro: Any) -> None:
    image = transparent().resize((64, 64))
    example = Example("What colour is K", "red", (image,), (Evidence(0, (0, 0, 16, 16)),))
    prompt = micro.prompt_examples([example])
    blanked = blank_region(evidence_of([example]), fill="grey")(micro, prompt)
    expected = as_rgb(image)
    expected.paste((128, 128, 128), (0, 0, 16, 16))
    assert blanked.images[0][0].tobytes() == expected.tobytes()
    by_hand = micro.prompt("What colour is K", images=[expected])
    assert torch.equal(blanked.inputs["pixel_values"], by_hand.inputs["pixel_values"])


def example_of(**fields: Any) -> Example:
    """An Example as a caller without a type checker makes it."""
    example = object.__new__(Example)
    for name, value in {**vars(Example("What?", "red", id="q")), **fields}.items():
        object.__setattr__(example, name, value)
    example.__post_init__()
    return example


def test_paths_and_other_lists_in_an_example(tmp_path: Path) -> None:
    image = tiny_images(1)[0]
    image.save(tmp_path / "a.png")
    example = example_of(images=[tmp_path / "a.png", image], evidence=(Evidence(1),))
    assert [each.tobytes() for each in example.images] == [image.tobytes()] * 2
    assert Example("What?", "red", (image,)).images[0] is image
    assert len(example_of(images=(each for each in [image])).images) == 1
    for given, message in (
        ("a.png", "the images of example 'q' is 'a.png'"),
        (image, "the images of example 'q' is <PIL"),
        ((np.zeros((4, 4, 3)),), "image 0 of example 'q' is a ndarray"),
        (({"a": 1},), "image 0 of example 'q' is a dict"),
    ):
        with pytest.raises(MmlensError, match=message):
            example_of(images=given)


# ---------------------------------------------------------------------- shapes

SHAPES = (
    *((640, 40), (1000, 40), (4000, 20), (40, 2000), (20, 4000), (3000, 1), (1, 3000)),
    *((1, 1), (1, 50), (50, 1), (2, 3), (8, 8), (300, 7), (7, 300), (333, 777), (1500, 33)),
)


@pytest.mark.parametrize(
    "family", others_slow(("llava_onevision", "llava_next", "qwen3_vl", "pixtral"), WITH_PROCESSOR)
)
def test_images_of_every_shape_are_laid_out_or_refused_with_their_size(family: str) -> None:
    """Where plain transformers takes the image, the layout has as many tokens as input_ids; else the error names it."""
    processor, n_taken = tiny_processor(family), 0
    for size in SHAPES:
        image = Image.new("RGB", size, (200, 30, 60))
        try:
            plain = plain_inputs(processor, image)
        except Exception as error:
            with pytest.raises(PromptError, match=f"{size[0]} x {size[1]} pixels: .*{str(error)[:10]}"):
                own(family, image, processor)
            continue
        prompt = own(family, image, processor)
        assert_equal(prompt.inputs, plain)
        boxes = prompt.token_map.boxes[0][prompt.token_map.is_image[0]]
        shown = boxes[~boxes.isnan().any(-1)]
        assert not len(shown) or bool((shown[:, 2:] <= torch.tensor(size)).all() and (shown >= 0).all())
        n_taken += 1
    assert n_taken >= 8
