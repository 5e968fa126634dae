"""From nothing to a running job and back, against a stand-in for gcloud whose hosts run what they are told."""

import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tpu_setup import gcloud
from tests.tpu_setup.conftest import REPOSITORY, World, shown

SCRIPTS = sorted((REPOSITORY / "tpu_setup").glob("*.sh"))
RUN = ["--workdir=gs://b/runs/x", "--every=0"]


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_shellcheck_finds_nothing() -> None:
    binary = Path(sys.executable).with_name("shellcheck")
    command = [str(binary if binary.exists() else "shellcheck"), "-x", "-P", str(REPOSITORY / "tpu_setup")]
    done = subprocess.run([*command, *map(str, SCRIPTS)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_five_commands_and_back_to_nothing(world: World) -> None:
    world.run("create.sh", "--type=v5e-16", "--every=0")
    world.run("setup.sh")
    world.run("launch.sh", "--workdir=gs://b/runs/x", "--", "--config=configs/digits.py")
    said = world.run("watch.sh", *RUN)
    assert "== moe-w0" in said
    assert "== moe-w1" in said
    assert re.search(r"step 5/5  loss 0\.2000  8 examples/s", said)
    assert said.endswith("ended with exit code 0\n")
    assert "nothing is left of moe in z" in world.run("delete.sh")
    assert world.left() == {}
    created = next(call for call in world.calls() if "create" in call)
    assert "--accelerator-type=v5litepod-16" in created
    assert "--runtime-version=v2-alpha-tpuv5-lite" in created


def test_every_host_gets_this_commit_and_pinned_versions(world: World) -> None:
    world.run("create.sh", "--type=v6e-8", "--direct")
    world.run("setup.sh")
    assert len(world.hosts()) == 2
    for host in world.hosts():
        assert (host / "moe" / "train.py").exists()
        installed = (host / "installed").read_text()
        assert "--python 3.12" in installed
        assert re.search(r"--user uv==[0-9.]+$", installed, flags=re.MULTILINE)
        assert "--constraint constraints.txt --editable .[text,gcs,tpu-aot]" in installed


def test_arguments_arrive_as_they_were_given(world: World) -> None:
    world.run("create.sh", "--type=v5e-8", "--direct")
    world.run("setup.sh")
    odd = ["--config=configs/a b.py", "--config.x='$(touch never)'", '--config.y="\\n";exit', "--config.z=*"]
    world.run("launch.sh", "--workdir=gs://b/runs/x", "--", *odd)
    world.run("watch.sh", *RUN)
    for host in world.hosts():
        assert json.loads((host / "moe" / "arguments.json").read_text()) == ["--workdir=gs://b/runs/x", *odd]


# Each would make the canary, or fall apart, where a shell read it once more than it should.
HOSTILE = (
    "$(touch {canary})",
    "`touch {canary}`",
    "; touch {canary};",
    "' ; touch {canary} ; '",
    '" ; touch {canary} ; "',
    "\n touch {canary}\n",
    "x && touch {canary} || touch {canary} &",
    "| touch {canary} #",
    "$HOME ${{PATH}} ~ * ? [a-z] {{a,b}} !x \\ \t %s é",
    "'\\''$(touch {canary})'\\''",
)


def hostile(world: World) -> list[str]:
    return [text.format(canary=world.folder / "canary") for text in HOSTILE]


def test_nothing_of_an_argument_is_run(world: World) -> None:
    odd = [f"--config.x={text}" for text in hostile(world)]
    workdir = "--workdir=gs://b/runs/" + "".join(hostile(world)[:6])
    world.run("babysit.sh", "--type=v5e-8", "--direct", "--keep", workdir, "--every=0", "--", *odd)
    for host in world.hosts():
        assert json.loads((host / "moe" / "arguments.json").read_text()) == [workdir, *odd]
    assert "ended with exit code 0" in world.run("watch.sh", workdir, "--every=0")
    assert not (world.folder / "canary").exists()


@pytest.mark.parametrize("by", ["flags", "variables"])
def test_project_zone_and_runtime_are_one_argument_each(by: str, world: World) -> None:
    for text in hostile(world)[2::3]:
        place = {"MOE_PROJECT": text, "MOE_ZONE": text}
        given = [f"--project={text}", f"--zone={text}"]
        options: dict[str, Any] = {"place": False} | (place if by == "variables" else {})
        words = [f"--runtime={text}", *(given if by == "flags" else [])]
        commands = shown(world.run("create.sh", "--type=v5e-8", "--direct", "--dry-run", *words, **options))
        before = len(world.calls())
        world.run("create.sh", "--type=v5e-8", "--direct", *words, **options)
        # Where nothing is, gcloud is asked why.
        did = [call for call, next_ in itertools.pairwise([*world.calls()[before:], []]) if call != next_]
        assert did == commands
        assert f"--version={text}" in did[-1]
        assert all(call[-2:] == given or set(given) < set(call) for call in did)
        world.run("delete.sh", *words[1:], **options)
        assert world.left() == {}
    assert not (world.folder / "canary").exists()


def test_names_and_numbers_are_checked(world: World) -> None:
    for text in hostile(world):
        for flag in ("name", "slices", "every", "wait", "attempts"):
            assert f"--{flag}=" in world.run("babysit.sh", f"--{flag}={text}", *RUN, "--", "--config=c.py", code=2)
        assert "--lines=" in world.run("watch.sh", f"--lines={text}", *RUN, code=2)
        assert "--type=" in world.run("create.sh", f"--type={text}", code=2)
        assert "--type=" in world.run("create.sh", f"--type=v5e-8{text}", code=2)
        assert "unknown flag" in world.run("create.sh", f"--{text}", code=2)
        assert "--name=" in world.run("status.sh", code=2, MOE_NAME=text)
    for text in ("08", "99999999999999999999"):
        assert "must be a number" in world.run("watch.sh", f"--slices={text}", *RUN, code=2)
    assert world.calls() == []
    assert not (world.folder / "canary").exists()


def test_stopping_saves_and_launching_goes_on(world: World) -> None:
    world.plan(steps=6, hold_at=3)
    world.run("create.sh", "--type=v5e-8", "--direct")
    world.run("setup.sh")
    world.run("launch.sh", "--workdir=gs://b/runs/x", "--", "--config=c.py")
    assert "running already" in world.run("launch.sh", "--workdir=gs://b/runs/x", "--", "--config=c.py", code=1)
    metrics = world.folder / "bucket" / "b" / "runs" / "x" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) == 2)
    assert "step 2/6" in world.run("watch.sh", *RUN, "--once")
    assert "stopped and saved" in world.run("stop.sh")
    assert "ended with exit code 75" in world.run("watch.sh", *RUN, code=75)
    world.run("launch.sh", "--workdir=gs://b/runs/x", "--", "--config=c.py")
    world.run("watch.sh", *RUN)
    assert len(metrics.read_text().splitlines()) == 6


