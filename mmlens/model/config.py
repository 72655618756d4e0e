"""TransformerLens' configuration of a model: what its tools read."""

from __future__ import annotations

from transformer_lens.config import TransformerLensConfig
from transformers import PreTrainedModel

from mmlens.families.anatomy import Anatomy
from mmlens.model.loading import input_device
from mmlens.model.weights import Block, normalization_of


def config_of(model: PreTrainedModel, anatomy: Anatomy) -> TransformerLensConfig:
    """What TransformerLens' tools read of a model, for the language side."""
    text = model.config.get_text_config()
    # Layers of some families differ in their number of heads.
    attention = max(
        (layer.attention for layer in anatomy.language if layer.attention is not None),
        key=lambda parts: parts.n_heads,
    )
    normalization_type, final_rms = normalization_of(anatomy)
    return TransformerLensConfig(
        d_model=text.hidden_size,
        d_head=attention.d_value,
        n_layers=len(anatomy.language),
        n_ctx=getattr(text, "max_position_embeddings", None) or 2048,
        n_heads=attention.n_heads,
        n_key_value_heads=attention.n_kv_heads,
        d_mlp=getattr(text, "intermediate_size", None),
        d_vocab=text.vocab_size,
        act_fn=getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None),
        device=str(input_device(model)),
        dtype=model.dtype,
        positional_embedding_type="rotary",
        normalization_type=normalization_type,
        final_rms=final_rms,
        gated_mlp=Block("", anatomy.language[0]).mlp.is_gated,
    )
