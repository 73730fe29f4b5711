"""How a benchmark is run and told: rounds in turn, medians, a table for people or one JSON object."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass
class Figures:
    """What one contestant did: a list of values, one a round, for each measure."""

    name: str
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **measures: float) -> None:
        for measure, value in measures.items():
            self.values.setdefault(measure, []).append(value)

    def median(self, measure: str) -> float:
        return statistics.median(self.values[measure])

    def ratios(self, measure: str, peer: Figures) -> list[float]:
        """Return by how much this one's value is the peer's, round by round: what slows a round slows both."""
        return [ours / theirs for ours, theirs in zip(self.values[measure], peer.values[measure], strict=True)]


def arguments(description: str, rounds: int, **counts: int) -> argparse.Namespace:
    """Return the options that every benchmark has, and those of `counts`, with their defaults."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"rounds of each, in turn (default {rounds})")
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    return parser.parse_args()


def tell(
    title: str,
    how: str,
    contestants: Sequence[Figures],
    units: Mapping[str, str],
    ratios: Mapping[str, Sequence[float]],
    *,
    as_json: bool,
) -> None:
    """Print medians, spread, ratios (of each round), and how it was measured."""
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    if as_json:
        print(
            json.dumps(
                {
                    "title": title,
                    "how": how,
                    "machine": machine,
                    "ratios": {name: round(statistics.median(each), 3) for name, each in ratios.items()},
                    "ratios_by_round": {name: [round(ratio, 3) for ratio in each] for name, each in ratios.items()},
                    "figures": {each.name: each.values for each in contestants},
                    "units": dict(units),
                }
            )
        )
        return
    table = Table(title=title)
    table.add_column("")
    for measure, unit in units.items():
        table.add_column(f"{measure.replace('_', ' ')}, {unit}", justify="right")
    for each in contestants:
        row = [
            f"{each.median(measure):,.2f}  ({min(each.values[measure]):,.2f} to {max(each.values[measure]):,.2f})"
            for measure in units
        ]
        table.add_row(each.name, *row)
    console = Console()
    console.print(table)
    for name, each in ratios.items():
        spread = f"({min(each):.2f} to {max(each):.2f})" if len(each) > 1 else ""
        console.print(f"against {name}: {statistics.median(each):.2f} x  {spread}  (> 1: we are faster)")
    console.print(f"{how}\n{machine}; median of the rounds (lowest to highest).")
