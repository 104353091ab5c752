"""Runs one campaign; see the package."""

from __future__ import annotations

import argparse
import importlib
import random
import time

from benchmarks import common

CAMPAIGNS = {
    "kill": ("kill", "kill", 240),
    "power": ("power", "power", 600),
    "power-scan": ("power", "power_scan", 200),
    "damage": ("damage", "damage", 1200),
    "resumed-damage": ("resumed", "resumed_damage", 400),
    "fuzz": ("fuzz", "fuzz", 100_000),
    "errno-sweep": ("errors", "errno_sweep", 10**9),
    "errno-scan": ("errors", "errno_scan", 10**9),
    "slow-sweep": ("slow", "slow_sweep", 200),
    "slow-scan": ("slow", "slow_scan", 100),
    "disk": ("full", "disk", 150),
    "races": ("races", "races", 10_000),
    "edits": ("edits", "edits", 200),
    "odd-values": ("odd", "odd_values", 2000),
    "limit": ("limit", "limit", 2),
    "device": ("device", "device", 1000),
    "interrupts": ("interrupts", "interrupts", 1000),
}
"""By name: module, function and the usual count."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.campaigns", description=__doc__)
    parser.add_argument("campaign", choices=CAMPAIGNS)
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="write no results")
    parsed = parser.parse_args()
    module, name, usual = CAMPAIGNS[parsed.campaign]
    function = getattr(importlib.import_module(f"benchmarks.campaigns.{module}"), name)
    count = parsed.count or usual
    began = time.perf_counter()
    results = function(count, random.Random(parsed.seed))
    results["seconds"] = time.perf_counter() - began
    if parsed.dry:
        print(results)
    else:
        file = f"campaign_{parsed.campaign.replace('-', '_')}"
        common.write(file, {"count": parsed.count, "seed": parsed.seed}, results)


if __name__ == "__main__":
    main()
