"""Untruncated backpropagation through a book: a character LSTM over 100,000 steps, in 64 MiB.

The text is Python's own language reference, which ships with every Python.  It is cut
into a few parallel streams of more than 100,000 characters; one gradient goes through
every step of all of them.  What is kept of past steps never exceeds the budget; the
rest is on disk, written and read behind compute.

    python examples/char_lstm.py [--steps N] [--memory SIZE] [--scratch DIR] [--picture FILE]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor
from torch.nn import functional

import longtape
import longtape.torch as lt
from longtape.plots import timeline
from longtape.progress import Progress
from longtape.sizes import format_bytes, format_seconds

STREAMS = 4
HIDDEN = 128
Carry = tuple[Tensor, Tensor]


class CharacterModel(torch.nn.Module):
    """Predicts the next character of each stream; `forward` is one step of the sequence."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(characters, HIDDEN)
        self.cell = torch.nn.LSTMCell(HIDDEN, HIDDEN)
        self.output = torch.nn.Linear(HIDDEN, characters)

    def forward(self, carry: Carry, x: tuple[Tensor, Tensor]) -> tuple[Carry, Tensor]:
        character, following = x
        h, c = self.cell(self.embedding(character), carry)
        return (h, c), functional.cross_entropy(self.output(h), following)


def load_text(steps: int) -> tuple[Tensor, Tensor, int]:
    """Characters and the ones that follow them, each of shape [steps, STREAMS]; and how many there are."""
    text = "\n".join(topics[name] for name in sorted(topics))
    known = sorted(set(text))
    codes = torch.tensor([known.index(character) for character in text])
    length = (len(codes) - 1) // STREAMS
    if steps > length:
        raise SystemExit(f"the text has {length} steps a stream; --steps {steps} is more")
    starts = torch.arange(STREAMS) * length
    place = torch.arange(steps)[:, None] + starts
    return codes[place], codes[place + 1], len(known)


def first_carry() -> Carry:
    return torch.zeros(STREAMS, HIDDEN), torch.zeros(STREAMS, HIDDEN)


def compare_with_autograd(model: CharacterModel, xs: tuple[Tensor, Tensor], options: dict[str, str]) -> float:
    """Largest relative difference of the gradient from plain autograd's, on a prefix that fits in memory."""
    prefix = tuple(part[:1000] for part in xs)
    parameters = list(model.parameters())
    _, losses = lt.scan(model, first_carry(), prefix, memory="1MiB", disk=options["disk"])
    ours = torch.autograd.grad(losses.mean(), parameters)
    carry, plain = first_carry(), []
    for x in zip(*prefix, strict=True):
        carry, loss = model(carry, x)
        plain.append(loss)
    theirs = torch.autograd.grad(torch.stack(plain).mean(), parameters)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--memory", default="64MiB", help="for everything kept of past steps")
    parser.add_argument("--scratch", default=None, help="directory to spill to")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--picture", default="char_lstm.png")
    arguments = parser.parse_args()
    began = time.perf_counter()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the steps are small; the other core is for moving data
    *xs, characters = load_text(arguments.steps)
    model = CharacterModel(characters)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        options = {"memory": arguments.memory, "disk": scratch}
        print(f"{STREAMS} streams of {arguments.steps:,} characters, {characters} different ones")
        difference = compare_with_autograd(model, tuple(xs), options)
        print(f"gradient on the first 1,000 steps: within {difference:.1e} of plain autograd's (relative)\n")
        for update in range(arguments.updates + 1):
            doing = optimiser if update < arguments.updates else None
            report = train(model, doing, tuple(xs), options, first=update == 0)
            if report is not None:
                print(f"\n{report}\n")
                timeline(report.trace, Path(arguments.picture), report=report)
                print(f"timeline picture: {arguments.picture}\n")
        print(f"everything took {format_seconds(time.perf_counter() - began)}")


def train(
    model: CharacterModel,
    optimiser: torch.optim.Optimizer | None,
    xs: tuple[Tensor, Tensor],
    options: dict[str, str],
    *,
    first: bool,
) -> longtape.Report | None:
    """One gradient through every step and one update; without an optimiser, the loss alone."""
    if optimiser is None:
        with torch.no_grad():
            _, losses = lt.scan(model, first_carry(), xs, **options)
        print(f"after the updates  loss {float(losses.mean()):.4f}")
        return None
    steps = len(xs[0])
    finished: list[longtape.Report] = []
    with Progress(steps) as progress:
        _, losses = lt.scan(
            model,
            first_carry(),
            xs,
            **options,
            observers=[progress],
            on_plan=show_plan if first else None,
            on_report=finished.append,
        )
        optimiser.zero_grad()
        losses.mean().backward()
    optimiser.step()
    seconds = finished[0].measured.seconds
    print(f"gradient through {steps:,} steps in {format_seconds(seconds)}  loss {float(losses.detach().mean()):.4f}")
    return finished[0] if first else None


def show_plan(choice: longtape.Choice) -> None:
    prediction = choice.prediction
    print(f"plan      {longtape.describe(choice)}")
    print(
        f"predicted {format_seconds(prediction.time_seconds)}, {format_bytes(prediction.peak_memory_bytes)} in memory, "
        f"{format_bytes(prediction.peak_disk_bytes)} on disk"
    )


if __name__ == "__main__":
    main()
