"""Every hook point's name, shape and meaning: the one vocabulary of the package.

Names and shapes are TransformerLens'. `{l}` is a layer. k and v keep their own head count under grouped
queries; scores and patterns have one block of rows per query head.
"""

from __future__ import annotations

import re

from mmlens.errors import InvalidValueError, UnknownNameError

STREAM = "[batch, pos, d_model]"
"""The residual stream's axes in all but a few families."""

BLOCK_HOOKS: dict[str, str] = {
    "hook_resid_pre": "[batch, pos, d_model] residual stream into the layer",
    "hook_attn_in": "[batch, pos, d_model] what attention reads from the stream, before its norm; edits reach it alone",
    "ln1.hook_scale": "[batch, pos, 1] what the first norm divides by",
    "ln1.hook_normalized": "[batch, pos, d_model] after the first norm, before its weight and bias",
    "attn.hook_q": "[batch, pos, head, d_head] queries as projected, before any norm and rotation",
    "attn.hook_k": "[batch, pos, kv_head, d_head] keys as projected, before any norm and rotation",
    "attn.hook_v": "[batch, pos, kv_head, d_head] values as projected",
    "attn.hook_rot_q": "[batch, pos, head, d_head] queries as attention uses them",
    "attn.hook_rot_k": "[batch, key, kv_head, d_head] keys as attention uses them, cached ones included",
    "attn.hook_attn_scores": "[batch, head, query, key] before the softmax, mask added",
    "attn.hook_pattern": "[batch, head, query, key] after the softmax",
    "attn.hook_z": "[batch, pos, head, d_head] each head's output before W_O",
    "attn.hook_result": "[batch, pos, head, d_model] each head's output after W_O",
    "ln1_post.hook_scale": "[batch, pos, 1] what a norm after attention divides by",
    "ln1_post.hook_normalized": "[batch, pos, d_model] after a norm after attention, before its weight and bias",
    "hook_attn_out": "[batch, pos, d_model] what attention (or another mixer of positions) adds to the stream",
    "hook_resid_mid": "[batch, pos, d_model] residual stream after attention",
    "hook_mlp_in": "[batch, pos, d_model] what the MLP reads from the stream, before its norm; edits reach it alone",
    "ln2.hook_scale": "[batch, pos, 1] what the second norm divides by",
    "ln2.hook_normalized": "[batch, pos, d_model] after the second norm, before its weight and bias",
    "ln2_post.hook_scale": "[batch, pos, 1] what a norm after the MLP divides by",
    "ln2_post.hook_normalized": "[batch, pos, d_model] after a norm after the MLP, before its weight and bias",
    "hook_mlp_out": "[batch, pos, d_model] what the MLP adds to the stream",
    "hook_resid_post": "[batch, pos, d_model] residual stream out of the layer",
}
"""Hook points of a layer, language `blocks.{l}.` and vision `vision.blocks.{l}.`, in the order they fire;
ln1_post and ln2_post only where it has such norms.

In the vision tower "batch, pos" is as the tower has it: [image or tile, patch] in most families, one packed
axis [patch] in Qwen's, where rot_q, rot_k, scores and pattern fire once per image or window. A cache stacks
what fires several times in one run on its first axis.
"""

BLOCK_IMAGE_HOOKS: dict[str, str] = {
    "image.hook_resid_pre": "[image_token, d_model]",
    "image.hook_z": "[image_token, head, d_head]",
    "image.hook_attn_out": "[image_token, d_model]",
    "image.hook_resid_mid": "[image_token, d_model]",
    "image.hook_mlp_out": "[image_token, d_model]",
    "image.hook_resid_post": "[image_token, d_model]",
}
"""The same activations of a language layer at the visual positions only, packed in batch-major order."""

MODEL_HOOKS: dict[str, str] = {
    "hook_embed": "[batch, pos, d_model] text and image embeddings as they enter the first layer",
    "image.hook_embed": "[image_token, d_model] the projected visual embeddings as they enter the first layer",
    "ln_final.hook_scale": "[batch, pos, 1] what the final norm divides by",
    "ln_final.hook_normalized": "[batch, pos, d_model] after the final norm, before its weight",
    "vision.hook_embed": "[image, patch, d_vision] patch embeddings as they enter the tower's first layer",
    "vision.ln_post.hook_scale": "[image, patch, 1] what the tower's last norm divides by",
    "vision.ln_post.hook_normalized": "[image, patch, d_vision] after the tower's last norm, before its weight",
    "projector.hook_in": "[..., d_vision] what the projector reads",
    "projector.hook_out": "[..., d_model] what the projector gives, in the tower's order",
    "vision.deepstack.{i}.hook_out": "[image_token, d_model] deep features for language layer i, in the tower's order",
    "blocks.{l}.attn.hook_q_input": "[batch, pos, head, d_model] what each head's queries read from the stream, "
    "before ln1; an edit reaches that head's queries alone",
    "blocks.{l}.attn.hook_k_input": "[batch, pos, kv_head, d_model] what each head's keys read from the stream",
    "blocks.{l}.attn.hook_v_input": "[batch, pos, kv_head, d_model] what each head's values read from the stream",
    "blocks.{l}.mlp.hook_post": "[batch, pos, d_mlp] neurons, gated where they have gates, as W_out reads them",
    "blocks.{l}.hook_deepstack": "[image_token, d_model] what the stream gains after layer l, at image positions",
}
"""Hook points outside the layers, or of language layers alone. Only where a family has them: vision.ln_post, the
deep ones, what heads read (needs a norm before attention and projections from the stream), neurons of plain MLPs."""

