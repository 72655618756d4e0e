"""Which keys a streaming head sees: the first tokens (sinks) and a window before the query."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Int
from torch import Tensor

from mmlens.arguments import whole_number
from mmlens.errors import InvalidValueError


@dataclass(frozen=True)
class StreamingRule:
    """The keys of a streaming head: the prompt's first `sink` tokens and the last `window` up to the query itself.

    Positions count from the first real token of a row, so that padding on the left is no sink. Source: arXiv
    2606.05843, section 5 (512 sinks, a window of 4,096); sinks and window as in StreamingLLM (arXiv 2309.17453).

    >>> import torch
    >>> StreamingRule(sink=1, window=2).allowed(torch.arange(4), torch.arange(4)).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    """

    sink: int
    window: int

    def __post_init__(self) -> None:
        for name in ("sink", "window"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        if self.sink < 0 or self.window < 1:
            raise InvalidValueError(
                f"a streaming head sees sink >= 0 first tokens and a window of at least 1 (the query itself), not "
                f"sink={self.sink} and window={self.window}"
            )

    def sees_all(self, n_positions: int) -> bool:
        """Whether every query of a prompt of `n_positions` tokens sees all that a causal head sees."""
        return n_positions <= self.sink + self.window

    def share(self, n_positions: int) -> float:
        """Scores that a streaming head computes over a prompt, as a share of a causal head's.

        Sum over i of min(i + 1, sink + window), over n (n + 1) / 2: sinks within the window count once.

        >>> StreamingRule(sink=1, window=2).share(4)
        0.9
        """
        n, most = whole_number("n_positions", n_positions, least=1), self.sink + self.window
        few = min(n, most)
        return (few * (few + 1) / 2 + (n - few) * most) / (n * (n + 1) / 2)

    def allowed(
        self,
        queries: Int[Tensor, " query"],
        keys: Int[Tensor, " key"],
        first: Int[Tensor, " batch"] | None = None,
    ) -> Bool[Tensor, "*batch query key"]:
        """Which of the keys each query sees, both given by position; `first` are the rows' first real positions."""
        ahead = queries[:, None] - keys[None, :]
        near = (ahead >= 0) & (ahead < self.window)
        if first is None:
            return near | ((ahead >= 0) & (keys < self.sink)[None, :])
        own = keys[None, :] - first[:, None]
        sinks = (own >= 0) & (own < self.sink)
        return (near[None] & (own >= 0)[:, None]) | ((ahead >= 0)[None] & sinks[:, None])


def first_positions(mask: Bool[Tensor, "batch _ query key"]) -> Int[Tensor, " batch"]:
    """The first key of each row that any query sees: padding on the left is seen by none."""
    return mask.any(1).any(1).int().argmax(-1)
