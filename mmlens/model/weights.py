"""Weights in TransformerLens' names and shapes, as views of the Hugging Face model's own parameters.

Nothing is folded, centred or copied, so an edit in place of a view edits the model. Where several projections
share one matrix (fused queries, keys and values; queries beside their gates) the view is cut out of it. Keys and
values keep their own head count under grouped queries, as `hook_k` and `hook_v` do and as TransformerLens 4.3 has
it; `QK` and `OV` repeat them to one per query head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import FactoredMatrix
from transformers import PreTrainedModel

from mmlens.families.anatomy import (
    Anatomy,
    AttentionParts,
    LayerParts,
    Projection,
    is_called_norm,
    mlp_linear,
    scale_of,
)
from mmlens.model.linear import NoWeightError, bias_of, unadapted, weight_of
from mmlens.model.taps import norm_arithmetic


@dataclass(frozen=True)
class AttentionWeights:
    """Weights of one attention layer; a missing bias is zeros.

    hook_q = x W_Q + b_Q, where x is what the projection reads (after ln1 with its weight and bias), and so on;
    hook_attn_out = sum over heads of z W_O, plus b_O, wherever no norm or factor stands after.
    """

    name: str
    parts: AttentionParts
    scale: Tensor | float | None

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        """Query weights."""
        return self._weight("q")

    @property
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """Key weights, one per key-value head."""
        return self._weight("k")

    @property
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """Value weights, one per key-value head."""
        return self._weight("v")

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """Output weights."""
        return weight_of(self.parts.out, name=f"{self.name}.W_O").T.unflatten(0, (-1, self.parts.d_value))

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        """Query biases."""
        return self._bias("q")

    @property
    def b_K(self) -> Float[Tensor, "kv_head d_head"]:
        """Key biases."""
        return self._bias("k")

    @property
    def b_V(self) -> Float[Tensor, "kv_head d_head"]:
        """Value biases."""
        return self._bias("v")

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """Output bias."""
        return bias_of(self.parts.out, f"{self.name}.b_O")

    @property
    def _result_contribution_scale(self) -> Tensor | float:
        # ActivationCache multiplies by this what it computes from hook_z and W_O.
        return 1.0 if self.scale is None else self.scale

    def _projection(self, role: str) -> Projection:
        projection = self.parts.projections.get(role)
        if projection is None:
            raise NoWeightError(
                f"{self.name} has no {role} projection: {type(self.parts.module).__name__} attends with the "
                "keys and values of an earlier layer"
            )
        if projection.of_latent:
            raise NoWeightError(
                f"{self.name} has no {role} weight on the residual stream: under latent attention "
                f"({type(self.parts.module).__name__}) it is projected from a normalized latent of "
                f"{projection.module.in_features} numbers"
            )
        return projection

    def _weight(self, role: str) -> Tensor:
        projection = self._projection(role)
        weight = weight_of(projection.module, name=f"{self.name}.W_{role.upper()}")
        return projection.read(weight.T).transpose(0, 1)

    def _bias(self, role: str) -> Tensor:
        projection = self._projection(role)
        return projection.read(bias_of(projection.module, f"{self.name}.b_{role.upper()}"))


@dataclass(frozen=True)
class MLPWeights:
    """Weights of a plain MLP, out(act(x W_in)), or a gated one, out(act(x W_gate) * (x W_in)).

    A missing bias is zeros. Each raises NoWeightError where the layer has another kind (experts), and W_gate also
    where there is no gate.
    """

    name: str
    parts: LayerParts

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """What the neurons read."""
        return self._cut(self._read("in", "W_in").T, half=1)

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        """What the neurons' gates read."""
        return self._cut(self._read("gate", "W_gate").T, half=0)

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """What the neurons write."""
        return weight_of(self.out, name=f"{self.name}.W_out").T

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        """Bias of the neurons."""
        return self._cut(bias_of(*self._reader("in", "b_in")), half=1)

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """Output bias."""
        return bias_of(self.out, f"{self.name}.b_out")

    @property
    def is_gated(self) -> bool:
        """Whether the neurons have gates."""
        return self._find("gate") is not None or self._find("gate_and_in") is not None

    @property
    def out(self) -> nn.Module:
        """The linear module that the neurons' activations enter; NoWeightError where there is none."""
        module = self._find("out")
        if module is None:
            raise self._other_kind("W_out")
        return module

    @property
    def is_plain(self) -> bool:
        """Whether the layer has such an MLP at all."""
        return self._find("out") is not None

    def _find(self, role: str) -> nn.Module | None:
        return mlp_linear(self.parts, role)

    def _reader(self, role: str, weight: str) -> tuple[nn.Module, str]:
        module = self._find(role) or self._find("gate_and_in")
        if module is None:
            raise self._other_kind(weight)
        return module, f"{self.name}.{weight}"

    def _read(self, role: str, weight: str) -> Tensor:
        module, name = self._reader(role, weight)
        return weight_of(module, name=name)

    def _cut(self, last_axis: Tensor, half: int) -> Tensor:
        return last_axis if self._find("gate_and_in") is None else last_axis.chunk(2, dim=-1)[half]

    def _other_kind(self, weight: str) -> NoWeightError:
        module = self.parts.mlp_out
        made_of = ", ".join(name for name, _ in module.named_children()) if module is not None else "nothing"
        return NoWeightError(f"{self.name} has no {weight}: {type(module).__name__} is made of {made_of}")


