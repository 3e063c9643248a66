"""``igpt env``: what is here, what runs, and why."""

from __future__ import annotations

import json as json_module


def env(json: bool = False) -> None:
    """Show versions, build, devices, instruction sets, and which implementation of every op is live and why.

    Example: igpt env

    Args:
        json: Print one JSON object.
    """
    from igpt_fast import environment

    report = environment.config()
    print(json_module.dumps(report, indent=2) if json else environment.format_config(report))
