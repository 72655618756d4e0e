"""Token maps against slow references and planted grids; the proof by occlusion is in families/test_layouts.py."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import REPRESENTATIVES, tiny_images, tiny_processor

from mmlens.data.examples import Evidence, Example
from mmlens.families.catalog import family_of
from mmlens.model.prompt_making import make_prompt
from mmlens.token_map import ImageGrid, Place, TokenMap, TokenMapError, VideoGrid, text_only_map

torch.set_num_threads(1)


def _uniform_grid(width: int, height: int, columns: int, rows: int) -> ImageGrid:
    """One token per 2 x 2 patches of an untiled image."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    x, y = width / columns, height / rows
    boxes = np.stack([column * x, row * y, (column + 1) * x, (row + 1) * y], axis=-1)
    return ImageGrid((width, height), np.zeros_like(row), row, column, boxes, (2 * rows, 2 * columns))


def _map_of(*grids: ImageGrid, n_text: int = 2) -> TokenMap:
    """One example: its images, then `n_text` question tokens."""
    n_image = sum(len(grid) for grid in grids)
    is_image = torch.tensor([[True] * n_image + [False] * n_text])
    return TokenMap.from_grids(is_image, torch.ones_like(is_image).long(), ~is_image, [grids])


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(8, 400), st.integers(8, 400)),
    cells=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    corner=st.tuples(st.floats(0, 0.95), st.floats(0, 0.95)),
    extent=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)),
)
def test_box_selects_every_cell_that_it_overlaps(
    size: tuple[int, int], cells: tuple[int, int], corner: tuple[float, float], extent: tuple[float, float]
) -> None:
    (width, height), (columns, rows) = size, cells
    left, top = corner[0] * width, corner[1] * height
    right, bottom = min(width, left + extent[0] * width), min(height, top + extent[1] * height)
    # Within the first pixel a box is taken for one that is scaled to 0 to 1.
    assume(right > 1 or bottom > 1)
    token_map = _map_of(_uniform_grid(width, height, columns, rows))
    selected = token_map.box(0, (left, top, right, bottom))[0]
    for position in range(rows * columns):
        row, column = divmod(position, columns)
        overlap_x = min(right, (column + 1) * width / columns) - max(left, column * width / columns)
        overlap_y = min(bottom, (row + 1) * height / rows) - max(top, row * height / rows)
        if min(overlap_x, overlap_y) > 0.02:
            assert selected[position]
        elif min(overlap_x, overlap_y) <= 0:
            assert not selected[position]
    assert not selected[rows * columns :].any()


def test_a_box_scaled_to_0_to_1_is_refused_and_small_boxes_and_images_are_not() -> None:
    token_map = _map_of(_uniform_grid(64, 32, 4, 2))
    for box in ((0.25, 0.5, 0.75, 1.0), (0, 0, 1, 1), (0.0, 0.0, 0.1, 0.1)):
        with pytest.raises(TokenMapError, match="is scaled to 0 to 1, and boxes are in pixels"):
            token_map.box(0, box)
    with pytest.raises(TokenMapError, match=r"multiplied by its size it is \(16.0, 16.0, 48.0, 32.0\)"):
        token_map.box(0, (0.25, 0.5, 0.75, 1.0))
    for box in ((0, 0, 1, 2), (0.5, 0.5, 1.5, 1), (1, 1, 2, 2), (16, 16, 48, 32)):
        assert token_map.box(0, box).any()
    assert _map_of(_uniform_grid(1, 1, 1, 1)).box(0, (0, 0, 1, 1)).sum() == 1
    assert _map_of(_uniform_grid(2, 2, 2, 2)).box(0, (0, 0, 1, 1)).sum() == 1


def test_a_token_s_own_box_selects_it_alone() -> None:
    token_map = _map_of(_uniform_grid(97, 61, 7, 5))
    for position in range(35):
        box = token_map.where(position).box
        assert box is not None
        assert torch.nonzero(token_map.box(0, box)[0]).flatten().tolist() == [position]


def _paper_indices(
    size: tuple[int, int], patches: tuple[int, int], box: tuple[int, int, int, int]
) -> list[tuple]:
    """Eq. 2-5 of the paper, patch by patch: (x', y') from both ends of the box, inclusive."""
    (width, height), (rows, columns) = size, patches

    def clamp(value: int, most: int) -> int:
        return max(0, min(value, most - 1))

    first = (
        clamp(int(np.floor(box[0] * columns / width)), columns),
        clamp(int(np.floor(box[1] * rows / height)), rows),
    )
    last = (
        clamp(int(np.floor(box[2] * columns / width)), columns),
        clamp(int(np.floor(box[3] * rows / height)), rows),
    )
    return [(x, y) for y in range(first[1], last[1] + 1) for x in range(first[0], last[0] + 1)]


