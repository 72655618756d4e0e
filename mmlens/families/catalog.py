"""The families mmlens knows, one record each."""

from __future__ import annotations

from mmlens.families import layouts
from mmlens.families.record import DeepInjection, Family, Stack
from mmlens.hook_names import unknown_name_message


def _decoder(language_model: str) -> Stack:
    """The decoder that Llama, Qwen2, Qwen3 and their relatives share."""
    return Stack(
        layers=f"{language_model}.layers",
        attention="self_attn",
        norm1="input_layernorm",
        norm2="post_attention_layernorm",
        mlp="mlp",
        qkv=("q_proj", "k_proj", "v_proj"),
        out_proj="o_proj",
        final_norm=f"{language_model}.norm",
    )


def _clip_like(tower: str, final_norm: str | None = None) -> Stack:
    """The encoder that CLIP, SigLIP and Idefics3 share; its last norm counts only where the features pass it."""
    return Stack(
        layers=f"{tower}.encoder.layers",
        attention="self_attn",
        norm1="layer_norm1",
        norm2="layer_norm2",
        mlp="mlp",
        qkv=("q_proj", "k_proj", "v_proj"),
        out_proj="out_proj",
        final_norm=final_norm,
    )


_QWEN_TOWER = Stack(
    layers="model.visual.blocks",
    attention="attn",
    norm1="norm1",
    norm2="norm2",
    mlp="mlp",
    qkv=("qkv",),
    out_proj="proj",
)

_INTERNVL_TOWER = Stack(
    layers="model.vision_tower.encoder.layer",
    attention="attention",
    norm1="layernorm_before",
    norm2="layernorm_after",
    mlp="mlp",
    qkv=("q_proj", "k_proj", "v_proj"),
    out_proj="projection_layer",
    final_norm="model.vision_tower.layernorm",
)


def _idefics(model_type: str) -> Family:
    return Family(
        model_type=model_type,
        language=_decoder("model.text_model"),
        vision=_clip_like("model.vision_model", final_norm="model.vision_model.post_layernorm"),
        projector="model.connector",
        layout=layouts.idefics3,
    )


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="llava",
            language=_decoder("model.language_model"),
            vision=_clip_like("model.vision_tower"),
            projector="model.multi_modal_projector",
            layout=layouts.llava,
            feature_layer="vision_feature_layer",
        ),
        Family(
            model_type="llava_onevision",
            language=_decoder("model.language_model"),
            vision=_clip_like("model.vision_tower"),
            projector="model.multi_modal_projector",
            layout=layouts.llava_onevision,
            feature_layer="vision_feature_layer",
        ),
        Family(
            model_type="qwen2_5_vl",
            language=_decoder("model.language_model"),
            vision=_QWEN_TOWER,
            projector="model.visual.merger",
            layout=layouts.qwen,
        ),
        Family(
            model_type="qwen3_vl",
            language=_decoder("model.language_model"),
            vision=_QWEN_TOWER,
            projector="model.visual.merger",
            layout=layouts.qwen,
            deep_injection=DeepInjection(
                mergers="model.visual.deepstack_merger_list",
                owner="model.language_model",
                method="_deepstack_process",
            ),
        ),
        Family(
            model_type="internvl",
            language=_decoder("model.language_model"),
            vision=_INTERNVL_TOWER,
            projector="model.multi_modal_projector",
            layout=layouts.internvl,
            feature_layer="vision_feature_layer",
        ),
        _idefics("idefics3"),
        _idefics("smolvlm"),
    )
}


class UnknownFamilyError(ValueError):
    """A model whose family mmlens has no record of."""


def family_of(model_type: str) -> Family:
    """The record of a family; raises UnknownFamilyError with the families there are.

    >>> family_of("qwen3_vl").projector
    'model.visual.merger'
    >>> family_of("qwen3vl")
    Traceback (most recent call last):
        ...
    mmlens.families.catalog.UnknownFamilyError: there is no model family 'qwen3vl'; the nearest: 'qwen3_vl', ...
    """
    if model_type not in FAMILIES:
        raise UnknownFamilyError(
            unknown_name_message("model family", model_type, FAMILIES)
            + ". A family needs a record: the paths of its decoder layers, vision layers and projector, "
            "and how its processor lays out image tokens (see docs/design.md)"
        )
    return FAMILIES[model_type]
