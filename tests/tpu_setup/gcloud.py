"""A stand-in for gcloud: TPUs in a file, hosts in folders; it records every call, and refuses what gcloud would.

Flags are those of Google Cloud SDK 528.0.0 (2025-06), by command, and those that all commands have. A scenario sets
"states": of a request, one for each time it is asked for; "refuse": {command: message}; "unreachable": nodes whose
hosts don't answer; "preempt_after": how many times nodes can be looked at before one is taken away, once; "why": a
request failed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

EVERYWHERE = {"project", "zone", "quiet", "format", "billing-project", "configuration", "flags-file", "verbosity"}
_CREATE = {
    "accelerator-type", "async", "data-disk", "description", "internal-ips", "labels", "metadata", "metadata-from-file",
    "network", "range", "reserved", "scopes", "service-account", "shielded-secure-boot", "spot", "subnetwork", "tags",
    "topology", "type",
}  # fmt: skip
_REACH = {
    "dry-run", "force-key-file-overwrite", "internal-ip", "plain", "ssh-key-expiration", "ssh-key-expire-after",
    "ssh-key-file", "strict-host-key-checking", "worker",
}  # fmt: skip
FLAGS = {
    "compute tpus tpu-vm create": _CREATE | {"preemptible", "queue-count", "version"},
    "compute tpus tpu-vm delete": {"async"},
    "compute tpus tpu-vm describe": set(),
    "compute tpus tpu-vm list": {"filter", "limit", "page-size", "sort-by", "uri"},
    "compute tpus tpu-vm ssh": _REACH | {"command", "output-directory", "ssh-flag"},
    "compute tpus tpu-vm scp": _REACH | {"compress", "recurse", "scp-flag"},
    "compute tpus queued-resources create": _CREATE
    | {
        "guaranteed",
        "node-count",
        "node-id",
        "node-prefix",
        "reservation-host-folder",
        "reservation-host-organization",
        "reservation-host-project",
        "runtime-version",
        "valid-after-duration",
        "valid-after-time",
        "valid-until-duration",
        "valid-until-time",
    },
    "compute tpus queued-resources delete": {"async", "force"},
    "compute tpus queued-resources describe": set(),
    "storage cat": {"additional-headers", "decryption-keys", "display-url", "range"},
    "config get-value": set(),
}
HOSTS = 2


class Refused(Exception):
    """What gcloud prints to standard error, before it exits with 1."""


class Cloud:
    """Everything that is billed, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "cloud.json"
        state = json.loads(self._file.read_text()) if self._file.exists() else {}
        self.requests: dict[str, dict] = state.get("requests", {})
        self.nodes: dict[str, str] = state.get("nodes", {})
        self.looks: int = state.get("looks", 0)
        scenario = folder / "scenario.json"
        self.scenario: dict = json.loads(scenario.read_text()) if scenario.exists() else {}

    def save(self) -> None:
        state = {"requests": self.requests, "nodes": self.nodes, "looks": self.looks}
        self._file.write_text(json.dumps(state))

    def hosts(self, node: str) -> list[Path]:
        return [self.folder / "hosts" / f"{node}-w{index}" for index in range(HOSTS)]

    def reach(self, node: str) -> list[Path]:
        if self.nodes.get(node) != "READY" or node in self.scenario.get("unreachable", []):
            raise Refused(f"ERROR: (gcloud.compute.tpus.tpu-vm.ssh) {node} can't be reached")
        return self.hosts(node)

    def add_node(self, name: str) -> None:
        self.nodes[name] = "READY"
        for host in self.hosts(name):
            host.mkdir(parents=True, exist_ok=True)

    def remove_node(self, name: str) -> None:
        for host in self.hosts(name):
            kill(host)
        del self.nodes[name]


def kill(host: Path) -> None:
    """A machine that is gone runs nothing, and keeps nothing."""
    pid = host / "moe" / "run.pid"
    if pid.exists():
        subprocess.run(["kill", "-9", pid.read_text().strip()], check=False, capture_output=True)
    subprocess.run(["rm", "-rf", str(host)], check=True)


def parse(argv: list[str]) -> tuple[str, list[str], dict[str, str]]:
    command = next((name for name in FLAGS if argv[: len(name.split())] == name.split()), None)
    if command is None:
        raise Refused(f"ERROR: (gcloud) Invalid choice: {' '.join(argv)!r}")
    names, flags = [], {}
    for word in argv[len(command.split()) :]:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            if name not in FLAGS[command] | EVERYWHERE:
                raise Refused(f"ERROR: (gcloud.{command.replace(' ', '.')}) unrecognized arguments: {word}")
            flags[name] = value
        else:
            names.append(word)
    return command, names, flags


