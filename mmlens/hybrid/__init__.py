"""Some heads dense, the others with a window and sinks."""

from mmlens.hybrid.dense_heads import hybrid_attention as hybrid_attention
from mmlens.hybrid.layer import NotCausalError as NotCausalError
from mmlens.hybrid.rule import StreamingRule as StreamingRule
from mmlens.hybrid.speed import prefill_speed as prefill_speed
