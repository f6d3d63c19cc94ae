"""The warehouse's tables as a data scientist writes them in pandas: the peer of the SQL.

Idiomatic and vectorised: group-bys with named aggregations, no `apply`, no Python loop over users.
The columns are those of the dbt models; sums are floats where the models sum decimals.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

SESSION_GAP_SECONDS = 1800
WINDOWS = (7, 30, 90)
QUALIFYING = "purchase"
TARGET_EVENTS = ("add_to_cart", "purchase")
NUM_TARGETS = 30
MORNING, EVENING, SATURDAY = 6, 22, 5

Tables = dict[str, pd.DataFrame]


def build(
    events: Path, cutoffs: list[pd.Timestamp], horizon_days: int, lookback_days: int
) -> Tables:
    """Return every table; the last cutoff is the night's own, the first trains the probes."""
    sessionized = sessionize(pd.read_parquet(events))
    days = user_days(sessionized)
    rfm = pd.concat(user_rfm(days, cutoff, lookback_days) for cutoff in cutoffs)
    targets, target_labels = propensity(sessionized, cutoffs, horizon_days, lookback_days, rfm)
    return {
        "events_sessionized": sessionized,
        "sessions": sessions(sessionized),
        "user_days": days,
        "daily_activity": daily_activity(sessionized),
        "user_rfm": rfm,
        "user_aggregates": user_aggregates(sessionized, days, cutoffs[-1], lookback_days),
        "labels": pd.concat(labels(days, rfm, cutoff, horizon_days) for cutoff in cutoffs),
        "propensity_targets": targets,
        "propensity_labels": target_labels,
    }


def sessionize(events: pd.DataFrame) -> pd.DataFrame:
    """Number each user's events, with the gap before each and the start of its session."""
    frame = events.sort_values(["user_id", "occurred_at", "event_id"], ignore_index=True)
    by_user = frame.groupby("user_id", sort=False)
    frame["event_number"] = by_user.cumcount() + 1
    frame["gap_seconds"] = by_user["occurred_at"].diff().dt.total_seconds()
    frame["is_session_start"] = ~(frame["gap_seconds"] <= SESSION_GAP_SECONDS)
    starts = frame["occurred_at"].where(frame["is_session_start"])
    frame["session_started_at"] = starts.groupby(frame["user_id"], sort=False).ffill()
    frame["activity_date"] = frame["occurred_at"].dt.floor("D")
    frame["is_qualifying"] = frame["event_type"] == QUALIFYING
    return frame


def sessions(events: pd.DataFrame) -> pd.DataFrame:
    """One row per session."""
    table = events.groupby(["user_id", "session_started_at"], as_index=False).agg(
        ended_at=("occurred_at", "max"),
        num_events=("event_id", "size"),
        num_qualifying_events=("is_qualifying", "sum"),
        num_items=("item_id", "nunique"),
        num_event_types=("event_type", "nunique"),
        amount=("amount", "sum"),
        first_event_type=("event_type", "first"),
        last_event_type=("event_type", "last"),
        first_event_number=("event_number", "min"),
    )
    elapsed = table["ended_at"] - table["session_started_at"]
    table["duration_seconds"] = elapsed.dt.total_seconds()
    table["is_first_session"] = table["first_event_number"] == 1
    table["is_bounce"] = table["num_events"] == 1
    return table


def user_days(events: pd.DataFrame) -> pd.DataFrame:
    """One row per user and active day."""
    hour = events["occurred_at"].dt.hour
    log_gap = np.log1p(events["gap_seconds"])
    table = (
        events.assign(
            is_night=(hour < MORNING) | (hour >= EVENING),
            qualifying_amount=events["amount"].where(events["is_qualifying"]),
            inner_gap=events["gap_seconds"].where(~events["is_session_start"]),
            log_gap=log_gap,
            log_gap_square=log_gap**2,
            qualifying_at=events["occurred_at"].where(events["is_qualifying"]),
        )
        .groupby(["user_id", "activity_date"], as_index=False)
        .agg(
            num_events=("event_id", "size"),
            num_qualifying_events=("is_qualifying", "sum"),
            num_sessions=("is_session_start", "sum"),
            num_night_events=("is_night", "sum"),
            amount=("amount", "sum"),
            qualifying_amount=("qualifying_amount", "sum"),
            max_amount=("amount", "max"),
            num_amounts=("amount", "count"),
            gap_seconds=("gap_seconds", "sum"),
            session_seconds=("inner_gap", "sum"),
            max_gap_seconds=("gap_seconds", "max"),
            last_gap_seconds=("gap_seconds", "last"),
            log_gap_sum=("log_gap", "sum"),
            log_gap_square_sum=("log_gap_square", "sum"),
            first_event_type=("event_type", "first"),
            first_event_at=("occurred_at", "min"),
            last_event_at=("occurred_at", "max"),
            last_qualifying_at=("qualifying_at", "max"),
        )
    )
    previous = table.groupby("user_id")["activity_date"].diff()
    table["days_since_active"] = previous.dt.days
    return table


