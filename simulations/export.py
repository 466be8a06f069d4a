"""Merges a run's target into a plain Hugging Face model: `make export RUN=runs/<id>`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from fl_app import lora, models, peft_files
from fl_app.errors import RunInvalid, StillroomError


def export(run: Path, out: Path) -> Path:
    """Write the merged model, its tokenizer and the model card to `out` and return it.

    Raises: RunInvalid when the run has no target; AdapterMismatch when this machine's base is another one.
    """
    target, summary = run / "target", run / "summary.json"
    if not (target / "adapter_config.json").is_file() or not summary.is_file():
        raise RunInvalid(f"{run} holds no target: the run has not finished a round")
    name = str(json.loads(summary.read_text(encoding="utf-8"))["models"]["local"]["name"])
    frozen = models.load(name, "float32")
    merged: Any = lora.attach(frozen.replica(own_weights=True), peft_files.load(target)).merge_and_unload()
    merged.save_pretrained(out)
    frozen.tokenizer.save_pretrained(out)
    (out / "README.md").write_text((target / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    return out


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    console = Console(stderr=True)
    try:
        console.print(f"merged model: {export(arguments.run, arguments.out)}")
    except StillroomError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
