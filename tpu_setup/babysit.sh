#!/usr/bin/env bash
# Brings a run to its end on slices that may be taken away: creates, sets up, launches, and does so again after each
# preemption; train.py goes on from its newest checkpoint. In the end, however it comes, everything is deleted.
#
#   babysit.sh --type=v5e-16 --spot --workdir=gs://BUCKET/runs/NAME [--attempts=N] [--every=SECONDS] [--keep] -- --config=…
#
# Waits for a slice for as long as there is none. --attempts: how often in a row it may start without a step more (5).
# --keep: leave the slice when the run is done.
# Gives up at once where train.py says that its command or what it needs is wrong (exit codes 1 and 2).
# Of all scripts: --project, --zone, --name (moe), --slices, --dry-run; defaults: MOE_PROJECT, MOE_ZONE, MOE_NAME, MOE_TYPE.

. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
parse type spot reserved direct runtime wait workdir attempts every keep -- "$@"
need_workdir
[ ${#rest[@]} -gt 0 ] || fail $USAGE "what is train.py to do? -- --config=configs/….py"

common=("--name=${opt[name]}" "--project=${opt[project]}" "--zone=${opt[zone]}" "--slices=${opt[slices]}")
[ -z "${opt[dry-run]}" ] || common+=(--dry-run)
create=("--type=${opt[type]}" "--wait=${opt[wait]}" "--every=${opt[every]}")
for flag in spot reserved direct; do [ -z "${opt[$flag]}" ] || create+=("--$flag"); done
[ -z "${opt[runtime]}" ] || create+=("--runtime=${opt[runtime]}")

# Whether the slice is one that this script made: another of the same name stays.
ours=''
clean_up() {
  local code=$?
  trap - EXIT INT TERM
  if [ -n "$ours" ] && { [ -z "${opt[keep]}" ] || [ $code != 0 ]; }; then
    "$here/delete.sh" "${common[@]}" || code=$FAILURE
  fi
  exit $code
}
trap clean_up EXIT
trap 'end 130' INT
trap 'end 143' TERM

# A step of the way runs beside this shell, which otherwise wouldn't hear a signal before it has ended.
child=''
step() { # SCRIPT ARGUMENTS…
  local code=0
  "$here/$1" "${@:2}" &
  child=$!
  wait "$child" || code=$?
  child=''
  return $code
}

end() { # CODE
  [ -z "$child" ] || { kill -TERM "$child" 2> /dev/null && wait "$child"; } || true
  exit "$1"
}

last_step() { # of metrics.jsonl, 0 where there is none
  local line
  line=$(gcloud storage cat "${opt[workdir]}/metrics.jsonl" 2>/dev/null | tail -n 1) || true
  [[ $line =~ \"step\":\ *([0-9]+) ]] && printf '%s' "${BASH_REMATCH[1]}" || printf 0
}

is_there() { # no node is known to be gone; where gcloud can't tell, the next look will
  local node state
  for node in $(nodes); do
    state=$(state_of_node READY "$node") || continue
    [ "$state" = READY ] || return 1
  done
}

follow() { # sets outcome to the exit code of the run, or to "lost" when a node is taken away
  outcome=running
  while [ "$outcome" = running ]; do
    nap "${opt[every]}"
    if is_there; then outcome=$("$here/status.sh" "${common[@]}") || outcome=running; else outcome=lost; fi
  done
}

if [ -n "${opt[dry-run]}" ]; then
  ours=yes
  "$here/create.sh" "${create[@]}" "${common[@]}"
  "$here/setup.sh" "${common[@]}"
  "$here/launch.sh" "--workdir=${opt[workdir]}" "${common[@]}" -- "${rest[@]}"
  is_there
  "$here/status.sh" "${common[@]}"
  exit 0
fi

tries=0 reached=$(last_step)
while :; do
  code=0
  step create.sh "${create[@]}" "${common[@]}" || code=$?
  if [ $code = $STOPPED ]; then
    nap "${opt[every]}"
    continue
  fi
  [ $code = 0 ] || exit $code
  ours=yes
  if step setup.sh "${common[@]}" && step launch.sh "--workdir=${opt[workdir]}" "${common[@]}" -- "${rest[@]}"; then
    follow
  else
    outcome=lost
  fi
  now=$(last_step)
  say "${opt[name]}: $outcome at step $now"
  case $outcome in
    "$DONE") exit 0 ;;
    "$FAILURE" | "$USAGE")
      if is_there; then
        # shellcheck disable=SC2016
        on_hosts 'tail -n 20 "$HOME/moe/run.log"' || true
        fail "$outcome" "train.py ended with exit code $outcome, which a new start doesn't mend; its last lines stand above."
      fi ;;
  esac
  if [ "$now" -gt "$reached" ]; then tries=0 reached=$now; else tries=$((tries + 1)); fi
  [ $tries -lt "${opt[attempts]}" ] ||
    fail $FAILURE "${opt[attempts]} starts in a row brought no step more than $reached: see what watch.sh shows, or raise --attempts."
  "$here/delete.sh" "${common[@]}"
  ours=''
done
