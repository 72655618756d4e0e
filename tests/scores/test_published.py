"""Published head scores: made-up files of exactly the published formats, and the real ones where they are present."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mmlens.cli import main
from mmlens.errors import MissingFileError, MmlensError
from mmlens.head_scores import HeadScores, half_mass_share
from mmlens.heads import HeadGrid, HeadSet
from mmlens.scores.published import (
    GRIDS,
    KeyValueScores,
    read_duo_attention,
    read_gaze_heads,
    read_mmrethead,
    read_mmrethead_heads,
    read_qrhead,
    read_retrieval_head,
    read_sparsemm,
)
from mmlens.scores.recomputed import PUBLISHED_RHO, recompute_published

ARTEFACTS = Path(__file__).parents[3] / "shared" / "artefacts" / "heads"
needs_artefacts = pytest.mark.skipif(not ARTEFACTS.is_dir(), reason="the published files are not here")

N_LAYERS, N_HEADS = 4, 16


def _scores(seed: int, shape: tuple[int, ...] = (N_LAYERS, N_HEADS)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def _mmrethead(scores: np.ndarray, **arguments: Any) -> dict[str, Any]:
    """A result as the source writes it: all heads, highest first, under "head_score_list"."""
    pairs = [[f"{layer}-{head}", float(scores[layer, head])] for layer, head in np.ndindex(*scores.shape)]
    given = {
        "model_name_or_path": "Qwen/Some-VL-2B-Instruct",
        "datasets": "mm_niah_retrieval-image",
        "test_files": "NIAH/retrieval-image_test_K8_dep6.jsonl",
        "input_max_length": 8192,
        "max_test_samples": 20,
        "add_null_score": True,
        "overwrite": True,
        "attn_implementation": None,
    }
    return {
        "args": given | arguments,
        "head_score_list": sorted(pairs, key=lambda pair: -pair[1]),
        "activation_frequency_head_list": None,
        "activation_frequency_path": None,
        "activation_frequency_definition": "a text",
        "metrics": {"input_len": [6513, 6507]},
        "averaged_metrics": {"input_len": 6510.0},
        "memory_usage": 19353376768,
        "throughput": 0.077,
    }


def _tests_of_heads(scores: np.ndarray) -> dict[str, list[float]]:
    """{"layer-head": [score, ...]} of [test, layer, head]."""
    return {
        f"{layer}-{head}": scores[:, layer, head].tolist() for layer, head in np.ndindex(*scores.shape[1:])
    }


def _write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def _gates(values: np.ndarray) -> str:
    """As np.savetxt writes them."""
    return "\n".join("\t".join(f"{value:.18e}" for value in row) for row in values) + "\n"


# ---------------------------------------------------------------------- made-up files


def test_a_result_of_mmrethead(tmp_path: Path) -> None:
    given = _scores(0)
    scores = read_mmrethead(_write(tmp_path / "result.json", _mmrethead(given)))
    assert torch.equal(scores.per_example, torch.from_numpy(given)[None])
    assert scores.kinds == ("mm_niah_retrieval-image",) and scores.grid.shape == (N_LAYERS, N_HEADS)
    assert "Some-VL-2B-Instruct, mm_niah_retrieval-image" in scores.name
    bare = {"head_score_list": _mmrethead(given)["head_score_list"]}
    assert torch.equal(read_mmrethead(_write(tmp_path / "bare.json", bare)).values, scores.values)


@pytest.mark.parametrize("read", [read_retrieval_head, read_sparsemm])
def test_scores_of_every_test(tmp_path: Path, read: Callable[[Path], HeadScores]) -> None:
    given = _scores(1, (7, N_LAYERS, N_HEADS)).clip(0)
    scores = read(_write(tmp_path / "some-model.json", _tests_of_heads(given)))
    assert torch.equal(scores.per_example, torch.from_numpy(given)) and len(scores) == 7
    assert np.allclose(scores.values, given.mean(0))


def test_a_list_of_mmrethead(tmp_path: Path) -> None:
    content = {
        "args": {"model": "google/gemma-3-12b-it", "total_model_heads": 768, "union_top_k": 3},
        "head_score_list": [["23-4", 0.47], ["7-0", 0.1], ["9-15", 0.3]],
    }
    path = _write(tmp_path / "gemma_8k_union_detection_head_score.json", content)
    assert read_mmrethead_heads(path).heads == ((23, 4), (9, 15), (7, 0))
    assert len(read_mmrethead_heads(path).complement()) == 765
    with pytest.raises(
        ValueError, match=r"holds 3 of 384 heads \(\(0, 0\) is missing\).*read_mmrethead_heads"
    ):
        read_mmrethead(path)
    with pytest.raises(IndexError, match="head 15 is out of range"):
        read_mmrethead_heads(path, grid=(48, 8))
    unknown = _write(tmp_path / "other.json", content | {"args": {"model": "some/model"}})
    with pytest.raises(
        ValueError, match=r"is of 'some/model' \(str\), whose heads are not known here; say which"
    ):
        read_mmrethead_heads(unknown)
    assert len(read_mmrethead_heads(unknown, (48, 16))) == 3


def test_a_list_of_qrhead(tmp_path: Path) -> None:
    written = (
        '# Default configuration\n\nattn_head_set: "16-19,16-2,3-20" # top3\n'
        'model_base_class: "Qwen2.5-7B-Instruct"\nmodel_name_or_path: "Qwen/Qwen2.5-7B-Instruct"'
    )
    path = _write(tmp_path / "Qwen2.5-7B-Instruct_qr_head_NQ.yaml", written)
    heads = read_qrhead(path)
    assert heads.heads == ((16, 19), (16, 2), (3, 20)) and len(heads.complement()) == 28 * 28 - 3
    assert read_qrhead(path, (17, 24)) == HeadSet(heads, (17, 24))
    every = _write(tmp_path / "full.yaml", yaml.safe_dump({"attn_head_set": "full_heads"}))
    assert read_qrhead(every, (2, 3)) == HeadSet([], (2, 3)).complement()
    with pytest.raises(ValueError, match="names no model; say which there are: grid=model.grid"):
        read_qrhead(every)


def test_rankings_of_gaze_heads(tmp_path: Path) -> None:
    rows = [[1, 2, 0.7], [0, 3, 0.9], [1, 0, 0.1]]
    named = [dict(zip(("layer", "head", "score"), row, strict=True)) for row in rows]
    for content in (rows, named):
        heads = read_gaze_heads(_write(tmp_path / "gaze.json", content), grid=(2, 4))
        assert heads.heads == ((0, 3), (1, 2), (1, 0))
    with pytest.raises(ValueError, match="names no model"):
        read_gaze_heads(tmp_path / "gaze.json")


def test_gates_are_of_key_value_heads(tmp_path: Path) -> None:
    given = np.array([[0.5, 1.25], [-0.1, 0.75]])
    path = _write(tmp_path / "lr=0.02" / "full_attention_heads.tsv", _gates(given))
    gates = read_duo_attention(path)
    assert gates.values.tolist() == [[0.5, 1.0], [0.0, 0.75]] and "2 key-value heads" in repr(gates)
    assert torch.equal(read_duo_attention(path.parent).values, gates.values)
    spread = gates.of_query_heads((2, 6))
    by_hand = [[float(gates.values[layer, head // 3]) for head in range(6)] for layer in range(2)]
    assert spread.values.tolist() == by_hand and "of its key-value head" in spread.name
    uneven = gates.of_query_heads(HeadGrid((0, 4)))
    assert uneven.values[1].tolist() == [0.0, 0.0, 0.75, 0.75] and bool(uneven.values[0].isnan().all())
    with pytest.raises(ValueError, match="is of 2 layers with 2 key-value heads, the grid is of 3 x 6 heads"):
        gates.of_query_heads((3, 6))
    with pytest.raises(ValueError, match="5 query heads, which 2 key-value heads cannot share evenly"):
        gates.of_query_heads((2, 5))


def test_query_heads_read_the_key_value_heads_as_in_transformers() -> None:
    from transformers.models.llama.modeling_llama import repeat_kv

    values = torch.rand(3, 4)
    by_transformers = repeat_kv(values[:, :, None, None], 5)[:, :, 0, 0]
    assert torch.equal(KeyValueScores(values, "gate").of_query_heads((3, 20)).values, by_transformers)


def test_key_value_scores_are_no_scores_of_query_heads() -> None:
    """As users run it: without the tests' type checker."""
    gates, scores = KeyValueScores(torch.rand(2, 4), "gate"), HeadScores(torch.rand(1, 2, 4), "RAM")
    assert not isinstance(gates, HeadScores) and not hasattr(gates, "top")
    with pytest.raises(Exception, match=r"KeyValueScores|violates"):
        scores.spearman(gates)
    with pytest.raises(Exception, match=r"KeyValueScores|violates"):
        half_mass_share(gates)
    assert scores.spearman(gates.of_query_heads((2, 4))) <= 1


