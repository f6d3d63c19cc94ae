"""The tasks that representations are judged on, and the targets that cannot be measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from behavior_pipeline.downstream.users import Population

TaskName = Literal["churn", "propensity", "next_action", "segments"]
CHURN_TARGET: Final = "is_churned"
NEXT_ACTION_TARGET: Final = "next_event_type"
MACRO_TARGET: Final = "macro"
MIN_USERS_PER_CLASS: Final = 5
"""An AUROC over fewer users of a class than this is noise, and its interval a fiction."""
MAX_CLASSES: Final = 20
"""Types of the next event that a probe learns, the most frequent; the rest count as misses."""


@dataclass(frozen=True)
class LeftOut:
    """A target that was not measured, with the reason in words."""

    task: TaskName
    target: str
    reason: str


@dataclass(frozen=True)
class Task:
    """Targets of the same users.

    Attributes:
        name: of the task.
        targets: names, one per array of labels.
        train_rows, test_rows: (N,) booleans: the users that the task is about.
        train_labels, test_labels: per target the classes of those users: booleans, or places in
            `classes` for a multiclass target (-1 for a class that is not learned).
        classes: names of the classes of a multiclass target.
        left_out: targets that could not be measured.
    """

    name: TaskName
    targets: tuple[str, ...]
    train_rows: NDArray[np.bool_]
    test_rows: NDArray[np.bool_]
    train_labels: tuple[NDArray[Any], ...]
    test_labels: tuple[NDArray[Any], ...]
    classes: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = field(default=())


def churn_task(train: Population, test: Population, name: TaskName = "churn") -> Task:
    """Return churn as one target; `segments` asks the same of segment membership."""
    return _binary_task(
        name, train, test, {CHURN_TARGET: train.is_churned}, {CHURN_TARGET: test.is_churned}
    )


def propensity_task(train: Population, test: Population) -> Task:
    """Return one target per propensity value, the most frequent first."""
    return _binary_task("propensity", train, test, train.positives, test.positives)


def next_action_task(train: Population, test: Population) -> Task:
    """Return the type of the first event in the window, among users who have one."""
    train_rows = _is_valid(train.next_event_types)
    test_rows = _is_valid(test.next_event_types)
    known = train.next_event_types.drop_null()
    classes = _frequent(known)
    reason = _next_action_reason(len(classes), int(train_rows.sum()), int(test_rows.sum()))
    if reason:
        return _left_out_task("next_action", train_rows, test_rows, NEXT_ACTION_TARGET, reason)
    is_learned = pc.is_in(train.next_event_types, value_set=pa.array(classes))
    train_rows &= is_learned.to_numpy(zero_copy_only=False)
    return Task(
        "next_action",
        (NEXT_ACTION_TARGET,),
        train_rows,
        test_rows,
        (_codes(train.next_event_types, classes)[train_rows],),
        (_codes(test.next_event_types, classes)[test_rows],),
        tuple(classes),
    )


def class_codes(values: pa.Array) -> NDArray[np.int64]:
    """Return each value's place among the distinct values in order: true classes of any name."""
    names = pc.unique(values).sort()
    codes: NDArray[np.int64] = pc.index_in(values, value_set=names).to_numpy().astype(np.int64)
    return codes


def _binary_task(
    name: TaskName,
    train: Population,
    test: Population,
    train_labels: dict[str, NDArray[np.bool_]],
    test_labels: dict[str, NDArray[np.bool_]],
) -> Task:
    """Keep the targets that have enough users of both classes at both cutoffs."""
    reasons = {
        target: _reason(train_labels[target], test_labels[target]) for target in train_labels
    }
    kept = tuple(target for target, reason in reasons.items() if not reason)
    return Task(
        name,
        kept,
        np.ones(len(train), dtype=np.bool_),
        np.ones(len(test), dtype=np.bool_),
        tuple(train_labels[target] for target in kept),
        tuple(test_labels[target] for target in kept),
        left_out=tuple(LeftOut(name, target, text) for target, text in reasons.items() if text),
    )


def _reason(train: NDArray[np.bool_], test: NDArray[np.bool_]) -> str:
    """Say why a binary target cannot be measured, or nothing."""
    for labels, role in ((train, "train"), (test, "test")):
        for count, word in ((int(labels.sum()), "positive"), (int((~labels).sum()), "negative")):
            if count < MIN_USERS_PER_CLASS:
                return (
                    f"only {count} {word} of {len(labels):,} {role} users; "
                    f"at least {MIN_USERS_PER_CLASS} are needed"
                )
    return ""


def _next_action_reason(num_classes: int, num_train: int, num_test: int) -> str:
    """Say why the next action cannot be measured, or nothing."""
    fewest = min(num_train, num_test)
    if fewest < 2 * MIN_USERS_PER_CLASS:
        return (
            f"only {num_train:,} train and {num_test:,} test users have an event in the label "
            f"window; at least {2 * MIN_USERS_PER_CLASS} of each are needed"
        )
    if num_classes <= 1:
        return "every user's next event has the same type, so there is nothing to tell apart"
    return ""


def _left_out_task(
    name: TaskName,
    train_rows: NDArray[np.bool_],
    test_rows: NDArray[np.bool_],
    target: str,
    reason: str,
) -> Task:
    """Return a task without a target that can be measured."""
    return Task(name, (), train_rows, test_rows, (), (), left_out=(LeftOut(name, target, reason),))


def _frequent(values: pa.Array) -> list[str]:
    """Return the most frequent values, the most frequent first, ties by name."""
    counts = sorted(
        (-row["counts"].as_py(), row["values"].as_py()) for row in pc.value_counts(values)
    )
    return [name for _, name in counts[:MAX_CLASSES]]


def _codes(values: pa.Array, classes: list[str]) -> NDArray[np.int64]:
    """Return each value's place in the classes, -1 for another value or null."""
    places = pc.fill_null(pc.index_in(values, value_set=pa.array(classes)), -1)
    codes: NDArray[np.int64] = places.to_numpy().astype(np.int64)
    return codes


def _is_valid(values: pa.Array) -> NDArray[np.bool_]:
    """Return which values are not null."""
    is_valid: NDArray[np.bool_] = values.is_valid().to_numpy(zero_copy_only=False)
    return is_valid
