#!/usr/bin/env bash
# Creates a TPU slice, or several, and returns when it is ready; whatever goes wrong, nothing is left behind.
#
#   create.sh --type=v5e-16 [--spot | --reserved] [--direct] [--runtime=VERSION] [--wait=SECONDS] [--every=SECONDS] [--slices=N]
#
# --type: kind and size, as configs name their presets: v4-8, v5e-16, v5p-128, v6e-64.
# --direct: a TPU VM at once or not at all; without it a queued resource, for which one waits (--wait, 3600 s) and
# asks time and again (--every, 30 s).
# --slices: so many slices in one queued resource, NAME-0, NAME-1, …; train them with --config.mesh.dcn=N.
# Exit code 75: there is no slice now, but may be later.
# Of all scripts: --project, --zone, --name (moe), --dry-run; defaults: MOE_PROJECT, MOE_ZONE, MOE_NAME, MOE_TYPE.

. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
parse type spot reserved direct runtime wait every -- "$@"

case ${opt[type]} in
  v4-*) accelerator=${opt[type]} runtime=tpu-ubuntu2204-base ;;
  v5e-*) accelerator=v5litepod-${opt[type]#v5e-} runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) accelerator=${opt[type]} runtime=v2-alpha-tpuv5 ;;
  v6e-*) accelerator=${opt[type]} runtime=v2-alpha-tpuv6e ;;
  *) fail $USAGE "--type=${opt[type]} must be v4-N, v5e-N, v5p-N or v6e-N, such as v5e-16; TPU7x is had through GKE." ;;
esac
[[ ${opt[type]#*-} =~ ^[1-9][0-9]*$ ]] || fail $USAGE "--type=${opt[type]} must end in a number, such as v5e-16."
[ -z "${opt[spot]}" ] || [ -z "${opt[reserved]}" ] || fail $USAGE "--spot and --reserved exclude each other."
[ -z "${opt[direct]}" ] || [ "${opt[slices]}" = 1 ] || fail $USAGE "several slices need a queued resource: leave out --direct."

explain() { # what gcloud said; a refusal in a sentence
  local about="${opt[type]} in ${opt[zone]}"
  case $1 in
    *[Qq]uota*) fail $FAILURE "there is no quota for $about: ask for it, or try --spot, another --type or --zone ($1)." ;;
    *'no more capacity'* | *stockout* | *RESOURCE_EXHAUSTED*)
      fail $STOPPED "Google has no $about now: leave out --direct to wait for it, or try another --zone ($1)." ;;
    *PERMISSION_DENIED* | *'not have permission'*)
      fail $FAILURE "this account may not create TPUs in project ${opt[project]}: it needs the role roles/tpu.admin ($1)." ;;
    *ALREADY_EXISTS* | *'already exists'*)
      fail $FAILURE "${opt[name]} exists already: use it, choose another --name, or run delete.sh --name=${opt[name]} ($1)." ;;
    *) fail $FAILURE "$about couldn't be created: $1" ;;
  esac
}

attempt() { # VERB…; runs it, and explains what is wrong after taking back what there is
  local said
  if [ -n "${opt[dry-run]}" ]; then call_tpu "$@"; return; fi
  if ! said=$(call_tpu "$@" 2>&1); then
    said=$(tr '\n' ' ' <<<"$said")
    # Somebody else was quicker.
    [[ $said == *ALREADY_EXISTS* || $said == *'already exists'* ]] || take_back
    trap - EXIT
    explain "$said"
  fi
}

take_back() {
  trap - EXIT INT TERM
  say "taking back ${opt[name]}, so that nothing is billed"
  "$here/delete.sh" --name="${opt[name]}" --project="${opt[project]}" --zone="${opt[zone]}" --slices="${opt[slices]}"
}

# What exists before isn't ours, and nothing that goes wrong below may take it back.
trap 'exit 130' INT
trap 'exit 143' TERM
state=$(state_of_request ABSENT 2>&1) || explain "$state"
[ "$state" = ABSENT ] || explain "ALREADY_EXISTS: a queued resource, $state"
for node in $(nodes); do
  state=$(state_of_node ABSENT "$node" 2>&1) || explain "$state"
  [ "$state" = ABSENT ] || explain "ALREADY_EXISTS: TPU VM $node, $state"
done

flags=("--accelerator-type=$accelerator" --labels=made-by=moe --quiet)
[ -z "${opt[spot]}" ] || flags+=(--spot)
[ -z "${opt[reserved]}" ] || flags+=(--reserved)
runtime=${opt[runtime]:-$runtime}
[ -n "${opt[dry-run]}" ] || trap 'take_back' EXIT
if [ -n "${opt[direct]}" ]; then
  attempt tpu-vm create "${opt[name]}" "${flags[@]}" "--version=$runtime"
else
  place_of=(--node-id="${opt[name]}")
  [ "${opt[slices]}" = 1 ] || place_of=(--node-count="${opt[slices]}" --node-prefix="${opt[name]}")
  attempt queued-resources create "${opt[name]}" "${place_of[@]}" "${flags[@]}" "--runtime-version=$runtime"
  begin=$SECONDS
  while state=$(state_of_request ACTIVE); [ "$state" != ACTIVE ]; do
    case $state in
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        why=$(ask_tpu '' queued-resources describe "${opt[name]}" '--format=value(state.failedData.error.message)')
        take_back
        [[ $state == FAILED || -n $why ]] || fail $STOPPED "the request is $state before it was ready: try again."
        explain "the request is $state${why:+: $why}" ;;
    esac
    [ $((SECONDS - begin)) -lt "${opt[wait]}" ] || {
      take_back
      fail $STOPPED "the request was still ${state:-unknown} after ${opt[wait]} s: try another --zone, --spot, or a longer --wait."
    }
    say "waiting for ${opt[type]} in ${opt[zone]}: ${state:-unknown}"
    nap "${opt[every]}"
  done
fi
trap - EXIT INT TERM
[ -n "${opt[dry-run]}" ] || say "${opt[name]} is ready: $here/setup.sh --name=${opt[name]} --zone=${opt[zone]}"