BROKEN: list[tuple[Callable[[Path], Any], Any, str]] = [
    (read_mmrethead, [1], r"holds \[1\] \(list\); expected a result of MMRetHead"),
    (read_mmrethead, {"scores": []}, r"expected \"head_score_list\".*its keys are \['scores'\]"),
    (read_mmrethead, {"head_score_list": []}, "no scores of MMRetHead"),
    (read_mmrethead, {"head_score_list": [["0-0"]]}, r'expected \["layer-head", score\]'),
    (read_mmrethead, {"head_score_list": [["L0H0", 1.0]]}, "names the head 'L0H0'.*as \"13-18\""),
    (
        read_mmrethead,
        {"head_score_list": [["0-0", "1"]]},
        r"head \(0, 0\) the score '1' \(str\); expected a number",
    ),
    (read_mmrethead, {"head_score_list": [["0-0", 1], ["0-0", 2]]}, r"lists head \(0, 0\) twice"),
    (read_mmrethead, {"head_score_list": [["0-0", 1], ["99999-99999", 2]]}, "holds 2 of 10000000000 heads"),
    (read_mmrethead, '{"head_score_list": [["0-0", NaN]]}', "NaN is no JSON"),
    (read_mmrethead, '{"head_score_list": [["0-0", 1', "it is broken or was cut off"),
    (read_retrieval_head, {"0-0": 1.0}, r"gives head \(0, 0\) 1.0 \(float\); expected a list"),
    (read_retrieval_head, {"0-0": [1.0], "0-1": [1.0, 0.5]}, r"as many scores for every head, got \[1, 2\]"),
    (read_retrieval_head, {"0-0": [True]}, r"the score True \(bool\)"),
    (read_retrieval_head, {"0-0": [1.0], "1-1": [1.0]}, r"holds 2 of 4 heads \(\(0, 1\) is missing\)"),
    (read_sparsemm, {}, "got no head"),
    (read_qrhead, "attn_head_set: [1, 2]", "holds no list of QRHead"),
    (read_qrhead, "attn_head_set: '1-2,x'", "names the head 'x'"),
    (read_qrhead, "a: [", "cannot be read as YAML"),
    (
        read_qrhead,
        "attn_head_set: '1-2,1-2'\nmodel_base_class: Llama-3.1-8B-Instruct",
        r"more than once: \[\(1, 2\)\]",
    ),
    (read_gaze_heads, {"a": 1}, r"expected a list of \[layer, head, score\]"),
    (read_gaze_heads, [[1, 2]], r"holds the row \[1, 2\]"),
    (read_duo_attention, "0.5\tx\n", "expected numbers with tabs between them"),
    (read_duo_attention, "0.5\t0.1\n0.5\n", r"as many numbers in every line, got \[1, 2\]"),
    (read_duo_attention, "", "got no line"),
    (read_duo_attention, "0.5\tnan\n", "a gate that is NaN"),
]


