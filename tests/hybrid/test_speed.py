"""What is counted and what is timed: operations by hand, runs that do what their names say."""

from __future__ import annotations

import pytest
import tiny
import torch

from mmlens.heads import HeadSet
from mmlens.hybrid.rule import StreamingRule
from mmlens.hybrid.speed import Work, peak_bytes, prefill_speed, prefill_work, random_ids
from mmlens.model.hooked_vlm import HookedVLM


def test_work_is_that_of_scores_and_weights(micro: HookedVLM) -> None:
    rule, n = StreamingRule(2, 6), 20
    top = HeadSet([(0, 4), (1, 0)], grid=(8, 8))
    dense, hybrid = prefill_work(micro, None, n, rule), prefill_work(micro, top, n, rule)
    scores = n * (n + 1) // 2
    streamed = sum(min(at + 1, 8) for at in range(n))
    assert dense.attention_operations == 64 * scores * 4 * 32
    assert hybrid.attention_operations == pytest.approx((2 * scores + 62 * streamed) * 4 * 32)
    # Per layer: q, o of 8 heads, k, v of 4, and three matrices of the MLP.
    width, mlp = 128, 256
    matrices = 8 * (2 * width * 256 + 2 * width * 128 + 3 * width * mlp)
    vocabulary = micro.hf_model.lm_head.weight.shape[0]
    assert dense.other_operations == hybrid.other_operations == 2 * (matrices * n + vocabulary * width)
    assert dense.other_bytes == 4 * (matrices + vocabulary * width)


def test_the_least_time_is_that_of_what_binds() -> None:
    work = Work(attention_operations=100.0, attention_bytes=10.0, other_operations=5.0, other_bytes=40.0)
    assert work.seconds(operations_per_second=10.0, bytes_per_second=4.0) == 10.0 + 10.0


def test_ids_name_no_image() -> None:
    model = HookedVLM(tiny.tiny_model("qwen3_vl"))
    ids = random_ids(model, 4000, torch.Generator().manual_seed(0))
    config = model.hf_model.config
    assert ids.shape == (1, 4000)
    assert not set(ids[0].tolist()) & {config.image_token_id, config.vision_start_token_id}


def test_the_table_has_a_row_for_every_set_length_and_part(micro: HookedVLM) -> None:
    table = prefill_speed(
        micro,
        {"two": [(0, 4), (0, 5)], "none": []},
        [48, 200],
        sink=4,
        window=16,
        repeats=2,
        warm_ups=1,
        progress=False,
    )
    assert len(table) == 2 * 2 * 3 and set(table["part"]) == {"attention", "prefill", "first token"}
    assert (table[["dense_seconds", "hybrid_seconds", "speedup"]] > 0).all(axis=None)
    assert (table["lowest"] <= table["speedup"]).all() and (table["speedup"] <= table["highest"]).all()
    limits = table.set_index(["heads", "length", "part"])["limit"]
    assert limits["none", 200, "attention"] > limits["two", 200, "attention"] > limits["two", 48, "attention"]
    assert limits["two", 200, "attention"] > limits["two", 200, "prefill"] > 1
    assert not micro.attention_tap(0).streaming


def test_bad_requests_are_refused(micro: HookedVLM) -> None:
    with pytest.raises(ValueError, match="there is no part 'decode'"):
        prefill_speed(micro, {"a": [(0, 0)]}, [64], parts=["decode"])
    with pytest.raises(ValueError, match=r"lengths=\[1\] and repeats=5"):
        prefill_speed(micro, {"a": [(0, 0)]}, [1])
    with pytest.raises(ValueError, match=r"none of the lengths \[64, 4608\] exceeds 512 sinks"):
        prefill_speed(micro, {"a": [(0, 0)]}, [64, 4608])
    eager = HookedVLM(tiny.tiny_model("qwen3_vl", attn_implementation="eager"))
    with pytest.raises(ValueError, match="timed against SDPA, and the model was loaded with 'eager'"):
        prefill_speed(eager, {"a": [(0, 0)]}, [64], sink=2, window=8)
    with pytest.raises(IndexError, match="layer 8 is out of range"):
        prefill_speed(micro, {"a": [(8, 0)]}, [64])


def test_peak_memory_is_seen() -> None:
    held: list[torch.Tensor] = []
    megabytes = peak_bytes(lambda: held.append(torch.ones(2**22)), torch.device("cpu")) / 2**20
    assert 12 < megabytes < 40
