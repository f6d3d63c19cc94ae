"""Reads users' features from a running `behavior-pipeline serve`; needs nothing but Python.

python examples/read_features.py 17841 12347 --service churn_model
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any
from urllib.request import Request, urlopen

URL = "http://127.0.0.1:6566"
COLD_START_USER = "__cold_start__"
"""Stands for users who were never published: ask for it along with them."""


def read_features(users: list[str], service: str, url: str = URL) -> list[dict[str, Any]]:
    """Return each user's features by name, in the order asked; None where there is none."""
    asked = {"feature_service": service, "entities": {"user_id": users}}
    request = Request(  # noqa: S310 - the caller says which server
        f"{url}/get-online-features",
        data=json.dumps(asked).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urlopen(request, timeout=10) as response:  # noqa: S310 - as above
        answer = json.load(response)
    names = answer["metadata"]["feature_names"]
    columns = [result["values"] for result in answer["results"]]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def with_prior(users: list[str], service: str, url: str = URL) -> list[dict[str, Any]]:
    """As `read_features`; an unknown user gets the embedding of an unknown user."""
    *found, prior = read_features([*users, COLD_START_USER], service, url)
    return [
        prior | {"user_id": row["user_id"]} if row["embedding"] is None else row for row in found
    ]


def main() -> None:
    """Print users' features, one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("users", nargs="+")
    parser.add_argument("--service", default="churn_model")
    parser.add_argument("--url", default=URL)
    options = parser.parse_args()
    for row in with_prior(options.users, options.service, options.url):
        json.dump(row, sys.stdout)
        sys.stdout.write("\n")


if __name__ == "__main__":
    main()
