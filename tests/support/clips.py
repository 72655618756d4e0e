"""Made videos."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def made_clip(n_frames: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """[frame, height, width, 3] of smooth random pictures."""
    generator = np.random.default_rng(seed)
    width, height = size
    coarse = generator.integers(30, 226, (n_frames, -(-height // 8), -(-width // 8), 3))
    return coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width].astype(np.uint8)


def written_clip(path: Path, frames: np.ndarray, fps: int, **options: str) -> Path:
    """The frames as a video file; options are those of its container."""
    import av

    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path
