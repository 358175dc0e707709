"""What a training step and a step of decoding of the Transformer that translates cost at least."""

from __future__ import annotations

from gpunn.profiling.translation_cases import translation_cases


def test_the_work_is_counted() -> None:
    """By hand, without biases and norms; half of the pairs of the target are masked."""
    base, decoding = translation_cases()
    weights = 6 * 12 * 512**2 + 2 * 6 * 2 * 512 * 2048 + 512 * 37000
    assert base.flops == 2 * 64 * 128 * (3 * weights + 3.5 * 6 * 2 * 512 * 128 * 2.5)
    assert base.bytes == 3 * 2 * 63_084_544 + 8 * 64 * (128 + 129) + 2 * 128 * 512
    weights = 6 * 6 * 512**2 + 6 * 2 * 512 * 2048 + 512 * 37000
    assert decoding.flops == 2 * 32 * (weights + 6 * 2 * 2 * 512 * 128)
    vectors = 6 * ((3 + 1 + 1 + 1 + 1 + 6) * 512 + 2048) + 2 * 512  # biases and norms
    caches, tokens = 4 * 32 * 6 * 128 * 512, 32 * (8 + 8 + 128)
    results, table = 32 * 37000, 128 * 512
    assert decoding.bytes == 2 * (weights + vectors + caches + results + table) + tokens
