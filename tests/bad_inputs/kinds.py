"""What may be wrong with each kind of argument, and what is unusual and yet right: values, as data.

`BAD[kind]` is {what is wrong: the value}, `WORDS[kind]` a pattern of what the refusal says was expected, and
`GOOD[kind]` {what is unusual: the value}. `Fresh(function)` is made anew for each call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import mmlens
from mmlens.model.prompt import Prompt

Values = dict[str, Any]
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Fresh:
    """A value that is used up, or changed, by the call that it is given to."""

    make: Callable[[], Any]


@dataclass(frozen=True)
class World:
    """What the rows are about: a small model, its examples and prompts, and a folder to write to."""

    model: mmlens.HookedVLM
    examples: list[mmlens.Example]
    prompt: Prompt
    other: Prompt
    scores: mmlens.HeadScores
    folder: Path

    @classmethod
    def make(cls, folder: Path) -> World:
        model = mmlens.HookedVLM.from_pretrained("micro")
        examples = mmlens.scene_examples("objects", 4, seed=0)
        prompt, other = model.prompt_examples(examples[:2]), model.prompt_examples(examples[2:])
        scores = mmlens.HeadScores(
            torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(0)), "RAM", ("objects",) * 4
        )
        (folder / "a_file").write_text("text", encoding="utf-8")
        (folder / "empty.parquet").touch()
        scores.save(folder / "whole.parquet")
        whole = (folder / "whole.parquet").read_bytes()
        (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
        return cls(model, examples, prompt, other, scores, folder)


def bad_values(w: World) -> dict[str, Values]:
    """{kind: {what is wrong: value}}"""
    not_numbers: Values = {"None": None, "a text": "2", "a list": [2], "a bool": True, "NaN": NAN}
    count = {
        **not_numbers,
        "a float": 2.0,
        "0": 0,
        "below 0": -1,
        "infinite": INF,
        "an array": np.array([2, 3]),
    }
    share = {**not_numbers, "0": 0, "below 0": -0.1, "percent": 95, "a complex number": 1j}
    no_prompt: Values = {
        "None": None,
        "the keyword inputs": dict(w.prompt.inputs),
        "a question": "What colour is K",
        "an example": w.examples[0],
        "a list of prompts": [w.prompt],
        "token ids": w.prompt.inputs["input_ids"],
        "a number": 3,
    }
    choice: Values = {
        "None": None,
        "misspelt": "meerged",
        "a number": 3,
        "a list": ["merged"],
        "a bool": True,
    }
    shape = tuple(w.prompt.shape)
    return {
        "model": {
            "None": None,
            "its name": "micro",
            "a path": Path("micro"),
            "the Hugging Face model": w.model.hf_model,
            "a prompt": w.prompt,
            "the class": mmlens.HookedVLM,
            "a number": 3,
        },
        "examples": {
            "None": None,
            "a prompt": w.prompt,
            "one example": w.examples[0],
            "a folder": "examples",
            "a number": 3,
            "none of them": [],
            "a dict": {"a": w.examples[0]},
            "prompts": [w.prompt],
            "a list of None": [None],
            "questions": ["What colour is K"],
            "(question, answer) pairs": [("What?", "red")],
            "records": [{"question": "What?", "answer": "red"}],
        },
        "prompt": no_prompt,
        "prompts": {
            "None": None,
            "the keyword inputs": dict(w.prompt.inputs),
            "a question": "What colour is K",
            "one example": w.examples[0],
            "none of them": [],
            "questions": ["What?"],
            "prompts and examples": [w.prompt, w.examples[0]],
            "a number": 3,
            "a set of numbers": {3},
        },
        "count": count,
        "count or none": {name: value for name, value in count.items() if name not in ("0",)},
        "count or the default": {name: value for name, value in count.items() if name != "None"},
        "image number": {name: value for name, value in count.items() if name != "0"},
        "part": {name: value for name, value in count.items() if name != "0"} | {"a part there is not": 7},
        "count or all": {name: value for name, value in count.items() if name != "None"},
        "seed": {
            **not_numbers,
            "a float": 1.5,
            "below 0": -1,
            "beyond 64 bits": 2**64,
            "two of them": (1, 2),
            "a generator": np.random.default_rng(0),
        },
        "flag": {"None": None, "1": 1, "a text": "yes", "0.0": 0.0, "a list": [True]},
        "fraction": {**share, "above 1": 1.5},
        "level": {**share, "1": 1, "infinite": INF},
        "number": {**not_numbers, "infinite": INF, "a complex number": 1j, "a dict": {}},
        "positive": {**not_numbers, "infinite": INF, "0": 0, "below 0": -0.1},
        "mapping": choice,
        "choice": choice,
        "choices": {
            "None": None,
            "one text": "mean",
            "none of them": [],
            "misspelt": ["meann"],
            "numbers": [1, 2],
            "a dict": {"mean": 1},
            "a set": {"mean"},
        },
        "fractions": {
            "None": None,
            "one number": 0.5,
            "none of them": [],
            "texts": ["0.5"],
            "bools": [True],
            "0": [0.0],
            "above 1": [1.5],
            "NaN": [NAN],
            "a text": "0.5",
            "a dict": {0.5: 1},
        },
        "counts": {
            "one number": 3,
            "texts": ["3"],
            "bools": [True],
            "floats": [3.0],
            "below 0": [-1],
            "0": [0],
            "a text": "3",
            "a dict": {3: 1},
            "a set": {3},
        },
        "metric": {
            "None": None,
            "its name": "accuracy",
            "its name, misspelt": "acuracy",
            "a number": 3,
            "none of them": [],
            "an empty dict": {},
            "names": ["accuracy"],
            "names in a dict": {"accuracy": "accuracy"},
            "numbered": {1: mmlens.accuracy},
            "a function of nothing": lambda: 0,
            "a function of the logits alone": lambda logits: logits,
            "a class": mmlens.effects.Effect,
            "its result": torch.zeros(2),
        },
        "one metric": {
            "None": None,
            "its name": "accuracy",
            "its name, misspelt": "acuracy",
            "a number": 3,
            "a list": [mmlens.accuracy],
            "a function of the logits alone": lambda logits: logits,
            "its result": torch.zeros(2),
        },
        "intervention": {
            "None": None,
            "a text": "ablate",
            "a number": 3,
            "hooks": [("hook_embed", lambda x, hook: x)],
            "a function of the model alone": lambda model: [],
            "a class": mmlens.interventions.Edit,
            "a prompt": w.prompt,
            "the model": w.model,
            "heads": mmlens.HeadSet([(0, 1)], grid=(8, 8)),
        },
        "heads": {
            "None": None,
            "a number": 3,
            "a text": "L0H1",
            "one pair": (0, 1),
            "one number each": [0, 1],
            "three numbers each": [(0, 1, 2)],
            "texts": ["L0H1"],
            "float layers": [(0.0, 1)],
            "bools": [(True, False)],
            "a dict": {0: [1]},
            "a layer that there is not": [(99, 0)],
            "a head that there is not": [(0, 99)],
            "a layer below 0": [(-1, 0)],
            "one head twice": [(0, 1), (0, 1)],
            "scores": w.scores,
            "none of them": [],
        },
        "positions": {
            "a number": 3,
            "a list": [True, False],
            "an unknown name": "lost",
            "a misspelt name": "lsat",
            "an array": np.ones(shape, dtype=bool),
            "numbers": torch.ones(shape),
            "another shape": torch.ones(1, 3, dtype=torch.bool),
            "none of them": torch.zeros(shape, dtype=torch.bool),
            "a function of nothing": lambda: None,
            "a function that gives None": lambda prompt: None,
            "a set": {3},
        },
        "mask": {
            "None": None,
            "an unknown name": "lost",
            "a number": 3,
            "a list": [[True]],
            "numbers": torch.ones(shape),
            "another shape": torch.ones(1, 3, dtype=torch.bool),
            "none of them": torch.zeros(shape, dtype=torch.bool),
        },
        "hook": {
            "None": None,
            "a number": 3,
            "misspelt": "blocks.0.attn.hook_Z",
            "empty": "",
            "a list": ["hook_embed"],
            "a layer that there is not": "blocks.99.attn.hook_z",
        },
        "source": {
            "None": None,
            "a text": "clean",
            "a number": 3,
            "an example": w.examples[0],
            "a list of prompts": [w.prompt],
            "the model": w.model,
            "an activation": torch.zeros(2, 3),
            "a dict of numbers": {"blocks.0.attn.hook_z": 3},
            "the keyword inputs": dict(w.prompt.inputs),
        },
        "values": {
            "None": None,
            "a text": "0.5",
            "a number": 3.0,
            "texts": ["a", "b"],
            "a dict": {0: 1.0, 1: 2.0},
            "a set": {1.0, 2.0},
            "two axes": [[1.0, 2.0], [3.0, 4.0]],
            "ragged": [[1.0], [2.0, 3.0]],
            "NaN": [1.0, NAN, 2.0],
            "infinite": [1.0, INF],
            "None within": [1.0, None],
            "complex numbers": [1j, 2j],
            "none of them": [],
        },
        "path": {"None": None, "a number": 3, "empty": "", "bytes": b"x", "a list": ["x"]},
        "new file": {
            "None": None,
            "a number": 3,
            "empty": "",
            "a folder": w.folder,
            "in no folder": w.folder / "nowhere" / "x.parquet",
            "in a file": w.folder / "a_file" / "x.parquet",
        },
        "new folder": {
            "None": None,
            "a number": 3,
            "empty": "",
            "a file": w.folder / "a_file",
            "in a file": w.folder / "a_file" / "x",
        },
        "text": {"None": None, "a number": 3, "a list": ["a"], "a bool": True, "empty": " "},
        "table": {
            "None": None,
            "a list": [],
            "a dict": {"mean": [1.0]},
            "other columns": pd.DataFrame({"a": [1]}),
            "no rows": pd.DataFrame(),
            "an array": np.zeros((2, 2)),
        },
    }


def _empty(w: World) -> str:
    folder = w.folder / "empty"
    folder.mkdir(exist_ok=True)
    return str(folder)


def special_values(w: World) -> dict[str, Values]:
    """`bad_values` of kinds that one function or two take."""
    image, example = w.examples[0].images[0], w.examples[0]
    zero = mmlens.ablate([(0, 1)])
    tuple(w.prompt.shape)
    functions: Values = {"None": None, "a text": "f", "a number": 3, "a class": mmlens.interventions.Edit}
    images: Values = {
        "None": None,
        "a number": 3,
        "numbers": [3],
        "None within": [None],
        "an array": np.zeros((4, 4, 3)),
        "arrays": [np.zeros((4, 4, 3))],
        "a dict": {"image": image},
    }
    boxes: Values = {
        "None": None,
        "a number": 3,
        "a text": "box",
        "texts": ["box"],
        "three sides": [(0, 0, 3)],
        "ragged": [(0, 0, 3, 3), (0, 0, 3)],
        "NaN and text": [(0, 0, "a", 3)],
    }
    columns: Values = {"a number": 3, "misspelt": "hed", "a list": ["head"], "a bool": True}
    texts: Values = {"None": None, "one text": "red", "a number": 3, "numbers": [1, 2], "a dict": {"a": 1}}
    labels: Values = {"None": None, "a number": 3, "a list": ["x"], "bytes": b"x"}
    tensors: Values = {
        "None": None,
        "a text": "logits",
        "a number": 3.0,
        "a list": [1.0, 2.0],
        "the model": w.model,
        "a prompt": w.prompt,
    }
    index: Values = {
        "None": None,
        "a float": 0.0,
        "a text": "0",
        "a bool": True,
        "a list": [0],
        "below 0": -1,
        "too high": 99,
    }
    hooks: Values = {
        "None": None,
        "a number": 3,
        "a name": "hook_embed",
        "one pair": ("hook_embed", lambda x, hook: x),
        "names": ["hook_embed"],
        "swapped": [(lambda x, hook: x, "hook_embed")],
        "three parts": [("hook_embed", lambda x, hook: x, 3)],
        "a dict": {"hook_embed": lambda x, hook: x},
        "an intervention": zero,
        "no function": [("hook_embed", None)],
    }
    inputs: Values = {
        "None": None,
        "a question": "What colour is K",
        "a number": 3,
        "a list of ids": [[1, 2]],
        "an example": example,
        "a list of prompts": [w.prompt],
        "float ids": torch.zeros(1, 3),
        "an image": image,
    }
    tokens: Values = {
        "None": None,
        "a float": 1.5,
        "several words": "red blue",
        "an id that there is not": 10**6,
        "below 0": -1,
        "a bool": True,
        "a dict": {},
    }
    effects: Values = {
        "a number": 3,
        "a text": "effect",
        "a list": [1.0, 2.0],
        "of another metric": mmlens.effect(w.model, w.prompt, None, mmlens.metrics.answer_rank),
    }
    components: Values = {
        "None": None,
        "a number": 3,
        "one pair": (0, 1),
        "an unknown word": "img",
        "an unknown part": [(0, "mpl")],
        "a layer alone": [0],
        "float layers": [(0.0, 1)],
        "a bool": [(True, 1)],
        "a layer that there is not": [(99, 0)],
        "a head that there is not": [(0, 99)],
        "none of them": [],
        "a dict": {0: [1]},
        "scores": w.scores,
        "the prompt": w.prompt,
    }
    regions: Values = {
        "None": None,
        "a number": 3,
        "a text": "box",
        "three sides": (0, 0, 3),
        "texts": ("a", "b", "c", "d"),
        "outside": (0, 0, 999, 999),
        "empty": (5, 5, 5, 9),
        "scaled 0 to 1": (0.1, 0.1, 0.2, 0.2),
        "NaN": (NAN, 0, 5, 5),
        "an example": example,
        "a function of nothing": lambda: None,
        "none of them": [],
    }
    per_layer: Values = {
        "a number": 8,
        "a text": "8",
        "floats": [8.0] * 8,
        "bools": [True] * 8,
        "no head at all": [0] * 8,
        "below 0": [-1] * 8,
    }
    head_grid: Values = {
        "a number": 8,
        "a text": "88",
        "one number": (8,),
        "heads per layer": (8,) * 8,
        "floats": (8.0, 8.0),
        "bools": (True, True),
        "no layers": (0, 8),
        "below 0": (8, -1),
    }
    names: Values = {
        "one text": "a",
        "a number": 3,
        "numbers": [1, 2],
        "a dict": {"a": 1},
        "too many": ["a", "b", "c", "d"],
    }
    positive: Values = {"a text": "2", "a list": [2], "a bool": True, "NaN": NAN, "0": 0, "below 0": -0.1}
    return {
        "split": {name: value for name, value in bad_values(w)["examples"].items() if name != "none of them"},
        "intervention or none": {
            name: value for name, value in bad_values(w)["intervention"].items() if name != "None"
        },
        "effect": effects,
        "interventions": {
            "None": None,
            "one": zero,
            "a list": [zero],
            "none of them": {},
            "numbers": {"a": 3},
            "hooks": {"a": [("hook_embed", lambda x, hook: x)]},
            "a class": {"a": mmlens.interventions.Edit},
            "a text": "ablate",
        },
        "logits": tensors | {"of the last position": torch.zeros(2, 5)},
        "answers": {
            "None": None,
            "a number": 3,
            "one text": "red",
            "too few": ["red"],
            "numbers": [1, 2],
            "logits": torch.zeros(2, 3, 4),
            "a dict": {0: "red"},
        },
        "token": tokens,
        "tokens": tokens | {"none of them": [], "the answer": ["red"], "None within": [None]},
        "indices": {
            "None": None,
            "a text": "0",
            "floats": [0.0],
            "too high": [99],
            "none of them": [],
            "a mask of others": [True] * 9,
            "a dict": {0: 1},
            "a number": 0.5,
            "two axes": torch.zeros(2, 2).long(),
        },
        "per example": tensors | {"two axes": torch.zeros(2, 2), "none of them": torch.zeros(0)},
        "text to parse": {"None": None, "a number": 3, "a list": ["red"]},
        "options": texts,
        "components": components,
        "hook or all": {
            name: value for name, value in bad_values(w)["hook"].items() if name not in ("None", "a list")
        }
        | {"numbers": [3], "a filter of nothing": lambda name: False, "a dict": {"hook_embed": 1}},
        "layers": {
            "a text": "all",
            "floats": [0.0],
            "bools": [True],
            "too high": 99,
            "below 0": -1,
            "none of them": [],
            "a dict": {0: 1},
            "a float": 1.0,
        },
        "per head": {
            "None": None,
            "a text": "1",
            "NaN": NAN,
            "infinite": INF,
            "too many": [1.0, 2.0],
            "texts": ["a"],
            "a bool": True,
            "a dict": {0: 1},
        },
        "indices of heads": {
            "a number": 3,
            "a text": "0",
            "floats": [0.0],
            "bools": [True],
            "too high": [99],
            "below 0": [-1],
            "none of them": [],
            "pairs": [(0, 1)],
            "a dict": {0: 1},
        },
        "receivers": {
            "None": None,
            "a number": 3,
            "an unknown word": "logit",
            "none of them": [],
            "heads without a part": [(1, 0)],
            "an unknown part": [(1, 0, "z")],
            "a float layer": [(1.0, 0, "q")],
            "a layer that there is not": [(99, 0, "q")],
            "a dict": {0: 1},
            "numbers": [3],
        },
        "schedule": {
            "None": None,
            "a number": 3,
            "none of them": {},
            "a list": [zero],
            "names": {"first": zero},
            "a layer that there is not": {99: zero},
            "numbers": {0: 3},
            "an intervention": zero,
            "a float layer": {0.0: zero},
        },
        "two-argument function": functions | {"of one argument": lambda x: x},
        "hooks": hooks,
        "region": regions,
        "colour": {
            "None": None,
            "a number": 3,
            "an unknown name": "gray-blue",
            "two numbers": (1, 2),
            "above 255": (300, 0, 0),
            "floats": (0.5, 0.5, 0.5),
            "texts": ("a", "b", "c"),
            "a bool": True,
        },
        "image": images | {"no file": "nowhere.png"},
        "images": {**images, "no file": "nowhere.png", "none of them": [], "questions": ["What?"]},
        "questions": {
            "None": None,
            "a number": 3,
            "none of them": [],
            "numbers": [3],
            "empty": " ",
            "a dict": {"a": 1},
            "a set of numbers": {3},
            "a function of nothing": lambda: "What?",
        },
        "two questions": {
            "one text": "What?",
            "a number": 3,
            "too few": ["What?"],
            "numbers": [1, 2],
            "a dict": {"a": 1, "b": 2},
            "empty": ["What?", " "],
        },
        "hook of a layer": {
            "None": None,
            "a number": 3,
            "misspelt": "hook_resid_pree",
            "with its layer": "blocks.0.hook_resid_pre",
            "a list": ["hook_resid_pre"],
            "empty": "",
        },
        "regions by name": {
            "None": None,
            "a name": "last",
            "a list": ["last"],
            "none of them": {},
            "numbers": {"a": 3},
        },
        "p-values": {
            **{
                name: value
                for name, value in bad_values(w)["values"].items()
                if name not in ("NaN", "two axes")
            },
            "above 1": [0.5, 1.5],
            "below 0": [-0.1],
            "NaN alone": [NAN],
        },
        "heads or none of them": {
            name: value for name, value in bad_values(w)["heads"].items() if name != "none of them"
        },
        "heads per layer": per_layer,
        "head grid": head_grid | {"None": None},
        "head grid of scores": head_grid | {"of another model": (2, 8)},
        "head set": {
            "None": None,
            "a list": [(0, 1)],
            "a number": 3,
            "of another model": mmlens.HeadSet([(0, 1)], grid=(2, 2)),
            "scores": w.scores,
        },
        "scores": {
            "None": None,
            "a list": [[[1.0]]],
            "a number": 3.0,
            "two axes": torch.zeros(8, 8),
            "whole numbers": torch.zeros(1, 2, 2, dtype=torch.long),
            "none of them": torch.zeros(0, 2, 2),
            "NaN": torch.full((2, 2, 2), NAN),
            "scores": w.scores,
        },
        "kinds": {
            "one text": "objects",
            "a number": 3,
            "too few": ["a"],
            "numbers": [1, 2, 3, 4],
            "a dict": {"a": 1},
        },
        "count or share": {
            "None": None,
            "a text": "3",
            "a bool": True,
            "0": 0,
            "0.0": 0.0,
            "below 0": -1,
            "too many": 999,
            "above 1": 1.5,
            "NaN": NAN,
            "a list": [3],
            "a complex number": 1j,
        },
        "kind": {"None": None, "a number": 3, "misspelt": "object", "a list": ["objects"]},
        "other scores": {
            "None": None,
            "a number": 3,
            "a tensor": w.scores.values,
            "a path": "x.parquet",
            "heads": mmlens.HeadSet([(0, 1)], grid=(8, 8)),
        },
        "gates": {
            "None": None,
            "a list": [[0.5, 1.0]],
            "an array": np.ones((2, 2)),
            "one row": torch.rand(4),
            "whole numbers": torch.ones(2, 2, dtype=torch.int64),
            "none": torch.rand(0, 4),
            "NaN": torch.tensor([[NAN, 0.0]]),
        },
        "published": {
            "None": None,
            "a number": 3,
            "no folder": "nowhere",
            "another file": w.folder / "a_file",
            "a list": ["x"],
        },
        "file to read": {
            "None": None,
            "a number": 3,
            "no file": "nowhere.parquet",
            "a folder": w.folder,
            "another file": w.folder / "a_file",
            "cut off": w.folder / "cut.parquet",
            "empty": w.folder / "empty.parquet",
        },
        "folder to read": {
            "None": None,
            "a number": 3,
            "no folder": "nowhere",
            "a file": w.folder / "a_file",
            "another folder": w.folder,
            "a list": ["x"],
        },
        "box or none": {
            "a number": 3,
            "a text": "box",
            "three sides": (0, 0, 3),
            "texts": ("a", "b", "c", "d"),
            "NaN": (0, 0, NAN, 3),
            "bools": (True, False, True, False),
            "a dict": {"left": 0},
            "None within": (0, 0, None, 3),
        },
        "any text": labels,
        "example images": {
            "None": None,
            "one image": image,
            "a path": "image.png",
            "paths": ["image.png"],
            "a number": 3,
            "arrays": [np.zeros((4, 4, 3))],
            "None within": [None],
            "a dict": {0: image},
            "a set": {3},
        },
        "example evidence": {
            "None": None,
            "one": mmlens.Evidence(0),
            "pairs": [(0, (0, 0, 9, 9))],
            "boxes": [(0, 0, 9, 9)],
            "one box": (0, 0, 9, 9),
            "of another image": [mmlens.Evidence(3)],
            "outside": [mmlens.Evidence(0, (0, 0, 999, 999))],
            "a number": 3,
            "dicts": [{"image": 0}],
        },
        "candidates": texts,
        "metadata": {"None": None, "a text": "a", "a list": [], "a number": 3},
        "example": {
            "None": None,
            "a text": "objects-0-0",
            "a number": 3,
            "a list": [example],
            "of another origin": mmlens.Example("What?", "red", id="mine"),
        },
        "rng": {"None": None, "a seed": 3, "a NumPy generator": np.random.default_rng(0)},
        "scores to draw": {
            "None": None,
            "a text": "scores",
            "a number": 3.0,
            "one axis": [1.0, 2.0],
            "texts": [["a"]],
            "NaN": [[NAN]],
            "a dict": {0: [1.0]},
            "ragged": [[1.0], [1.0, 2.0]],
            "heads": mmlens.HeadSet([(0, 1)], grid=(8, 8)),
        },
        "marked heads": {
            "a list": [(0, 1)],
            "a number": 3,
            "scores": w.scores,
            "of another model": mmlens.HeadSet([(0, 1)], grid=(2, 2)),
        },
        "axes": {"a text": "ax", "a number": 3, "a list": []},
        "matrix": {
            "None": None,
            "a text": "m",
            "a number": 3.0,
            "one axis": [1.0, 2.0],
            "texts": [["a", "b"]],
            "another shape": [[1.0]],
            "NaN alone": [[NAN, NAN]],
            "a dict": {0: [1.0]},
        },
        "names": names | {"None": None},
        "names or none": names,
        "positive or none": positive,
        "column": columns | {"None": None},
        "lines": {
            "a number": 3,
            "a list": [0.5],
            "texts": {"chance": "a"},
            "NaN": {"chance": NAN},
            "a text": "chance",
        },
        "dashed": {"a number": 3, "one text": "a", "misspelt": ["aa"], "numbers": [3]},
        "number or none": {"a text": "2", "a list": [2], "a bool": True, "NaN": NAN},
        "choices or all": {
            "one text": "mean",
            "none of them": [],
            "misspelt": ["meann"],
            "numbers": [1],
            "a dict": {"mean": 1},
        },
        "chances": {"a text": "2", "a list": [2], "a bool": True, "NaN": NAN, "texts": {"pooled": "a"}},
        "PIL image": images,
        "PIL images": {**images, "one image": image, "none of them": []},
        "boxes": boxes | {"outside": [(900, 900, 999, 999), (32, 0, 64, 32)]},
        "weights": {
            "None": None,
            "a number": 3,
            "texts": ["a", "b"],
            "below 0": [-0.1, 0.4],
            "NaN": [NAN, 0.4],
            "too few": [0.1],
            "a dict": {0: 0.1},
        },
        "boxes of evidence": {
            "None": None,
            "a number": 3,
            "one box": (0, 0, 9, 9),
            "three sides": [(0, 0, 3)],
            "outside": [(0, 0, 999, 999)],
            "texts": [("a", "b", "c", "d")],
            "a text": "box",
        },
        "boxes of images": {
            "None": None,
            "a number": 3,
            "too few": [],
            "a text": "b",
            "numbers": [3],
            "a dict": {0: 1},
        },
        "questions to ask": {
            "None": None,
            "one text": "?",
            "none of them": [],
            "numbers": [3],
            "empty": [" "],
        },
        "tags": {
            "None": None,
            "one text": "<e>",
            "one tag": ("<e>",),
            "numbers": (1, 2),
            "a dict": {"a": 1, "b": 2},
        },
        "rows": {
            "None": None,
            "a number": 3,
            "a hub id": "lmms-lab/POPE",
            "a dict of columns": {"q": ["What?"]},
            "none of them": [],
            "numbers": [3],
            "a number among them": [{"q": "What?", "a": "x", "image": image, "box": [0, 0, 9, 9]}, 3],
            "a generator": Fresh(lambda: iter([{"q": "What?"}])),
            "examples": w.examples,
        },
        "name of a data set": {
            "None": None,
            "a number": 3,
            "misspelt": "madeup",
            "a hub id": "lmms-lab/POPE",
            "a list": ["pope"],
        },
        "folder of a data set": {
            "nowhere": "nowhere",
            "a number": 3,
            "empty": "",
            "an empty folder": _empty(w),
        },
        "choice or none": {name: value for name, value in bad_values(w)["choice"].items() if name != "None"},
        "revision": {"a number": 3, "a list": ["main"], "a bool": True},
        "row column": columns | {"a function that fails": lambda row: row["nothing"], "a number's text": "3"},
        "row columns": columns | {"one text": "q", "numbers": [3], "None within": [None]},
        "setup": {"None": None, "the model": w.model, "a dict": {}, "a number": 3, "examples": w.examples},
        "question": {
            "None": None,
            "a number": 3,
            "empty": "",
            "numbers": [3],
            "none of them": [],
            "a dict": {"a": 1},
            "a set": {"What?"},
            "an example": example,
            "bytes": b"What?",
        },
        "images of a prompt": {
            name: value for name, value in images.items() if name not in ("None", "arrays")
        }
        | {"one image": image, "one path": "x.png", "no file": ["nowhere.png"], "a list too many": [[image]]},
        "inputs": inputs,
        "return type": {"a number": 3, "misspelt": "logit", "a list": ["logits"], "a bool": True},
        "function of a hook": functions,
        "function of rows": functions,
        "text to tokenize": {
            "None": None,
            "a number": 3,
            "numbers": [3],
            "none of them": [],
            "a dict": {"a": 1},
            "bytes": b"a",
        },
        "one word": {
            "None": None,
            "a number": 3,
            "several words": "red blue",
            "empty": "",
            "a list": ["red"],
        },
        "token ids": {
            "None": None,
            "a text": "red",
            "floats": [0.5],
            "three axes": torch.zeros(1, 1, 1).long(),
            "an id that there is not": [10**6],
            "below 0": [-1],
            "texts": ["a"],
            "a dict": {},
        },
        "token id": {
            "None": None,
            "a text": "red",
            "a float": 0.5,
            "a bool": True,
            "an id that there is not": 10**6,
            "below 0": -1,
            "a list": [3],
        },
        "text or ids": {
            "None": None,
            "a number": 3,
            "floats": torch.zeros(3),
            "two rows": torch.zeros(2, 3).long(),
            "numbers of texts": [None],
            "a dict": {},
        },
        "batch of ids": {
            "None": None,
            "a text": "red",
            "floats": torch.zeros(1, 2),
            "a number": 3,
            "an id that there is not": torch.tensor([[10**6]]),
        },
        "Hugging Face model": {
            "None": None,
            "its name": "micro",
            "the processor": w.model.processor,
            "the tokenizer": w.model.tokenizer,
            "a HookedVLM": w.model,
            "the class": type(w.model.hf_model),
            "a module": torch.nn.Linear(2, 2),
            "its configuration": w.model.hf_model.config,
            "a number": 3,
        },
        "name of a model": {
            "None": None,
            "a number": 3,
            "misspelt": "mikro-model",
            "empty": "",
            "the model": w.model.hf_model,
            "a list": ["micro"],
        },
        "bridge": {
            "None": None,
            "a text": "micro",
            "the model": w.model,
            "the Hugging Face model": w.model.hf_model,
            "a number": 3,
        },
        "layer of a cache": {"a text": "0", "a float": 1.0, "a bool": True, "too high": 99, "a list": [0]},
        "packed name": {
            "None": None,
            "a number": 3,
            "not packed": "hook_embed",
            "misspelt": "image.hook_embd",
            "a list": ["image.hook_embed"],
        },
        "index of one": index | {"too high": 1},
        "index of two": index | {"too high": 2},
        "box": {**regions} | {"an example": example},
        "evidence of two": {
            "None": None,
            "a number": 3,
            "a text": "box",
            "too few": w.examples[:1],
            "boxes": [[(0, 0, 9, 9)], [(0, 0, 9, 9)]],
            "pairs": [(0, (0, 0, 9, 9))] * 2,
            "none of them": [],
            "examples without": mmlens.scene_examples("text_recall", 2, seed=0),
            "numbers": [1, 2],
            "dicts": [{"image": 0}] * 2,
        },
        "position": {
            "None": None,
            "a float": 0.0,
            "a text": "last",
            "a bool": True,
            "too high": 999,
            "too low": -999,
            "a list": [0],
        },
        "device": {"None": None, "misspelt": "cpuu", "a list": ["cpu"], "a float": 0.5},
        "head sets by name": {
            "None": None,
            "a list": [(0, 1)],
            "a HeadSet": mmlens.HeadSet([(0, 1)], grid=(8, 8)),
            "numbers": {"a": 3},
            "none of them": {},
        },
        "question or none": {"a number": 3, "a list": ["a"], "a bool": True, "empty": " "},
        "other documents": {"None": None, "a number": 3, "a list": [torch.zeros(3)], "a prompt": w.prompt},
        "scores of one document": {
            "None": None,
            "a text": "0.5",
            "one number": 0.5,
            "numbers": [0.5],
            "of two": [[0.5] * 3] * 2,
            "too few": [[0.5]],
            "NaN": [[NAN] * 3],
            "texts": [["a"] * 3],
            "a dict": {0: [0.5] * 3},
        },
        "recall": {"None": None, "a text": "1", "a number": 1.0, "too few": [1.0], "NaN": [NAN] * 3},
        "page texts": {name: value for name, value in names.items() if name != "too many"}
        | {"None": None, "none of them": []},
    }


WORDS: dict[str, str] = {
    "model": "HookedVLM",
    "examples": "Example|at least one|1 or more",
    "prompt": "Prompt|prompt",
    "prompts": "Prompt|Example|1 or more",
    "count": "whole number|>= 0|1 or more",
    "count or none": "whole number|>= 0",
    "count or all": "whole number",
    "seed": "seed",
    "flag": "True or False",
    "fraction": "number|fraction|share",
    "level": "number",
    "number": "number",
    "positive": "number",
    "mapping": "'merged' or 'paper_floor'",
    "choice": "one of|there is no|there are|is '",
    "choices": "list|one of|there is no|at least one",
    "fractions": "number|list",
    "counts": "number|list|count|or more",
    "metric": "function|name of a metric|metric",
    "one metric": "function",
    "intervention": "function|intervention",
    "heads": "HeadSet|head|layer",
    "positions": "positions|mask",
    "mask": "boolean tensor|shape|position",
    "hook": "hook",
    "source": "source",
    "values": "number|finite|shape",
    "rows": "datasets.Dataset|list of dicts|no rows|dict of its columns",
    "row column": "name of a column|there is no column|function of the row|none of the candidates",
    "name of a data set": "name of a data set|there is no data set",
    "folder of a data set": "no such folder|expected a path|cannot be read as its split",
    "choice or none": "one of|there is no|there are|is '",
    "revision": "a text",
    "row columns": "name of a column|there is no column|list of names",
    "path": "path",
    "new file": "path|folder|file",
    "new folder": "path|folder|file",
    "text": "text",
    "table": "table|DataFrame|columns",
}
"""Of kinds that are not here any word will do: their refusals are each of their own."""


def good_values(w: World) -> dict[str, Values]:
    """{kind: {what is unusual: value}}"""
    shape = tuple(w.prompt.shape)
    return {
        "examples": {
            "a tuple": tuple(w.examples),
            "a generator": Fresh(lambda: (example for example in w.examples)),
            "a Series": pd.Series(w.examples, index=["a", "b", "c", "d"]),
            "an object array": np.array(w.examples, dtype=object),
            "one in a list": w.examples[:1],
        },
        "prompts": {
            "examples": w.examples,
            "a tuple": (w.prompt, w.other),
            "a generator": Fresh(lambda: iter(w.examples)),
        },
        "count": {
            "int64": np.int64(2),
            "int32": np.int32(2),
            "a torch scalar": torch.tensor(2),
            "0-d": np.array(2),
        },
        "count or all": {"None": None, "int64": np.int64(2)},
        "seed": {"int64": np.int64(3), "uint8": np.uint8(3), "large": 2**40},
        "flag": {"a NumPy bool": np.bool_(False)},
        "fraction": {"float32": np.float32(0.5), "a whole": 1, "a torch scalar": torch.tensor(0.5)},
        "level": {"float32": np.float32(0.9), "a Fraction": Fraction(9, 10)},
        "number": {"float32": np.float32(2.0), "an int": 2, "a torch scalar": torch.tensor(2.0)},
        "metric": {
            "a list": [mmlens.accuracy, mmlens.metrics.answer_rank],
            "a tuple": (mmlens.accuracy,),
            "named": {"right": mmlens.accuracy},
            "a lambda": lambda logits, prompt: logits[:, -1, 0],
            "of optional arguments": lambda logits, prompt, scale=1.0: scale * logits[:, -1, 0],
            "of the clean logits": mmlens.metrics.kl_to_clean,
            "of answers": mmlens.metrics.exact_match,
        },
        "heads": {
            "a HeadSet": mmlens.HeadSet([(0, 1), (2, 3)], grid=(8, 8)),
            "lists": [[0, 1], [2, 3]],
            "an array": np.array([[0, 1], [2, 3]]),
            "a tensor": torch.tensor([[0, 1], [2, 3]]),
            "a set": {(0, 1), (2, 3)},
            "a generator": Fresh(lambda: (head for head in [(0, 1), (2, 3)])),
            "NumPy numbers": [(np.int64(0), np.int32(1))],
        },
        "positions": {
            "None": None,
            "a name": "last",
            "a mask": torch.ones(shape, dtype=torch.bool),
            "a function": lambda prompt: prompt.last,
        },
        "values": {
            "a list": [1.0, 2.0, 4.0],
            "a tuple of ints": (1, 2, 4),
            "a Series": pd.Series([1.0, 2.0, 4.0], index=list("abc")),
            "float32": np.array([1, 2, 4], dtype=np.float32),
            "ints": np.array([1, 2, 4]),
            "a tensor": torch.tensor([1.0, 2.0, 4.0]),
            "bfloat16": torch.tensor([1.0, 2.0, 4.0], dtype=torch.bfloat16),
            "a tensor with gradients": torch.tensor([1.0, 2.0, 4.0], requires_grad=True),
            "torch scalars": [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(4.0)],
            "an object column": pd.Series([1.0, 2, 4.0], dtype=object),
        },
    }
