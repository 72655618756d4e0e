"""The examples of a run: generated scenes, folders, and published data sets by name, in two splits."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from mmlens.arguments import instance_of, unknown_name_message
from mmlens.data.examples import DataError, Example, load_examples
from mmlens.data.images import Images, LateImage
from mmlens.data.many import ExampleStream
from mmlens.data.published.catalog import CATALOG
from mmlens.data.published.loading import load_data
from mmlens.data.scenes import scene_examples
from mmlens.data.splits import is_in_first, split_examples
from mmlens.errors import InvalidValueError, MmlensWarning
from mmlens.model.loading import model_source, scene_kinds, shipped_models
from mmlens.provenance import data_fingerprint
from mmlens.runs.request import Request

# Scenes are drawn from their seed: these differ from each other and from the training's, 2**20 and up.
SELECTION_SEED, EVALUATION_SEED = 100_000, 200_000


@dataclass(frozen=True, eq=False)
class Splits:
    """The examples to choose heads on, those to judge them on, and what a record says of where they are from."""

    selection: list[Example]
    evaluation: list[Example]
    source: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Both splits in plain JSON, with the fingerprints by which a rerun knows them."""
        return {
            **self.source,
            "selection": _described(self.selection),
            "evaluation": _described(self.evaluation),
        }


def splits(request: Request) -> Splits:
    """The examples that a request asks for.

    Raises DataError where a model that does not come with the package is given no data, for a name that is neither a
    folder nor a data set, and where a split of a data set is empty; ModelNotFoundError for a model that is none.
    Warns where a data set has fewer examples than were asked for.
    """
    if not request.data_names:
        return _scenes(request)
    found = [
        _named(request, name) if is_published(name) else _folder(request, name) for name in request.data_names
    ]
    if len(found) == 1:
        return found[0]
    return Splits(
        [example for own in found for example in own.selection],
        [example for own in found for example in own.evaluation],
        {
            "source": ", ".join(own.source["source"] for own in found),
            "parts": [own.source for own in found],
        },
    )


def is_published(name: str) -> bool:
    """Whether this is the name of a published data set; ValueError where a folder of examples has the same name."""
    if name in CATALOG and (Path(name) / "examples.jsonl").is_file():
        raise InvalidValueError(
            f"{name!r} is a data set by name, and a folder of examples here: write ./{name} for the folder"
        )
    return name in CATALOG


def cites(request: Request) -> tuple[str, ...]:
    """The entries of the bibliography that the data sets of a request cite."""
    return tuple(CATALOG[name].cite for name in request.data_names if is_published(name))


# ---------------------------------------------------------------------- where examples are from


def _scenes(request: Request) -> Splits:
    trained_on = scene_kinds(request.model)
    if trained_on is None:
        # A name that is misspelt is no model without data.
        model_source(request.model)
        raise DataError(
            f"--model {request.model} needs --data: a folder of examples (docs/data.md), or a data set by name "
            f"(`mmlens data` lists them); generated scenes are for models trained on them, such as the shipped ones: "
            f"{', '.join(shipped_models())}"
        )
    kinds = (*trained_on["visual"], *trained_on["text"])
    seeds = SELECTION_SEED + request.seed, EVALUATION_SEED + request.seed
    selection, evaluation = (
        [example for kind in kinds for example in scene_examples(kind, n, seed)]
        for n, seed in zip((request.n_selection, request.n_evaluation), seeds, strict=True)
    )
    source = {"source": "generated scenes", "selection_seed": seeds[0], "evaluation_seed": seeds[1]}
    return Splits(selection, evaluation, source)


def _folder(request: Request, name: str) -> Splits:
    if not Path(name).is_dir() and Path(name).name == name:
        raise DataError(
            f"there is no folder of examples {name!r}, and "
            + unknown_name_message("data set", name, CATALOG)
            + ". `mmlens data` lists them all"
        )
    if (request.data_dir or request.data_options) and not any(map(is_published, request.data_names)):
        raise DataError(
            f"data_dir={request.data_dir!r} and data_options={request.data_options!r} are of data sets by name, and "
            f"{', '.join(request.data_names)} is none"
        )
    examples = load_examples(name, images_outside=request.images_outside)
    selection, evaluation = split_examples(examples, request.selection_share, request.seed)
    source = {
        "source": str(Path(name).resolve()),
        "selection_share": request.selection_share,
        "split_seed": request.seed,
    }
    return Splits(list(selection), list(evaluation), source)


