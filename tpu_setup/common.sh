# shellcheck shell=bash
# What the scripts of this folder share: flags, errors, calls of gcloud. Sourced, not run.

# shellcheck disable=SC2034  # what is set here is read there
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname -- "$here")
# Where a dry run prints, also from inside $(…).
exec 3>&1

# Exit codes of train.py: done, failed, wrong command; told to stop and saved.
readonly DONE=0 FAILURE=1 USAGE=2 STOPPED=75

fail() { # CODE SENTENCE
  printf '%s: %s\n' "$(basename -- "$0")" "$2" >&2
  exit "$1"
}

say() { printf '%s\n' "$*"; }

# Flags ----------------------------------------------------------------------------------------------------------------

# What a flag is where it isn't given; a file `env` beside this one may set these variables.
# shellcheck source=/dev/null
[ ! -f "$here/env" ] || . "$here/env"
declare -A opt=(
  [project]=${MOE_PROJECT:-} [zone]=${MOE_ZONE:-} [name]=${MOE_NAME:-moe} [type]=${MOE_TYPE:-} [workdir]=${MOE_WORKDIR:-}
  [runtime]='' [slices]=1 [wait]=3600 [every]=30 [attempts]=5 [lines]=5
  [dry-run]='' [spot]='' [reserved]='' [direct]='' [keep]='' [once]=''
)
declare -a rest=()

parse() { # FLAGS… -- ARGUMENTS…; the flags that a script has, and what it was called with
  local known=() word flag
  while [ "$1" != -- ]; do known+=("$1"); shift; done
  shift
  while [ $# -gt 0 ]; do
    word=$1
    shift
    case $word in
      --) rest=("$@"); break ;;
      --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit 0 ;;
      --*=*) flag=${word#--} flag=${flag%%=*} word=${word#*=} ;;
      --*) flag=${word#--} word=yes ;;
      *) fail $USAGE "'$word' isn't a flag: give --FLAG=VALUE, and what is for train.py after --; see --help." ;;
    esac
    [[ " ${known[*]} dry-run project zone name slices " == *" $flag "* ]] ||
      fail $USAGE "unknown flag --$flag: there are ${known[*]/#/--} --dry-run --project --zone --name --slices; see --help."
    case $flag in
      dry-run | spot | reserved | direct | keep | once)
        [ "$word" = yes ] || fail $USAGE "--$flag takes no value." ;;
      slices | wait | every | attempts | lines)
        [[ $word =~ ^(0|[1-9][0-9]{0,8})$ ]] || fail $USAGE "--$flag=$word must be a number." ;;
      *) [ "$word" != yes ] || fail $USAGE "--$flag needs a value: --$flag=…." ;;
    esac
    opt[$flag]=$word
  done
  [[ ${opt[name]} =~ ^[a-z]([a-z0-9-]{0,60}[a-z0-9])?$ ]] ||
    fail $USAGE "--name=${opt[name]} must be lower-case letters, digits and hyphens, as names of Google Cloud are."
  [ "${opt[slices]}" -ge 1 ] || fail $USAGE "--slices=${opt[slices]} must be at least 1."
  command -v gcloud >/dev/null || fail $FAILURE "gcloud isn't installed: see https://cloud.google.com/sdk/docs/install."
  place project core/project
  place zone compute/zone
}

place() { # FLAG PROPERTY; from gcloud's own configuration where it isn't given
  [ -n "${opt[$1]}" ] || opt[$1]=$(gcloud config get-value "$2" 2>/dev/null || true)
  [[ -n ${opt[$1]} && ${opt[$1]} != '(unset)' ]] ||
    fail $USAGE "there is no $1: give --$1=…, set MOE_${1^^}, or run: gcloud config set $2 …"
}

need_workdir() {
  [[ ${opt[workdir]} == gs://?*/?* ]] ||
    fail $USAGE "--workdir=${opt[workdir]} must be gs://BUCKET/…, which every host and this machine can read."
}

# Calls ----------------------------------------------------------------------------------------------------------------

show() { # COMMAND…; as a shell reads it
  local word words=()
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_=/.,:@%+-]+$ ]] || word=\'${word//\'/\'\\\'\'}\'
    words+=("$word")
  done
  printf '%s\n' "${words[*]}" >&3
}

call() { # COMMAND…; or what it would be
  if [ -n "${opt[dry-run]}" ]; then show "$@"; else "$@"; fi
}

ask() { # ANSWER COMMAND…; what a command prints, or that answer in a dry run; nothing where it fails
  local answer=$1
  shift
  if [ -n "${opt[dry-run]}" ]; then
    show "$@"
    printf '%s' "$answer"
  else
    "$@" 2>/dev/null || true
  fi
}

nap() { # SECONDS; signals end it
  [ -n "${opt[dry-run]}" ] || { sleep "$1" > /dev/null 2>&1 3>&- & wait $!; }
}

tpu() { # KIND VERB ARGUMENTS…; KIND: tpu-vm or queued-resources
  printf '%s\0' gcloud compute tpus "$1" "$2" "${@:3}" "--project=${opt[project]}" "--zone=${opt[zone]}"
}

call_tpu() { # KIND VERB ARGUMENTS…
  local words
  mapfile -d '' -t words < <(tpu "$@")
  call "${words[@]}"
}

ask_tpu() { # ANSWER KIND VERB ARGUMENTS…
  local words
  mapfile -d '' -t words < <(tpu "${@:2}")
  ask "$1" "${words[@]}"
}

nodes() { # the TPU VMs of this name, one for each slice
  if [ "${opt[slices]}" = 1 ]; then printf '%s\n' "${opt[name]}"; else
    seq --format="${opt[name]}-%.0f" 0 $((opt[slices] - 1))
  fi
}

on_hosts() { # SCRIPT; on every host of every slice
  local node
  for node in $(nodes); do call_tpu tpu-vm ssh "$node" --worker=all --command="$1"; done
}

ask_hosts() { # ANSWER SCRIPT; what all hosts print
  local node
  for node in $(nodes); do ask_tpu "$1" tpu-vm ssh "$node" --worker=all --command="$2"; done
}

state_of() { # ANSWER KIND NAME FIELD; ABSENT where there is none; fails, and says why, where gcloud can't tell
  local words said why
  mapfile -d '' -t words < <(tpu "$2" describe "$3" "--format=value($4)")
  if [ -n "${opt[dry-run]}" ]; then show "${words[@]}"; printf '%s' "$1"; return; fi
  if said=$("${words[@]}" 2> /dev/null); then printf '%s' "$said"; return; fi
  why=$("${words[@]}" 2>&1 > /dev/null) || true
  case $why in
    *NOT_FOUND* | *'not found'*) printf ABSENT ;;
    *) printf '%s: gcloud says: %s\n' "$(basename -- "$0")" "$(tr '\n' ' ' <<< "$why")" >&2; return 1 ;;
  esac
}

state_of_request() { state_of "$1" queued-resources "${opt[name]}" state.state; } # ANSWER

state_of_node() { state_of "$1" tpu-vm "$2" state; } # ANSWER NODE