PARTS: dict[str, str] = {
    "attn": "hook_attn_out",
    "mlp": "hook_mlp_out",
    "z": "attn.hook_z",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "pattern": "attn.hook_pattern",
    "result": "attn.hook_result",
    "post": "mlp.hook_post",
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "deepstack": "hook_deepstack",
}
"""The word for a part of a layer, as TransformerLens abbreviates it, and the hook point that holds what it gives."""

MODEL_PARTS: dict[str, str] = {"embed": "hook_embed", "image": "image.hook_embed"}
"""Words for what enters the first layer: all embeddings, those of images alone."""

PART_INPUTS: dict[str, str] = {
    "attn": "hook_attn_in",
    "mlp": "hook_mlp_in",
    "q": "attn.hook_q_input",
    "k": "attn.hook_k_input",
    "v": "attn.hook_v_input",
}
"""What a part of a layer reads from the residual stream, and it alone."""

COSTLY_HOOKS = ("hook_result", "hook_q_input", "hook_k_input", "hook_v_input")
"""Left out of a cache of everything unless named: [batch, pos, head, d_model] for every layer is huge."""


def block(layer: int, hook: str) -> str:
    """The full name of a language layer's hook point.

    >>> block(3, "attn.hook_z")
    'blocks.3.attn.hook_z'
    """
    return f"blocks.{layer}.{hook}"


def axes_of(name: str) -> tuple[str, ...]:
    """The axes of a hook point's activation, as the lists above name them.

    Raises KeyError for a name that is in none of the lists.

    >>> axes_of("blocks.2.attn.hook_pattern"), axes_of("blocks.2.image.hook_z")
    (('batch', 'head', 'query', 'key'), ('image_token', 'head', 'd_head'))
    """
    general = re.sub(r"\.\d+\.", lambda match: ".{i}." if "deepstack" in name else ".{l}.", name)
    within = name.split("blocks.", 1)[-1].split(".", 1)[-1].replace("cross_attn.", "attn.")
    for hooks, key in (
        (MODEL_HOOKS, general),
        (MODEL_HOOKS, f"blocks.{{l}}.{within}"),
        (BLOCK_HOOKS, within),
        (BLOCK_IMAGE_HOOKS, within),
    ):
        if key in hooks:
            return tuple(hooks[key][1:].split("]")[0].split(", "))
    if name.endswith("hook_embed"):
        return axes_of("vision.hook_embed")
    raise UnknownNameError(f"{name!r} is in no list of hook points")


def layer_of(name: str) -> int | None:
    """The language layer of a hook point; None outside the language layers.

    >>> layer_of("blocks.12.hook_resid_pre"), layer_of("vision.blocks.3.hook_resid_pre")
    (12, None)
    """
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" else None


def runs_over_positions(name: str) -> bool:
    """Whether the activation runs over the positions of the language model, all of them or the visual ones.

    >>> runs_over_positions("image.hook_embed"), runs_over_positions("projector.hook_out")
    (True, False)
    """
    return layer_of(name) is not None or name.startswith(("hook_embed", "image.", "ln_final."))


def position_axis(name: str) -> int:
    """The axis of an activation that runs over positions, of queries where there are keys too.

    Raises ValueError where there is none.

    >>> position_axis("blocks.2.hook_resid_pre"), position_axis("blocks.2.attn.hook_pattern")
    (1, 2)
    """
    axes = axes_of(name)
    for axis, what in enumerate(axes):
        if what in ("pos", "query", "key"):
            return axis
    raise InvalidValueError(f"{name} is [{', '.join(axes)}]: it has no axis of positions")


def head_axis(name: str) -> int | None:
    """The axis of heads, counted from the end: towers that pack their images have fewer axes in front. None: no heads.

    >>> head_axis("vision.blocks.0.attn.hook_z"), head_axis("blocks.2.hook_resid_pre")
    (-2, None)
    """
    axes = axes_of(name)
    return next((axis - len(axes) for axis, what in enumerate(axes) if what in ("head", "kv_head")), None)
