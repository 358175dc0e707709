"""The work of the benchmark's adversarial networks."""

from __future__ import annotations

from gpunn.profiling.gan_cases import gan_cases


def test_the_work_of_a_dcgan_step() -> None:
    """Counted by hand: products forward, and those of the gradients that are needed."""
    (step,) = gan_cases()
    # Three layers that double the size, or halve it; those at the image, at z and at the logit.
    doublings, rgb, z, logit = 3 * 16 * 16 * 1024 * 512, 32 * 32 * 16 * 128 * 3, 16 * 102400, 2**14
    generator, discriminator = doublings + rgb + z, doublings + rgb + logit
    assert step.flops == 2 * 128 * (3 * generator - z + 8 * discriminator - 2 * rgb)
    kernels = 16 * (2 * (1024 * 512 + 512 * 256 + 256 * 128 + 128 * 3) + 100 * 1024 + 1024)
    biases, norms = 3 + 128 + 1, 2 * (1024 + 512 + 256 + 128) + 2 * (256 + 512 + 1024)
    assert step.bytes == 3 * (2 * (kernels + biases) + 4 * norms) + 2 * 128 * 3 * 64 * 64
