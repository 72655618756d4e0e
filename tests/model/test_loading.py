"""Where models come from, and what is said when they do not come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tiny.wrapped import QUESTION

import mmlens
from mmlens.errors import InvalidTypeError, InvalidValueError, UnsupportedError
from mmlens.families.catalog import FAMILIES, UnknownFamilyError
from mmlens.model import loading
from mmlens.model.loading import IncompleteModelError, ModelNotFoundError, RemoteCodeError, shipped_models


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
    folders = [Path(mmlens.__file__).parent / "shipped" / name for name in shipped_models()]
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
    folder = Path(mmlens.__file__).parent / "shipped" / "micro"
    assert micro.family.model_type == "qwen3_vl"
    assert micro.cfg.n_layers * micro.cfg.n_heads >= 64
    assert micro.cfg.n_key_value_heads < micro.cfg.n_heads
    by_path = mmlens.HookedVLM.from_pretrained(str(folder))
    example = mmlens.scene_examples("objects", 1, seed=0)[0]
    prompt = micro.prompt_examples([example])
    assert torch.equal(micro(prompt), by_path(prompt))
    assert micro.answer(prompt, max_new_tokens=1) == [example.answer]


# ---------------------------------------------------------------------- what a folder holds


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny.tiny_model("llava").save_pretrained(tmp_path / "model")
    tiny.tiny_processor("llava").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_missing_tensor_is_an_error(saved: Path) -> None:
    file = saved / "model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if name.endswith("layers.1.self_attn.o_proj.weight"))
    save_file({name: x for name, x in tensors.items() if name != gone}, file, metadata={"format": "pt"})
    with pytest.raises(IncompleteModelError, match=r"lack 1 tensor.*layers.1.self_attn.o_proj.weight"):
        mmlens.HookedVLM.from_pretrained(str(saved))


def test_a_tensor_of_another_shape_is_an_error(saved: Path) -> None:
    file = saved / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.1.self_attn.o_proj.weight"))
    save_file({**tensors, name: torch.zeros(2, 2)}, file, metadata={"format": "pt"})
    with pytest.raises(IncompleteModelError, match="do not fit its configuration"):
        mmlens.HookedVLM.from_pretrained(str(saved))


@torch.no_grad()
def test_tensors_that_are_rightly_absent_or_more(tmp_path: Path) -> None:
    """Tied weights are saved once; a checkpoint may hold what the model has no place for (a training head)."""
    model = tiny.tiny_model("llava")
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    tiny.tiny_processor("llava").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert not any("lm_head" in name for name in tensors)
    save_file(
        {**tensors, "value_head.weight": torch.zeros(2)},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    loaded = mmlens.HookedVLM.from_pretrained(str(tmp_path), dtype=torch.float32)
    assert torch.equal(loaded.W_U, loaded.W_E.T)
    assert torch.equal(loaded.W_O, mmlens.HookedVLM(model).W_O)


def sharded(folder: Path) -> Path:
    """The folder's weights as two files with an index; gives the index."""
    tiny.tiny_model("llava").save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    return folder / "model.safetensors.index.json"


@torch.no_grad()
def test_weights_come_from_inside_the_folder(saved: Path) -> None:
    index = sharded(saved)
    prompt_model = mmlens.HookedVLM.from_pretrained(str(saved), dtype=torch.float32)
    expected = prompt_model.W_O
    held = json.loads(index.read_text())
    first = sorted(set(held["weight_map"].values()))[0]
    # Links, as the hub's cache has them, are right.
    blob = saved.parent / "blob"
    (saved / first).rename(blob)
    (saved / first).symlink_to(blob)
    assert torch.equal(mmlens.HookedVLM.from_pretrained(str(saved), dtype=torch.float32).W_O, expected)
    outside = saved.parent / "x.safetensors"
    blob.rename(outside)
    for name in ("../x.safetensors", str(outside)):
        moved = {key: name if file == first else file for key, file in held["weight_map"].items()}
        index.write_text(json.dumps({**held, "weight_map": moved}))
        with pytest.raises(IncompleteModelError, match="outside the model's folder"):
            mmlens.HookedVLM.from_pretrained(str(saved))


_OWN_CODE = """
from pathlib import Path
from transformers import LlavaConfig, LlavaForConditionalGeneration

class OwnConfig(LlavaConfig):
    model_type = "{model_type}"

class OwnModel(LlavaForConditionalGeneration):
    config_class = OwnConfig

Path({mark!r}).write_text("ran")
"""


