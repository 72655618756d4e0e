"""Examples as pictures: every box where it belongs, of images, pages and videos."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image

from mmlens import Evidence, Example
from mmlens.boxes import TokenMapError
from mmlens.data import LateImage, Video, scene_examples
from mmlens.viz import plot_examples


def drawn(example: Example, **options: int) -> list[tuple[str, list[tuple[float, ...]]]]:
    """(caption, boxes) of every panel."""
    figure = plot_examples([example], **options)
    figure.canvas.draw()
    return [
        (
            ax.get_xlabel(),
            [
                (*each.get_xy(), each.get_x() + each.get_width(), each.get_y() + each.get_height())
                for each in ax.patches
                if isinstance(each, Rectangle)
            ],
        )
        for ax in figure.axes
    ]


def pages(n: int) -> tuple[Image.Image, ...]:
    return tuple(Image.new("RGB", (85, 110), (200, 200, number)) for number in range(n))


def test_boxes_stand_in_pixels_of_the_image() -> None:
    box = (10, 20, 60, 50)
    big = LateImage(lambda: Image.new("RGB", (4000, 2000)))
    assert drawn(Example("What?", "x", (big,), (Evidence(0, box),))) == [("", [box])]
    assert drawn(Example("What?", "x", (big,), (Evidence(0),))) == [("", [(0, 0, 4000, 2000)])]


def test_pages_with_evidence_are_drawn() -> None:
    evidence = (Evidence(5, (0, 0, 9, 9)), Evidence(1), Evidence(5, (20, 0, 29, 9)), Evidence(6))
    example = Example("What?", "x", pages(7), evidence)
    assert drawn(example) == [
        ("image 2 of 7", [(0, 0, 85, 110)]),
        ("image 6 of 7", [(0, 0, 9, 9), (20, 0, 29, 9)]),
        ("image 7 of 7", [(0, 0, 85, 110)]),
    ]
    assert [caption for caption, _ in drawn(example, n_images=1)] == ["image 2 of 7; evidence in 2 more"]
    assert drawn(Example("What?", "x", pages(2))) == [("image 1 of 2", [])]
    assert drawn(Example("What?", "x")) == []


def test_a_video_stands_by_the_middle_of_its_evidence() -> None:
    frames = np.arange(12, dtype=np.uint8)[:, None, None, None] * np.ones((1, 64, 96, 3), np.uint8)
    content = [{"type": "video", "video": Video(frames, fps=2)}, {"type": "text", "text": "When?"}]
    evidence = (Evidence(video=0, frames=(4, 9), box=(10, 10, 50, 50)),)
    example = Example(messages=[{"role": "user", "content": content}], answer="now", evidence=evidence)
    assert drawn(example) == [("frame 6 of 12, evidence in 4 to 8", [(10, 10, 50, 50)])]


def test_texts_are_said_as_they_are() -> None:
    example = Example("Is it $5 or $6?", "$5", pages(1), candidates=("$5", "$6"), id="q_1^2", group="bill")
    figure = plot_examples([example, *scene_examples("objects", 1, seed=0)])
    figure.canvas.draw()
    said = [part.get_suptitle() for part in figure.subfigs]
    assert said[0] == "q_1^2 · bill\nQ: Is it $5 or $6?\nA: $5\nof: $5, $6\nno evidence: a text-only control"
    assert len(figure.axes) == 2


def test_what_cannot_be_drawn_is_refused() -> None:
    outside = Example("What?", "x", (LateImage(lambda: pages(1)[0]),), (Evidence(0, (0, 0, 99, 9)),))
    with pytest.raises(TokenMapError, match="inside the image of 85 x 110"):
        plot_examples([outside])
