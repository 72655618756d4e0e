"""Images as models are shown them: read, turned upright, laid over white, or refused by name."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from mmlens.errors import MissingFileError, MmlensWarning, PromptError, warn

MAX_IMAGE_PIXELS = 89_478_485
"""The largest image taken: PIL's own bound against decompression bombs (256 MB at three bytes a pixel)."""


def load_image(image: Any, where: str = "the image") -> Image.Image:
    """A PIL image, or the image file at a path, as every model is shown it: upright, and RGB (`as_rgb`).

    Raises as `open_image` does.
    """
    opened = open_image(image, where)
    try:
        return as_rgb(opened)
    except (OSError, SyntaxError, ValueError) as error:
        raise PromptError(f"{where} is broken and cannot be decoded ({error})") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """An RGB copy, laid over white where the image is transparent: what transformers shows its models.

    >>> as_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0))
    (255, 255, 255)
    """
    if not is_transparent(image):
        return image.convert("RGB")
    above = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")


def is_transparent(image: Image.Image) -> bool:
    """Whether the image has an alpha channel, or a colour that stands for none."""
    return "A" in image.getbands() or image.info.get("transparency") is not None


def open_image(image: Any, where: str = "the image") -> Image.Image:
    """A PIL image, the image file at a path, or an array, in its own mode, turned upright as its EXIF data say.

    An array is one of whole numbers from 0 to 255, uint8 [height, width, 3].

    Plain transformers turns a file's image so, and not a PIL image: a PIL image that had to be turned gives a
    MmlensWarning.

    Raises PromptError for what is no image, a truncated file, an empty image or one above MAX_IMAGE_PIXELS, and for
    what cannot be shown to a model without a choice that is yours: an image of several frames, one of 16 bits or of
    floats that does not hold whole numbers from 0 to 255, a mode that PIL does not bring to RGB unharmed. Raises
    MissingFileError (a FileNotFoundError) for a path at which there is no file.
    """
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        image = Image.fromarray(image)
    if not isinstance(image, (str, os.PathLike)):
        return _checked_image(image, where)
    name = f"{where} ({os.fspath(image)})"
    if not Path(image).is_file():
        raise MissingFileError(
            f"{name} does not exist" if not Path(image).is_dir() else f"{name} is a folder"
        )
    try:
        opened = Image.open(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PromptError(f"{name} is gigantic, more than {MAX_IMAGE_PIXELS} pixels ({error})") from error
    except OSError as error:
        raise PromptError(f"{name} is no image that PIL can read ({error})") from error
    with opened:
        return _checked_image(opened, name, from_file=True)


def pixel_fingerprint(image: Image.Image) -> str:
    """Two images with the same fingerprint have the same size and the same pixels."""
    rgb = as_rgb(image)
    return f"{rgb.width} x {rgb.height} pixels {hashlib.sha256(rgb.tobytes()).hexdigest()}"


_WAYS_TO_AN_IMAGE = {
    "ndarray": "; an array is uint8 [height, width, 3], numbers from 0 to 255, or else PIL.Image.fromarray(array)",
    "Tensor": "; make one: torchvision.transforms.functional.to_pil_image(tensor)",
    "bytes": "; make one: PIL.Image.open(io.BytesIO(data))",
    "BytesIO": "; make one: PIL.Image.open(file)",
    "dict": "; of a row of Hugging Face datasets: PIL.Image.open(io.BytesIO(row['bytes']))",
}
_PREMULTIPLIED = ("La", "RGBa")


def _checked_image(image: Any, name: str, *, from_file: bool = False) -> Image.Image:
    if not isinstance(image, Image.Image):
        kind = type(image).__name__
        raise PromptError(
            f"{name} is a {kind}; expected a PIL image or the path of an image file{_WAYS_TO_AN_IMAGE.get(kind, '')}"
        )
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise PromptError(
            f"{name} is gigantic: {width} x {height} = {width * height} pixels, at most {MAX_IMAGE_PIXELS} are taken; "
            "resize it or cut it into pages"
        )
    if not width * height:
        raise PromptError(f"{name} is empty: {width} x {height} pixels")
    try:
        _check_showable(image, name)
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation not in _TURNED:
            # A copy has no file that could be closed, and no further frames.
            return image.copy() if from_file else image
        turned = ImageOps.exif_transpose(image)
    except PromptError:
        raise
    except (OSError, EOFError, SyntaxError, ValueError, AttributeError) as error:
        raise PromptError(f"{name} is broken and cannot be decoded ({error})") from error
    if not from_file:
        warn(
            f"{name} was turned upright, as the orientation in its EXIF data says ({orientation}): it is now "
            f"{turned.width} x {turned.height} pixels, and boxes are pixels of it so. Plain transformers shows a PIL "
            "image as its pixels lie, and turns files alone. Where the pixels are upright already, take the tag away: "
            "del image.getexif()[0x0112], and image.info.pop('exif', None)",
            MmlensWarning,
            stacklevel=2,
        )
    return turned


_TURNED = range(2, 9)
"""EXIF's orientations other than upright (1)."""


def _check_showable(image: Image.Image, name: str) -> None:
    """Raise PromptError for an image that would reach the model as something else than it is."""
    # Phones put a preview, a depth map or a gain map after the photograph of an MPO file.
    n_frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if n_frames > 1:
        raise PromptError(
            f"{name} holds {n_frames} frames, of which a model would see one: choose it (image.seek(0), then "
            "image.copy()), or give all of them as images in order: [frame.copy() for frame in "
            "PIL.ImageSequence.Iterator(image)]"
        )
    if image.mode in (*_PREMULTIPLIED, "LAB"):
        raise PromptError(
            f"{name} has the mode {image.mode!r}, which transformers would show with its colours changed; convert it: "
            f"image.convert({'RGBA' if image.mode in _PREMULTIPLIED else 'RGB'!r})"
        )
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        # NaN is not equal to itself, so it is refused with the fractions.
        if low < 0 or high > 255 or not bool((values == np.rint(values)).all()):
            raise PromptError(
                f"{name} has the mode {image.mode!r} and values from {low:g} to {high:g}; models take whole numbers "
                "from 0 to 255, and PIL would clip or cut off all others. Scale it yourself, as in "
                "PIL.Image.fromarray((255.0 * (a - a.min()) / (a.max() - a.min())).astype('uint8')) with a = "
                "numpy.asarray(image)"
            )
