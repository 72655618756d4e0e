"""Whether the metrics of the first token see what the model says: they are compared with generated answers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pandas as pd
import torch

from mmlens.arguments import BATCH_SIZE, whole_number
from mmlens.errors import MmlensWarning
from mmlens.metrics.answers import generated_accuracy
from mmlens.metrics.outcomes import DEFAULT_MAX_NEW_TOKENS, accuracy, evaluate
from mmlens.model.batches import Batches, Prompts
from mmlens.model.hooked_vlm import HookedVLM, model_of


@torch.no_grad()
def first_token_agreement(
    model: HookedVLM,
    prompts: Prompts,
    *,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    batch_size: int = BATCH_SIZE,
    progress: bool = False,
) -> pd.DataFrame:
    """One row per example: what `accuracy` and `generated_accuracy` say of it, and what they looked at.

    Columns: example, accuracy, generated_accuracy, expected_token (the answer's first), token (the most probable one)
    and text (the greedy answer). Warns (MmlensWarning) where a generated answer is right and its first token is called
    wrong: then the model writes its answers in another way than first tokens look for, and metrics of whole or of
    generated answers are the ones to take.

    >>> import mmlens
    >>> model = mmlens.HookedVLM.from_pretrained("micro")
    >>> table = first_token_agreement(model, mmlens.scene_examples("objects", 4, seed=0))
    >>> list(table.columns)
    ['example', 'accuracy', 'generated_accuracy', 'expected_token', 'token', 'text']
    """
    model_of(model)
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=1)
    rows = []
    for index, prompt in Batches(model, prompts, batch_size, progress=progress, label="first tokens"):
        logits = model(prompt, logits_to_keep=1)[:, -1:]
        texts = model.answer(prompt, max_new_tokens=max_new_tokens, do_sample=False)
        right = evaluate(accuracy, "accuracy", prompt, logits=logits)
        generated = evaluate(generated_accuracy, "generated_accuracy", prompt, answers=texts)
        assert prompt.answer_tokens is not None
        named = model.tokenizer.convert_ids_to_tokens
        greedy = named(logits[:, -1].argmax(-1).tolist())
        expected = named([own[0] for own in prompt.answer_tokens])
        columns = index, right.tolist(), generated.tolist(), expected, greedy, texts
        rows += list(zip(*columns, strict=True))
    names = ["example", "accuracy", "generated_accuracy", "expected_token", "token", "text"]
    table = pd.DataFrame(rows, columns=names).sort_values("example", ignore_index=True)
    warn_of_disagreement(table["accuracy"].tolist(), table["generated_accuracy"].tolist(), stacklevel=4)
    return table


def warn_of_disagreement(first: Sequence[float], generated: Sequence[float], *, stacklevel: int) -> None:
    """Warn where generated answers are right whose first token is called wrong."""
    missed = [
        row for row, (one, other) in enumerate(zip(first, generated, strict=True)) if other > 0 and one == 0
    ]
    if missed:
        warnings.warn(
            f"{len(missed)} of {len(first)} generated answers are right where the metric of the first token calls them "
            f"wrong (the first of them: example {missed[0]}): the model writes them with another first token than the "
            "answer's. Measure generated answers (generated_accuracy) or whole ones (multiple_choice); "
            "mmlens.metrics.first_token_agreement(model, examples) shows both",
            MmlensWarning,
            stacklevel=stacklevel,
        )
