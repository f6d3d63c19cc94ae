"""Figures of a comparison of two partitions of the same events into sessions."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Final

QUANTILES: Final = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class Agreement:
    """Our sessions under one gap beside theirs, in exact counts.

    Attributes:
        gap_minutes: a silence longer than this ends a session of ours.
        num_events: events that both sides place.
        num_ours, num_theirs: sessions with at least one of these events.
        num_exact: sessions of one side that are the same set of events on the other.
        num_split_events: events in sessions of theirs that we cut into several.
        num_merged_events: events in sessions of ours that join several of theirs.
        num_missed_boundaries: places where a user's next event is in another session of theirs,
            but in the same one of ours.
        num_cut_gaps: places where it is in the same session of theirs, but in another one of ours.
        num_pairs: pairs of events in one session on both sides.
        num_our_pairs, num_their_pairs: pairs of events in one session of ours, of theirs.
    """

    gap_minutes: int
    num_events: int
    num_ours: int
    num_theirs: int
    num_exact: int
    num_split_events: int
    num_merged_events: int
    num_missed_boundaries: int
    num_cut_gaps: int
    num_pairs: int
    num_our_pairs: int
    num_their_pairs: int

    @property
    def adjusted_rand_index(self) -> float:
        """1 for equal partitions, 0 on average for random ones of the same sizes.

        Hubert and Arabie, Comparing partitions, Journal of Classification 2 (1985), 193 to 218,
        equation 5: (index - expected) / (maximum - expected), where index counts the pairs that
        both sides join, expected = ours * theirs / all pairs, and maximum = (ours + theirs) / 2.
        Multiplied out it needs integers only, so nothing is rounded before the last division.
        """
        all_pairs = self.num_events * (self.num_events - 1) // 2
        product = self.num_our_pairs * self.num_their_pairs
        above_chance = 2 * (self.num_pairs * all_pairs - product)
        at_most = (self.num_our_pairs + self.num_their_pairs) * all_pairs - 2 * product
        # nothing to disagree about: every event alone on both sides, or all in one session
        return float(Fraction(above_chance, at_most)) if at_most else 1.0

    @property
    def share_of_theirs(self) -> float:
        """Share of their sessions that ours reproduce exactly."""
        return self.num_exact / self.num_theirs

    @property
    def share_of_ours(self) -> float:
        """Share of our sessions that are exactly one of theirs."""
        return self.num_exact / self.num_ours

    @property
    def share_split(self) -> float:
        """Share of events in sessions of theirs that we cut."""
        return self.num_split_events / self.num_events

    @property
    def share_merged(self) -> float:
        """Share of events in sessions of ours that join several of theirs."""
        return self.num_merged_events / self.num_events


@dataclass(frozen=True)
class TheirSessions:
    """What the given sessions look like, whatever our rule says.

    Attributes:
        num_several_users: sessions with events of more than one user.
        num_overlapping: sessions that begin before an earlier one of the same user has ended.
        num_boundaries: places where a user's next event is in another session.
        num_gaps_inside: places where it is in the same session.
        minutes_inside, minutes_between: the gaps there, at `QUANTILES`; empty without any gap.
    """

    num_several_users: int
    num_overlapping: int
    num_boundaries: int
    num_gaps_inside: int
    minutes_inside: tuple[float, ...]
    minutes_between: tuple[float, ...]


@dataclass(frozen=True)
class SessionStudy:
    """The whole comparison.

    Attributes:
        source: name of the preset.
        session_column: column of the source with their sessions.
        preset_gap_seconds: the gap that the preset has.
        num_read: rows read, malformed lines included.
        reasons: rows left out because they break the contract, by reason.
        num_repeated: rows left out because an earlier one has the same given event id.
        num_without_session: events that their side places nowhere; ours are made with them.
        num_events: events compared.
        num_users: their users.
        theirs: what their sessions look like.
        agreements: one per gap, ascending.
    """

    source: str
    session_column: str
    preset_gap_seconds: int
    num_read: int
    reasons: dict[str, int]
    num_repeated: int
    num_without_session: int
    num_events: int
    num_users: int
    theirs: TheirSessions
    agreements: tuple[Agreement, ...]

    @property
    def best(self) -> Agreement:
        """The highest adjusted Rand index; of equal ones the shortest gap."""
        return max(self.agreements, key=lambda agreement: agreement.adjusted_rand_index)
