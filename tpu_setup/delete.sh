#!/usr/bin/env bash
# Deletes the TPU VMs and the queued resource of this name, and makes sure that nothing of it is left; buckets stay.
#
#   delete.sh [--slices=N]
#
# Of all scripts: --project, --zone, --name (moe), --dry-run; defaults: MOE_PROJECT, MOE_ZONE, MOE_NAME.

. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
parse -- "$@"

unsure="gcloud can't say what is there: nothing of ${opt[name]} may be deleted, and it may be billed; try again."
for attempt in 1 2 3; do
  found=()
  # The request first, with its nodes; a node that is left, or was made without one, by itself.
  state=$(state_of_request ACTIVE) || fail $FAILURE "$unsure"
  if [ "$state" != ABSENT ]; then
    found+=("queued resource ${opt[name]}")
    call_tpu queued-resources delete "${opt[name]}" --force --quiet || true
  fi
  for node in $(nodes); do
    state=$(state_of_node READY "$node") || fail $FAILURE "$unsure"
    if [ "$state" != ABSENT ]; then
      found+=("TPU VM $node")
      call_tpu tpu-vm delete "$node" --quiet || true
    fi
  done
  if [ -n "${opt[dry-run]}" ]; then exit 0; fi
  if [ ${#found[@]} = 0 ]; then
    say "nothing is left of ${opt[name]} in ${opt[zone]}"
    exit 0
  fi
  [ "$attempt" = 1 ] || nap $((attempt * 5))
done
fail $FAILURE "there is still, and may be billed, in ${opt[project]}, ${opt[zone]}: ${found[*]}; delete it in the console."
