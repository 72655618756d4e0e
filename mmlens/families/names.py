"""The names by which transformers' models call their parts, as data: what `anatomy` looks for.

Of several names the first that is there counts. A family with another name says so in its record.
"""

from __future__ import annotations

ROLES: dict[str, tuple[str, ...]] = {
    "attention": ("self_attn", "attn", "attention", "self_attention", "cross_attn", "mixer"),
    "mixer": ("linear_attn", "conv", "mamba", "mixer"),
    "norm1": (
        "input_layernorm",
        "layer_norm1",
        "norm1",
        "layernorm_before",
        "attention_norm",
        "rms_norm1",
        "operator_norm",
        "self_attn_layer_norm",
        "input_latents_norm",
        "norm",
    ),
    "post_norm1": ("post_self_attn_layernorm", "post_operator_norm", "post_norm1", "layer_scale1"),
    "norm2": (
        "pre_feedforward_layernorm",
        "post_attention_layernorm",
        "layer_norm2",
        "norm2",
        "layernorm_after",
        "ffn_norm",
        "rms_norm2",
        "final_layer_norm",
    ),
    "post_norm2": (
        "post_feedforward_layernorm",
        "post_mlp_layernorm",
        "post_ffn_norm",
        "post_norm2",
        "layer_scale2",
    ),
    "mlp": ("mlp", "feed_forward", "ffn"),
    "mlp_in": ("fc1",),
    "mlp_out": ("fc2",),
    "attention_scale": (
        "residual_multiplier",
        "lambda_1",
        "tanh cross_attn_attn_gate",
        "tanh alpha_cross_attn",
    ),
    "mlp_scale": ("residual_multiplier", "lambda_2", "tanh cross_attn_mlp_gate", "tanh alpha_dense"),
}
"""Parts of a layer by the names they go by; the first that is there counts."""

ATTENTION_ROLES: dict[str, tuple[str, ...]] = {
    "q": ("q_proj", "q_b_proj", "query", "q"),
    "k": ("k_proj", "key", "k"),
    "v": ("v_proj", "value", "v"),
    "latent_kv": ("kv_b_proj",),
    "qkv": ("qkv", "query_key_value", "qkv_proj"),
    "out": ("o_proj", "out_proj", "proj", "projection_layer", "projection", "dense"),
}
"""Parts of an attention module."""

LAYER_NORMS_AROUND_MLP = "post_feedforward_layernorm"
"""Where a layer has this, its post_attention_layernorm closes attention; elsewhere it opens the MLP."""

STREAM_NORMS = ("norm", "final_layernorm", "final_layer_norm", "embedding_norm", "norm_f", "layer_norm")
PROJECTORS = (
    "multi_modal_projector",
    "mm_projector",
    "connector",
    "aligner",
    "projector",
    "vision_projection",
    "language_projection",
    "image_to_text_projection",
    "embed_vision",
    "resampler_model",
    "merger",
    "patch_merger",
    "vision_adapter",
)
IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_patch_id")
NOT_VISION = ("audio", "qformer", "resampler", "video_tower")

MLP_ROLES: dict[str, tuple[str, ...]] = {
    "in": ("up_proj", "w3", "fc1", "dense_h_to_4h"),
    "gate": ("gate_proj", "w1"),
    "gate_and_in": ("gate_up_proj",),
    "out": ("down_proj", "w2", "fc2", "dense_4h_to_h"),
}
"""Linear modules of an MLP."""

LATENT_QUERIES = "q_b_proj"
"""Queries under this name are projected from a latent, as keys and values under "latent_kv" are."""

KEYS_OF_AN_EARLIER_LAYER = "is_kv_shared_layer"
"""The mark of attention with the keys and values of a layer before it."""

IMAGE_STATES = "cross_attention_states"
"""What attention to images calls what it reads keys and values from."""

BETWEEN_LAYERS = "cross."
"""The stack of layers that read the image and stand between the language layers."""

EPSILONS = ("variance_epsilon", "eps", "epsilon", "norm_eps")
"""What a norm calls the number that it adds before the root."""
