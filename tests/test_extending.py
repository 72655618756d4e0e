"""What docs/contributing.md shows is all it takes: its files, outside the package, used through the public calls."""

from __future__ import annotations

import copy
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from plain_runs import scenes
from transformers import LlavaConfig, LlavaForConditionalGeneration

import mmlens
from mmlens.cli import main
from mmlens.experiments import EXPERIMENTS
from mmlens.families.catalog import FAMILIES

PAGE = (Path(__file__).parents[1] / "docs" / "contributing.md").read_text()
FILES = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, re.S))


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Imports a file of the page by its name."""
    folder = tmp_path_factory.mktemp("mine")
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(folder)

        def imported(name: str) -> ModuleType:
            return importlib.import_module(name)

        yield imported
    for name in FILES:
        sys.modules.pop(name, None)


def test_files_have_the_lines_that_the_page_says() -> None:
    said = [int(lines) for lines in re.findall(r"^\| \[.*\| (\d+) \|", PAGE, re.M)]
    sections = re.findall(r"```python\n# \w+\.py\n(.*?)```", PAGE, re.S)
    assert said == [len(text.splitlines()) for text in sections]
    assert len(said) == 7


@torch.no_grad()
def test_an_intervention_and_a_metric(mine: Any, micro: mmlens.HookedVLM) -> None:
    heads, examples = [(5, 2), (5, 7), (2, 0)], scenes(2, 7)
    margin, reverse = mine("margin").margin, mine("reversed_heads").reversed_heads(heads)
    found = mmlens.effect(micro, examples, reverse, margin, progress=False)
    plain, width = copy.deepcopy(micro.hf_model), micro.cfg.d_head
    plain_margins = []
    for _ in range(2):
        logits = [plain(**micro.prompt_examples([example]).inputs).logits[0, -1] for example in examples]
        best = torch.stack(logits).sort(descending=True).values
        plain_margins.append(best[:, 0] - best[:, 1])
        for layer, head in heads:
            projection = plain.model.language_model.layers[layer].self_attn.o_proj
            projection.weight[:, head * width : (head + 1) * width].neg_()
    clean, changed = plain_margins
    assert (clean - changed).abs().max() > 0.1
    torch.testing.assert_close(found.clean, clean, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.values, changed, atol=1e-3, rtol=1e-3)


def test_a_head_score(mine: Any, micro: mmlens.HookedVLM) -> None:
    """On prompts of one image it is the mass on images."""
    examples = [example for example in scenes(3, 8, ("objects",)) if len(example.images) == 1]
    scores = mine("own_image").OWN_IMAGE(micro, examples, progress=False)
    prompt = micro.prompt_examples(examples)
    mass = mmlens.attention_mass(micro, prompt, prompt.last, prompt.token_map.is_image)
    torch.testing.assert_close(scores.per_example, mass)


def test_a_data_set(mine: Any, micro: mmlens.HookedVLM, tmp_path: Path) -> None:
    examples = mine("patches").patches(6)
    mmlens.data.save_examples(examples, tmp_path / "patches")
    read = mmlens.load_examples(tmp_path / "patches")
    assert read == examples and {example.answer for example in read} == {"red", "blue"}
    # The patch is all that the evidence's pixels show.
    for example in read:
        [image], [region] = example.images, example.evidence
        colours = [
            len(np.unique(np.asarray(part).reshape(-1, 3), axis=0))
            for part in (image, image.crop(region.box))
        ]
        assert colours == [2, 1]
    assert mmlens.ram(micro, read, progress=False).per_example.shape[0] == 6


def test_an_experiment_with_a_figure(mine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXPERIMENTS, "reversing", mine("reversing").EXPERIMENT)
    sizes = ["--n-selection", "2", "--n-evaluation", "2", "--set", "n_heads=3"]
    folder = tmp_path / "micro"
    assert main(["run", "reversing", "--model", "micro", "--out", str(tmp_path), *sizes]) == 0
    record = json.loads((folder / "run.json").read_text())
    assert record["request"]["settings"] == {"n_heads": 3}
    assert "Turned round" in (folder / "report.html").read_text()
    assert main(["rerun", str(folder)]) == 0


class MyLlavaConfig(LlavaConfig):
    model_type = "my_llava"


class MyLlava(LlavaForConditionalGeneration):
    config_class = MyLlavaConfig


@torch.no_grad()
def test_a_family(mine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Taken back by monkeypatch.
    monkeypatch.setitem(FAMILIES, "my_llava", FAMILIES["llava"])
    mine("my_llava")
    llava = tiny.tiny_model("llava")
    plain = MyLlava(MyLlavaConfig(**llava.config.to_dict() | {"model_type": "my_llava"})).eval()
    plain.load_state_dict(llava.state_dict())
    model = mmlens.HookedVLM(plain, tiny.tiny_processor("llava"))
    prompt = model.prompt("What colour is K?", images=tiny.tiny_images(1))
    as_llava = mmlens.HookedVLM(llava, tiny.tiny_processor("llava")).prompt(
        "What colour is K?", images=tiny.tiny_images(1)
    )
    assert model.family is FAMILIES["my_llava"]
    assert torch.equal(prompt.token_map.is_image, as_llava.token_map.is_image)
    assert prompt.token_map.is_image.any()
    assert torch.equal(model(prompt), plain(**prompt.inputs).logits)
