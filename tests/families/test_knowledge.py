"""What a family is called, and by what names its modules go, is known in families/ and nowhere else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

import mmlens
from mmlens import internals
from mmlens.families import names, placeholders
from mmlens.families.catalog import FAMILIES
from mmlens.families.refused import REFUSED

PACKAGE = Path(mmlens.__file__).parent
ELSEWHERE = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    # The models that ship are models; what transformers keeps inside is in internals.
    if path.relative_to(PACKAGE).parts[0] not in ("families", "shipped", "internals.py")
]

TYPES = {*FAMILIES, *REFUSED}
CLASSES = {
    name
    for name in dir(transformers)
    if re.search(r"(For[A-Z]\w+|Model|Processor|Processing|ImageProcessor|Config|Attention)$", name)
    and any(name.lower().startswith(kind.replace("_", "").replace("-", "")) for kind in TYPES)
}
ATTRIBUTES = {
    name.removeprefix("tanh ").split(".")[0]
    for roles in (names.ROLES, names.ATTENTION_ROLES, names.MLP_ROLES)
    for known in roles.values()
    for name in known
    if "_" in name and name not in roles
} - set(names.ROLES)
ATTRIBUTES |= {names.KEYS_OF_AN_EARLIER_LAYER, names.LATENT_QUERIES, names.IMAGE_STATES}
ATTRIBUTES |= {*placeholders.POSITION_MASKS, *placeholders.DROP_ALPHA, "image_placeholder_token"}
CODE = TYPES | CLASSES | ATTRIBUTES


def words_of(tree: ast.AST) -> Iterator[str]:
    """Names, attributes, imports and texts of a module's code; no docstring, and no word inside a message."""
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (name.name for name in node.names)
            yield from (getattr(node, "module", None) or "").split(".")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


@pytest.mark.parametrize("path", ELSEWHERE, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_room_but_families_names_one(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {word for word in words_of(tree) if word in CODE}
    assert not found, "what single families, or their modules, are called belongs into mmlens/families"


@pytest.mark.parametrize(
    "code",
    [
        "from transformers import LlavaForConditionalGeneration",
        "from transformers.models.llava import modeling_llava",
        "if model.config.model_type == 'qwen3_vl': pass",
        "layer.self_attn.q_proj",
        "getattr(module, 'is_kv_shared_layer', False)",
        "type(processor).__name__ in ('Idefics2Processor',)",
    ],
)
def test_the_names_are_known(code: str) -> None:
    assert any(word in CODE for word in words_of(ast.parse(code)))


def test_docstrings_and_messages_may_tell_of_families() -> None:
    assert not any(
        word in CODE for word in words_of(ast.parse('"""llava"""\nraise ValueError("as llava has")'))
    )
    assert len(CLASSES) > 200 and set(internals.IMAGE_TEXT_MODELS) & TYPES
