#!/usr/bin/env bash
# Deletes the TPU VMs and the queued resource of this name, and makes sure that nothing of it is left; buckets stay.
#
#   delete.sh [--slices=N]
#
# Of all scripts: --project, --zone, --name (moe), --dry-run; defaults: MOE_PROJECT, MOE_ZONE, MOE_NAME.

. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
parse -- "$@"

left() { # ANSWER; what there still is of this name
  local node
  [ -z "$(state_of_request "$1")" ] || printf 'queued resource %s\n' "${opt[name]}"
  for node in $(nodes); do [ -z "$(state_of_node "$1" "$node")" ] || printf 'TPU VM %s\n' "$node"; done
}

for attempt in 1 2 3; do
  # The request first, with its nodes; a node that is left, or was made without one, by itself.
  [ -z "$(state_of_request ACTIVE)" ] || call_tpu queued-resources delete "${opt[name]}" --force --quiet || true
  for node in $(nodes); do
    [ -z "$(state_of_node READY "$node")" ] || call_tpu tpu-vm delete "$node" --quiet || true
  done
  found=$(left '')
  [ -n "$found" ] || break
  nap $((attempt * 5))
done
[ -z "$found" ] ||
  fail $FAILURE "there is still, and may be billed, in ${opt[project]}, ${opt[zone]}: $(paste -sd, - <<<"$found"); delete it in the console."
[ -n "${opt[dry-run]}" ] || say "nothing is left of ${opt[name]} in ${opt[zone]}"
