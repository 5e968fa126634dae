#!/usr/bin/env bash
# Shows how far a run is, from metrics.jsonl on the bucket, and the last lines of every host's log, until it has ended.
#
#   watch.sh --workdir=gs://BUCKET/runs/NAME [--every=SECONDS] [--lines=N] [--once] [--slices=N]
#
# Its exit code is that of the run. Ctrl-C ends watching, not the run.
# Of all scripts: --project, --zone, --name (moe), --dry-run; defaults: MOE_PROJECT, MOE_ZONE, MOE_NAME, MOE_WORKDIR.

. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
parse workdir every lines once -- "$@"
need_workdir

while :; do
  metrics=$(ask '' gcloud storage cat "${opt[workdir]}/metrics.jsonl")
  config=$(ask '' gcloud storage cat "${opt[workdir]}/config.json")
  [ -n "${opt[dry-run]}" ] || printf '%s\n%s\n' "$metrics" "$config" | python3 "$here/progress.py"
  # shellcheck disable=SC2016
  on_hosts 'cd "$HOME/moe" && echo "== $(hostname)" && tail -n '"${opt[lines]}"' run.log' || say "not every host answers" >&2
  codes=$("$here/status.sh" --name="${opt[name]}" --project="${opt[project]}" --zone="${opt[zone]}" --slices="${opt[slices]}" \
    ${opt[dry-run]:+--dry-run}) || true
  if [ -n "${opt[dry-run]}" ]; then say "$codes"; exit 0; fi
  [[ $codes == running ]] || { say "ended with exit code $codes"; exit "$codes"; }
  [ -z "${opt[once]}" ] || exit 0
  nap "${opt[every]}"
done
