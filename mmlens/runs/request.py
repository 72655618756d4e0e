"""What is asked of a run: an experiment with its settings, on which model and which examples."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mmlens.arguments import flag, instance_of, listed, number, one_of, whole_number
from mmlens.errors import InvalidValueError
from mmlens.experiments.judging import FIRST_TOKEN, JUDGES

MOST_SEED = 2**62
"""Seeds are added up, and torch and NumPy take no more than 2^63 - 1."""

MOST_THREADS = max(1024, os.cpu_count() or 1)
"""More threads than any machine has cores: a number above it is a slip, and would stop the machine."""


@dataclass(frozen=True)
class Request:
    """What to run: an experiment with its settings on a model and its examples. Plain JSON.

    `data` None draws `n_selection` and `n_evaluation` scenes of every kind that a shipped model was trained on. A
    folder of examples is split by `selection_share` and `seed`; its images lie in it unless `images_outside`. The name
    of a published data set (`mmlens data` lists them) gives `n_selection` and `n_evaluation` of its examples, split by
    a hash of their groups and `seed`. Of several data sets, a list, each is a kind of task. `data_dir` is a folder with
    the published files. `data_options` are further options of `mmlens.data.load_data`, such as {"split": "val"}; those
    under a data set's name are for it alone.

    `threads` 0 is torch's own choice. `settings` are the experiment's keywords; those left out have their defaults.
    """

    experiment: str
    model: str
    data: str | Sequence[str] | None = None
    data_dir: str | None = None
    data_options: dict[str, Any] | None = None
    n_selection: int = 40
    n_evaluation: int = 30
    selection_share: float = 0.5
    seed: int = 0
    batch_size: int = 30
    dtype: str | None = None
    device_map: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    threads: int = 0
    images_outside: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    prompt_options: dict[str, Any] | None = None
    """Options of every prompt, of the chat template or the processor: `HookedVLM.prompt_options`."""
    answers: str = FIRST_TOKEN
    """How answers are judged: `mmlens.experiments.judging.JUDGES`."""

    def __post_init__(self) -> None:
        for name in ("experiment", "model"):
            instance_of(name, getattr(self, name), str, "a name")
        self._take_data()
        for name in ("data_dir", "device_map", "attn_implementation"):
            instance_of(name, getattr(self, name), (str, type(None)), "a text, or None")
        for name in ("n_selection", "n_evaluation", "batch_size"):
            whole_number(name, getattr(self, name), least=1)
        number("selection_share", self.selection_share, above=0, below=1)
        whole_number("seed", self.seed, least=0, most=MOST_SEED)
        if self.dtype is not None:
            checked_dtype("dtype", self.dtype)
        flag("trust_remote_code", self.trust_remote_code)
        flag("images_outside", self.images_outside)
        one_of("answers", self.answers, tuple(JUDGES))
        whole_number("threads", self.threads, least=0, most=MOST_THREADS)
        instance_of("settings", self.settings, Mapping, "a dict of the experiment's settings")
        instance_of(
            "prompt_options", self.prompt_options, (dict, type(None)), "a dict of options of model.prompt"
        )

    def _take_data(self) -> None:
        """`data` as one name or folder, or a tuple of several."""
        instance_of(
            "data_options",
            self.data_options,
            (dict, type(None)),
            "a dict of options of mmlens.data.load_data",
        )
        if not isinstance(self.data, str | None):
            expected = "a folder or the name of a data set, or a list of them"
            given = [
                instance_of("data", one, str, expected)
                for one in listed("data", self.data, expected, least=1)
            ]
            twice = [one for i, one in enumerate(given) if one in given[:i]]
            if twice:
                raise InvalidValueError(f"data names {twice[0]!r} twice")
            object.__setattr__(self, "data", given[0] if len(given) == 1 else tuple(given))
        if self.data is None and (self.data_dir or self.data_options):
            raise InvalidValueError(
                f"data_dir={self.data_dir!r} and data_options={self.data_options!r} are of published data sets, and no "
                "data are named"
            )

    @property
    def data_names(self) -> tuple[str, ...]:
        """What `data` names, one after the other."""
        if self.data is None:
            return ()
        return (self.data,) if isinstance(self.data, str) else tuple(self.data)


def checked_dtype(name: str, value: object) -> str:
    """The name of one of torch's dtypes, or "auto", as transformers takes it.

    >>> checked_dtype("dtype", "bfloat17")
    Traceback (most recent call last):
        ...
    mmlens.errors.InvalidValueError: there is no dtype 'bfloat17'; the nearest: 'bfloat16', 'float16', 'float'
    """
    known = [
        "auto",
        *(
            key
            for key, found in vars(torch).items()
            if isinstance(found, torch.dtype) and found.is_floating_point
        ),
    ]
    return one_of(name, value, known)
