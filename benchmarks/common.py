"""Shared by all benchmarks: a description of the machine, Markdown tables and result files."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def environment(*libraries: str) -> dict:
    """The machine and the versions of the libraries, on which a result depends."""
    versions = {}
    for library in ("torch", *libraries):
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = None
    return {
        "python": platform.python_version(),
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "versions": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def describe(environment: dict) -> str:
    """One paragraph of Markdown about an :func:`environment`."""
    versions = ", ".join(f"{name} {number or '(not installed)'}" for name, number in environment["versions"].items())
    dtype = f" {environment['dtype']}," if "dtype" in environment else ""
    return (
        f"{environment['processor']}, {environment['cpu_count']} CPUs, {environment['torch_threads']} torch thread(s),{dtype} "
        f"Python {environment['python']}, {versions}."
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_results(path: str | Path, results: dict, markdown: str) -> None:
    """Write the results as JSON, and their tables as a Markdown file beside it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown.rstrip() + "\n")


def in_processes(module: str, number: int, *arguments: Any) -> dict[str, Any]:
    """The line of JSON that a benchmark prints in so many new processes, with one thread each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"] if number > 1 else []
    command = [sys.executable, *launcher, "-m", module, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