@dataclass(frozen=True)
class Block:
    """One language layer's weights and norms, as TransformerLens' `model.blocks[l]`."""

    name: str
    parts: LayerParts

    @property
    def attn(self) -> AttentionWeights:
        """Attention weights; raises NoWeightError where the layer has another mixer of positions."""
        attention = self.parts.attention
        if attention is None:
            raise NoWeightError(
                f"{self.name} has no softmax attention: its mixer is {type(self.parts.mixer).__name__}"
            )
        scale = scale_of(self.parts.module, self.parts.attention_scale)
        return AttentionWeights(f"{self.name}.attn", attention, scale)

    @property
    def mlp(self) -> MLPWeights:
        """MLP weights."""
        return MLPWeights(f"{self.name}.mlp", self.parts)

    @property
    def ln1(self) -> nn.Module | None:
        """The model's own norm before attention."""
        return self.parts.norm1

    @property
    def ln2(self) -> nn.Module | None:
        """The model's own norm before the MLP."""
        return self.parts.norm2

    @property
    def submodules(self) -> dict[str, Any]:
        """What the layer is made of, where TransformerLens' tools ask whether a head's z W_O enters the stream."""
        post = {"ln1_post": self.parts.post_norm1} if self.parts.post_norm1 is not None else {}
        return {"attn": self.parts.mixer, **post}

    @property
    def hook_aliases(self) -> dict[str, str]:
        """Whose output hook_attn_out is; see `submodules`."""
        return {"hook_attn_out": "attn.hook_out" if self.parts.post_norm1 is None else "ln1_post.hook_out"}

    @property
    def residual_contribution_scale(self) -> Tensor | float:
        """What the MLP's output is multiplied by before it enters the stream."""
        scale = scale_of(self.parts.module, self.parts.mlp_scale)
        return 1.0 if scale is None else scale

    def bias(self, *, attention: bool = True, mlp: bool = True) -> Tensor | float:
        """What the layer adds to the stream at every position: output biases, times the layer's factor.

        Raises NoWeightError where a norm after the bias makes it depend on the position.
        """
        total: Tensor | float = 0.0
        for wanted, post_norm, scale, bias in (
            (attention, self.parts.post_norm1, self.parts.attention_scale, lambda: self.attn.b_O),
            (mlp, self.parts.post_norm2, self.parts.mlp_scale, lambda: self.mlp.b_out),
        ):
            if not wanted:
                continue
            value = bias()
            if post_norm is not None:
                if bool(value.any()):
                    raise NoWeightError(
                        f"{self.name} has no constant bias: {type(post_norm).__name__} stands after it"
                    )
                value = norm_bias(post_norm, value)
            factor = scale_of(self.parts.module, scale)
            total = total + (value if factor is None else value * factor)
        return total


