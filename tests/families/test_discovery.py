"""Finding the parts of a model: a family never met, a refused one, and parts that are not where they should be."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers
from transformers import CONFIG_MAPPING, LlavaConfig, PreTrainedModel

from mmlens import HookedVLM, internals
from mmlens.families.anatomy import AnatomyError, dissect
from mmlens.families.catalog import FAMILIES, UnknownFamilyError, UntestedFamilyWarning, family_of
from mmlens.families.record import Family, Stack
from mmlens.families.refused import BROKEN, REFUSED, refusal
from mmlens.model.support import missing_hooks, support_table
from mmlens.token_map import TokenMapError


class _NewConfig(LlavaConfig):
    model_type = "lavender"


class _RefusedConfig(LlavaConfig):
    model_type = "florence2"


def _of_type(config_class: type[LlavaConfig]) -> PreTrainedModel:
    model = tiny.tiny_model("llava")
    model.config.__class__ = config_class
    return model


@torch.no_grad()
def test_a_family_never_met_works_with_a_warning() -> None:
    inputs = tiny.tiny_inputs("llava")
    known = HookedVLM(tiny.tiny_model("llava"))
    with pytest.warns(UntestedFamilyWarning, match=r"'lavender'; the nearest: .*nothing about .* tested"):
        model = HookedVLM(_of_type(_NewConfig), tiny.tiny_processor("llava"))
    assert set(model.hook_dict) == set(known.hook_dict)
    logits, cache = model.run_with_cache(inputs)
    expected, reference = known.run_with_cache(inputs)
    assert torch.equal(logits, expected)
    assert all(torch.equal(cache[name], reference[name]) for name in reference)
    with pytest.raises(TokenMapError, match=r"lavender.*no token map.*not known.*model\(\*\*inputs\)"):
        model.prompt("What?", images=tiny.tiny_images(1))


def test_a_refused_family_is_refused_with_its_reason() -> None:
    with pytest.raises(UnknownFamilyError, match="'florence2' is refused: encoder-decoder"):
        HookedVLM(_of_type(_RefusedConfig))


def test_every_family_of_transformers_is_in_the_table_once() -> None:
    table = support_table()
    in_transformers, broken = set(CONFIG_MAPPING), {name for name in BROKEN if refusal(name)}
    counts = {"5.23": 97, "5.24": 100}
    assert len(table) == counts[transformers.__version__[:4]] and table["family"].is_unique
    assert set(table.loc[table["status"] == "refused", "family"]) == set(REFUSED) & in_transformers | broken
    taken = set(table.loc[table["status"].isin(["supported", "partly"]), "family"])
    assert taken == set(FAMILIES) & in_transformers - broken
    assert (table["status"] != "untested").all()
    assert (table.loc[table["status"] != "supported", "notes"] != "").all()
    assert len(FAMILIES) >= 80


def test_a_part_that_is_not_where_the_record_says_is_named() -> None:
    model = tiny.tiny_model("llava")
    for record, message in (
        (Family("llava", projector="model.bridge"), "no module 'model.bridge', where its family's record"),
        (Family("llava", language=Stack("model.decoder")), "no module 'model.decoder'"),
        (Family("llava", language=Stack(names={"mlp": "moe"})), "no 'moe', where .* expects its mlp"),
        (Family("llava", vision=Stack(norm="model.norm")), "no module 'model.norm'"),
    ):
        with pytest.raises(AnatomyError, match=message):
            dissect(model, record)


def test_a_model_without_attention_of_the_interface_is_refused() -> None:
    model = tiny.tiny_model("llava")
    for layer in model.get_decoder().layers:
        layer.self_attn = torch.nn.Identity()
    with pytest.raises(AnatomyError, match="no layer of LlamaModel has attention"):
        dissect(model, family_of("llava"))


def test_attention_is_known_by_what_its_code_asks_for() -> None:
    model = tiny.tiny_model("qwen3_5")
    kinds = {type(module).__name__: internals.asks_for_attention(module) for module in model.modules()}
    assert kinds["Qwen3_5Attention"] and kinds["Qwen3_5VisionAttention"]
    assert not kinds["Qwen3_5GatedDeltaNet"] and not kinds["Qwen3_5MLP"]
    hooked = HookedVLM(model)
    assert hooked.attention_layers == [
        index for index, kind in enumerate(model.config.text_config.layer_types) if kind == "full_attention"
    ]
    assert {layer for layer, _ in hooked.heads} == set(hooked.attention_layers)
    assert "blocks.{l}.attn.hook_z" in missing_hooks(hooked)
    assert missing_hooks(HookedVLM(tiny.tiny_model("llava"))) == []
