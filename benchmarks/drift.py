"""False alarms of drift over calm nights of a simulated shop, and how soon changes are named.

Every figure comes from the nightly path itself: load, warehouse, sequences, a tiny encoder,
segments. Calm nights lie between two gift days, so that nothing changes but what chance, weekdays
and the slow fading of users do. Each change is injected into a copy of the shop on one of the calm
nights. What a stretch with gift days in it does is told apart (`drift_gift_season_alarms`).

`python benchmarks/drift.py [--seeds 3] [--users 800] [--calibration 40] [--nights 60]`
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from drift_nights import Shop, Tamper, mix_up_users
from figures import measured, publish

from behavior_pipeline.downstream.drift.calibration import DAYS_OF_A_YEAR
from behavior_pipeline.downstream.drift.verdicts import Kind, Verdict
from behavior_pipeline.ingest.simulation.changes import Change

CALM_FROM = date(2026, 6, 22)  # the day after a gift day; the next season begins on 17 November
GIFTS_FROM = date(2026, 3, 25)  # 35 nights before a season; gift days are 10 May and 21 June
GIFT_NIGHTS = 98
NIGHTS_TO_NAME = 3  # that are run after a change; it is to be named within two
OTHER_SEED = 1000  # of a retraining


@dataclass(frozen=True)
class Injection:
    """A change, and what it must be named.

    Attributes:
        kind: the verdict that names it.
        changes: of what the shop records, from a day on.
        is_retrained: whether another encoder takes over on that day.
        is_aligned: whether its vectors are brought into the space of the night before.
        tamper: what spoils the embeddings of that night.
        says: words that the verdict has, such as the event type.
    """

    kind: Kind
    changes: Callable[[date], list[Change]] = lambda _: []
    is_retrained: bool = False
    is_aligned: bool = False
    tamper: Tamper | None = None
    says: str = ""


INJECTIONS = {
    "event_mix": Injection(
        Kind.EVENT_MIX, lambda day: [Change(day, "view", 0.2, "search")], says="'search'"
    ),
    "broken_tracking": Injection(
        Kind.BROKEN_TRACKING, lambda day: [Change(day, "add_to_cart", 0.9)], says="'add_to_cart'"
    ),
    "retraining": Injection(Kind.RETRAINING, is_retrained=True, says="not aligned"),
    "aligned_retraining": Injection(
        Kind.RETRAINING, is_retrained=True, is_aligned=True, says="; aligned"
    ),
    "encoder_fault": Injection(Kind.ENCODER_FAULT, tamper=mix_up_users),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--users", type=int, default=800)
    parser.add_argument("--calibration", type=int, default=40)
    parser.add_argument("--nights", type=int, default=60)
    parser.add_argument("--folder", type=Path, help="kept; a temporary one otherwise")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="drift-"))
    started = time.perf_counter()
    runs = [Run(given, folder / f"seed-{seed}", seed) for seed in range(given.seeds)]
    for run in runs:
        run.measure()
    lines = [*_lines(given, runs), _gift_seasons(given, folder / "gifts")]
    if given.folder is None:
        shutil.rmtree(folder)
    seconds = time.perf_counter() - started
    lines.append(measured("drift_benchmark_seconds", seconds, "s"))
    publish("drift", lines, is_kept=given.seeds >= 3)  # noqa: PLR2004 - a full run has as many


class Run:
    """One seed: a calm shop, and copies of it to which something happens."""

    def __init__(self, given: argparse.Namespace, folder: Path, seed: int) -> None:
        self.given = given
        nights = given.calibration + given.nights
        self.shop = Shop(folder / "calm", seed, given.users, CALM_FROM, nights)
        # Another weekday with each seed, well after the calibration.
        self.changed_night = given.calibration + 12 + 2 * seed
        self.calm: list[Verdict] = []
        self.named: dict[str, list[Verdict]] = {}

    def measure(self) -> None:
        """Run the calm nights, and each change on a copy."""
        self.shop.simulate()
        self.shop.open()
        for number in range(self.given.calibration + self.given.nights):
            if number == self.changed_night:
                self._inject()
            self.shop.night(self.shop.day(number))
        self.calm = self.shop.verdicts()[self.given.calibration :]
        told = [str(verdict.words) for verdict in self.calm if verdict.is_alarm]
        print(f"seed {self.shop.seed}: calm: {told}", file=sys.stderr, flush=True)

    def _inject(self) -> None:
        """Let each change happen to a copy, tonight."""
        for name, injection in INJECTIONS.items():
            copy = self.shop.forked(self.shop.folder.with_name(name))
            copy.simulate(injection.changes(self.shop.day(self.changed_night)))
            if injection.is_retrained:
                copy.pretrain(OTHER_SEED + copy.seed)
            if injection.is_aligned:
                copy.align(self.shop.day(self.changed_night))
            for number in range(NIGHTS_TO_NAME):
                day = self.shop.day(self.changed_night + number)
                copy.night(day, injection.tamper if number == 0 else None)
            self.named[name] = copy.verdicts()[self.changed_night :]
            words = " || ".join(verdict.words for verdict in self.named[name])
            print(f"seed {copy.seed}: {name}: {words}", file=sys.stderr, flush=True)
            shutil.rmtree(copy.folder)


def nights_to_name(verdicts: list[Verdict], injection: Injection) -> int | None:
    """Return after how many nights a change was named as it should be, None if it never was."""
    for number, verdict in enumerate(verdicts, start=1):
        if any(
            finding.kind is injection.kind and injection.says in str(finding)
            for finding in verdict.findings
        ):
            return number
    return None


def _lines(given: argparse.Namespace, runs: list[Run]) -> Iterator[dict[str, object]]:
    """Yield the figures."""
    per_year = runs[0].shop.settings.drift_false_alarms_per_year
    by_seed = [sum(verdict.is_alarm for verdict in run.calm) for run in runs]
    circumstances = {"users": given.users, "seeds": given.seeds, "calibration": given.calibration}
    yield measured(
        "drift_false_alarms", sum(by_seed), f"nights of {given.nights * len(runs)}",
        stated=round(per_year * given.nights * len(runs) / DAYS_OF_A_YEAR, 2),
        stated_per_year=per_year, by_seed=by_seed, **circumstances,
    )  # fmt: skip
    for name, injection in INJECTIONS.items():
        found = [nights_to_name(run.named[name], injection) for run in runs]
        worst = max((number or NIGHTS_TO_NAME + 1) for number in found)
        yield measured(
            f"drift_nights_to_name_{name}", worst, "nights", by_seed=found,
            verdict=str(injection.kind), words=runs[0].named[name][(found[0] or 1) - 1].words,
            **circumstances,
        )  # fmt: skip


def _gift_seasons(given: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Return how often a stretch with two gift days in it alarms: a calendar is a change too."""
    shop = Shop(folder, 0, given.users, GIFTS_FROM, GIFT_NIGHTS)
    shop.simulate()
    shop.open()
    for number in range(GIFT_NIGHTS):
        shop.night(shop.day(number))
    alarms = [verdict for verdict in shop.verdicts() if verdict.is_alarm]
    told = [f"{verdict.night.cutoff:%m-%d} {verdict.words}" for verdict in alarms]
    return measured(
        "drift_gift_season_alarms", len(alarms), f"nights of {GIFT_NIGHTS}", words=told, seeds=1
    )


if __name__ == "__main__":
    main()
