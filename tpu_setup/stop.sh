#!/usr/bin/env bash
# Tells the run to stop: it saves, on all hosts together, and ends; launch.sh with the same command goes on.
#
#   stop.sh [--wait=SECONDS] [--slices=N]
#
# Of all scripts: --project, --zone, --name (moe), --dry-run; defaults: MOE_PROJECT, MOE_ZONE, MOE_NAME.

. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
opt[wait]=300
parse wait every -- "$@"

# shellcheck disable=SC2016
on_hosts 'cd "$HOME/moe" && if [ -s run.pid ] && [ ! -s run.code ]; then kill -TERM "$(cat run.pid)" 2>/dev/null || true; fi' ||
  fail $FAILURE "not every host of ${opt[name]} could be told to stop."
begin=$SECONDS
while code=$("$here/status.sh" --name="${opt[name]}" --project="${opt[project]}" --zone="${opt[zone]}" \
  --slices="${opt[slices]}" ${opt[dry-run]:+--dry-run}); [ "$code" = running ]; do
  [ $((SECONDS - begin)) -lt "${opt[wait]}" ] ||
    fail $FAILURE "${opt[name]} still runs ${opt[wait]} s after it was told to stop: wait, or delete.sh, which loses what isn't saved."
  nap 2
done
if [ -n "${opt[dry-run]}" ]; then say "$code"; exit; fi
case $code in
  "$STOPPED") say "stopped and saved: launch.sh with the same command goes on" ;;
  "$DONE") say "the run was already done" ;;
  *) fail $FAILURE "the run ended with exit code $code: see run.log on its hosts, watch.sh shows it." ;;
esac
