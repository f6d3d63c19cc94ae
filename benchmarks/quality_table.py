"""The page of the comparison: what it shows first, then every figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from kept_results import table
from quality_cells import COMBINED, EVERYONE, NEW_USERS, REPRESENTATIONS, SHARES
from quality_cutoffs import TASKS
from quality_statistics import COMPARISONS, RULES

Line = dict[str, Any]
PROBES = {"logistic_regression": "LR", "gradient_boosting": "GBM", "end_to_end": "end to end"}
LIFT = 0.08  # relative, of the embedding over RFM


class Claim(NamedTuple):
    """Something to be shown.

    Attributes:
        text: in words.
        cells: of comparisons that it is about.
        is_met: whether a comparison meets it.
        needed: how many must.
    """

    text: str
    cells: list[Line]
    is_met: Callable[[Line], bool]
    needed: int


def write_page(lines: list[Line], machine: str) -> str:
    """Return the page's tables in Markdown.

    Args:
        lines: figures of all data sets.
        machine: where it was measured, in words; what the lines say if empty.
    """
    if not lines:
        return ""
    last = lines[-1]
    where = machine or f"{last['machine']}, {last['about']['device']}"
    seeds = ", ".join(map(str, last["seeds"]))
    parts = [f"{last['date']}, {where}, seeds {seeds}: `{last['command']}`", claims_part(lines)]
    names = list(dict.fromkeys(line["data"] for line in lines))
    parts += [f"## Verdicts\n\n{verdict_table(lines)}"]
    parts += [f"## {name}\n\n{data_part(lines, name)}" for name in names]
    parts += [f"## Few labels\n\n{few_labels_table(lines)}"]
    parts += [f"## Users whom no probe has seen\n\n{verdict_table(lines, NEW_USERS)}"]
    return "\n\n".join(parts) + "\n"


def picked(lines: Iterable[Line], **wanted: object) -> list[Line]:
    """Return the lines that hold these values."""
    return [
        line for line in lines if all(line.get(name) == value for name, value in wanted.items())
    ]


def claims_part(lines: list[Line]) -> str:
    """Say what was to be shown, and in how many cells it is."""
    rows = []
    strict = claims_of(lines, RULES[1])
    for claim, harder in zip(claims_of(lines, RULES[0]), strict, strict=True):
        met = [line for line in claim.cells if claim.is_met(line)]
        missed = [f"{line['data']} {line['task']}" for line in claim.cells if line not in met]
        told = "yes" if len(met) >= claim.needed else "**no**"
        told = told if claim.cells else "not measured"
        cells = f"{len(met)} of {len(claim.cells)}"
        also = f"{sum(map(harder.is_met, harder.cells))} of {len(harder.cells)}"
        row = [claim.text, cells, str(claim.needed), told, ", ".join(missed) or "none", also]
        rows.append(row)
    head = ["what was to be shown", "cells", "needed", "shown", "not in", "both probes held out"]
    return f"## What it shows\n\n{table(head, rows)}"


def claims_of(lines: list[Line], rule: str) -> list[Claim]:
    """Return the claims, by how probes are chosen; four data sets have eight cells with a task."""

    def cells(ours: str, theirs: str, split: str = EVERYONE, **more: object) -> list[Line]:
        given = {"kind": "comparison", "ours": ours, "theirs": theirs, "split": split}
        used = rule if split == EVERYONE else RULES[1]
        return picked(lines, **given, rule=used, **more)

    rfm, coles = cells("embedding", "rfm"), cells("embedding", "coles")
    churn = cells("embedding", "rfm", task="churn")
    propensity = cells("embedding", "rfm", task="propensity")
    against, added = cells("embedding", "aggregates"), cells(COMBINED, "aggregates")
    few = cells("embedding", "aggregates", "1%")
    return [
        Claim("embedding 8 % over RFM on propensity", propensity, _is_lifted, len(propensity)),
        Claim("embedding 8 % over RFM on churn", churn, _is_lifted, 2),
        Claim("embedding nowhere significantly below RFM", rfm, _is_no_loss, len(rfm)),
        Claim(
            "embedding no significant loss to aggregates on churn",
            picked(against, task="churn"), _is_no_loss, len(picked(against, task="churn")),
        ),
        Claim(
            "embedding a significant win over aggregates on propensity",
            picked(against, task="propensity"), _is_win, 2,
        ),
        Claim("aggregates + embedding a significant win over aggregates", added, _is_win, 6),
        Claim("aggregates + embedding no significant loss", added, _is_no_loss, len(added)),
        Claim("embedding ahead of CoLES", coles, _is_ahead, 6),
        Claim("embedding ahead of aggregates with 1 % of the labels", few, _is_ahead, 6),
    ]  # fmt: skip


def _is_lifted(line: Line) -> bool:
    return bool(line["relative"] >= LIFT)


def _is_no_loss(line: Line) -> bool:
    return bool(line["verdict"] != "loss")


def _is_win(line: Line) -> bool:
    return bool(line["verdict"] == "win")


def _is_ahead(line: Line) -> bool:
    return bool(line["value"] > 0)


def verdict_table(lines: list[Line], split: str = EVERYONE) -> str:
    """Return a row per data set, task and comparison: differences, intervals, verdicts."""
    rows = []
    order = {pair: place for place, pair in enumerate(COMPARISONS)}
    found = picked(lines, kind="comparison", split=split, rule="stated")
    for line in sorted(found, key=lambda line: order[line["ours"], line["theirs"]]):
        same = {name: line[name] for name in ("data", "task", "ours", "theirs")}
        other = picked(lines, kind="comparison", split=split, rule="held_out", **same)[0]
        rows.append([
            f"{line['ours']} against {line['theirs']}", f"`{line['data']}`", line["task"],
            with_interval(line), f"{100 * line['relative']:+.1f} %", f"**{line['verdict']}**",
            f"{signed(other['value'])}, {other['verdict']}",
        ])  # fmt: skip
    head = [
        "comparison", "data", "task", "difference", "relative", "verdict", "both probes held out",
    ]  # fmt: skip
    return table(head, rows)


def data_part(lines: list[Line], name: str) -> str:
    """Return the scores of a data set, under each probe and under the chosen one."""
    mine = picked(lines, data=name, kind="score", split=EVERYONE, rule="stated")
    rows = []
    for representation in REPRESENTATIONS:
        row = [representation]
        for task in TASKS:
            found = picked(mine, representation=representation, task=task)
            row += score_cells(found[0]) if found else [""] * 4
        rows.append(row) if any(row[1:]) else None
    head = [name]
    for task in TASKS:
        head += [f"{task} LR", f"{task} GBM", f"{task}, chosen probe", "AP"]
    return f"{sizes_of(lines, name)}\n\n{table(head, rows)}"


def sizes_of(lines: list[Line], name: str) -> str:
    """Say who is measured on."""
    about = picked(lines, data=name, figure="quality_data")[0]["about"]
    days = ", ".join(pair[1][:10] for pair in about["pairs"])
    users = ", ".join(f"{num:,}" for num in list(about["judged_users"].values()))
    return (
        f"Test cutoffs {days}; horizon {about['horizon_days']} days, lookback "
        f"{about['lookback_days']}; {users} users at the cutoffs in order; targets are values of "
        f"`{about['propensity_column']}`; encoders trained on {about['training_users']:,} users "
        f"before {about['trained_through'][:10]}."
    )


def score_cells(line: Line) -> list[str]:
    """Return the cells of a score: both probes, the chosen one, and its average precision."""
    probes = line["by_probe"]
    known = [probes.get(probe) for probe in ("logistic_regression", "gradient_boosting")]
    cells = ["" if value is None else number(value) for value in known]
    low, high = line["interval"] or (line["value"], line["value"])
    told = f"{number(line['value'])} ({number(low)} to {number(high)})"
    return [*cells, told, number(line["average_precision"])]


def few_labels_table(lines: list[Line]) -> str:
    """Return the scores at each share of the labels, and the verdict against the aggregates."""
    rows = []
    for name in dict.fromkeys(line["data"] for line in lines):
        for task in TASKS:
            for representation in ("rfm", "aggregates", "embedding", COMBINED):
                given = {"data": name, "task": task, "rule": "held_out"}
                row = [f"`{name}`", task, representation]
                row += [
                    share_cell(lines, representation, split, given)
                    for split in (*SHARES, EVERYONE)
                ]  # fmt: skip
                rows.append(row) if any(row[3:]) else None
    return table(["data", "task", "representation", *SHARES, EVERYONE], rows)


def share_cell(lines: list[Line], representation: str, split: str, given: Line) -> str:
    """Return a score, and how it stands to the aggregates."""
    found = picked(lines, kind="score", representation=representation, split=split, **given)
    if not found:
        return ""
    against = picked(
        lines, kind="comparison", ours=representation, theirs="aggregates", split=split, **given
    )
    told = f" {against[0]['verdict']}" if against else ""
    return number(found[0]["value"]) + told


def with_interval(line: Line) -> str:
    """Return a difference and its interval."""
    low, high = line["interval"] or (line["value"], line["value"])
    return f"{signed(line['value'])} ({signed(low)} to {signed(high)})"


def number(value: float) -> str:
    """Return a score with three digits."""
    return f"{value:.3f}".replace("0.", ".", 1)


def signed(value: float) -> str:
    """Return a difference with its sign."""
    return f"{value:+.3f}".replace("0.", ".", 1)
