#!/usr/bin/env bash
# Starts train.py with the same command on every host; it goes on when this script, or the connection, has ended.
#
#   launch.sh --workdir=gs://BUCKET/runs/NAME [--slices=N] -- --config=configs/olmoe_1b_7b.py:v5e-16 [--config.FIELD=VALUE …]
#
# On each host ~/moe/run.log is what it prints, run.pid its process, and run.code, once it has ended, its exit code.
# Of all scripts: --project, --zone, --name (moe), --dry-run; defaults: MOE_PROJECT, MOE_ZONE, MOE_NAME, MOE_WORKDIR.

. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
parse workdir -- "$@"
need_workdir
[ ${#rest[@]} -gt 0 ] || fail $USAGE "what is train.py to do? -- --config=configs/….py"

printf -v command '%q ' .venv/bin/python train.py "--workdir=${opt[workdir]}" "${rest[@]}"
printf -v job '%q' "$command & echo \$! > run.pid; wait \$!; echo \$? > run.code"
start="set -eu
cd \"\$HOME/moe\"
if [ -f run.pid ] && [ ! -f run.code ] && kill -0 \"\$(cat run.pid)\" 2>/dev/null; then
  echo \"\$(hostname): train.py is running already\" >&2
  exit 3
fi
rm -f run.pid run.code
nohup setsid bash -c $job > run.log 2>&1 < /dev/null &
for _ in 1 2 3 4 5 6 7 8 9 10; do [ -s run.pid ] || sleep 0.2; done
test -s run.pid"
on_hosts "$start" || fail $FAILURE "train.py didn't start on every host of ${opt[name]}: run stop.sh, then launch.sh again."
[ -n "${opt[dry-run]}" ] || say "started on every host: $here/watch.sh --name=${opt[name]} --workdir=${opt[workdir]}"
