"""What stands in for train.py on a host: its steps, files on a bucket that is a folder, and exit codes."""

import json
import os
import signal
import sys
import time
from pathlib import Path

workdir = next(word for word in sys.argv if word.startswith("--workdir=")).removeprefix("--workdir=gs://")
folder = Path(os.environ["BUCKET"]) / workdir
folder.mkdir(parents=True, exist_ok=True)
Path("arguments.json").write_text(json.dumps(sys.argv[1:]))
stopping: list[int] = []
signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
plan = json.loads((Path(os.environ["BUCKET"]) / "plan.json").read_text())
if code := plan.get("code"):
    print(f"train.py: a sentence about exit code {code}", file=sys.stderr)
    sys.exit(code)
(folder / "config.json").write_text(json.dumps({"steps": plan["steps"]}, indent=2))
metrics = folder / "metrics.jsonl"
first = len(metrics.read_text().splitlines()) if metrics.exists() else 0
for step in range(first + 1, plan["steps"] + 1):
    if stopping:
        sys.exit(75)
    if plan.get("hold_at") == step and not first:
        while not stopping:
            time.sleep(0.02)
        sys.exit(75)
    if Path.cwd().parent.name.endswith("w0"):
        with metrics.open("a") as file:
            file.write(json.dumps({"step": step, "train/loss": 1 / step, "examples_per_second": 8.0}) + "\n")
    print(f"step {step}/{plan['steps']}", flush=True)
    time.sleep(0.02)
