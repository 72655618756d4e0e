"""The write side: how much of the answer's logit a head writes from the evidence (direct logit contribution)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmlens.arguments import BATCH_SIZE, instance_of, one_of
from mmlens.errors import InvalidValueError
from mmlens.head_scores import HeadScores
from mmlens.model.batches import Prompts
from mmlens.model.hooked_vlm import HookedVLM, model_of
from mmlens.model.hooks import Hook
from mmlens.model.prompt import Prompt, check_left_padding, prompt_of
from mmlens.model.prompt_answers import answer_ids_of
from mmlens.model.taps import norm_arithmetic
from mmlens.scores.retrieval import evidence_tokens
from mmlens.scores.rows import Rows, of_layers
from mmlens.scores.score import HeadScore
from mmlens.token_map import BoxMapping, mapping_of

FINAL_NORMS = ("frozen", "none")
OFF_EVIDENCE = ("all", "visual")


def logit_contribution(
    model: HookedVLM,
    prompts: Prompts,
    *,
    final_norm: Literal["frozen", "none"] = "frozen",
    off_evidence: Literal["all", "visual"] | None = "all",
    batch_size: int = BATCH_SIZE,
    mapping: BoxMapping = "merged",
    progress: bool = True,
) -> HeadScores:
    """What a head writes towards the answer from the evidence, minus what it writes from as much elsewhere.

    phi_j = u_y . (A_j W_O v_j) at the prompt's last position, where the answer y is predicted; the score is the sum of
    phi over the evidence V* minus |V*| / n times its sum over the n positions off the evidence: all other positions
    of the prompt (off_evidence="all", as published), the other visual ones ("visual"), or nothing (None).

    `final_norm` says what u_y is. "frozen": g * W_U[:, y] / scale, with the final norm's gain g and its scale at that
    position in this very run, so that phi is in logits, and sums over heads, positions, MLPs and embedding to the
    answer's logit (up to the biases of norm and unembedding; a cap on logits stays out). "none": W_U[:, y] alone,
    as published: without the norm, so without a unit, and a large stream counts for more. A norm after attention
    (Gemma) and a layer's own factor are part of what a head writes: frozen likewise, in both.

    Source: arXiv 2607.01002 (LOCOS) and its code, which averages over all tokens of right answers as they are
    generated. Ours is the first token of the known answer, from one forward pass. Paths through later layers are not
    in it: a direct contribution of 0 does not mean no effect.

    Raises ValueError as `ram`, for an unknown option, where nothing is off the evidence, and where a head's output is
    not its pattern times its values (gated attention, shared values); NoWeightError where W_O or W_U cannot be read.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> logit_contribution(model, mmlens.scene_examples("objects", 2, seed=0), progress=False)
    HeadScores(logit contribution: 8 layers x 8 heads, 2 examples)
    """
    one_of("final_norm", final_norm, FINAL_NORMS)
    if off_evidence is not None:
        one_of("off_evidence", off_evidence, OFF_EVIDENCE)
    mapping_of(mapping)

    def of_batch(model: HookedVLM, prompt: Prompt) -> Float[Tensor, "batch layer head"]:
        evidence = evidence_tokens(prompt, mapping).cpu()
        weights = evidence.float()
        if off_evidence is not None:
            others = prompt.token_map.is_image if off_evidence == "visual" else ~prompt.token_map.is_padding
            weights -= _length_matched(evidence, others.cpu() & ~evidence)
        return position_contributions(model, prompt, weights, final_norm=final_norm)

    score = HeadScore("logit contribution", of_batch, needs=("evidence", "answer"))
    return score(model, prompts, batch_size=batch_size, progress=progress)


@torch.no_grad()
def position_contributions(
    model: HookedVLM,
    prompt: Prompt,
    weights: Float[Tensor, "batch pos"],
    *,
    final_norm: Literal["frozen", "none"] = "frozen",
) -> Float[Tensor, "batch layer head"]:
    """Sum over positions j of weights_j phi_j, of every head: `logit_contribution` for positions of your choice.

    All ones give a head's whole direct contribution to the answer's logit. The prompt carries its answers
    (`model.prompt_examples`) and is padded on the left. Raises ValueError as `logit_contribution` does; NaN where the
    model has no head.
    """
    model_of(model)
    one_of("final_norm", final_norm, FINAL_NORMS)
    answer_ids_of(prompt_of(prompt))  # Raises before anything runs.
    if instance_of("weights", weights, Tensor, "a tensor [batch, pos]").shape != prompt.shape:
        raise InvalidValueError(
            f"weights has shape {list(weights.shape)}; expected that of the prompt, [batch, pos] = {list(prompt.shape)}"
        )
    check_left_padding(prompt.inputs["attention_mask"])
    towards = _directions(model, prompt, final_norm)
    total: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    expected: dict[int, Tensor] = {}
    scales: dict[str, Tensor] = {}

    def consume(layer: int, rows: Rows, real: Bool[Tensor, "batch query"]) -> None:
        pattern = rows[:, :, 0]
        value = values.pop(layer).to(pattern)
        n_heads, n_shared = pattern.shape[1], pattern.shape[1] // value.shape[2]
        per_head = value.repeat_interleave(n_shared, dim=2)
        expected[layer] = torch.einsum("bhk,bkhd->bhd", pattern, per_head)
        attention = model.blocks[layer].attn
        direction = _before_the_norm(model, layer, towards.to(pattern))
        write = torch.einsum("hdm,bm->bhd", attention.W_O.to(pattern), direction)
        if attention.scale is not None:
            write = write * torch.as_tensor(attention.scale).to(pattern)
        phi = pattern * torch.einsum("bkhd,bhd->bhk", per_head, write)
        total[layer] = torch.einsum("bhk,bk->bh", phi, weights.to(phi))[:, :n_heads]

    def keep_value(value: Tensor, hook: Any) -> None:
        values[hook.layer()] = value

    def check(z: Tensor, hook: Any) -> None:
        layer, own = hook.layer(), z[:, -1].float()
        given = expected.pop(layer).to(own)
        rounding = 1e-4 if z.dtype == torch.float32 else 3e-2
        if float((own - given).abs().max()) > rounding * max(float(own.abs().max()), 1e-3):
            raise InvalidValueError(
                f"blocks.{layer}.attn: its heads' output is not their pattern times hook_v (a gate, or a norm of "
                "values, stands between), so no position's contribution can be told apart"
            )

    def keep_scale(scale: Tensor, hook: Any) -> None:
        scales[hook.name] = scale[:, -1].float().cpu()

    hooks: list[Hook] = []
    for layer in model.attention_layers:
        name = f"blocks.{layer}.attn.hook_v"
        if name not in model.hook_dict:
            raise InvalidValueError(
                f"{name}: the layer has no values of its own, so no head's contribution can be told"
            )
        hooks += [(name, keep_value), (f"blocks.{layer}.attn.hook_z", check)]
        if model.blocks[layer].parts.post_norm1 is not None:
            hooks.append((f"blocks.{layer}.ln1_post.hook_scale", keep_scale))
    if final_norm == "frozen" and model.ln_final is not None:
        hooks.append(("ln_final.hook_scale", keep_scale))
    with model.hooks(fwd_hooks=hooks):
        model.attention_rows(prompt, prompt.last, consume)
    result = of_layers(model, total)
    for name, scale in scales.items():
        if name == "ln_final.hook_scale":
            result = result / scale[:, :, None]
        else:
            result[:, int(name.split(".")[1])] /= scale
    return result


def _directions(model: HookedVLM, prompt: Prompt, final_norm: str) -> Float[Tensor, "batch d_model"]:
    ids = answer_ids_of(prompt)
    if final_norm == "none" or model.ln_final is None:
        return model.W_U.T[ids.to(model.W_U.device)].float()
    towards = model.residual_directions(ids).float()
    _, centred, _ = norm_arithmetic(model.ln_final, towards.shape[-1], towards)
    return towards - towards.mean(-1, keepdim=True) if centred else towards


def _before_the_norm(
    model: HookedVLM, layer: int, direction: Float[Tensor, "batch d_model"]
) -> Float[Tensor, "batch d_model"]:
    """The direction as it reads what stands before the norm after attention, up to that norm's scale."""
    norm = model.blocks[layer].parts.post_norm1
    if norm is None:
        return direction
    gain, centred, _ = norm_arithmetic(norm, direction.shape[-1], direction)
    direction = direction * gain
    return direction - direction.mean(-1, keepdim=True) if centred else direction


def _length_matched(
    evidence: Bool[Tensor, "batch pos"], others: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    counts = others.sum(-1)
    if bool((counts == 0).any()):
        raise InvalidValueError(
            f"batch row(s) {(counts == 0).nonzero().flatten().tolist()} have no such position off the evidence; "
            "off_evidence='all' or None"
        )
    return others * (evidence.sum(-1) / counts)[:, None]