def test_the_babysitter_goes_on_after_a_preemption(world: World) -> None:
    world.plan(steps=6, hold_at=3)
    world.scenario(states=["PROVISIONING", "ACTIVE"], preempt_after=8)
    said = world.run("babysit.sh", "--type=v5e-16", "--spot", *RUN, "--every=0", "--", "--config=c.py")
    # Which look finds it gone, at the node or at its processes, depends on how quickly each step of the way went.
    assert re.search(r"moe: (lost|137) at step [012]\n", said)
    assert "moe: 0 at step 6" in said
    created = [call for call in world.calls() if "create" in call]
    assert len(created) == 2
    assert all("--spot" in call for call in created)
    assert world.left() == {}


def test_the_babysitter_waits_for_a_slice(world: World) -> None:
    world.scenario(states=["WAITING_FOR_RESOURCES", "SUSPENDED"])
    process = world.start("babysit.sh", "--type=v5e-16", "--spot", *RUN, "--", "--config=c.py")
    wait_until(lambda: sum("create" in call for call in world.calls()) == 2)
    world.scenario(states=["ACTIVE"])
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, (out, err)
    assert "the request is SUSPENDED before it was ready: try again." in err
    assert "moe: 0 at step 5" in out
    assert world.left() == {}


@pytest.mark.parametrize("code", [1, 2])
def test_the_babysitter_does_not_repeat_what_is_wrong(code: int, world: World) -> None:
    world.plan(steps=6, code=code)
    said = world.run("babysit.sh", "--type=v5e-16", *RUN, "--", "--config=c.py", code=code)
    assert f"a sentence about exit code {code}" in said
    assert f"train.py ended with exit code {code}, which a new start doesn't mend" in said
    assert sum("create" in call for call in world.calls()) == 1
    assert world.left() == {}


