"""What a load generator sends: arrival times, prompts and output lengths, from a rate, a number of
clients or a trace file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hmc.errors import UsageError


@dataclass(frozen=True)
class Shot:
    """One request: `arrival` seconds after the start, tokens of its prompt and of its output."""

    arrival: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Lengths:
    """A uniform mix of lengths, both ends included."""

    least: int
    most: int

    @staticmethod
    def read(option: str, text: str) -> Lengths:
        """`128-1024` or `128`."""
        low, dash, high = text.partition("-")
        try:
            found = Lengths(int(low), int(high) if dash else int(low))
        except ValueError:
            raise UsageError(f"{option} {text}: give a length or a range, such as 64-256") from None
        if not 1 <= found.least <= found.most:
            raise UsageError(f"{option} {text}: lengths begin at 1 and must not fall")
        return found

    def draw(self, random: np.random.Generator) -> int:
        """One of them."""
        return int(random.integers(self.least, self.most + 1))


def poisson(
    count: int, rate: float, prompts: Lengths, outputs: Lengths, random: np.random.Generator
) -> list[Shot]:
    """`count` requests whose arrivals are a Poisson process of `rate` requests a second."""
    arrivals = np.cumsum(random.exponential(1 / rate, count))
    arrivals -= arrivals[0]
    return [Shot(float(at), prompts.draw(random), outputs.draw(random)) for at in arrivals]


def at_once(
    count: int, prompts: Lengths, outputs: Lengths, random: np.random.Generator
) -> list[Shot]:
    """`count` requests that may all be sent from the start."""
    return [Shot(0.0, prompts.draw(random), outputs.draw(random)) for _ in range(count)]


def trace(path: Path) -> list[Shot]:
    """JSON lines {"arrival": seconds, "prompt": tokens, "output": tokens}, sorted by arrival."""
    shots = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"--trace {path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            shot = Shot(float(found["arrival"]), int(found["prompt"]), int(found["output"]))
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f'--trace {path}, line {number}: not an object with "arrival", "prompt", "output"'
            ) from error
        if shot.arrival < 0 or shot.prompt < 1 or shot.output < 1:
            raise UsageError(f"--trace {path}, line {number}: a length or a time is too small")
        shots.append(shot)
    if not shots:
        raise UsageError(f"--trace {path}: it holds no requests")
    return sorted(shots, key=lambda shot: shot.arrival)


def prompt_ids(tokens: int, vocab: int, random: np.random.Generator) -> list[int]:
    """A random prompt: nothing of it is in a prefix cache, and every expert is asked."""
    return list(map(int, random.integers(0, vocab, tokens)))