@pytest.mark.parametrize(("read", "content", "said"), BROKEN)
def test_broken_files_are_refused_by_name(
    tmp_path: Path, read: Callable[[Path], Any], content: Any, said: str
) -> None:
    path = _write(tmp_path / "broken.json", content)
    with pytest.raises(MmlensError, match=said) as error:
        read(path)
    assert "broken.json" in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        MissingFileError, match="there is no file at this path; expected a result of MMRetHead"
    ):
        read_mmrethead(tmp_path / "none.json")
    with pytest.raises(MissingFileError, match="is a folder; expected scores of Retrieval Head"):
        read_retrieval_head(tmp_path)
    with pytest.raises(MissingFileError, match="full_attention_heads.tsv"):
        read_duo_attention(tmp_path)


# ---------------------------------------------------------------------- recomputed


def _folder(root: Path, model: str = "Qwen/Qwen3-VL-8B-Instruct") -> Path:
    """Results of two tasks at two lengths, one list, gates, and files that are none of ours."""
    lengths = {8192: 0, 16384: 10}
    for task, seed in (("mm_niah_retrieval-text", 0), ("identical_retrieval-image", 1)):
        for length, more in lengths.items():
            content = _mmrethead(
                _scores(seed + more), datasets=task, input_max_length=length, model_name_or_path=model
            )
            _write(root / "mmrethead" / f"{task}_in{length}.json", content)
    _write(root / "llava-v1.6.json", _tests_of_heads(_scores(5, (2, 4, 4)).clip(0) + 1e-3))
    _write(root / "yi.json", _tests_of_heads(_scores(6, (3, 4, 4)).clip(0)))
    _write(root / "duo" / "full_attention_heads.tsv", _gates(_scores(7, (4, 2)).clip(0, 1)))
    _write(root / "some.yaml", "a: 1")
    _write(root / "config.json", {"model_name": "x"})
    return root


