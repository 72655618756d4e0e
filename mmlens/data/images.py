"""Images as models are shown them: read, turned upright, laid over white, or refused by name."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from mmlens.arguments import shown
from mmlens.errors import InvalidTypeError, MissingFileError, MmlensWarning, PromptError, warn

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

    An array is one of whole numbers from 0 to 255, uint8 [height, width, 3]. A `LateImage` is opened.

    Plain transformers turns a file's image so, and not a PIL image: a PIL image that had to be turned gives a
    MmlensWarning.

    Raises PromptError for what is no image, a truncated file, an empty image or one above MAX_IMAGE_PIXELS, and for
    what cannot be shown to a model without a choice that is yours: an image of several frames, one of 16 bits or of
    floats that does not hold whole numbers from 0 to 255, a mode that PIL does not bring to RGB unharmed. Raises
    MissingFileError (a FileNotFoundError) for a path at which there is no file.
    """
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        image = Image.fromarray(image)
    if isinstance(image, LateImage):
        return image.open()
    if not isinstance(image, (str, os.PathLike)):
        return _checked_image(image, where)
    name = f"{where} ({os.fspath(image)})"
    with _opened_file(image, name) as opened:
        return _checked_image(opened, name, from_file=True)


def _opened_file(file: Any, name: str) -> Image.Image:
    """The image of a path or of an open file, its header read."""
    if isinstance(file, (str, os.PathLike)) and not Path(file).is_file():
        raise MissingFileError(f"{name} does not exist" if not Path(file).is_dir() else f"{name} is a folder")
    try:
        return Image.open(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PromptError(f"{name} is gigantic, more than {MAX_IMAGE_PIXELS} pixels ({error})") from error
    except OSError as error:
        raise PromptError(f"{name} is no image that PIL can read ({error})") from error


class LateImage:
    """An image that is opened when it is used, and let go after it.

    `file` is the path of an image file, the bytes of one, or a function of no arguments that gives either, a PIL
    image, or the dict of "bytes" and "path" in which Hugging Face datasets hold one. `name` is what errors call it.
    `check`, a function of its (width, height), is called when it opens.

    It opens as every model is shown it: upright and RGB (`load_image`). Two uses at a time share one opened image.

    >>> late = LateImage(lambda: Image.new("RGB", (4, 2), "red"), "a red one")
    >>> late.size, late.open().getpixel((0, 0))
    ((4, 2), (255, 0, 0))
    """

    def __init__(
        self, file: Any, name: str = "", check: Callable[[tuple[int, int]], None] | None = None
    ) -> None:
        if isinstance(file, Mapping) or not (callable(file) or isinstance(file, (str, os.PathLike, bytes))):
            raise InvalidTypeError(
                f"the file of {name or 'the image'} is {shown(file)}; expected a path, the bytes of an image "
                "file, or a function that gives them"
            )
        self.file, self.name, self.check = file, name or "the image", check
        self._held: Callable[[], Image.Image | None] = _nothing

    def __repr__(self) -> str:
        return f"LateImage({self.name})"

    def __eq__(self, other: object) -> bool:
        """Whether both show the same pixels."""
        if not isinstance(other, (LateImage, Image.Image)):
            return NotImplemented
        return self is other or self.open() == load_image(other)

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_held": _nothing}

    def checked(self, name: str, check: Callable[[tuple[int, int]], None]) -> LateImage:
        """The same image with a check, and with this name where it has none."""
        return LateImage(self.file, name if self.name == "the image" else self.name, check)

    def open(self) -> Image.Image:
        """The image, upright and RGB; raises as `open_image` does, and what its check raises."""
        held = self._held()
        if held is not None:
            return held
        file, name = self._file()
        if isinstance(file, Image.Image):
            opened = load_image(file, name)
        else:
            with _opened_file(file, name) as image:
                try:
                    opened = as_rgb(_checked_image(image, name, from_file=True))
                except (OSError, SyntaxError, ValueError) as error:
                    if isinstance(error, PromptError):
                        raise
                    raise PromptError(f"{name} is broken and cannot be decoded ({error})") from error
        if self.check is not None:
            self.check(opened.size)
        self._held = weakref.ref(opened)
        return opened

    @functools.cached_property
    def size(self) -> tuple[int, int]:
        """(width, height) of the image turned upright, from the file's header where there is a file."""
        file, name = self._file()
        if isinstance(file, Image.Image):
            return open_image(file, name).size
        with _opened_file(file, name) as image:
            try:
                turned = (
                    _may_hold_exif(image, file)
                    and image.getexif().get(ExifTags.Base.Orientation, 1) in _ON_THE_SIDE
                )
            except (OSError, EOFError, SyntaxError, ValueError) as error:
                raise PromptError(f"{name} is broken and cannot be decoded ({error})") from error
            width, height = image.size
            return (height, width) if turned else (width, height)

    @functools.cached_property
    def fingerprint(self) -> str:
        """`pixel_fingerprint` of the image, kept once it was computed."""
        return pixel_fingerprint(self.open())

    def _file(self) -> tuple[Any, str]:
        """A path, an open file or a PIL image, and what to call it."""
        given = self.file() if callable(self.file) else self.file
        if isinstance(given, Mapping):
            given = given.get("bytes") or given.get("path")
        if isinstance(given, bytes):
            return io.BytesIO(given), self.name
        if isinstance(given, (str, os.PathLike)):
            return given, f"{self.name} ({os.fspath(given)})"
        if isinstance(given, Image.Image):
            return given, self.name
        raise PromptError(
            f"{self.name}: its file is {shown(given)}; expected a path, the bytes of an image file or a PIL image"
        )


def _may_hold_exif(image: Image.Image, file: Any) -> bool:
    """False where EXIF data need not be asked for. Of a PNG they may follow the pixels, which PIL then decodes."""
    if image.format != "PNG":
        return True
    data = file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()
    return any(mark in data for mark in (b"eXIf", b"exif", b"xmp"))


def _nothing() -> None:
    return None


class Images(Sequence[Image.Image]):
    """The images of an example, in order: a late one is opened as it is read.

    >>> images = Images([LateImage(lambda: Image.new("RGB", (4, 2)))])
    >>> len(images), images.sizes, images[0].size
    (1, ((4, 2),), (4, 2))
    """

    def __init__(self, given: Sequence[Any]) -> None:
        self.given = tuple(given)
        """PIL images, and LateImages that are not opened."""

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return Images(self.given[at])
        return _open_if_late(self.given[at])

    def __iter__(self) -> Iterator[Image.Image]:
        return map(_open_if_late, self.given)

    def __add__(self, other: Sequence[Any]) -> Images:
        return Images([*self.given, *(other.given if isinstance(other, Images) else other)])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (Images, tuple, list)) or len(self) != len(other):
            return False
        theirs = other.given if isinstance(other, Images) else other
        # A late image is asked first: PIL's own image says of it that it is none.
        return all(
            their == mine if isinstance(their, LateImage) else mine == their
            for mine, their in zip(self.given, theirs, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Images({list(self.given)})"

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of each, without decoding it where its file's header says so."""
        return tuple(image.size for image in self.given)

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """`pixel_fingerprint` of each."""
        return tuple(
            image.fingerprint if isinstance(image, LateImage) else pixel_fingerprint(image)
            for image in self.given
        )


def _open_if_late(image: Any) -> Image.Image:
    return image.open() if isinstance(image, LateImage) else image


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
_ON_THE_SIDE = range(5, 9)
"""Those by which width and height change places."""


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