def _stacked(blocks: Sequence[Block], name: str) -> Tensor:
    """A weight of every layer, such as "attn.W_Q", on a new first axis."""
    weights = list(map(attrgetter(name), blocks))
    shapes = [tuple(weight.shape) for weight in weights]
    if len(set(shapes)) > 1:
        raise NoWeightError(
            f"{name} of the layers cannot be stacked, their shapes differ: {shapes}; "
            f"read model.blocks[l].{name}"
        )
    return torch.stack([weight.to(weights[0].device) for weight in weights])


def _of_all_layers(name: str, doc: str) -> Any:
    return property(lambda model: _stacked(model.blocks, name), doc=doc)


class WeightProperties:
    """The weights that TransformerLens' tools and users read of a model; a part of HookedVLM.

    Stacked weights have the layers on a new first axis. They raise NoWeightError where a layer has no such weight
    or layers differ in shape; `blocks[l]` then still gives each layer's own.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> cfg = model.cfg
    >>> model.W_Q.shape == (cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_head)
    True
    >>> model.blocks[0].attn.W_O.data_ptr() == model.anatomy.language[0].attention.out.weight.data_ptr()
    True
    >>> model.OV.shape == (cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_model)
    True
    """

    hf_model: PreTrainedModel
    anatomy: Anatomy
    cfg: Any

    @property
    def blocks(self) -> list[Block]:
        """The language layers."""
        return [Block(f"blocks.{layer}", parts) for layer, parts in enumerate(self.anatomy.language)]

    @property
    def embed(self) -> nn.Module:
        """The model's own token embedding."""
        return self.hf_model.get_input_embeddings()

    @property
    def unembed(self) -> nn.Module:
        """The model's own unembedding. Some families scale or cap what it gives before they call it logits."""
        return self.hf_model.get_output_embeddings()

    @property
    def ln_final(self) -> nn.Module | None:
        """The model's own final norm, weight and bias included."""
        return self.anatomy.final_norm

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embeddings. Factors that a family applies to them are not in it."""
        return weight_of(self.embed, name="W_E")

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding, without the final norm's weight (see `tokens_to_residual_directions`)."""
        return weight_of(self.unembed, name="W_U").T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The unembedding's bias, zeros where there is none."""
        return bias_of(self.unembed, "b_U")

    W_Q: Float[Tensor, "layer head d_model d_head"] = _of_all_layers(
        "attn.W_Q", "Query weights of all layers."
    )
    W_K: Float[Tensor, "layer kv_head d_model d_head"] = _of_all_layers(
        "attn.W_K", "Key weights of all layers, one per key-value head."
    )
    W_V: Float[Tensor, "layer kv_head d_model d_head"] = _of_all_layers(
        "attn.W_V", "Value weights of all layers, one per key-value head."
    )
    W_O: Float[Tensor, "layer head d_head d_model"] = _of_all_layers(
        "attn.W_O", "Output weights of all layers."
    )
    b_Q: Float[Tensor, "layer head d_head"] = _of_all_layers("attn.b_Q", "Query biases of all layers.")
    b_K: Float[Tensor, "layer kv_head d_head"] = _of_all_layers("attn.b_K", "Key biases of all layers.")
    b_V: Float[Tensor, "layer kv_head d_head"] = _of_all_layers("attn.b_V", "Value biases of all layers.")
    b_O: Float[Tensor, "layer d_model"] = _of_all_layers("attn.b_O", "Attention output biases of all layers.")
    W_in: Float[Tensor, "layer d_model d_mlp"] = _of_all_layers(
        "mlp.W_in", "MLP input weights of all layers."
    )

    @property
    def W_gate(self) -> Float[Tensor, "layer d_model d_mlp"] | None:
        """MLP gate weights of all layers; None where no MLP has gates, as in TransformerLens."""
        if not any(block.mlp.is_gated for block in self.blocks):
            return None
        return _stacked(self.blocks, "mlp.W_gate")

    W_out: Float[Tensor, "layer d_mlp d_model"] = _of_all_layers(
        "mlp.W_out", "MLP output weights of all layers."
    )
    b_in: Float[Tensor, "layer d_mlp"] = _of_all_layers("mlp.b_in", "MLP input biases of all layers.")
    b_out: Float[Tensor, "layer d_model"] = _of_all_layers("mlp.b_out", "MLP output biases of all layers.")

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q W_K^T of every layer and query head, [layer, head, d_model, d_model].

        What stands between projections and scores (norms of queries and keys, rotation) is not in it, nor is
        ln1's weight.
        """
        return FactoredMatrix(self.W_Q, self._per_query_head(self.W_K).transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """W_V W_O of every layer and query head, [layer, head, d_model, d_model]; without ln1's weight."""
        return FactoredMatrix(self._per_query_head(self.W_V), self.W_O)

    @property
    def all_head_labels(self) -> list[str]:
        """["L0H0", "L0H1", ...], as `stack_head_results` orders heads."""
        return [
            f"L{layer}H{head}"
            for layer, parts in enumerate(self.anatomy.language)
            for head in range(parts.attention.n_heads if parts.attention else 0)
        ]

    def residual_directions(self, token_ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape d_model"]:
        """The directions d_t = g * W_U[:, t], where g is the final norm's own gain.

        The unembedding gives token t the logit ln_final.hook_normalized . d_t, up to a constant (the biases of
        norm and unembedding). TransformerLens folds the gain into W_U for this; here W_U stays as it is.
        """
        directions = self.W_U.T[token_ids.to(self.W_U.device)]
        if self.ln_final is None:
            return directions
        gain, _, _ = norm_arithmetic(self.ln_final, directions.shape[-1], directions)
        return directions * gain

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """The sum of all output biases in the stream that enters `layer` (its MLP, with `mlp_input`).

        Raises NoWeightError where a norm after a bias makes it depend on the position.
        """
        total = torch.zeros_like(self.W_E[0])
        for block in self.blocks[:layer]:
            total = total + torch.as_tensor(block.bias(mlp=include_mlp_biases), device=total.device)
        if mlp_input:
            total = total + torch.as_tensor(self.blocks[layer].bias(mlp=False), device=total.device)
        return total

    def _per_query_head(self, weight: Float[Tensor, "layer kv_head a b"]) -> Float[Tensor, "layer head a b"]:
        return weight.repeat_interleave(self.W_Q.shape[1] // weight.shape[1], dim=1)


def normalization_of(anatomy: Anatomy) -> tuple[str | None, bool]:
    """TransformerLens' normalization_type ("LN", "RMS" or None) of the layers, and whether the final norm is RMS.

    The first norm of the layers speaks for all.
    """
    final = anatomy.final_norm
    norms = [layer.norm1 for layer in anatomy.language if layer.norm1 is not None and is_norm(layer.norm1)]
    if final is None or not is_norm(final):
        return None, False
    final_rms = not subtracts_mean(final)
    within_rms = not subtracts_mean(norms[0]) if norms else final_rms
    return "RMS" if within_rms else "LN", final_rms


def is_norm(module: nn.Module) -> bool:
    """Whether a module in a norm's place divides by a scale (some families have gates or factors there)."""
    return is_called_norm(unadapted(module))


def subtracts_mean(norm: nn.Module) -> bool:
    """Whether a norm subtracts the mean (LayerNorm) or not (RMSNorm), whatever its class is called."""
    weight = next(norm.parameters(), torch.empty(0))
    # Weights that are offloaded are brought to wherever the input is.
    like = torch.empty(0, dtype=weight.dtype, device="cpu" if weight.is_meta else weight.device)
    return norm_arithmetic(norm, 64 if not weight.numel() else weight.shape[-1], like)[1]


@torch.no_grad()
def norm_bias(norm: nn.Module, like: Float[Tensor, "... d_model"]) -> Float[Tensor, " d_model"]:
    """What a norm adds to the normalized vector: its response to zeros."""
    return norm.forward(torch.zeros_like(like).view(1, 1, -1))[0, 0]