def test_rho_is_the_mean_over_context_lengths(tmp_path: Path) -> None:
    table = recompute_published(_folder(tmp_path))
    rows = table[table["what"].str.startswith("rho_0.5 in %, text")]
    assert rows["what"].tolist() == ["rho_0.5 in %, text: mean over 2 context lengths"]
    by_hand = []
    for seed in (0, 10):
        ordered = np.sort(_scores(seed).clip(0).ravel())[::-1]
        n = next(n for n in range(1, 65) if ordered[:n].sum() >= ordered.sum() / 2)
        by_hand.append(100 * n / 64)
    assert rows["recomputed"].item() == f"{np.mean(by_hand):.1f}"
    # Two of five lengths: what is stated is not what they can give.
    assert rows["stated"].item() == "5.6" and rows["agrees"].item() is None
    assert "stated for 8k, 16k, 32k, 64k and 128k" in rows["note"].item()
    assert set(table["source"]) == {"MMRetHead", "SparseMM", "Retrieval Head", "DuoAttention"}
    assert "KEY-VALUE heads" in table[table["source"] == "DuoAttention"]["note"].item()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _folder(tmp_path / "published")
    assert main(["published", str(folder), "--csv", str(tmp_path / "table.csv")]) == 0
    said = capsys.readouterr().out
    assert "MMRetHead, Qwen3-VL-8B-Instruct\n    rho_0.5 in %, text: mean over 2" in said
    assert "0 agree, 0 differ" in said and (tmp_path / "table.csv").read_text().startswith(
        "source,model,what,"
    )
    assert main(["published", str(folder / "yi.json")]) == 0
    broken = _mmrethead(_scores(0)) | {"head_score_list": [["0-0", None]]}
    _write(folder / "broken.json", broken)
    assert main(["published", str(folder)]) == 0
    assert "not read\n" in (said := capsys.readouterr().out) and "the score None" in said


def test_a_statement_that_does_not_hold_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(
        tmp_path / "x_qr_head_NQ.yaml",
        'attn_head_set: "1-2,1-3" # top16\nmodel_base_class: "Llama-3.1-8B-Instruct"',
    )
    assert main(["published", str(tmp_path)]) == 1
    assert "stated 16, recomputed 2  DIFFERS" in capsys.readouterr().out