@pytest.mark.parametrize("model_type", ["llava", "own_llava"])
def test_a_folders_own_code_runs_when_it_is_asked_for(
    model_type: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a known family transformers' own class is taken without it; of another there is nothing to take."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    # A class of its own has no renaming of keys in transformers: the names are the modules' own.
    own = {name: x.clone() for name, x in tiny.tiny_model("llava").state_dict().items()}
    save_file(own, saved / "model.safetensors", metadata={"format": "pt"})
    mark = tmp_path / "mark"
    (saved / "own.py").write_text(_OWN_CODE.format(model_type=model_type, mark=str(mark)))
    config = json.loads((saved / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForImageTextToText": "own.OwnModel"}
    (saved / "config.json").write_text(json.dumps({**config, "model_type": model_type, "auto_map": auto_map}))
    if model_type == "llava":
        assert type(mmlens.HookedVLM.from_pretrained(str(saved)).hf_model).__name__ != "OwnModel"
    else:
        with pytest.raises(RemoteCodeError, match="trust_remote_code=True"):
            mmlens.HookedVLM.from_pretrained(str(saved))
    assert not mark.exists()
    if model_type == "own_llava":
        monkeypatch.setitem(FAMILIES, "own_llava", FAMILIES["llava"])
    model = mmlens.HookedVLM.from_pretrained(str(saved), trust_remote_code=True)
    assert mark.exists() and type(model.hf_model).__name__ == "OwnModel"


# ---------------------------------------------------------------------- what is no model


@pytest.mark.parametrize(
    ("given", "way"),
    [
        ("micro", r"HookedVLM.from_pretrained\('micro'\)"),
        (None, "from_pretrained"),
        (3, "from_pretrained"),
        (tiny.tiny_processor("llava").tokenizer, "from_pretrained"),
        (torch.nn.Linear(2, 2), "from_pretrained"),
    ],
    ids=["name", "None", "number", "tokenizer", "module"],
)
def test_what_is_no_model_says_the_way_to_one(given: object, way: str) -> None:
    with pytest.raises(InvalidTypeError, match=f"HookedVLM wraps a .*{way}"):
        mmlens.HookedVLM(given)


def test_a_wrapped_model_and_a_text_model_are_told() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with pytest.raises(InvalidTypeError, match=r"wrapped already; its Hugging Face model is \.hf_model"):
        mmlens.HookedVLM(mmlens.HookedVLM(tiny.tiny_model("llava")))
    parallel = torch.nn.DataParallel(tiny.tiny_model("llava"))
    with pytest.raises(InvalidTypeError, match=r"it holds one, \.module, to wrap"):
        mmlens.HookedVLM(parallel)
    assert mmlens.HookedVLM(parallel.module)
    text = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
        )
    )
    with pytest.raises(
        UnknownFamilyError, match="LlamaForCausalLM is no vision-language model.*TransformerBridge"
    ):
        mmlens.HookedVLM(text)


def test_a_tokenizer_is_no_processor() -> None:
    processor = tiny.tiny_processor("llava")
    for wrong in (processor.tokenizer, "micro"):
        with pytest.raises(InvalidTypeError, match="AutoProcessor.from_pretrained"):
            mmlens.HookedVLM(tiny.tiny_model("llava"), wrong)
    assert mmlens.HookedVLM(tiny.tiny_model("llava"), None).processor is None


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"device": "cuda"}, InvalidTypeError, "takes no device: .*device_map='cuda'"),
        ({"fold_ln": True}, InvalidTypeError, "takes no fold_ln: weights stay as they are"),
        ({"load_in_8bit": True}, InvalidTypeError, "BitsAndBytesConfig"),
        ({"processor": None, "tokenizer": "x"}, InvalidTypeError, r"takes no tokenizer: HookedVLM\(hf_model"),
        ({"dtyp": torch.float16}, InvalidTypeError, "no option 'dtyp'; the nearest: 'dtype'"),
        ({"trust_remote_cod": True}, InvalidTypeError, "the nearest: 'trust_remote_code'"),
        ({"max_pixel": 1000}, InvalidTypeError, "no option 'max_pixel'; the nearest: 'max_pixels'"),
        ({"dtype": "bfloat"}, InvalidValueError, "there is no dtype 'bfloat'; the nearest: 'bfloat16'"),
        ({"dtype": "tensor"}, InvalidValueError, "there is no dtype 'tensor'"),
        ({"dtype": {"text_config": float}}, InvalidTypeError, "dtype is .*expected a torch.dtype"),
        ({"attn_implementation": "sdpaa"}, InvalidValueError, "'micro' cannot be loaded so: .*sdpaa"),
        ({"device_map": "gpu"}, InvalidValueError, "'micro' cannot be loaded so: .*gpu"),
        pytest.param(
            {"device_map": "cuda"},
            (UnsupportedError, RuntimeError),
            "CUDA|NVIDIA",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_options_that_loading_does_not_know(
    options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        mmlens.HookedVLM.from_pretrained("micro", **options)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"device": "cpu", "fold_ln": False, "center_unembed": False, "tokenizer": None}, torch.float32),
        ({"dtype": "half"}, torch.float16),
        ({"dtype": "auto", "device_map": "cpu"}, torch.float32),
        ({"dtype": {"text_config": torch.bfloat16, "": "float32"}}, torch.float32),
        ({"attn_implementation": "eager", "revision": "main", "token": None}, torch.float32),
        # An option of the model's configuration.
        ({"tie_word_embeddings": True}, torch.float32),
    ],
)
def test_options_that_ask_for_what_there_is_are_served(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = mmlens.HookedVLM.from_pretrained("micro", **options)
    assert next(model.hf_model.model.visual.parameters()).dtype == dtype


@pytest.mark.parametrize("name", [3, None, ["micro"]])
def test_a_name_is_a_text_or_a_path(name: object) -> None:
    with pytest.raises(InvalidTypeError, match="name_or_path is .*; expected a shipped model's name"):
        mmlens.HookedVLM.from_pretrained(name)