def daily_activity(events: pd.DataFrame) -> pd.DataFrame:
    """What happened on each day, by event type."""
    return events.groupby(["activity_date", "event_type"], as_index=False).agg(
        num_events=("event_id", "size"),
        num_users=("user_id", "nunique"),
        amount=("amount", "sum"),
    )


def user_rfm(days: pd.DataFrame, cutoff: pd.Timestamp, lookback_days: int) -> pd.DataFrame:
    """Recency, frequency and monetary value as of a cutoff."""
    known = days[(days["activity_date"] < cutoff) & (days["num_qualifying_events"] > 0)]
    table = known.groupby("user_id", as_index=False).agg(
        frequency=("activity_date", "size"),
        monetary=("qualifying_amount", "sum"),
        last_qualifying_at=("last_qualifying_at", "max"),
    )
    hours = (cutoff - table["last_qualifying_at"].dt.floor("h")).dt.total_seconds() // 3600
    table["recency_days"] = hours / 24
    start = cutoff - pd.Timedelta(days=lookback_days)
    table["is_in_population"] = table["last_qualifying_at"] >= start
    return table.assign(observation_cutoff=cutoff)


def labels(
    days: pd.DataFrame, rfm: pd.DataFrame, cutoff: pd.Timestamp, horizon_days: int
) -> pd.DataFrame:
    """What the population does in the label window."""
    end = cutoff + pd.Timedelta(days=horizon_days)
    window = days[(days["activity_date"] >= cutoff) & (days["activity_date"] < end)]
    found = window.groupby("user_id", as_index=False).agg(
        num_qualifying_events=("num_qualifying_events", "sum"),
        amount=("qualifying_amount", "sum"),
        next_event_type=("first_event_type", "first"),
    )
    is_known = (rfm["observation_cutoff"] == cutoff) & rfm["is_in_population"]
    table = rfm.loc[is_known, ["observation_cutoff", "user_id"]].merge(
        found, on="user_id", how="left"
    )
    table = table.fillna({"num_qualifying_events": 0, "amount": 0})
    return table.assign(is_churned=table["num_qualifying_events"] == 0)


