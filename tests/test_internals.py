"""One canary for each thing read of transformers' private interface; a failure names what moved."""

from __future__ import annotations

from typing import Any

from conftest import generate, two_image_prompt

import mmlens
from mmlens import internals


def test_the_decoder_is_given_its_cache_under_a_known_keyword(model: mmlens.HookedVLM) -> None:
    seen: list[tuple[list[str], int]] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((sorted(kwargs), internals.cached_length(kwargs)))

    prompt = two_image_prompt(model)
    handle = model.anatomy.decoder.register_forward_pre_hook(look, with_kwargs=True)
    try:
        generate(model, prompt, 3, [])
    finally:
        handle.remove()
    length = prompt.inputs["input_ids"].shape[1]
    assert [known for _, known in seen] == [0, length, length + 1], (
        f"transformers renamed the keyword of the decoder's key-value cache, or counts it anew: of "
        f"{internals.CACHE_KEYWORDS} none tells the positions held; the keywords given are {seen[-1][0]}"
    )
