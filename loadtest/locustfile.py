"""What `locust -f loadtest/locustfile.py` runs: the users, their options, the percentiles shown."""

from __future__ import annotations

import locust.stats
from locust import events
from locust.argument_parser import LocustArgumentParser

from loadtest.users import EuropeanUser, NorthAmericanUser

__all__ = ["EuropeanUser", "NorthAmericanUser"]

locust.stats.PERCENTILES_TO_REPORT = [0.5, 0.95, 0.99]


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def add_options(parser: LocustArgumentParser) -> None:
    parser.add_argument("--account", default="loadtest", help="in the path of every request")
    parser.add_argument("--token", env_var="EDGEFIRE_TOKEN", is_secret=True, help="bearer key")
    parser.add_argument("--model", required=True)
    parser.add_argument("--max-tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--samples", required=True, help="file to append a line a request to")
