"""Runs the tables and writes one line of JSON per row: what was called, how, and what came of it.

It is a program of its own, because the tests check types in every call (conftest.py), which users' programs do not.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from by_hand import bad_rows, good_rows
from calls import calls
from kinds import WORDS, Fresh, World, bad_values, good_values, special_values

from mmlens.errors import MmlensError

PACKAGE = str(Path(sys.modules["mmlens"].__file__ or "").parent)


def rows(w: World) -> Iterator[tuple[str, str, str, Any, Any, str]]:
    """(bad or good, call, what is special, the value, the function, a pattern of the message)."""
    made = calls(w)
    bad, good = bad_values(w) | special_values(w), good_values(w)
    for call in made:
        for parameter, kind in call.kinds.items():
            words = WORDS.get(kind.removesuffix("!"), "")
            for what, value in bad[kind.removesuffix("!")].items():
                yield "bad", f"{call.name} ({parameter})", what, value, (call, parameter), words
            for what, value in good.get(kind, {}).items():
                yield "good", f"{call.name} ({parameter})", what, value, (call, parameter), ""
        if not call.name.startswith("experiment") and call.name not in ("from_bridge", "HookedVLM"):
            yield "good", call.name, "as it is meant", None, (call, None), ""
    for name, what, value, function, words in bad_rows(w):
        yield "bad", name, what, value, function, words
    for name, what, function in good_rows(w):
        yield "good", name, what, None, function, ""


def result(function: Any, value: Any) -> dict[str, Any]:
    """What a call did: its error's class, message and the file that raised it; nothing of these where it passed."""
    began = time.perf_counter()
    found: dict[str, Any] = {}
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            if isinstance(function, tuple):
                call, parameter = function
                given = value.make() if isinstance(value, Fresh) else value
                call(**({} if parameter is None else {parameter: given}))
            else:
                function()
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            found = {
                "error": type(error).__name__,
                "ours": isinstance(error, MmlensError),
                "inside": frames[-1].filename.startswith(PACKAGE),
                "where": f"{Path(frames[-1].filename).name}:{frames[-1].lineno}",
                "message": str(error),
            }
    return {**found, "seconds": time.perf_counter() - began}


def main() -> None:
    torch.set_num_threads(1)
    only = sys.argv[1] if len(sys.argv) > 1 else "."
    with tempfile.TemporaryDirectory() as folder:
        for sort, name, what, value, function, words in rows(World.make(Path(folder))):
            if re.search(only, f"{sort} {name}: {what}"):
                found = result(function, value)
                shown = [type(value).__name__, repr(value)[:30], str(value)[:30]]
                print(
                    json.dumps(
                        {"sort": sort, "name": name, "what": what, "words": words, "shown": shown} | found
                    )
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
