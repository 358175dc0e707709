"""One neuron computes AND, OR and NOT; XOR takes a layer more, and backpropagation, written out.

    python examples/neuron.py [--device auto] [--seed 0] [--steps 2000] [--out FOLDER] [--quick]

A neuron answers o = sigmoid(w·x + b). First its weights are chosen by hand, then learned: down the
gradient of E = Σ (o - t)² / 2. Where o > 1/2 is half a plane, so no neuron computes XOR. A network
with a hidden layer does, and its gradients are written out here, one line of algebra each: with
δ = ∂E/∂net, that of an output is (o - t) o (1 - o), that of a hidden neuron b

    δ_b = (Σ_l δ_l w_bl) o_b (1 - o_b),   and   ∂E/∂w_ab = δ_b o_a.

Each product is a ``gpunn.functional.linear``, and the gradients are compared with those of gpunn's
own backward pass. Two hidden neurons can be enough, but from some starts they get stuck; the last
picture counts from how many they do not.

On a GPU it runs on gpunn's kernels, on a CPU on PyTorch's own ops, and with TRITON_INTERPRET=1 in
the environment on the kernels, interpreted on the CPU (slow: try ``--quick --steps 10``).

Papers: F. Rosenblatt, "The perceptron", 1958; D. Rumelhart, G. Hinton and R. Williams, "Learning
representations by back-propagating errors", Nature 323, 1986. Data: truth tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

import gpunn
import gpunn.functional as GF
from command_line import device_of, parser_for
from loops import progress_bar, threads

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"The demos need {error.name}: pip install 'gpunn[demo]'", name=error.name
    ) from None

HAND = {"AND": ((20.0, 20.0), -30.0), "OR": ((20.0, 20.0), -10.0), "NOT": ((-20.0,), 10.0)}
ANSWERS = {"AND": (0, 0, 0, 1), "OR": (0, 1, 1, 1), "NOT": (1, 0), "XOR": (0, 1, 1, 0)}
LEARNING_RATE, MOMENTUM = 1.0, 0.9
GATE_STEPS = 300
SHOWN = (0, 10, 30, 100)  # steps whose decision boundary is drawn, before the last
STEPS, QUICK_STEPS = 2000, 400
HIDDEN = 4
N_STARTS = 20


@dataclass
class Network:
    """Layers of neurons, each fully connected to the one before."""

    weights: list[torch.Tensor]
    """Of each layer, (neurons, inputs)."""
    biases: list[torch.Tensor]

    @staticmethod
    def random(sizes: Sequence[int], seed: int, device: torch.device | str) -> Network:
        """Weights from a normal distribution, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        pairs = list(itertools.pairwise(sizes))
        return Network(
            [torch.randn(n, m, generator=generator).to(device) for m, n in pairs],
            [torch.randn(n, generator=generator).to(device) for _, n in pairs],
        )

    def parameters(self) -> list[torch.Tensor]:
        return [*self.weights, *self.biases]

    def outputs(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x (n, inputs), and what each layer answers."""
        found = [x]
        for weight, bias in zip(self.weights, self.biases, strict=True):
            found.append(GF.linear(found[-1], weight, bias, activation="sigmoid"))
        return found

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """What the last layer answers."""
        return self.outputs(x)[-1]


def truth_table(name: str, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """All inputs, (n, 1 or 2), and the right answers, (n, 1)."""
    answers = torch.tensor(ANSWERS[name], dtype=torch.float32, device=device)[:, None]
    n_inputs = 1 if name == "NOT" else 2
    inputs = list(itertools.product((0.0, 1.0), repeat=n_inputs))
    return torch.tensor(inputs, device=device), answers


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """E = Σ (o - t)² / 2."""
    return (output - target).square().sum() / 2


def backpropagate(
    network: Network, outputs: Sequence[torch.Tensor], target: torch.Tensor
) -> list[torch.Tensor]:
    """The gradients of E by ``network.parameters()``, by the formulas above; linear is x Wᵀ."""
    last = outputs[-1]
    delta = (last - target) * last * (1 - last)
    dweights: list[torch.Tensor] = []
    dbiases: list[torch.Tensor] = []
    for layer in reversed(range(len(network.weights))):
        below = outputs[layer]
        dweights.insert(0, GF.linear(delta.T, below.T))  # Σ over the inputs of δ_b o_a
        dbiases.insert(0, delta.sum(0))
        delta = GF.linear(delta, network.weights[layer].T) * below * (1 - below)
    return [*dweights, *dbiases]


def descend(
    network: Network, x: torch.Tensor, target: torch.Tensor, steps: int
) -> Iterator[tuple[Network, torch.Tensor]]:
    """Gradient descent with momentum: the network at each step, changed in place, and its E."""
    velocities = [torch.zeros_like(parameter) for parameter in network.parameters()]
    for step in range(steps + 1):
        outputs = network.outputs(x)
        yield network, loss_of(outputs[-1], target)
        if step == steps:
            return
        gradients = backpropagate(network, outputs, target)
        for parameter, velocity, gradient in zip(
            network.parameters(), velocities, gradients, strict=True
        ):
            velocity.mul_(MOMENTUM).sub_(LEARNING_RATE * gradient)
            parameter.add_(velocity)


def is_right(network: Network, x: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether every answer is on the right side of 1/2, by a quarter at least."""
    return bool(((network(x) - target).abs() < 0.25).all())


def difference_from_autograd(network: Network, x: torch.Tensor, target: torch.Tensor) -> float:
    """The largest difference of a gradient from the one that gpunn's backward pass gives."""
    written = backpropagate(network, network.outputs(x), target)
    leaves = [parameter.clone().requires_grad_() for parameter in network.parameters()]
    half = len(leaves) // 2
    loss = loss_of(Network(leaves[:half], leaves[half:])(x), target)
    own = torch.autograd.grad(loss, leaves)
    return max(float((a - b).abs().max()) for a, b in zip(written, own, strict=True))


@dataclass(frozen=True)
class Learned:
    """How a network came to compute a function."""

    network: Network
    losses: list[float]
    drawn: dict[int, torch.Tensor]
    """By step, what it answered on ``grid()``."""


def grid(n_inputs: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Inputs from -0.5 to 1.5: 101 of them, or 101 by 101."""
    line = torch.linspace(-0.5, 1.5, 101, device=device)
    if n_inputs == 1:
        return line[:, None]
    return torch.cartesian_prod(line, line)


def learn(
    name: str,
    network: Network,
    steps: int,
    device: torch.device,
    told: Callable[[float], None] = lambda loss: None,
) -> Learned:
    """Train a network on a truth table."""
    x, target = truth_table(name, device)
    losses: list[float] = []
    drawn: dict[int, torch.Tensor] = {}
    for step, (_, loss) in enumerate(descend(network, x, target, steps)):
        losses.append(loss.item())
        told(losses[-1])
        if step in SHOWN or step == steps:
            drawn[step] = network(grid(x.shape[1], device)).cpu()
    return Learned(network, losses, drawn)


def starts_that_learn(hidden: int, steps: int, device: torch.device) -> int:
    """Of N_STARTS starts of a network for XOR, how many get it right."""
    x, target = truth_table("XOR", device)
    right = 0
    for seed in range(N_STARTS):
        network = Network.random((2, hidden, 1), seed, device)
        right += any(is_right(network, x, target) for _ in descend(network, x, target, steps))
    return right


def draw_plane(axes: Axes, answers: torch.Tensor, name: str, title: str) -> None:
    """What a network answers to two inputs, the line where it is 1/2, and the truth table."""
    image = answers.reshape(101, 101).T.numpy()
    extent = (-0.5, 1.5, -0.5, 1.5)
    axes.imshow(image, origin="lower", extent=extent, cmap="RdBu_r", vmin=0, vmax=1, alpha=0.7)
    if image.min() < 0.5 < image.max():
        axes.contour(image, [0.5], origin="lower", extent=extent, colors="black")
    x, target = truth_table(name, "cpu")
    for (a, b), t in zip(x.tolist(), target.flatten().tolist(), strict=True):
        axes.scatter(a, b, c="tab:red" if t else "tab:blue", s=60, edgecolors="white", zorder=3)
    axes.set(title=title, xticks=(0, 1), yticks=(0, 1))
    axes.title.set_fontsize(10)


def draw_gates(by_hand: dict[str, Network], learned: dict[str, Learned]) -> Figure:
    """A row a gate: by hand, and as it learns."""
    figure = Figure(figsize=(12, 7.2), layout="constrained")
    figure.suptitle("One neuron: red where it answers 1, blue where 0; dots are the truth table")
    rows = figure.subplots(3, 2 + len(SHOWN))
    for (name, neuron), row in zip(by_hand.items(), rows, strict=True):
        n_inputs = 1 if name == "NOT" else 2
        answers = {"by hand": neuron(grid(n_inputs))}
        answers |= {f"learned, step {step}": a for step, a in learned[name].drawn.items()}
        for axes, (title, answer) in zip(row, answers.items(), strict=True):
            if n_inputs == 2:
                draw_plane(axes, answer, name, title)
                continue
            axes.plot(grid(1).flatten(), answer.flatten(), color="black")
            axes.scatter([0, 1], [1, 0], c=["tab:red", "tab:blue"], s=60, zorder=3)
            axes.set(xticks=(0, 1), yticks=(0, 1), ylim=(-0.1, 1.1), xlabel="input")
            axes.set_title(title, fontsize=10)
        row[0].set_ylabel(name, fontsize=13)
    return figure


def draw_xor(learned: Learned, counts: dict[int, int]) -> Figure:
    """How the boundary forms, the error, and how many starts succeed."""
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.05, 1), squeeze=False).flat
    upper.suptitle(f"XOR, with {HIDDEN} hidden neurons")
    panels = upper.subplots(1, len(learned.drawn), squeeze=False).flat
    for axes, (step, answers) in zip(panels, learned.drawn.items(), strict=True):
        draw_plane(axes, answers, "XOR", f"step {step}")
    error, *beside = lower.subplots(1, 2 if counts else 1, squeeze=False)[0]
    error.plot(learned.losses, color="tab:blue")
    error.set(xlabel="step", ylabel="E = Σ (o - t)² / 2", yscale="log")
    error.grid(alpha=0.3)
    for starts in beside:
        bars = starts.bar([f"{n} hidden neurons" for n in counts], list(counts.values()))
        starts.bar_label(bars)
        starts.set(ylim=(0, N_STARTS * 1.15), ylabel=f"of {N_STARTS} starts, right in the end")
    return figure


def train(seed: int, steps: int, device: torch.device) -> tuple[dict[str, Learned], gpunn.Trace]:
    """Every gate by one neuron, then XOR; and the trace of a pass forward and backward of XOR."""
    learned = {}
    with progress_bar() as progress:
        task = progress.add_task("", total=3 * (GATE_STEPS + 1) + steps + 1, loss=float("nan"))

        def told(loss: float) -> None:
            progress.update(task, advance=1, loss=loss)

        for name in HAND:
            neuron = Network.random((1 if name == "NOT" else 2, 1), seed, device)
            learned[name] = learn(name, neuron, GATE_STEPS, device, told)
        network = Network.random((2, HIDDEN, 1), seed, device)
        with gpunn.trace() as trace:
            apart = difference_from_autograd(network, *truth_table("XOR", device))
        learned["XOR"] = learn("XOR", network, steps, device, told)
    print(f"Gradients written out differ from gpunn's backward pass by {apart:.1e} at most.")
    return learned, trace


def tell(by_hand: dict[str, Network], learned: dict[str, Learned], device: torch.device) -> int:
    """Print every truth table; the number of learned ones that are right."""
    right = 0
    for name, result in learned.items():
        x, target = truth_table(name, device)
        networks = {"by hand": by_hand.get(name), "learned": result.network}
        for how, network in networks.items():
            if network is not None:
                answers = "  ".join(f"{o:.3f}" for o in network(x).flatten().tolist())
                print(f"{name:4} {how}: {answers}")
        right += is_right(result.network, x, target)
    return right


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and print what it found; the last line is the figure that it reached."""
    parser = parser_for(
        __doc__, "neuron", seed="of the weights that are learned",
        steps=f"of XOR (default: {STEPS})", quick=f"{QUICK_STEPS} steps, one start",
        resume="of no effect: no network takes a second",
    )  # fmt: skip
    given = parser.parse_args(argv)
    steps = given.steps or (QUICK_STEPS if given.quick else STEPS)
    device = device_of(parser, given.device)
    by_hand = {
        name: Network([torch.tensor([w], device=device)], [torch.tensor([b], device=device)])
        for name, (w, b) in HAND.items()
    }
    with threads(1):
        learned, trace = train(given.seed, steps, device)
        counts = {}
        if not given.quick:
            counts = {n: starts_that_learn(n, steps, device) for n in (2, HIDDEN)}
    print(f"A forward and backward pass on {device} ran:\n{trace}")
    right = tell(by_hand, learned, device)
    pictures = {
        "gates.png": draw_gates(by_hand, learned),
        "xor.png": draw_xor(learned["XOR"], counts),
    }
    for name, figure in pictures.items():
        figure.savefig(given.out / name, dpi=90, bbox_inches="tight", pad_inches=0.15)
    print("Pictures:", *(given.out / name for name in pictures))
    for hidden, count in counts.items():
        print(f"XOR with {hidden} hidden neurons: right from {count} of {N_STARTS} starts")
    print(f"Truth tables learned: {right} (expected: {len(ANSWERS)})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
