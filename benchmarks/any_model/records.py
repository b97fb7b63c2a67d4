"""Result files that runs of some of the models merge into, each row with the machine, the versions and the commit it is from."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common import environment
from .models import PROBLEMS

RESULTS = Path(__file__).parents[1] / "results"


def read(path: Path) -> dict[str, Any]:
    """The rows of a result file by model; none if there is no file yet."""
    return json.loads(path.read_text())["models"] if path.exists() else {}


def merge(path: Path, name: str, row: dict[str, Any]) -> None:
    """Writes the row of one model, and keeps all others, in the order of the models."""
    rows = {**read(path), name: {**row, "commit": commit(), "environment": environment("pyro-ppl", "pyro-flowguides")}}
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = {each: rows[each] for each in PROBLEMS if each in rows}
    # The place of the checkout, which the messages of errors hold, says nothing to others.
    path.write_text(json.dumps({"models": ordered}, indent=1).replace(f"{RESULTS.parents[1]}/", "") + "\n")


def commit() -> str:
    """The commit of the checkout, with a plus if files have changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=RESULTS, capture_output=True, text=True, check=False
        ).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (
        "+" if git("status", "--porcelain", "--", "../../pyro_flowguides") else ""
    )


def chosen(names: Sequence[str]) -> list[str]:
    """The models of these names; all of them if there is none.

    Raises:
        SystemExit: if a name is unknown.
    """
    if unknown := set(names) - set(PROBLEMS):
        raise SystemExit(f"no model {', '.join(sorted(unknown))}; there are {', '.join(PROBLEMS)}")
    return list(names or PROBLEMS)