@pytest.mark.parametrize(
    "box", [(16, 0, 32, 16), (0, 0, 96, 64), (40, 20, 41, 21), (90, 60, 96, 64), (3, 17, 70, 30)]
)
def test_paper_floor_is_the_papers_rule_and_merged_the_right_one(box: tuple[int, int, int, int]) -> None:
    processor = tiny_processor("qwen3_vl")
    images = tiny_images(2, sizes=[(32, 32), (96, 64)])
    token_map = make_prompt(processor, family_of("qwen3_vl").layout, "What?", images).token_map
    positions = torch.nonzero(token_map.image[0] == 1).flatten().tolist()
    rows, columns = 8, 12
    patches = _paper_indices((96, 64), (rows, columns), box)
    paper = {positions[(y * columns + x) // 4] for x, y in patches}
    assert set(torch.nonzero(token_map.box(1, box, mapping="paper_floor")[0]).flatten().tolist()) == paper
    # The merge puts patch (x, y) into token (y // 2) * (columns // 2) + x // 2; the paper's inclusive end
    # reaches one patch further where the box ends on a patch's edge.
    inside = [(x, y) for x, y in patches if x * 8 < box[2] and y * 8 < box[3]]
    merged = {positions[(y // 2) * (columns // 2) + x // 2] for x, y in inside}
    assert set(torch.nonzero(token_map.box(1, box)[0]).flatten().tolist()) == merged


@pytest.mark.parametrize("family", [f for f in REPRESENTATIVES if not f.startswith("qwen")])
def test_paper_floor_is_refused_where_there_is_no_such_merge(family: str) -> None:
    token_map = make_prompt(
        tiny_processor(family), family_of(family).layout, "What?", tiny_images(1)
    ).token_map
    with pytest.raises(TokenMapError, match="2 x 2 block of one grid"):
        token_map.box(0, (0, 0, 20, 20), mapping="paper_floor")


def test_where_and_table_agree() -> None:
    processor = tiny_processor("llava_onevision")
    images = tiny_images(2, seed=1)
    prompt = make_prompt(
        processor, family_of("llava_onevision").layout, ["What colour is K?", "Why?"], [images[:1], images]
    )
    token_map = prompt.token_map
    table = token_map.to_pandas()
    assert len(table) == token_map.image.numel()
    kinds = set()
    for entry in table.itertuples():
        place = token_map.where(entry.position, entry.example)
        kinds.add(place.kind)
        assert (place.kind in ("patch", "separator")) == entry.is_image
        assert (place.kind == "padding") == entry.is_padding
        assert (place.kind == "question") == entry.is_question
        if place.kind == "patch":
            assert (place.image, place.tile, place.row, place.col) == (
                entry.image,
                entry.tile,
                entry.row,
                entry.col,
            )
            assert place.box == pytest.approx((entry.left, entry.top, entry.right, entry.bottom))
        else:
            assert place.box is None and np.isnan(entry.left)
    assert kinds == {"patch", "separator", "padding", "question", "template"}
    assert token_map.where(-1, 0) == token_map.where(token_map.image.shape[1] - 1, 0)


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_images_count_from_zero_in_every_example(family: str) -> None:
    processor = tiny_processor(family)
    images = tiny_images(3, seed=2)
    layout = family_of(family).layout
    token_map = make_prompt(
        processor, layout, ["a b", "What colour is K?"], [images[:1], images[1:]]
    ).token_map
    assert token_map.image[0].unique().tolist() == [-1, 0]
    assert token_map.image[1].unique().tolist() == [-1, 0, 1]
    for example, image in ((0, 0), (1, 0), (1, 1)):
        selected = token_map.image_tokens(image, example=example)
        assert int(selected.sum()) == len(token_map.grids[example][image])
        assert not selected[1 - example].any()
        assert torch.equal(selected, token_map.page(image, example=example))
        assert torch.equal(selected, token_map.frame(image, example=example))
        # A whole image's box is all its patches.
        whole = token_map.box(image, (0, 0, *token_map.grids[example][image].size), example=example)
        assert torch.equal(whole, selected & (token_map.row >= 0))


def test_evidence_is_the_union_of_its_regions() -> None:
    images = tuple(tiny_images(2, seed=3))
    examples = [
        Example("a?", "b", images, evidence=(Evidence(0, (0, 0, 10, 10)), Evidence(1))),
        Example("What colour is K?", "b", images[:1], evidence=(Evidence(0, (30, 20, 40, 30)),)),
    ]
    prompt = make_prompt(
        tiny_processor("qwen2_5_vl"),
        family_of("qwen2_5_vl").layout,
        [e.question for e in examples],
        [list(e.images) for e in examples],
    )
    token_map = prompt.token_map
    expected = (
        token_map.box(0, (0, 0, 10, 10), example=0)
        | token_map.image_tokens(1, example=0)
        | token_map.box(0, (30, 20, 40, 30), example=1)
    )
    assert torch.equal(token_map.evidence(examples), expected)
    assert torch.equal(token_map.evidence([list(e.evidence) for e in examples]), expected)
    with pytest.raises(TokenMapError, match=re.escape("evidence for 1 example(s), but the batch has 2")):
        token_map.evidence(examples[0])
    with pytest.raises(TokenMapError, match="example 1 has no evidence"):
        token_map.evidence([examples[0].evidence, []])


def test_evidence_of_a_batch_of_one_may_stand_alone() -> None:
    token_map = _map_of(_uniform_grid(40, 40, 4, 4))
    example = Example(
        "a?", "b", (tiny_images(1, sizes=[(40, 40)])[0],), evidence=(Evidence(0, (0, 0, 15, 5)),)
    )
    for evidence in (example, [example], list(example.evidence), [list(example.evidence)]):
        assert torch.nonzero(token_map.evidence(evidence)[0]).flatten().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0, 0, 41, 10), "inside the image of 40 x 40 pixels; the nearest box inside is (0, 0, 40, 10)"),
        ((-1, 0, 5, 10), "the nearest box inside is (0, 0, 5, 10)"),
        ((10, 0, 5, 10), "the nearest box inside is (5, 0, 10, 10)"),
        ((50, 0, 60, 10), "inside the image of 40 x 40 pixels"),
        ((5, 5, 5, 10), "is not a box (left, top, right, bottom)"),
        ((float("nan"), 0, 5, 10), "is not a box (left, top, right, bottom)"),
        ((0, 0, 5), "a box is (left, top, right, bottom), not (0, 0, 5)"),
    ],
)
def test_a_box_outside_its_image_is_refused(box: tuple[float, ...], message: str) -> None:
    with pytest.raises(TokenMapError, match=re.escape(message)):
        _map_of(_uniform_grid(40, 40, 4, 4)).box(0, box)


def test_indices_out_of_range_are_refused() -> None:
    token_map = _map_of(_uniform_grid(40, 40, 4, 4))
    with pytest.raises(
        IndexError, match=re.escape("image 1 of example 0: the example has 1 image(s), 0 to 0")
    ):
        token_map.image_tokens(1)
    with pytest.raises(IndexError, match=re.escape("image -1 of example 0")):
        token_map.box(-1, (0, 0, 5, 5))
    with pytest.raises(IndexError, match=re.escape("example 1: the batch has 1 example(s)")):
        token_map.page(0, example=1)
    with pytest.raises(IndexError, match="position 18 is outside the prompt of 18 positions"):
        token_map.where(18)
    # The tests' own type check may refuse it first.
    with pytest.raises(Exception, match="paper_floor"):
        token_map.box(0, (0, 0, 5, 5), mapping="floor")


def test_tokens_of_padding_alone_are_never_selected() -> None:
    grid = _uniform_grid(40, 40, 4, 4)
    grid.boxes[3] = (40, 0, 40, 10)
    token_map = _map_of(grid)
    selected = token_map.box(0, (0, 0, 40, 40))[0]
    assert not selected[3] and int(selected.sum()) == 15
    with pytest.raises(
        TokenMapError, match=re.escape("the box (31, 1, 39, 9) of image 0 of example 0 maps to no token")
    ):
        token_map.box(0, (31, 1, 39, 9))


def test_another_number_of_image_tokens_than_predicted_is_refused() -> None:
    grid = _uniform_grid(40, 40, 4, 4)
    is_image = torch.tensor([[True] * 15 + [False]])
    with pytest.raises(TokenMapError, match=re.escape("input_ids holds 15 visual token(s), but the layout")):
        TokenMap.from_grids(is_image, torch.ones(1, 16).long(), ~is_image, [[grid]])
    with pytest.raises(TokenMapError, match=re.escape("grids for 2 example(s), but the batch has 1")):
        TokenMap.from_grids(is_image, torch.ones(1, 16).long(), ~is_image, [[grid], []])


def test_a_map_moves_between_devices_whole() -> None:
    token_map = text_only_map(torch.tensor([[0, 1, 1]]))
    moved = token_map.to("meta")
    assert (
        moved.device.type == "meta" and moved.boxes.device.type == "meta" and moved.grids == token_map.grids
    )


# ---------------------------------------------------------------------- videos


def _video_map() -> TokenMap:
    """An image of 2 tokens, then a video of 3 temporal patches of 2 x 1 tokens and a separator, between texts."""
    row, column = np.divmod(np.arange(2), 2)
    boxes = np.array([[0.0, 0, 8, 10], [8, 0, 16, 10]])
    image = ImageGrid((16, 10), np.zeros_like(row), row, column, boxes)
    video = VideoGrid(
        size=(16, 10),
        tile=np.array([0] * 6 + [-1]),
        row=np.array([0] * 6 + [-1]),
        column=np.array([0, 1] * 3 + [-1]),
        boxes=np.concatenate([boxes, boxes, boxes, np.full((1, 4), np.nan)]),
        step=np.array([0, 0, 1, 1, 2, 2, -1]),
        shown=((0, 3), (6, 9), (12, 12)),
        n_frames=15,
    )
    is_image = torch.tensor([[False, True, True, False, *[True] * 7, False, False]])
    is_question = torch.zeros_like(is_image)
    return TokenMap.from_grids(is_image, torch.ones_like(is_image).long(), is_question, [[image, video]])


def _at(mask: torch.Tensor) -> list[int]:
    return torch.nonzero(mask[0]).flatten().tolist()


def test_positions_of_a_video_know_its_frames() -> None:
    token_map = _video_map()
    assert token_map.video[0].tolist() == [-1] * 4 + [0] * 7 + [-1] * 2
    assert token_map.image[0].tolist() == [-1, 0, 0] + [-1] * 10
    assert token_map.frames[0, 4:11].tolist() == [
        [0, 3],
        [0, 3],
        [6, 9],
        [6, 9],
        [12, 12],
        [12, 12],
        [-1, -1],
    ]
    assert token_map.where(7) == Place(
        "patch", tile=0, row=0, col=1, box=(8.0, 0.0, 16.0, 10.0), video=0, frames=(6, 9)
    )
    assert token_map.where(10) == Place("separator", video=0)
    assert token_map.where(1).video is None and token_map.where(1).image == 0
    assert token_map.labels()[1:11] == [
        "<img0 r0c0>", "<img0 r0c1>", None,
        "<vid0 f0-3 r0c0>", "<vid0 f0-3 r0c1>", "<vid0 f6-9 r0c0>", "<vid0 f6-9 r0c1>",
        "<vid0 f12 r0c0>", "<vid0 f12 r0c1>", "<vid0 sep>",
    ]  # fmt: skip
    table = token_map.to_pandas()
    assert table.loc[6, ["video", "first_frame", "last_frame", "image"]].tolist() == [0, 6, 9, -1]
    assert [len(own) for own in token_map.grids] == [1] and [len(own) for own in token_map.videos] == [1]
    assert token_map.to("cpu").videos == token_map.videos


def test_frames_and_boxes_of_a_video_choose_positions() -> None:
    token_map = _video_map()
    assert _at(token_map.video_tokens(0)) == list(range(4, 11))
    assert _at(token_map.video_tokens(0, (9, 10))) == [6, 7]
    assert _at(token_map.video_tokens(0, (3, 7))) == [4, 5, 6, 7]
    assert _at(token_map.video_tokens(0, (9, 15), (8, 0, 16, 10))) == [7, 9]
    assert _at(token_map.video_tokens(0, box=(0, 0, 8, 10))) == [4, 6, 8]
    evidence = [Evidence(0, (0, 0, 8, 10)), Evidence(video=0, frames=(12, 13))]
    assert _at(token_map.evidence(evidence)) == [1, 8, 9]
    assert _at(token_map.image_tokens(0)) == [1, 2]


def test_frames_that_no_position_shows_are_an_error() -> None:
    token_map = _video_map()
    with pytest.raises(
        TokenMapError, match=re.escape("frames 1 to 2 of video 0 of example 0 map to no token: of its")
    ):
        token_map.video_tokens(0, (1, 3))
    with pytest.raises(TokenMapError, match="end after the last of its 15 frames"):
        token_map.video_tokens(0, (4, 16))
    with pytest.raises(TokenMapError, match="holds no frame"):
        token_map.video_tokens(0, (4, 4))
    with pytest.raises(IndexError, match="video 1 of example 0: the example has 1 video"):
        token_map.video_tokens(1)
    with pytest.raises(TokenMapError, match="not a box"):
        token_map.video_tokens(0, box=(0, 0, 17, 10))
    with pytest.raises(TokenMapError, match="defined for images"):
        token_map.evidence([Evidence(video=0, box=(0, 0, 8, 10))], mapping="paper_floor")
    with pytest.raises(TokenMapError, match=re.escape("1 image(s) and 1 video(s)")):
        TokenMap.from_grids(
            token_map.is_image[:, :-3],
            torch.ones(1, 10).long(),
            token_map.is_question[:, :-3],
            [[*token_map.grids[0], *token_map.videos[0]]],
        )
