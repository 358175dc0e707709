"""The benchmark's adversarial networks: their work, and whose gradients they compute."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gpunn.profiling.gan_cases import PARTS, AdversarialStep, dcgan, gan_cases


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


def test_each_network_gets_the_gradient_of_its_own_loss(device: str) -> None:
    """Against two losses, written out, of which each is derived by one network's parameters."""
    step = AdversarialStep("small", lambda: dcgan(8, (16, 8)), 3, 16, 8)
    inputs = step.make(torch.device(device), torch.float32, 0)
    network = step.drawn(torch.float32).to(device)
    parameters = dict(network.named_parameters())
    images, z, *state, _ = inputs
    with torch.no_grad():
        for name, tensor in zip(step.names, state, strict=True):
            network.state_dict()[name].copy_(tensor)
    generator, discriminator = (network.get_submodule(part) for part in PARTS)
    drawn = generator(z)
    of_discriminator = F.softplus(-discriminator(images)) + F.softplus(
        discriminator(drawn.detach())
    )
    of_generator = F.softplus(-discriminator(drawn))
    expected = [
        torch.autograd.grad(loss.mean(), list(part.parameters()))
        for loss, part in ((of_generator, generator), (of_discriminator, discriminator))
    ]
    leaves = [tensor.clone().requires_grad_() for tensor in state[: len(parameters)]]
    step.loss_of(network)(images, z, *leaves, *state[len(parameters) :]).backward()
    for name, leaf, wanted in zip(parameters, leaves, (*expected[0], *expected[1]), strict=True):
        assert leaf.grad is not None, name
        assert wanted.norm() > 0, name
        close = 1e-3 * float(wanted.abs().max())  # which no zeros are within
        torch.testing.assert_close(leaf.grad, wanted, rtol=1e-3, atol=close, msg=name)
