"""Model types that transformers' image-text-to-text mapping names and mmlens takes no model of, and why."""

from __future__ import annotations

import transformers

_ENCODER_DECODER = "encoder-decoder: "

REFUSED: dict[str, str] = {
    "blip": (
        "no attention, of language or vision side, goes through transformers' attention interface, and the text "
        "decoder reads the image by cross-attention"
    ),
    "diffusion_gemma": (
        "block diffusion: logits belong to a canvas that is denoised in several passes under bidirectional "
        "attention, not to the next token of the prompt"
    ),
    "evolla": "reads proteins: its forward pass takes no image",
    "florence2": (
        _ENCODER_DECODER
        + "image and question are encoder input, the answer is decoded from cross-attention to them"
    ),
    "git": (
        "no attention of its language side goes through transformers' attention interface, and the image is put in "
        "front of the embeddings, where input_ids have no positions"
    ),
    "inkling2_loop": (
        "its middle layers run several times in one forward pass, each time with other inputs, so that a hook point "
        "named by a layer would see several passes in one"
    ),
    "kosmos-2.5": (
        "no attention of its vision side goes through transformers' attention interface, and its processor counts "
        "the image's positions from the left end, which in a left-padded batch is padding"
    ),
    "mistral4": "the mapping names a language model without a vision side: its forward pass takes no image",
    "pi0": "its outputs are velocities of a robot's actions, not logits over a vocabulary",
    "pix2struct": (
        _ENCODER_DECODER
        + "the image, into which a question is drawn, is encoder input, read by cross-attention"
    ),
    "pp_formulanet": _ENCODER_DECODER
    + "the image is encoder input, read by cross-attention, and there is no question",
    "t5gemma2": (
        _ENCODER_DECODER
        + "image and question are encoder input, and one softmax of the decoder runs over its own "
        "positions and the encoder's"
    ),
    "udop": (
        _ENCODER_DECODER
        + "image and question are encoder input, the answer is decoded from cross-attention to them"
    ),
    "vision-encoder-decoder": (
        _ENCODER_DECODER
        + "the image is encoder input, read by cross-attention of whichever decoder was put in"
    ),
}
"""model_type -> why no HookedVLM is made of it."""

BROKEN: dict[str, tuple[str, str]] = {
    "llama4": (
        "5.24.0",
        "its Llama4ForConditionalGeneration reads image_outputs of an output that has none, so that every forward "
        "pass, with or without an image, ends in an AttributeError; transformers 5.23 runs it",
    )
}
"""model_type -> the release of transformers in which the family itself does not run, and why."""


def refusal(model_type: str) -> str | None:
    """Why no HookedVLM is made of a family under the installed transformers; None where one is."""
    if model_type in BROKEN and transformers.__version__ == BROKEN[model_type][0]:
        version, why = BROKEN[model_type]
        return f"transformers {version} is broken for it: {why}"
    return REFUSED.get(model_type)