def _named(request: Request, name: str) -> Splits:
    """`n_selection` and `n_evaluation` examples of a published data set, in a random order where it has numbers."""
    entry, options = CATALOG[name], _options(request, name)
    examples = load_data(name, data_dir=_data_dir(request, name), **options).shuffled(request.seed)
    wanted = {"selection": request.n_selection, "evaluation": request.n_evaluation}
    found = _first_of_each(examples, wanted, request, streams=bool(options.get("streaming")))
    for part, taken in found.items():
        if not taken:
            raise DataError(f"{name}: no example is in the {part} split; is --selection-share right?")
        if len(taken) < wanted[part]:
            warnings.warn(
                f"{name}: {len(taken)} examples in the {part} split, {wanted[part]} were asked for",
                MmlensWarning,
                stacklevel=2,
            )
    if len(request.data_names) > 1:
        # Data sets side by side are kinds of task, as in the paper.
        found = {part: [replace(each, kind=name) for each in taken] for part, taken in found.items()}
    source = {
        "source": name,
        "title": entry.title,
        "hub": entry.hub,
        "revision": options.get("revision", entry.revision) or "unverified",
        "licence": entry.licence,
        "columns_checked_against": entry.checked,
        "group": entry.group,
        "cite": entry.cite,
        "selection_share": request.selection_share,
        "split_seed": request.seed,
    }
    return Splits(found["selection"], found["evaluation"], source)


def _options(request: Request, name: str) -> dict[str, Any]:
    """The options of loading that are for all data sets, and over them those under this one's name."""
    given = dict(request.data_options or {})
    own = instance_of(f"data_options[{name!r}]", given.pop(name, {}), dict, "a dict of options of load_data")
    return {key: value for key, value in given.items() if key not in request.data_names} | own


def _data_dir(request: Request, name: str) -> str | None:
    """The folder with the published files: of several data sets, each may have its own in it, by its name."""
    if request.data_dir is None or not (Path(request.data_dir) / name).is_dir():
        return request.data_dir
    return str(Path(request.data_dir) / name)


def _first_of_each(
    examples: ExampleStream, wanted: dict[str, int], request: Request, *, streams: bool
) -> dict[str, list[Example]]:
    """The first examples of each split, in one pass that ends where both are full."""
    found: dict[str, list[Example]] = {part: [] for part in wanted}
    for example in examples:
        part = "selection" if is_in_first(example, request.selection_share, request.seed) else "evaluation"
        if len(found[part]) < wanted[part]:
            found[part].append(_on_disk(example) if streams else example)
        if all(len(taken) == wanted[part] for part, taken in found.items()):
            break
    return found


@cache
def _place_of_images() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="mmlens-images-")


def _on_disk(example: Example) -> Example:
    """An example of a stream with the files of its images in a temporary folder, until the process ends.

    A stream's row holds them in memory, or names them on the hub; an experiment opens them many times.
    """
    return replace(example, images=Images([_image_on_disk(image) for image in example.images.given]))


def _image_on_disk(image: Any) -> Any:
    data = image.file() if isinstance(image, LateImage) and callable(image.file) else None
    if not isinstance(data, bytes):
        return image
    place = Path(_place_of_images().name) / hashlib.sha256(data).hexdigest()
    if not place.is_file():
        place.write_bytes(data)
    return LateImage(place, image.name)


def _described(split: Sequence[Example]) -> dict[str, Any]:
    return {
        "n": len(split),
        "n_by_kind": dict(sorted(Counter(example.kind for example in split).items())),
        "controls": sorted(
            _kinds(e for e in split if not e.evidence) - _kinds(e for e in split if e.evidence)
        ),
        "fingerprint": data_fingerprint(split),
        "ids": [example.id for example in split],
    }


def _kinds(examples: Iterable[Example]) -> set[str]:
    return {example.kind for example in examples}