def run(cloud: Cloud, argv: list[str]) -> str:
    command, names, flags = parse(argv)
    if command == "config get-value":
        return os.environ.get("FAKE_" + names[0].replace("/", "_"), "(unset)")
    if message := cloud.scenario.get("refuse", {}).get(command):
        raise Refused(message)
    if command == "storage cat":
        return _object(cloud, names[0]).read_text()
    if "zone" not in flags or "project" not in flags:
        raise Refused(f"ERROR: (gcloud.{command.replace(' ', '.')}) zone and project must be specified")
    kind, verb = command.split()[2:]
    return {"tpu-vm": _node, "queued-resources": _request}[kind](cloud, verb, names, flags)


def _object(cloud: Cloud, name: str) -> Path:
    path = cloud.folder / "bucket" / name.removeprefix("gs://")
    if not path.exists():
        raise Refused(f"ERROR: (gcloud.storage.cat) The following URLs matched no objects or files: {name}")
    return path


def _request(cloud: Cloud, verb: str, names: list[str], flags: dict[str, str]) -> str:
    (name,) = names
    if verb == "create":
        if name in cloud.requests:
            raise Refused(f"ERROR: ALREADY_EXISTS: Resource '{name}' already exists")
        if not {"accelerator-type", "runtime-version"} <= flags.keys() or not {"node-id", "node-count"} & flags.keys():
            raise Refused("ERROR: Must be specified: --accelerator-type, --runtime-version, --node-id or --node-count")
        count, prefix = int(flags.get("node-count", 1)), flags.get("node-prefix", name)
        nodes = [flags["node-id"]] if "node-id" in flags else [f"{prefix}-{index}" for index in range(count)]
        states = cloud.scenario.get("states", ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
        cloud.requests[name] = {"states": states, "nodes": nodes}
        return ""
    if name not in cloud.requests:
        raise Refused(f"ERROR: NOT_FOUND: Resource '{name}' was not found")
    request = cloud.requests[name]
    if verb == "delete":
        for node in request["nodes"]:
            if node in cloud.nodes:
                if "force" not in flags:
                    raise Refused(f"ERROR: FAILED_PRECONDITION: {name} has nodes")
                cloud.remove_node(node)
        del cloud.requests[name]
        return ""
    if "failedData" in flags["format"]:
        return cloud.scenario.get("why", "")
    state = request["states"].pop(0) if len(request["states"]) > 1 else request["states"][0]
    if state == "ACTIVE" and not request.get("made"):
        request["made"] = True
        for node in request["nodes"]:
            cloud.add_node(node)
    return state


def _node(cloud: Cloud, verb: str, names: list[str], flags: dict[str, str]) -> str:
    name = names[-1].partition(":")[0]
    if verb == "create":
        if not {"accelerator-type", "version"} <= flags.keys():
            raise Refused("ERROR: Must be specified: --accelerator-type, --version")
        cloud.add_node(name)
        return ""
    if name not in cloud.nodes:
        raise Refused(f"ERROR: NOT_FOUND: Resource '{name}' was not found")
    if verb == "delete":
        cloud.remove_node(name)
    if verb == "describe":
        cloud.looks += 1
        if cloud.looks == cloud.scenario.get("preempt_after"):
            for host in cloud.hosts(name):
                kill(host)
            cloud.nodes[name] = "PREEMPTED"
            for request in cloud.requests.values():
                request["states"] = ["SUSPENDED"]
        return cloud.nodes[name]
    if verb == "scp":
        for host in cloud.reach(name):
            (host / names[-1].partition(":")[2]).write_bytes(Path(names[0]).read_bytes())
    if verb == "ssh":
        return _ssh(cloud, name, flags["command"])
    return ""


def _ssh(cloud: Cloud, node: str, command: str) -> str:
    said, code = "", 0
    cloud.save()
    for host in cloud.reach(node):
        environment = {**os.environ, "HOME": str(host), "PATH": f"{cloud.folder / 'bin'}:{os.environ['PATH']}"}
        environment["BUCKET"] = str(cloud.folder / "bucket")
        done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
        said, code = said + done.stdout, code or done.returncode
        sys.stderr.write(done.stderr)
    if code:
        sys.stdout.write(said)
        raise Refused(f"ERROR: (gcloud.compute.tpus.tpu-vm.ssh) exit code {code}")
    return said


def main() -> None:
    cloud = Cloud(Path(os.environ["FAKE_CLOUD"]))
    with (cloud.folder / "calls.jsonl").open("a") as file:
        file.write(json.dumps(["gcloud", *sys.argv[1:]]) + "\n")
    try:
        said = run(cloud, sys.argv[1:])
    except Refused as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    finally:
        cloud.save()
    if said:
        print(said.rstrip("\n"))


if __name__ == "__main__":
    main()
