"""Names what happened on a night: rules on which figures moved, in docs/drift.md as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from behavior_pipeline.downstream.drift.history import NightFigures
from behavior_pipeline.downstream.drift.judgement import (
    TYPE_PREFIX,
    Judged,
    Judgement,
    is_type,
    judge_history,
)
from behavior_pipeline.ingest.drift import MIN_EXPECTED
from behavior_pipeline.settings import Settings

BROKEN_SHARE: Final = 0.5  # of the expected events: a type with fewer has lost its tracking ...
HOLDING: Final = (2 / 3, 3 / 2)  # ... if the others together came in such a share of theirs
ALIGNED_SHARE: Final = 0.8  # of the neighbours that the best motion brings together
ECHO_NIGHTS: Final = 14  # for so long what happened to data may move embeddings
MAX_NAMED: Final = 5
WHOLE: Final = 1000  # a figure from which no decimals are shown


class Kind(StrEnum):
    """What a night is named, gravest first where several things happened."""

    BROKEN_TRACKING = "data drift: tracking broken"
    EVENT_MIX = "data drift: event mix changed"
    VOLUME = "data drift: number of events changed"
    USERS = "data drift: users changed"
    ENCODER_FAULT = "embedding drift without data drift"
    RETRAINING = "retraining"
    ECHO = "embeddings follow data drift"
    CALIBRATING = "calibrating"
    CALM = "calm"


ALARMING: Final = frozenset(
    {Kind.BROKEN_TRACKING, Kind.EVENT_MIX, Kind.VOLUME, Kind.USERS, Kind.ENCODER_FAULT}
)
"""What somebody should look at."""

DATA_DRIFT: Final = ALARMING - {Kind.ENCODER_FAULT}


@dataclass(frozen=True)
class Finding:
    """One thing that happened on a night, in words."""

    kind: Kind
    words: str

    def __str__(self) -> str:
        """Return one line for people."""
        return f"{self.kind}: {self.words}" if self.words else str(self.kind)


@dataclass(frozen=True)
class Verdict:
    """What happened on a night.

    Attributes:
        judgement: the figures behind it.
        findings: at least one, the gravest first.
    """

    judgement: Judgement
    findings: tuple[Finding, ...]

    @property
    def night(self) -> NightFigures:
        """What was measured."""
        return self.judgement.night

    @property
    def kind(self) -> Kind:
        """The gravest of the findings."""
        return self.findings[0].kind

    @property
    def is_alarm(self) -> bool:
        """Whether somebody should look at it."""
        return any(finding.kind in ALARMING for finding in self.findings)

    @property
    def words(self) -> str:
        """All findings, a line each."""
        return "\n".join(str(finding) for finding in self.findings)


def judge_nights(nights: Sequence[NightFigures], settings: Settings) -> list[Verdict]:
    """Return the verdict of every night of a history, which is in order."""
    judgements = judge_history(
        nights, settings.drift_false_alarms_per_year, settings.drift_calm_nights
    )
    verdicts: list[Verdict] = []
    for judgement in judgements:
        recent = verdicts[-ECHO_NIGHTS:]
        was_data_drift = any(
            finding.kind in DATA_DRIFT for verdict in recent for finding in verdict.findings
        )
        verdicts.append(Verdict(judgement, name_findings(judgement, was_data_drift=was_data_drift)))
    return verdicts


def name_findings(judgement: Judgement, *, was_data_drift: bool) -> tuple[Finding, ...]:
    """Name what happened on a night.

    Args:
        judgement: of the night.
        was_data_drift: whether data drifted on one of the ECHO_NIGHTS before.
    """
    findings = [*_events(judgement), *_users(judgement)]
    is_data_drift = was_data_drift or bool(findings)
    findings += _embeddings(judgement, is_data_drift=is_data_drift)
    if findings:
        order = list(Kind)
        return tuple(sorted(findings, key=lambda finding: order.index(finding.kind)))
    if not judgement.num_ready:
        return (Finding(Kind.CALIBRATING, "too few calm nights yet"),)
    return (Finding(Kind.CALM, ""),)


def _events(judgement: Judgement) -> list[Finding]:
    """Name what happened to events: tracking lost, else another mix; or more or fewer of all."""
    alarms = judgement.alarms("events")
    if not alarms:
        return []
    broken = broken_types(judgement)
    if broken:
        return [Finding(Kind.BROKEN_TRACKING, _broken_words(judgement, broken))]
    mix = [name for name in alarms if name != "num_events"]
    if mix:
        return [Finding(Kind.EVENT_MIX, _mix_words(judgement, mix))]
    return [Finding(Kind.VOLUME, _from_to("num_events", judgement.figures["num_events"]))]


def broken_types(judgement: Judgement) -> list[str]:
    """Return the event types whose tracking broke: they alarm and are missing, the others hold."""
    counts = judgement.night.event_counts or {}
    expected = {
        name: count for name, count in judgement.expected_counts.items() if count >= MIN_EXPECTED
    }
    missing = [
        name
        for name, count in expected.items()
        if counts.get(name, 0) < BROKEN_SHARE * count
        and judgement.figures[TYPE_PREFIX + name].is_alarm
    ]
    others = [name for name in expected if name not in missing]
    ratio = sum(counts.get(name, 0) for name in others) / max(
        sum(expected[name] for name in others), 1.0
    )
    return missing if others and HOLDING[0] <= ratio <= HOLDING[1] else []


def _broken_words(judgement: Judgement, broken: Sequence[str]) -> str:
    """Say how many events of a type came of how many, and what came new in their place."""
    counts = judgement.night.event_counts or {}
    expected = judgement.expected_counts
    words = [
        f"{counts.get(name, 0):,} events of type '{name}' of {expected[name]:,.0f} expected"
        for name in broken[:MAX_NAMED]
    ]
    new = [
        f"{count:,} of type '{name}', which is new"
        for name, count in sorted(counts.items())
        if count >= MIN_EXPECTED and name not in expected
    ]
    renamed = f"; but {', '.join(new[:MAX_NAMED])}: renamed?" if new else ""
    return f"{', '.join(words)}, while the others hold{renamed}"


def _mix_words(judgement: Judgement, alarms: Sequence[str]) -> str:
    """Say which shares changed, from what to what."""
    types = [name for name in alarms if is_type(name)]
    others = [name for name in alarms if not is_type(name)]
    shown = [*types, *([] if types else others)][:MAX_NAMED]
    return ", ".join(_from_to(name, judgement.figures[name]) for name in shown)


def _users(judgement: Judgement) -> list[Finding]:
    """Name what happened to users: their number, those without a history, their RFM."""
    alarms = judgement.alarms("users")
    if not alarms:
        return []
    words = (_from_to(name, judgement.figures[name]) for name in alarms[:MAX_NAMED])
    return [Finding(Kind.USERS, ", ".join(words))]


def _embeddings(judgement: Judgement, *, is_data_drift: bool) -> list[Finding]:
    """Name what happened to embeddings: another encoder, what data explain, or a fault."""
    alarms = judgement.alarms("embeddings")
    if judgement.is_retrained:
        return [Finding(Kind.RETRAINING, _retraining_words(judgement, alarms))]
    if not alarms:
        return []
    words = ", ".join(_from_to(name, judgement.figures[name]) for name in alarms[:MAX_NAMED])
    return [Finding(Kind.ECHO if is_data_drift else Kind.ENCODER_FAULT, words)]


def _retraining_words(judgement: Judgement, alarms: Sequence[str]) -> str:
    """Say whether the new encoder's space is the old one's, and what no alignment explains."""
    night = judgement.night
    words = [f"{judgement.former_checkpoint_id} → {night.checkpoint_id}"]
    aligned = is_aligned(night)
    if aligned is not None:
        cross, best = (night.figures[name] for name in ("cross_overlap", "aligned_overlap"))
        words.append(
            f"{'aligned' if aligned else 'not aligned'}: {cross:.0%} of the neighbours kept across "
            f"the two spaces, {best:.0%} after the best rotation and shift"
        )
    beyond = [name for name in alarms if name in MOTION_FREE]
    if beyond:
        moved = ", ".join(_from_to(name, judgement.figures[name]) for name in beyond[:MAX_NAMED])
        words.append(f"more than alignment explains: {moved}")
    elif judgement.num_ready:
        words.append("no more moved than alignment explains")
    return "; ".join(words)


MOTION_FREE: Final = frozenset({"effective_rank", "neighbour_overlap"})
"""Figures that a rotation and shift of all vectors leave as they are."""


def is_aligned(night: NightFigures) -> bool | None:
    """Tell whether a night's vectors lie in the space of those before; None if not measured.

    They do if the best rotation and shift bring hardly more neighbours together than there are.
    """
    cross, best = (night.figures.get(name) for name in ("cross_overlap", "aligned_overlap"))
    if cross is None or best is None:
        return None
    return cross >= ALIGNED_SHARE * best and best > 0


def _from_to(name: str, judged: Judged) -> str:
    """Say what a figure was expected to be and is."""
    if is_type(name):
        label = f"'{name.removeprefix(TYPE_PREFIX)}' {judged.expected:.1%} → {judged.value:.1%}"
        return f"{label} of the events"
    label = name.replace("_", " ")
    return f"{label} {_short(judged.expected)} → {_short(judged.value)}"


def _short(value: float) -> str:
    """Write a figure in few digits."""
    return f"{value:,.0f}" if abs(value) >= WHOLE else f"{value:.3g}"
