#!/usr/bin/env bash
# Prints "running" while train.py runs on every host, and otherwise the exit code that says what became of it.
#
#   status.sh [--slices=N]
#
# 0: every host is done. 75: stopped and saved. Otherwise the first code of another kind, 137 where a process is gone
# without one.
# Of all scripts: --project, --zone, --name (moe), --dry-run; defaults: MOE_PROJECT, MOE_ZONE, MOE_NAME.

. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
parse -- "$@"

# shellcheck disable=SC2016
codes=$(ask_hosts 'code=0' 'cd "$HOME/moe" 2>/dev/null || { echo code=137; exit; }
if [ -s run.code ]; then echo "code=$(cat run.code)"
elif [ -s run.pid ] && kill -0 "$(cat run.pid)" 2>/dev/null; then echo code=running
else echo code=137; fi')
mapfile -t codes < <(grep --only-matching --extended-regexp '^code=(running|[0-9]+)' <<<"$codes" | cut -d= -f2)
[ ${#codes[@]} -gt 0 ] || fail $FAILURE "no host of ${opt[name]} answers."
worst=$DONE
for code in "${codes[@]}"; do
  case $code in
    "$DONE" | running) ;;
    "$STOPPED") [ "$worst" != "$DONE" ] || worst=$STOPPED ;;
    *) worst=$code ;;
  esac
done
# One that failed ends the run on all; one that is done waits for the others.
if [ "$worst" = "$DONE" ] && [[ " ${codes[*]} " == *' running '* ]]; then worst=running; fi
say "$worst"
