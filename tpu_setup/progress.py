"""One line on how far a run is: reads metrics.jsonl, and after it config.json, from standard input."""

import json
import sys


def line(text: str) -> str:
    """The line for the two files' text, one after the other."""
    metrics, brace, config = text.partition("\n{\n")
    last = {}
    for each in metrics.splitlines():
        try:
            values = json.loads(each)
        except json.JSONDecodeError:  # a line that is being written
            continue
        last = values if "train/loss" in values else last
    if not last:
        return "no step has been logged yet"
    try:
        total = json.loads(brace + config)["steps"]
    except (json.JSONDecodeError, KeyError):
        total = None
    parts = [f"step {last['step']}" + (f"/{total}" if total else ""), f"loss {last['train/loss']:.4f}"]
    if rate := last.get("examples_per_second"):
        parts.append(f"{rate:.4g} examples/s")
    parts += [f"{name} {100 * last[name]:.1f} %" for name in ("mfu", "goodput") if name in last]
    if total and last.get("time/training_seconds"):
        left = last["time/training_seconds"] / last["step"] * (total - last["step"])
        parts.append(f"{int(left // 3600)}:{int(left % 3600 // 60):02d} h left")
    return "  ".join(parts)


if __name__ == "__main__":
    print(line(sys.stdin.read()))