def test_the_babysitter_gives_up_where_nothing_moves(world: World) -> None:
    world.plan(steps=6, code=134)
    said = world.run("babysit.sh", "--type=v5e-16", *RUN, "--attempts=2", "--", "--config=c.py", code=1)
    assert "2 starts in a row brought no step more than 0" in said
    assert sum("create" in call for call in world.calls()) == 2
    assert world.left() == {}


def test_hosts_that_cannot_be_set_up_count_as_a_start(world: World) -> None:
    world.scenario(unreachable=["moe"])
    said = world.run("babysit.sh", "--type=v5e-16", *RUN, "--attempts=2", "--", "--config=c.py", code=1)
    assert said.count("moe can't be reached by ssh") == 2
    assert "2 starts in a row brought no step more than 0" in said
    assert world.left() == {}


@pytest.mark.parametrize("way", [["--direct"], ["--every=0"]])
@pytest.mark.parametrize("other", [["--direct"], ["--every=0"]])
def test_creating_that_is_refused_leaves_what_was_there(way: list[str], other: list[str], world: World) -> None:
    world.run("create.sh", "--type=v5e-8", *other)
    before = world.left()
    quota = "ERROR: RESOURCE_EXHAUSTED: Quota limit has been exceeded"
    world.scenario(refuse={f"compute tpus {kind} create": quota for kind in ("tpu-vm", "queued-resources")})
    said = world.run("create.sh", "--type=v5e-8", *way, code=1)
    assert said.startswith("create.sh: moe exists already")
    assert said.count("\n") == 1
    assert world.left() == before


@pytest.mark.parametrize("kind", ["tpu-vm", "queued-resources"])
def test_nothing_is_created_or_deleted_where_gcloud_cannot_tell(kind: str, world: World) -> None:
    world.run("create.sh", "--type=v5e-8", "--direct")
    before, count = world.left(), len(world.calls())
    world.scenario(refuse={f"compute tpus {kind} describe": "ERROR: PERMISSION_DENIED: tpu.nodes.get"})
    said = world.run("create.sh", "--type=v5e-8", code=1)
    assert said.startswith("create.sh: this account may not create TPUs in project p")
    assert said.count("\n") == 1
    assert not any({"create", "delete"} & set(call) for call in world.calls()[count:])
    assert world.left() == before


def test_the_babysitter_leaves_what_another_made(world: World) -> None:
    world.run("create.sh", "--type=v5e-8", "--every=0")
    before = world.left()
    assert "moe exists already" in world.run("babysit.sh", "--type=v5e-8", *RUN, "--", "--config=c.py", code=1)
    assert world.left() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_creating_that_is_interrupted_leaves_nothing(number: int, world: World) -> None:
    world.scenario(states=["WAITING_FOR_RESOURCES"])
    process = world.start("create.sh", "--type=v5e-16", "--every=60")
    # Twice before it asks for a slice, and then time and again.
    wait_until(lambda: sum("describe" in call for call in world.calls()) >= 3)
    time.sleep(0.3)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert world.left() == {}


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_request_that_fails_is_taken_back_and_explained(state: str, world: World) -> None:
    world.scenario(states=["PROVISIONING", state], why="Quota exceeded for v5e")
    said = world.run("create.sh", "--type=v5e-16", "--every=0", code=1)
    assert "there is no quota for v5e-16 in z: ask for it, or try --spot" in said
    assert world.left() == {}


def test_a_request_that_takes_too_long_is_taken_back(world: World) -> None:
    world.scenario(states=["WAITING_FOR_RESOURCES"])
    said = world.run("create.sh", "--type=v5e-16", "--every=0", "--wait=0", code=75)
    assert "still WAITING_FOR_RESOURCES after 0 s" in said
    assert world.left() == {}


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProject' has been exceeded", "there is no quota for"),
        ('ERROR: There is no more capacity in the zone "z"', "Google has no v5e-16 in z now"),
        ("ERROR: PERMISSION_DENIED: tpu.nodes.create", "this account may not create TPUs in project p"),
        ("ERROR: something new", "v5e-16 in z couldn't be created: ERROR: something new"),
    ],
)
@pytest.mark.parametrize("way", ["queued-resources", "tpu-vm"])
def test_a_refusal_is_one_sentence(way: str, message: str, sentence: str, world: World) -> None:
    world.scenario(refuse={f"compute tpus {way} create": message})
    code = 75 if "capacity" in message else 1
    said = world.run("create.sh", "--type=v5e-16", *(["--direct"] if way == "tpu-vm" else []), code=code)
    assert sum(line.startswith("create.sh: ") for line in said.splitlines()) == 1
    assert f"create.sh: {sentence}" in said


