#!/usr/bin/env bash
# Puts this commit on every host, in ~/moe, and installs it there with the versions that constraints.txt pins.
#
#   setup.sh [--slices=N]
#
# The TPU VM may be one that create.sh made, or any other. What isn't committed isn't sent. Python comes by uv, because
# the images of TPU VMs have 3.10.
# Of all scripts: --project, --zone, --name (moe), --dry-run; defaults: MOE_PROJECT, MOE_ZONE, MOE_NAME.

. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
parse -- "$@"

commit=$(git -C "$root" rev-parse --short HEAD 2>/dev/null) || fail $FAILURE "$root is not a clone with git: what is to be sent?"
[ -z "$(git -C "$root" status --porcelain)" ] || say "uncommitted changes stay here: $commit is sent" >&2
archive=$(mktemp -d)
trap 'rm -rf "$archive"' EXIT
git -C "$root" archive --format=tar.gz --prefix=moe/ --output="$archive/moe.tar.gz" HEAD

# shellcheck disable=SC2016  # for the hosts to expand
install='set -eu
cd "$HOME"
mkdir -p moe
tar xzf moe.tar.gz
cd moe
python3 -m pip install --quiet --user uv==0.13.9
PATH=$HOME/.local/bin:$PATH
[ -x .venv/bin/python ] || uv venv --quiet --python 3.12 .venv
uv pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable ".[text,gcs,tpu-aot]"
.venv/bin/python -c "import jax, libtpu; print(\"installed: jax\", jax.__version__)"'
for node in $(nodes); do
  call_tpu tpu-vm scp "$archive/moe.tar.gz" "$node:moe.tar.gz" --worker=all ||
    fail $FAILURE "$node can't be reached by ssh: is it READY (gcloud compute tpus tpu-vm describe), and does its network let ssh in?"
  call_tpu tpu-vm ssh "$node" --worker=all --command="$install" ||
    fail $FAILURE "the installation failed on a host of $node; what it said stands above, and setup.sh can be run again."
done
[ -n "${opt[dry-run]}" ] || say "$commit is installed on every host of ${opt[name]}"
