"""Images optimised by what a network sees in them: losses, style transfer, dreams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from checkpoint import Part
from feature_networks import FeatureNetwork
from photographs import enlarged, resized

OUTSIDE = 1000.0  # weight of the mean square by which pixels leave [0, 1]
ROUGHNESS = 2.0  # weight of the mean square of the difference between neighbours
ROUND = 20  # evaluations of the loss from one checkpoint to the next
N_OCTAVES, OCTAVE = 4, 1.4  # sizes of a dream, and the ratio of one to the next
DREAM_RATE = 0.006  # by which a step of a dream changes pixels, in the mean

Tell = Callable[[float], None]


def gram(maps: torch.Tensor) -> torch.Tensor:
    """The mean over positions of the products of channels, (C, C), of maps (1, C, H, W)."""
    rows = maps[0].flatten(1)
    return rows @ rows.T / rows.shape[1]


def relative(got: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The square of the difference, in units of the target's: the same for layers of any scale."""
    return (got - target).square().sum() / target.square().sum()


def outside(image: torch.Tensor) -> torch.Tensor:
    """The mean square by which pixels leave [0, 1]."""
    return (image - image.clamp(0, 1)).square().mean()


def roughness(image: torch.Tensor) -> torch.Tensor:
    """The mean square of the difference between neighbours, one below or beside the other."""
    below, beside = (image.diff(dim=dim).square().mean() for dim in (2, 3))
    return below + beside


@dataclass(frozen=True)
class Goal:
    """What an image is to look like to the networks; the content is the first one's."""

    networks: Sequence[FeatureNetwork]
    grams: Sequence[Sequence[torch.Tensor]]
    content: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls, networks: Sequence[FeatureNetwork], photograph: torch.Tensor, painting: torch.Tensor
    ) -> Goal:
        grams = [[gram(maps) for maps in n(painting[None], n.style)] for n in networks]
        (content,) = networks[0](photograph[None], [networks[0].content])
        return cls(networks, grams, content)

    def losses(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the content, and of the style: a mean over the layers, a sum over the networks."""
        content = style = image.new_zeros(())
        for number, (network, targets) in enumerate(zip(self.networks, self.grams, strict=True)):
            maps = network(image, (*network.style, network.content))
            if number == 0:
                content = relative(maps[-1], self.content)
            distances = [relative(gram(m), g) for m, g in zip(maps, targets, strict=False)]
            style = style + torch.stack(distances).mean()
        return content, style

    def loss(self, image: torch.Tensor, ratio: float) -> torch.Tensor:
        """What L-BFGS makes small."""
        content, style = self.losses(image)
        return content + ratio * style + OUTSIDE * outside(image) + ROUGHNESS * roughness(image)


def descend(
    goal: Goal, image: torch.Tensor, ratio: float, steps: int, tell: Tell, part: Part
) -> torch.Tensor:
    """The image (1, 3, H, W) after so many evaluations of the loss; ``tell`` hears of each.

    If ``part`` was begun, it goes on from there.
    """
    begun = part.state or {"image": image, "optimizer": None, "losses": []}
    # L-BFGS sees the pixels as a vector: a view of them, so they must be contiguous.
    image = begun["image"].to(image).clone(memory_format=torch.contiguous_format).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [image], max_iter=ROUND, history_size=20, line_search_fn="strong_wolfe",
        tolerance_grad=0, tolerance_change=0,
    )  # fmt: skip
    if begun["optimizer"] is not None:
        optimizer.load_state_dict(begun["optimizer"])
    losses = list(begun["losses"])
    for loss in losses:
        tell(loss)

    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        loss = goal.loss(image, ratio)
        loss.backward()
        losses.append(loss.item())
        tell(losses[-1])
        return loss

    while len(losses) < steps:
        optimizer.param_groups[0]["max_eval"] = min(ROUND, steps - len(losses))
        optimizer.step(evaluate)
        # What L-BFGS remembers is forty images: it is kept no longer than it is needed.
        memory = optimizer.state_dict() if len(losses) < steps else None
        part.keep({"image": image.detach(), "optimizer": memory, "losses": losses})
    return image.detach()


def transfer(
    networks: Sequence[FeatureNetwork],
    photograph: torch.Tensor,
    painting: torch.Tensor,
    ratio: float,
    steps: int,
    tell: Tell,
    part: Part,
) -> torch.Tensor:
    """The photograph (3, H, W) in the painting's style, which has its shorter side."""
    side = min(photograph.shape[-2:])
    # Half the size first: a stroke spans fewer pixels there, and a step takes a quarter.
    small, small_painting = resized(photograph, side // 2), resized(painting, side // 2)
    goal, half = Goal.of(networks, small, small_painting), replace(part, name=f"{part.name}, half")
    image = descend(goal, small[None], ratio, steps, tell, half)
    goal = Goal.of(networks, photograph, painting)
    image = descend(goal, enlarged(image, photograph), ratio, steps, tell, part)
    return image[0].clamp(0, 1)


def strength(network: FeatureNetwork, layer: int, image: torch.Tensor) -> torch.Tensor:
    """The mean of a layer's maps of an image (3, H, W)."""
    mean: torch.Tensor = network(image[None], [layer])[0].mean()
    return mean


def dream(
    network: FeatureNetwork,
    layer: int,
    photograph: torch.Tensor,
    steps: int,
    tell: Tell,
    part: Part,
) -> torch.Tensor:
    """The photograph (3, H, W), changed so that the layer's maps grow, one octave after the other.

    An octave is a size; each begins with the detail that the one before it, smaller, added. If
    ``part`` was begun, it goes on from there.
    """
    side = min(photograph.shape[-2:])
    begun = part.state or {"detail": torch.zeros_like(photograph), "strengths": []}
    detail: torch.Tensor = begun["detail"].to(photograph)
    strengths = list(begun["strengths"])
    for reached in strengths:
        tell(reached)
    for octave in reversed(range(N_OCTAVES - len(strengths) // steps)):
        generator = torch.Generator().manual_seed(N_OCTAVES * layer + octave)
        base = resized(photograph, round(side / OCTAVE**octave))
        image = base + enlarged(detail, base)
        for _ in range(steps):
            # Another shift in every step, so that no pixel lies always at the border of a pooling.
            down, right = torch.randint(-8, 9, (2,), generator=generator).tolist()
            shifted = image.roll((down, right), (1, 2)).requires_grad_()
            reached = strength(network, layer, shifted)
            (slope,) = torch.autograd.grad(reached, shifted)
            slope = slope.roll((-down, -right), (1, 2))
            # Without its means over neighbourhoods, which would but change the colours.
            slope = slope - F.avg_pool2d(slope, 15, 1, 7, count_include_pad=False)
            image = (image + DREAM_RATE * slope / slope.abs().mean()).clamp(0, 1)
            strengths.append(reached.item())
            tell(strengths[-1])
        detail = image - base
        part.keep({"detail": detail, "strengths": strengths})
    return (photograph + detail).clamp(0, 1)


def judge(network: FeatureNetwork, image: torch.Tensor, painting: torch.Tensor) -> float:
    """The mean distance of an image's Gram matrices from the painting's."""
    with torch.no_grad():
        got, target = (network(each[None], network.style) for each in (image, painting))
        pairs = zip(got, target, strict=True)
        return sum(relative(gram(g), gram(t)).item() for g, t in pairs) / len(network.style)