def test_folders_without_published_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path / "config.json", {"a": 1})
    with pytest.raises(ValueError, match=r"holds no published head scores \(1 file\(s\) looked at\)"):
        recompute_published(tmp_path)
    with pytest.raises(MissingFileError, match="expected a folder with published head scores"):
        recompute_published(tmp_path / "none")
    assert main(["published", str(tmp_path / "none")]) == 2
    assert "expected a folder with published" in capsys.readouterr().err
    for name in ("a", "b"):
        _write(tmp_path / f"{name}.json", _mmrethead(_scores(0)))
    with pytest.raises(ValueError, match="two results of MMRetHead are of Some-VL-2B-Instruct, image, 8k"):
        recompute_published(tmp_path)


# ---------------------------------------------------------------------- the published files themselves


@needs_artefacts
@pytest.mark.parametrize(
    ("folder", "name"), [("Qwen3-VL-8B-Instruct", "Qwen3-VL-8B"), ("gemma-3-12b-it", "Gemma3-12B")]
)
def test_rho_of_mmrethead_as_published(folder: str, name: str) -> None:
    files = {
        "text": "mm_niah_retrieval-text_",
        "image": "mm_niah_retrieval-image_",
        "rendered text": "text_needle_image_",
        "identical image": "identical_retrieval-image_",
    }
    stated = PUBLISHED_RHO.set_index("model").loc[name]
    for task, start in files.items():
        paths = sorted((ARTEFACTS / "MMRetHead" / folder).glob(f"{start}*.json"))
        scores = [read_mmrethead(path) for path in paths]
        assert len(scores) == 5 and {each.grid.shape for each in scores} == {GRIDS[folder.lower()]}
        assert round(100 * float(np.mean([half_mass_share(each) for each in scores])), 1) == stated[task]


@needs_artefacts
def test_all_that_is_stated_of_the_published_files_holds() -> None:
    table = recompute_published(ARTEFACTS)
    assert table["agrees"].map(lambda each: each is False).sum() == 0
    agree = table[table["agrees"].map(lambda each: each is True)]
    assert len(agree) == 21 and agree["what"].str.startswith("rho_0.5").sum() == 8
    of = table.set_index("source")
    assert "9 of 10 shared" in of.loc["Retrieval Head", "note"].iloc[0]
    assert of.loc["SparseMM", "recomputed"] == "rho_0.5 = 4.2%" and "hold 55%" in of.loc["SparseMM", "note"]
    assert "L14H24" in of.loc["SparseMM", "note"]
    # All of gemma's unions need the ceiling of 38.4 heads, all of Qwen's are the same by the nearest number.
    unions = table[table["what"].str.contains("union")]
    by_nearest = unions["note"].str.extract(r"number (\d+)$")[0]
    assert ((by_nearest == unions["recomputed"]) == (unions["model"] == "Qwen3-VL-8B-Instruct")).all()


@needs_artefacts
def test_the_other_published_files() -> None:
    tests = read_retrieval_head(ARTEFACTS / "Retrieval_Head" / "llama-2-7b-80k.first40.json")
    assert len(tests) == 40 and tests.top(2) == HeadSet([(16, 19), (11, 15)], (32, 32))
    gates = read_duo_attention(next((ARTEFACTS / "duo-attention" / "Meta-Llama-3.1-8B-Instruct").iterdir()))
    assert gates.values.shape == (32, 8) and gates.of_query_heads((32, 32)).grid.shape == (32, 32)
    lme = read_qrhead(ARTEFACTS / "QRHead" / "Llama-3.1-8B-Instruct_qr_head_LME.yaml")
    assert len(lme) == 16 and next(iter(lme)) == (13, 18)
    gaze = read_gaze_heads(ARTEFACTS / "gaze-heads" / "gaze_top25_qwen3vl_2b.json", grid=(28, 16))
    assert len(gaze) == 25 and next(iter(gaze)) == (19, 5)