def test_where_gcloud_cannot_tell_nothing_is_said_to_be_gone(world: World) -> None:
    world.run("create.sh", "--type=v5e-8", "--direct")
    before = world.left()
    world.scenario(refuse={"compute tpus queued-resources describe": "ERROR: You do not have an active account"})
    said = world.run("delete.sh", code=1)
    assert "gcloud says: ERROR: You do not have an active account" in said
    assert "gcloud can't say what is there" in said
    assert world.left() == before
    world.scenario()
    assert "nothing is left" in world.run("delete.sh")


def test_the_babysitter_keeps_what_it_cannot_see(world: World) -> None:
    world.plan(steps=6, hold_at=3)
    process = world.start("babysit.sh", "--type=v5e-8", *RUN, "--every=1", "--", "--config=c.py")
    metrics = world.folder / "bucket" / "b" / "runs" / "x" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) == 2)
    world.scenario(refuse={"compute tpus tpu-vm describe": "ERROR: network is unreachable"})
    count = len(world.calls())
    wait_until(lambda: len(world.calls()) > count + 4)
    world.scenario()
    assert sum("create" in call for call in world.calls()) == 1
    assert not any("delete" in call for call in world.calls())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert world.left() == {}


def test_hosts_that_do_not_answer_are_named(world: World) -> None:
    world.run("create.sh", "--type=v5e-8", "--direct")
    world.scenario(unreachable=["moe"])
    assert "moe can't be reached by ssh" in world.run("setup.sh", code=1)
    world.scenario()
    world.run("setup.sh")
    world.plan(steps=3, code=134)
    world.run("launch.sh", "--workdir=gs://b/runs/x", "--", "--config=c.py")
    assert "exit code 134" in world.run("watch.sh", *RUN, code=134)


def test_slices_are_nodes_of_one_request(world: World) -> None:
    world.run("create.sh", "--type=v5e-16", "--slices=2", "--every=0")
    world.run("setup.sh", "--slices=2")
    world.run("launch.sh", "--slices=2", "--workdir=gs://b/runs/x", "--", "--config.mesh.dcn=2")
    assert {host.name for host in world.hosts()} == {"moe-0-w0", "moe-0-w1", "moe-1-w0", "moe-1-w1"}
    world.run("watch.sh", "--slices=2", *RUN)
    world.run("delete.sh", "--slices=2")
    assert world.left() == {}


STEPS = {
    "create.sh": ["--type=v5p-16", "--reserved", "--every=0"],
    "setup.sh": [],
    "launch.sh": ["--workdir=gs://b/runs/x", "--", "--config=c d.py"],
    "status.sh": [],
    "watch.sh": [*RUN, "--once"],
    "stop.sh": [],
    "delete.sh": [],
}


def test_a_dry_run_shows_what_is_run_and_nothing_else(world: World) -> None:
    """Repeated questions apart: how often a state is asked for, only the real run knows."""

    def distinct(calls: list[list[str]]) -> list[list[str]]:
        calls = [[re.sub(r"/\S*/moe\.tar\.gz$", "moe.tar.gz", word) for word in call] for call in calls]
        return [call for index, call in enumerate(calls) if call not in calls[:index]]

    names = ("TOKEN", "KEY", "SECRET", "PASSWORD", "HF_TOKEN", "WANDB_API_KEY", "GOOGLE_APPLICATION_CREDENTIALS")
    secrets = {name: f"{name.lower()}_s3cr3t" for name in names}
    for script, arguments in STEPS.items():
        before = len(world.calls())
        text = world.run(
            script, *([arguments[0], "--dry-run", *arguments[1:]] if arguments else ["--dry-run"]), **secrets
        )
        assert len(world.calls()) == before, script
        said = world.run(script, *arguments, **secrets)
        assert "s3cr3t" not in text + said
        assert "s3cr3t" not in json.dumps(world.calls()[before:])
        would, did = distinct(shown(text)), distinct(world.calls()[before:])
        if script == "delete.sh":
            # A node goes with its request; by itself it is deleted only where one is left.
            would = [call for call in would if call[3:5] != ["tpu-vm", "delete"]]
        assert would == did, script


