"""Where models come from, and what is said when they do not come."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import tiny
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file

import mmlens
from conftest import QUESTION
from mmlens import loading
from mmlens.families.catalog import UnknownFamilyError
from mmlens.loading import ModelNotFoundError, shipped_models


@torch.no_grad()
def test_a_saved_folder_loads_as_it_was(family: str, tmp_path: Path) -> None:
    plain, processor = tiny.tiny_model(family).eval(), tiny.tiny_processor(family)
    plain.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model = mmlens.HookedVLM.from_pretrained(str(tmp_path), dtype=torch.float32, attn_implementation="sdpa")
    assert not model.hf_model.training
    assert type(model.processor).__name__ == type(processor).__name__
    prompt = model.prompt(QUESTION, images=tiny.tiny_images(2, seed=0))
    assert torch.equal(model(prompt), plain(**prompt.inputs).logits)
    eager = mmlens.HookedVLM.from_pretrained(str(tmp_path), dtype="bfloat16", attn_implementation="eager")
    assert eager.hf_model.dtype == torch.bfloat16
    assert eager.hf_model.config._attn_implementation == "eager"
    placed = mmlens.HookedVLM.from_pretrained(str(tmp_path), dtype=torch.float32, device_map={"": "cpu"})
    assert torch.equal(placed(prompt), model(prompt))


def test_only_safetensors_are_loaded(tmp_path: Path) -> None:
    plain = tiny.tiny_model("llava")
    plain.save_pretrained(tmp_path)
    tiny.tiny_processor("llava").save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="safetensors"):
        mmlens.HookedVLM.from_pretrained(str(tmp_path))


def test_unknown_family_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(
        UnknownFamilyError, match="no image-text-to-text family 'llama'; the nearest: 'mllama', 'llama4'"
    ):
        mmlens.HookedVLM.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no folder './nowhere'"),
        ("/nowhere/at/all", "no folder '/nowhere/at/all'"),
        ("mikro", "no shipped model or folder 'mikro'; the nearest: 'micro'"),
    ],
)
def test_missing_folders_and_names(name: str, message: str) -> None:
    with pytest.raises(ModelNotFoundError, match=message):
        mmlens.HookedVLM.from_pretrained(name)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        mmlens.HookedVLM.from_pretrained(str(tmp_path))


def test_a_hub_out_of_reach_is_said_to_be() -> None:
    with pytest.raises(ModelNotFoundError, match="out of reach.*micro"):
        mmlens.HookedVLM.from_pretrained("nobody/nothing", local_files_only=True)


def test_a_gated_and_an_absent_model_are_told_apart() -> None:
    """transformers raises OSError from the hub's own errors; the explanation reads the chain."""
    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
    for cause, words in (
        (GatedRepoError("gated", response=response), "is gated"),
        (RepositoryNotFoundError("none", response=response), "the hub has no model"),
    ):
        outer = OSError("from transformers")
        outer.__cause__ = cause
        assert words in loading._explain("owner/name", outer)


def test_shipped_models_are_small_and_name_their_kinds() -> None:
    folders = [Path(loading.__file__).parent / "micro" / name for name in shipped_models()]
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in folders]
    assert max(sizes) <= 10_000_000 and sum(sizes) <= 80_000_000
    for name in shipped_models():
        kinds = loading.scene_kinds(name)
        assert kinds is not None and len(kinds["visual"]) >= 4 and kinds["text"]
        assert all(mmlens.scene_examples(kind, 1, 0) for kind in (*kinds["visual"], *kinds["text"]))
    assert loading.scene_kinds("owner/name") is None


@pytest.mark.parametrize("text", ["{", "[1]", '{"visual": ["objects"]}'])
def test_a_list_of_tasks_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.json").write_text(text)
    with pytest.raises(ValueError, match=r"tasks.json"):
        loading.scene_kinds(tmp_path)


@pytest.mark.parametrize("name", [name for name in shipped_models() if name != "micro"])
def test_a_zoo_model_answers_each_kind(name: str) -> None:
    """10 examples of each kind; the cards give 1,000. At 95% right, fewer than 7 of 10 is one in a thousand."""
    model = mmlens.HookedVLM.from_pretrained(name)
    kinds = loading.scene_kinds(name)
    assert kinds is not None
    for kind in (*kinds["visual"], *kinds["text"]):
        examples = mmlens.scene_examples(kind, 10, seed=500_000)
        answers = model.answer(model.prompt_examples(examples), max_new_tokens=1)
        assert sum(a == e.answer for a, e in zip(answers, examples, strict=True)) >= 7, kind


def test_the_shipped_model_loads_as_any_other(micro: mmlens.HookedVLM) -> None:
    folder = Path(loading.__file__).parent / "micro" / "micro"
    assert micro.family.model_type == "qwen3_vl"
    assert micro.cfg.n_layers * micro.cfg.n_heads >= 64
    assert micro.cfg.n_key_value_heads < micro.cfg.n_heads
    by_path = mmlens.HookedVLM.from_pretrained(str(folder))
    example = mmlens.scene_examples("objects", 1, seed=0)[0]
    prompt = micro.prompt_examples([example])
    assert torch.equal(micro(prompt), by_path(prompt))
    assert micro.answer(prompt, max_new_tokens=1) == [example.answer]