def propensity(
    events: pd.DataFrame,
    cutoffs: list[pd.Timestamp],
    horizon_days: int,
    lookback_days: int,
    rfm: pd.DataFrame,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The most frequent targets before the first cutoff, and who takes them after each."""
    taken = events[events["event_type"].isin(TARGET_EVENTS) & events["category"].notna()]
    start = cutoffs[0] - pd.Timedelta(days=lookback_days)
    train = taken[taken["activity_date"].between(start, cutoffs[0], inclusive="left")]
    counts = train.groupby("category", as_index=False).agg(num_events=("event_id", "size"))
    ranked = counts.sort_values(["num_events", "category"], ascending=[False, True])
    targets = ranked.head(NUM_TARGETS)
    found = []
    for cutoff in cutoffs:
        end = cutoff + pd.Timedelta(days=horizon_days)
        window = taken[taken["activity_date"].between(cutoff, end, inclusive="left")]
        users = rfm[(rfm["observation_cutoff"] == cutoff) & rfm["is_in_population"]]
        pairs = window[["category", "user_id"]].drop_duplicates()
        pairs = pairs.merge(targets[["category"]]).merge(users[["user_id"]])
        found.append(pairs.assign(observation_cutoff=cutoff))
    return targets, pd.concat(found)


def user_aggregates(
    events: pd.DataFrame, days: pd.DataFrame, cutoff: pd.Timestamp, lookback_days: int
) -> pd.DataFrame:
    """Point-in-time features of everybody with an event before the cutoff."""
    known = days[days["activity_date"] < cutoff]
    tables = [_history(known)]
    for name, length in (*((f"_{d}d", d) for d in WINDOWS), ("_lookback", lookback_days)):
        recent = known[known["activity_date"] >= cutoff - pd.Timedelta(days=length)]
        tables.append(_window(recent, name))
    yesterday = known[known["activity_date"] >= cutoff - pd.Timedelta(days=1)]
    tables.append(yesterday.groupby("user_id")["num_events"].sum().rename("num_events_1d"))
    before = events[events["occurred_at"] < cutoff]
    tables += [_diversity(before, column) for column in ("item_id", "category", "event_type")]
    return _ratios(pd.concat(tables, axis=1).fillna(0), cutoff)


def _history(known: pd.DataFrame) -> pd.DataFrame:
    """Features of the whole history."""
    weekend = known["num_events"].where(known["activity_date"].dt.dayofweek >= SATURDAY, 0)
    return (
        known.assign(num_weekend_events=weekend)
        .groupby("user_id")
        .agg(
            num_events=("num_events", "sum"),
            num_active_days=("activity_date", "size"),
            num_sessions=("num_sessions", "sum"),
            num_qualifying_events=("num_qualifying_events", "sum"),
            amount=("amount", "sum"),
            num_amounts=("num_amounts", "sum"),
            max_amount=("max_amount", "max"),
            gap_seconds=("gap_seconds", "sum"),
            session_seconds=("session_seconds", "sum"),
            max_gap_seconds=("max_gap_seconds", "max"),
            last_gap_seconds=("last_gap_seconds", "last"),
            log_gap_sum=("log_gap_sum", "sum"),
            log_gap_square_sum=("log_gap_square_sum", "sum"),
            median_days_between_active_days=("days_since_active", "median"),
            num_weekend_events=("num_weekend_events", "sum"),
            num_night_events=("num_night_events", "sum"),
            first_event_at=("first_event_at", "min"),
            last_event_at=("last_event_at", "max"),
        )
    )


def _window(recent: pd.DataFrame, name: str) -> pd.DataFrame:
    """Sums over the last days."""
    sums = recent.groupby("user_id").agg(
        num_events=("num_events", "sum"),
        num_active_days=("activity_date", "size"),
        num_sessions=("num_sessions", "sum"),
        num_qualifying_events=("num_qualifying_events", "sum"),
        amount=("amount", "sum"),
        num_amounts=("num_amounts", "sum"),
    )
    return sums.add_suffix(name)


def _diversity(events: pd.DataFrame, column: str) -> pd.DataFrame:
    """Distinct values, their entropy and the share of the most frequent one."""
    counts = events.groupby(["user_id", column])["event_id"].size().rename("n").reset_index()
    counts["n_log_n"] = counts["n"] * np.log(counts["n"])
    sums = counts.groupby("user_id").agg(
        num=("n", "size"), total=("n", "sum"), top=("n", "max"), n_log_n=("n_log_n", "sum")
    )
    entropy = np.log(sums["total"]) - sums["n_log_n"] / sums["total"]
    share = sums["top"] / sums["total"]
    repeats = 1 - sums["num"] / sums["total"]
    table = pd.DataFrame(
        {"num": sums["num"], "entropy": entropy, "top_share": share, "repeats": repeats}
    )
    return table.add_prefix(f"{column}_")


def _ratios(table: pd.DataFrame, cutoff: pd.Timestamp) -> pd.DataFrame:
    """Shares, means and silence."""
    gaps = (table["num_events"] - 1).replace(0, np.nan)
    silence = (cutoff - table["last_event_at"]).dt.total_seconds()
    tenure = (cutoff - table["first_event_at"]).dt.total_seconds()
    mean_log = table["log_gap_sum"] / gaps
    ratios = {
        "mean_gap_seconds": table["gap_seconds"] / gaps,
        "mean_log_gap": mean_log,
        "std_log_gap": np.sqrt((table["log_gap_square_sum"] / gaps - mean_log**2).clip(lower=0)),
        "recency_days": silence // 3600 / 24,
        "tenure_days": tenure // 3600 / 24,
        "silence_over_mean_gap": silence / (table["gap_seconds"] / gaps),
        "mean_amount": table["amount"] / table["num_amounts"],
        "mean_amount_lookback": table["amount_lookback"] / table["num_amounts_lookback"],
        "mean_session_events": table["num_events"] / table["num_sessions"],
        "mean_session_seconds": table["session_seconds"] / table["num_sessions"],
        "weekend_share": table["num_weekend_events"] / table["num_events"],
        "night_share": table["num_night_events"] / table["num_events"],
        "active_days_per_day": table["num_active_days"] / (tenure // 3600 / 24),
        "events_share_7d_of_30d": table["num_events_7d"] / table["num_events_30d"],
        "events_share_30d_of_90d": table["num_events_30d"] / table["num_events_90d"],
        "events_share_90d_of_lookback": table["num_events_90d"] / table["num_events_lookback"],
        "sessions_share_30d_of_90d": table["num_sessions_30d"] / table["num_sessions_90d"],
    }
    return table.assign(**ratios).fillna(0)