def test_the_babysitters_dry_run_shows_all_its_commands(world: World) -> None:
    text = world.run("babysit.sh", "--type=v5e-16", "--spot", *RUN, "--dry-run", "--", "--config=c.py")
    verbs = [" ".join(call[3:5]) for call in shown(text)]
    assert verbs[:3] == ["queued-resources describe", "tpu-vm describe", "queued-resources create"]
    assert {"tpu-vm scp", "tpu-vm ssh", "tpu-vm delete", "queued-resources delete"} <= set(verbs)
    assert world.calls() == []


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("create.sh", ["--type=v9-8"], "--type=v9-8 must be v4-N, v5e-N, v5p-N or v6e-N"),
        ("create.sh", ["--type=v5e-x"], "--type=v5e-x must end in a number"),
        ("create.sh", [], "--type= must be"),
        ("create.sh", ["--type=v5e-8", "--spot", "--reserved"], "--spot and --reserved exclude each other"),
        ("create.sh", ["--type=v5e-8", "--slices=2", "--direct"], "several slices need a queued resource"),
        ("create.sh", ["--tpye=v5e-8"], "unknown flag --tpye: there are --type --spot"),
        ("create.sh", ["v5e-8"], "'v5e-8' isn't a flag"),
        ("create.sh", ["--type=v5e-8", "--wait=long"], "--wait=long must be a number"),
        ("create.sh", ["--type=v5e-8", "--name=My_TPU"], "--name=My_TPU must be lower-case"),
        ("launch.sh", ["--workdir=runs/x", "--", "--config=c"], "--workdir=runs/x must be gs://BUCKET/"),
        ("launch.sh", ["--workdir=gs://b/x"], "what is train.py to do?"),
        ("babysit.sh", ["--type=v5e-8", "--workdir=gs://b/x"], "what is train.py to do?"),
        ("watch.sh", [], "--workdir= must be gs://BUCKET/"),
    ],
)
def test_a_mistake_is_one_sentence(script: str, arguments: list[str], message: str, world: World) -> None:
    said = world.run(script, *arguments, code=2)
    assert said.startswith(f"{script}: {message}")
    assert said.count("\n") == 1
    assert world.calls() == []


@pytest.mark.parametrize("script", ["create.sh", "setup.sh", "status.sh", "stop.sh", "delete.sh"])
def test_project_and_zone_are_asked_for(script: str, world: World) -> None:
    type_ = ["--type=v5e-8"] if script == "create.sh" else []
    assert world.run(script, *type_, code=2, place=False).startswith(f"{script}: there is no project: give --project=")
    said = world.run(script, *type_, code=2, place=False, FAKE_core_project="p")
    assert said.startswith(f"{script}: there is no zone: give --zone=")
    configured = {"FAKE_core_project": "p", "FAKE_compute_zone": "z"}
    assert "--project=p --zone=z" in world.run(script, *type_, "--dry-run", place=False, **configured)


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS if path.name != "common.sh"])
def test_help_says_how(script: str, world: World) -> None:
    text = world.run(script, "--help")
    assert f"  {script}" in text
    assert "--dry-run" in text


@pytest.mark.gcloud
def test_the_stand_in_knows_no_flag_that_gcloud_lacks() -> None:
    for command, flags in gcloud.FLAGS.items():
        done = subprocess.run(["gcloud", *command.split(), "--help"], capture_output=True, text=True, check=True)
        known = set(re.findall(r"--(?:\[no-\])?([a-z][a-z-]+)", re.sub(r"\x1b\[[0-9;]*m|.\x08", "", done.stdout)))
        assert flags <= known, (command, flags - known)


def test_the_stand_in_refuses_what_gcloud_would() -> None:
    gcloud.parse(shlex.split("compute tpus tpu-vm ssh moe --worker=all --command=ls --zone=z"))
    for wrong in (
        "compute tpus tpu-vm ssh moe --workers=all",
        "compute tpus tpu-vm start moe",
        "storage cat x --zoom=1",
    ):
        with pytest.raises(gcloud.Refused):
            gcloud.parse(shlex.split(wrong))
