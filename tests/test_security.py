"""Nothing that comes as data is run, or leads a program out of the folder that it was given; secrets aren't written."""

import ast
import base64
import functools
import json
import os
import pickle
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers

import evaluate
import train
from moe import cli
from moe import config as config_lib
from moe.checkpoint import CheckpointError, Checkpoints, complete_steps
from moe.convert import __main__ as convert
from moe.convert import from_hf, to_hf
from moe.convert.logits import write_logits
from moe.convert.safetensors import Tensors
from moe.convert.settings import parse
from moe.convert.source import open_source
from moe.convert.store import StoredVariables
from moe.data.corpus import open_corpus
from moe.data.documents import Source
from moe.data.source import open_builder
from moe.data.tokenizer import HuggingFace, SentencePiece, TokenizerConfig
from moe.files import write_whole
from moe.metrics import MetricsWriter
from moe.workdir import open_workdir, read_config
from tests.test_imports import REPOSITORY, sources

STORED = Path(__file__).parent / "convert" / "stored"
DEEP = "[" * 100_000

# What the code says -------------------------------------------------------------------------------------------------

# Names as Python resolves them; those that no import brings are builtins.
FORBIDDEN = re.compile(
    r"(_?pickle|marshal|shelve|dill|cloudpickle|joblib|yaml|runpy|subprocess|pty|code|ctypes|tarfile|zipfile)(\..+)?"
    r"|builtins\.(eval|exec|compile|breakpoint|__import__)|.*\.exec_module"
    r"|os\.(system|popen|exec\w+|spawn\w+|posix_spawn\w*|fork)|importlib\.(import_module|machinery.*)"
    r"|importlib\.util\.(spec_from_file_location|module_from_spec)|shutil\.unpack_archive"
)
# A config FILE.py that the command names is run.
ALLOWED = {
    ("moe.config", "importlib.util.spec_from_file_location"),
    ("moe.config", "importlib.util.module_from_spec"),
    ("moe.config", "builtins.spec.loader.exec_module"),
    # train.py, with arguments that no shell sees.
    ("sweep", "subprocess.Popen"),
    ("sweep", "subprocess"),
    ("sweep", "subprocess.DEVNULL"),
}
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL")


def resolve(node: ast.AST, aliases: dict[str, str]) -> str:
    """The dotted name of an expression; "" where it is none."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, f"builtins.{node.id}")
    if isinstance(node, ast.Attribute) and (base := resolve(node.value, aliases)):
        return f"{base}.{node.attr}"
    return ""


def dangers(text: str) -> Iterator[str]:
    """What the code could run or unpickle, and what it does with the environment besides looking single names up."""
    nodes = list(ast.walk(ast.parse(text)))
    aliases: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                aliases[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                if FORBIDDEN.fullmatch(alias.name):
                    yield alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                aliases[alias.asname or alias.name] = name = f"{node.module}.{alias.name}"
                if FORBIDDEN.fullmatch(name):
                    yield name
    looked_up = {
        id(node.value)
        for node in nodes
        if isinstance(node, ast.Subscript) or (isinstance(node, ast.Attribute) and node.attr in ("get", "setdefault"))
    }
    for node in nodes:
        name = resolve(node, aliases)
        if FORBIDDEN.fullmatch(name) or name == "os.environb" or (name == "os.environ" and id(node) not in looked_up):
            yield name
        if isinstance(node, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            pickles = given.get("allow_pickle")
            allowed = isinstance(pickles, ast.Constant) and pickles.value is False
            if not allowed and (
                pickles or resolve(node.func, aliases) in ("numpy.load", "numpy.lib.format.read_array")
            ):
                yield "allow_pickle"
            if "shell" in given:
                yield "shell"
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if re.fullmatch(r"[A-Z][A-Z0-9_]*", text) and SECRET.search(text):
            yield f"the name {text}"


def test_the_code_runs_and_unpickles_nothing() -> None:
    paths = [("moe", REPOSITORY / "moe" / "__init__.py"), *sources()]
    assert len(paths) > 100
    found = {(name, danger) for name, path in paths for danger in dangers(path.read_text())}
    assert found == ALLOWED


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import joblib.numpy_pickle as j",
        "from pickle import loads",
        "from multiprocessing import x\nfrom os import system as s\ns('x')",
        "import os\nos.system('x')",
        "import os as o\no.execvp('x', [])",
        "eval('x')",
        "f = exec",
        "__import__('x')",
        "import importlib\nimportlib.import_module('x')",
        "import importlib.util\nimportlib.util.spec_from_file_location('x', 'y')",
        "def f(spec): spec.loader.exec_module(1)",
        "import numpy as np\nnp.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=flag)",
        "from numpy import load\nload('x')",
        "f('x', shell=True)",
        "import os\nprint(dict(os.environ))",
        "import os\nprint(os.environ.get('HF_TOKEN'))",
    ],
)
def test_a_danger_is_seen(code: str) -> None:
    assert list(dangers(code))


def test_what_does_no_harm_is_none() -> None:
    code = "import re, os, numpy as np\nre.compile('x')\nnp.load('x', allow_pickle=False)\nos.environ['HOME']\nx.eval()"
    assert list(dangers(code)) == []


# What is done with data ---------------------------------------------------------------------------------------------

EXECUTION = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pickle.find_class"}
READING = {"open", "os.listdir", "os.scandir"}
# Of a link it concerns the link.
CHANGING = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree"}


class Guard:
    """A folder that nothing may touch, and what was run while somebody looked."""

    watching: "Guard | None" = None

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, list[str]()
        folder.mkdir()
        (folder / "canary").write_text("sings")

    def see(self, event: str, arguments: tuple) -> None:
        if event in EXECUTION:
            self.seen.append(f"{event} {arguments}")
        elif event in READING | CHANGING:
            for path in arguments[:2]:
                if not isinstance(path, str | os.PathLike):
                    continue
                name = os.path.realpath(path if event in READING else os.path.dirname(path))
                if name.startswith(str(self.folder)):
                    self.seen.append(f"{event} {path}")

    @property
    def payload(self) -> bytes:
        """What makes a canary when it is unpickled."""

        class Bomb:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.system, ("touch hatched",)

        return pickle.dumps(Bomb())


@pytest.fixture
def guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guard]:
    """Nothing was run or touched when the test ends."""
    one = Guard(tmp_path / "outside")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    _install()
    Guard.watching = one
    yield one
    Guard.watching = None
    assert one.seen == []
    assert [(path.name, path.read_text()) for path in one.folder.iterdir()] == [("canary", "sings")]
    assert list(tmp_path.rglob("hatched")) == []


def _install(done: list[bool] = []) -> None:  # noqa: B006  # a hook stays for good
    def hook(event: str, arguments: tuple) -> None:
        if (one := Guard.watching) is not None:
            Guard.watching = None  # what it does itself doesn't count
            one.see(event, arguments)
            Guard.watching = one

    if not done:
        done.append(True)
        sys.addaudithook(hook)


def test_the_guard_sees_what_it_should(tmp_path: Path) -> None:
    one = Guard(tmp_path / "outside")
    _install()
    Guard.watching = one
    (tmp_path / "link").symlink_to(one.folder / "canary")
    pickle.loads(pickle.dumps(Path("x")))
    for path in (one.folder / "canary", tmp_path / "link"):
        path.read_text()
    os.system("true")
    Guard.watching = None
    events = [event.split()[0] for event in one.seen]
    assert {"pickle.find_class", "open", "os.system"} <= set(events)
    assert events.count("open") == 2


def sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def refusal(action: Callable[[], object]) -> str:
    """What it is refused with; "" where it isn't."""
    try:
        action()
    except (ValueError, CheckpointError) as error:
        return str(error)
    return ""


# Configs

REDUCE = {
    "__reduce__": ["os.system", ["touch hatched"]],
    "py/object": "os.system",
    "!!python/object/apply": "os.system",
}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (DEEP, "nested too deeply"),
        ('{"steps":' * 100_000, "nested too deeply"),
        ('{"steps": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ("[]", "must hold a table"),
        ('"../../x"', "must hold a table"),
        ('{"__class__": "os.system"}', "cannot be overridden"),
        ("__import__('os').system('touch hatched')", "Expecting value"),
        ("!!python/object/apply:os.system ['touch hatched']", "Expecting value"),
    ],
)
def test_text_that_is_no_config(text: str, words: str, guard: Guard) -> None:
    Path("config.json").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        config_lib.load_file("config.json")
    sentence(error)
    with pytest.raises(CheckpointError, match=words) as damaged:
        read_config(Path())
    sentence(damaged)


BAD_VALUES = [None, "../../x", 10**30, float("inf"), [], [[]], REDUCE, {"name": []}]


@pytest.mark.parametrize("file", ["digits", "olmoe_1b_7b"])
def test_any_value_anywhere_in_a_config_is_refused_in_a_sentence_or_harmless(file: str, guard: Guard) -> None:
    table = config_lib.load_file(str(REPOSITORY / f"configs/{file}.py")).to_dict()

    def places(part: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
        for name, value in list(part.items()):
            yield part, name
            if isinstance(value, dict):
                yield from places(value)

    for part, name in list(places(table)):
        old = part[name]
        for value in BAD_VALUES:
            part[name] = value
            said = refusal(lambda: config_lib.resolve(config_lib.from_json(json.dumps(table))))
            assert "\n" not in said
        part[name] = old


def test_a_config_in_json_names_no_programs_to_run_and_no_files_to_write(guard: Guard) -> None:
    table = config_lib.load_file(str(REPOSITORY / "configs/digits.py"))
    table.compiler = {
        "preset": "overlap",
        "cache": str(guard.folder),
        "options": (f"xla_dump_to={guard.folder}",),
    }
    Path("config.json").write_text(config_lib.to_json(table))
    loaded = config_lib.load_file("config.json")
    compiler = config_lib.resolve(loaded).compiler
    assert (compiler.preset, compiler.cache, compiler.options) == ("overlap", "", ())
    # The command may.
    config_lib.override(loaded, ["compiler.cache=x", "compiler.options=('xla_y=1',)"])
    assert config_lib.resolve(loaded).compiler.cache == "x"
    for other in ({"preset": "default"}, {"cache": 5, "options": [[]]}):
        Path("config.json").write_text(json.dumps({**loaded.to_dict(), "compiler": other}))
        assert config_lib.resolve(config_lib.load_file("config.json")).compiler.cache == ""


# Workdirs and checkpoints

STATE = {"variables": {"params": {"x": np.arange(3, dtype=np.float32)}}}
ABSTRACT = {"variables": {"params": {"x": jax.ShapeDtypeStruct((3,), np.float32)}}}


def save(folder: Path, *steps: int, keep: int = 2) -> None:
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(step, STATE, {"examples": step})
        checkpoints.wait()
    checkpoints.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(folder, 1, 2)
    return folder


@pytest.fixture
def checkpoints(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run" / "checkpoints"))


def readings(folder: Path) -> dict[str, Callable[[], Any]]:
    return {
        "restore": lambda: Checkpoints(folder).restore(2, ABSTRACT),
        "variables": lambda: Checkpoints(folder).restore_variables(2, ABSTRACT["variables"]),
        "parts": lambda: StoredVariables(folder / "2" / "state").open(("params", "x")).read().result(),
    }


@pytest.mark.parametrize(
    "name",
    [
        "7.tmp",
        "٣",
        "²",
        "-1",
        "1e3",
        "007",
        " 9",
        "x",
        "checkpoint_9",
        "9.orbax-checkpoint-tmp-1",
        "../7",
        "$(x)",
    ],
)
def test_odd_names_among_the_checkpoints_are_no_steps(name: str, checkpoints: Path, guard: Guard) -> None:
    odd = checkpoints / name
    shutil.copytree(checkpoints / "2", odd)
    assert complete_steps(checkpoints) == [1, 2]
    assert Checkpoints(checkpoints).choose(None) == 2
    with pytest.raises(CheckpointError, match="there is no checkpoint of step 7"):
        Checkpoints(checkpoints).choose(7)
    save(checkpoints, 10, 11, 12)
    assert complete_steps(checkpoints) == [11, 12]
    # What Orbax itself leaves behind, it takes away.
    assert odd.exists() or "orbax" in name


@pytest.mark.parametrize("name", ["²", "٣٤", "../x", "1e3", "-1", " 2"])
def test_odd_names_of_checkpoints_to_begin_with(name: str, checkpoints: Path, guard: Guard) -> None:
    (checkpoints.parent / "config.json").write_text("{}")
    with pytest.raises((CheckpointError, ValueError), match=r"no such folder|missing|neither") as error:
        open_source(checkpoints / name)
    sentence(error)


def test_a_step_that_is_a_link_is_neither_read_nor_deleted(checkpoints: Path, guard: Guard) -> None:
    (checkpoints / "0").symlink_to(guard.folder, target_is_directory=True)
    for attempt in (lambda: complete_steps(checkpoints), lambda: save(checkpoints, 3)):
        with pytest.raises(CheckpointError, match=r"0 is a link to .*outside: put a copy in its place") as error:
            attempt()
        sentence(error)
    (checkpoints / "0").unlink()
    (checkpoints / "5.orbax-checkpoint-tmp-1").symlink_to(guard.folder, target_is_directory=True)
    save(checkpoints, 3)
    assert complete_steps(checkpoints) == [2, 3]


CHECKPOINT_FILES: list[tuple[str, Any, str]] = [
    ("_CHECKPOINT_METADATA", DEEP, "can't be read"),
    ("_CHECKPOINT_METADATA", [], "must be a dictionary"),
    ("_CHECKPOINT_METADATA", {"metrics": 5, "item_handlers": 5}, "must be any one of types"),
    ("_CHECKPOINT_METADATA", {"item_handlers": {"state": "os.system", "../../outside": "os.system"}, **REDUCE}, ""),
    ("state/_METADATA", DEEP, "can't be read"),
    ("state/_METADATA", "os.system('touch hatched')", "Expecting value"),
    ("data/metadata", DEEP, "can't be read"),
    ("data/metadata", "payload", "decode"),
    ("state/manifest.ocdbt", "payload", "can't be read"),
]


@pytest.mark.parametrize(("file", "content", "words"), CHECKPOINT_FILES)
def test_files_of_a_checkpoint_that_are_something_else(
    file: str, content: Any, words: str, checkpoints: Path, guard: Guard
) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (checkpoints / "2" / file).write_bytes(guard.payload if content == "payload" else text.encode())
    said = [text for read in readings(checkpoints).values() if (text := refusal(read))]
    assert bool(said) == bool(words)
    assert all(words in text and "\n" not in text for text in said)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("name", ["../../../outside", "/outside", "a\\b"])
def test_metadata_that_name_arrays_elsewhere(name: str, merged: bool, checkpoints: Path, guard: Guard) -> None:
    path = checkpoints / "2" / "state" / "_METADATA"
    table = json.loads(path.read_text())
    (entry,) = table["tree_metadata"].values()
    entry["key_metadata"][2]["key"] = name
    path.write_text(json.dumps({**table, "use_ocdbt": merged}))
    for what in ("restore", "variables"):
        with pytest.raises(CheckpointError, match="which isn't in this folder") as error:
            readings(checkpoints)[what]()
        sentence(error)


def test_types_in_metadata_are_looked_up_not_imported(checkpoints: Path, guard: Guard) -> None:
    path = checkpoints / "2" / "state" / "_METADATA"
    path.write_text(path.read_text().replace("np.ndarray", "os.system"))
    for read in readings(checkpoints).values():
        assert "\n" not in refusal(read)


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "profile", "tensorboard"])
def test_a_run_writes_through_no_link(name: str, guard: Guard) -> None:
    run = Path("run")
    run.mkdir()
    (run / name).symlink_to(guard.folder / ("canary" if "." in name else "."))
    with pytest.raises(ValueError, match=rf"{name} is a link to .*outside") as error:
        open_workdir(run, config_lib.load_file(str(REPOSITORY / "configs/digits.py")))
    sentence(error)


def test_a_workdir_as_a_whole_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    open_workdir(tmp_path / "run", config_lib.load_file(str(REPOSITORY / "configs/digits.py")))
    assert (tmp_path / "disk/config.json").is_file()


def test_files_are_replaced_not_written_through(guard: Guard) -> None:
    for name in ("result.json", "result.tmp"):
        Path(name).symlink_to(guard.folder / "canary")
    write_whole(Path("result.json"), "{}")
    assert [(path.name, path.is_symlink(), path.read_text()) for path in Path().iterdir()] == [
        ("result.json", False, "{}")
    ]


def test_foreign_lines_of_metrics_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ['{"step": 1}', "[]", "1", DEEP, '{"step": "x"}', json.dumps(REDUCE), '{"step": 9}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    MetricsWriter(tmp_path, 5).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert "took out 6 lines" in capsys.readouterr().err


# Weights

HEADERS: list[tuple[Any, str]] = [
    ({"x": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 8]}}, "truncated or damaged"),
    ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [10**30, 10**30 + 8]}}, "truncated or damaged"),
    ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, "truncated or damaged"),
    ({"x": {"dtype": "F32", "shape": [2.0], "data_offsets": [0.0, 8.0]}}, "damaged header"),
    ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, "damaged header"),
    ({"x": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, "damaged header"),
    ({"x": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}}, "of type O"),
    ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "path": "../../outside/canary"}}, "damaged header"),
    ({"x": REDUCE}, "damaged header"),
    (DEEP, "damaged header"),
    ('{"x": ' + "9" * 5000 + "}", "damaged header"),
]


@pytest.mark.parametrize(("header", "words"), HEADERS)
def test_headers_of_weights(header: Any, words: str, guard: Guard) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    Path("model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ValueError, match=words) as error:
        Tensors(Path())
    sentence(error)


@pytest.mark.parametrize("length", [0, 2**63 - 1, 2**64 - 1, 10**8])
def test_headers_that_claim_to_be_long(length: int, guard: Guard) -> None:
    Path("model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ValueError, match="truncated or no safetensors file") as error:
        Tensors(Path())
    sentence(error)


def test_weights_that_are_a_pickle(guard: Guard) -> None:
    for name in ("model.safetensors", "pytorch_model.bin"):
        Path(name).write_bytes(guard.payload)
    with pytest.raises(ValueError, match="no safetensors file") as error:
        Tensors(Path())
    sentence(error)
    Path("model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model\.safetensors"):
        Tensors(Path())


@pytest.mark.parametrize("name", ["../outside/canary", "a/../../outside/canary", "..", "", ".", "x\0y", 5, ["x"], None])
def test_files_that_an_index_names(name: Any, guard: Guard) -> None:
    names = [name, str(guard.folder / "canary")] if name == "../outside/canary" else [name]
    for one in names:
        Path("model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": one}}))
        with pytest.raises(ValueError, match=r"names files outside|lacks|no table weight_map") as error:
            Tensors(Path())
        sentence(error)


def test_models_ask_for_nothing_absurd(guard: Guard) -> None:
    for family in ("mixtral", "olmoe", "qwen", "llama", "qwen2", "qwen3"):
        table = json.loads((STORED / family / "config.json").read_text())
        table |= {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "mlp_only_layers": [], "layer_types": None}
        table.pop("rope_parameters", None)
        for name, old in list(table.items()):
            for value in (*BAD_VALUES, 0, 10**9):
                table[name] = value
                assert "\n" not in refusal(functools.partial(parse, table))
            table[name] = old


def hub(folder: Path, family: str = "qwen") -> Path:
    """The stored model as the Hub's cache has it: every file a link to its content."""
    snapshot, blobs = folder / "snapshots" / "main", folder / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate((STORED / family).glob("*.*s*n*")):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_links_of_a_cache_are_followed_and_others_are_not(tmp_path: Path, guard: Guard) -> None:
    snapshot = hub(tmp_path / "models--x")
    from_hf(snapshot, tmp_path / "run")
    kept = tmp_path / "run/huggingface/config.json"
    assert not kept.is_symlink()
    for folder, convert_it in (
        (kept.parent, lambda: to_hf(tmp_path / "run", tmp_path / "out")),
        (snapshot, lambda: from_hf(snapshot, tmp_path / "out")),
    ):
        (folder / "vocab.json").symlink_to(guard.folder / "canary")
        with pytest.raises(ValueError, match=r"vocab\.json is a link to .*canary, outside of") as error:
            convert_it()
        sentence(error)
        assert not (tmp_path / "out").exists()


def test_types_to_write_weights_in(tmp_path: Path, guard: Guard) -> None:
    from_hf(STORED / "qwen", tmp_path / "run")
    path = tmp_path / "run/huggingface/dtypes.json"
    for value in ("object", "O", ["F32"], REDUCE):
        path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), value)))
        with pytest.raises(ValueError, match="must be of F64, F32, F16, BF16") as error:
            to_hf(tmp_path / "run", tmp_path / "out")
        sentence(error)


def npy(dtype: Any, shape: Any, data: bytes) -> bytes:
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


@pytest.mark.parametrize(
    "content",
    [
        "payload",
        "objects",
        npy("<i8", (10**15,), b""),
        npy("<i8", (10**30,), b""),
        npy("<i8", (-5,), b""),
        npy("__import__('os').system('touch hatched')", (1,), bytes(8)),
        b"PK\x03\x04" + bytes(100),
    ],
)
def test_tokens_that_are_no_numbers(content: Any, guard: Guard) -> None:
    special = {"payload": guard.payload, "objects": npy("|O", (1, 1), guard.payload)}
    Path("tokens.npy").write_bytes(special.get(content, content) if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=r"tokens\.npy is not a \.npy file of numbers"):
        write_logits(Path("run"), Path("tokens.npy"), Path("logits.npy"))


# Tokenizers, tokens and data sets

WORDS = json.loads(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a")).to_str())


def with_model(**changes: Any) -> dict[str, Any]:
    return {**WORDS, "model": {**WORDS["model"], **changes}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (with_model(vocab={}), "numbers its 0 tokens"),
        (with_model(vocab={"a": 2**32 - 1, "</s>": 1}), "up to 4294967295"),
        (with_model(vocab={"a": 2**31 - 2, "</s>": 1}), "up to 2147483646"),
        (with_model(vocab={"a": -1}), "no tokenizer.json"),
        (with_model(vocab="../outside/canary"), "no tokenizer.json"),
        (with_model(type="BPE", vocab="../outside/canary", merges="../outside/canary"), "no tokenizer.json"),
        ({**WORDS, "__reduce__": REDUCE}, "no tokenizer.json"),
        (
            {
                **WORDS,
                "normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff" * 8).decode()},
            },
            "no tokenizer.json",
        ),
        ({**WORDS, "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}}, "no token"),
        ("../outside/canary", "no tokenizer.json"),
        (DEEP, "no tokenizer.json"),
        ("payload", "no tokenizer.json"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # a panic prints its trace to standard error
def test_tokenizer_files(content: Any, words: str, guard: Guard) -> None:
    text = content if isinstance(content, str) and content[0] == "[" else json.dumps(content)
    Path("tokenizer.json").write_bytes(guard.payload if content == "payload" else text.encode())
    with pytest.raises(ValueError, match=words) as error:
        HuggingFace("tokenizer.json")
    sentence(error)


def test_a_template_with_tokens_that_there_are_not(guard: Guard) -> None:
    special = {"X": {"id": "X", "ids": [2**31], "tokens": ["X"]}}
    single = [{"SpecialToken": {"id": "X", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special}
    Path("tokenizer.json").write_text(json.dumps({**WORDS, "post_processor": template}))
    with pytest.raises(ValueError, match="puts token 2147483648 about a text") as error:
        HuggingFace("tokenizer.json")
    sentence(error)


@pytest.mark.parametrize("content", [b"", b"\xff" * 99, b"\x0a\xff\xff\xff\xff\x7fa", "payload"])
def test_sentencepiece_models(content: Any, guard: Guard) -> None:
    Path("x.model").write_bytes(guard.payload if content == "payload" else content)
    with pytest.raises(ValueError, match="no SentencePiece model") as error:
        SentencePiece("x.model")
    sentence(error)


@pytest.mark.parametrize(
    "changes",
    [
        # An array of pointers, from a file.
        {"dtype": "O"},
        {"dtype": ["uint16"]},
        {"arrays": {"../../outside/canary": [5, 0]}},
        {"arrays": []},
        {"notes": 5},
        None,
    ],
)
def test_kept_tokens_that_were_changed_are_made_anew(
    changes: dict | None, guard: Guard, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text").write_text("one two")

    def read() -> list[int]:
        source = Source("files", paths=("text",), test_paths=("text",))
        corpus = open_corpus(source, "train", TokenizerConfig(), "data", "kept", with_sizes=False)
        return corpus.tokens.tolist()

    tokens = read()
    (meta,) = Path("kept").glob("*/meta.json")
    table = json.loads(meta.read_text())
    if changes and isinstance(added := changes.get("arrays"), dict):
        changes = {"arrays": table["arrays"] | added}
    meta.write_text(DEEP if changes is None else json.dumps({**table, **changes}))
    assert read() == tokens
    assert "meta.json" in capsys.readouterr().out
    assert json.loads(meta.read_text()) == table


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
def test_a_data_set_brings_no_code(key: str, guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("data/evil/1.0.0")
    folder.mkdir(parents=True)
    Path("hatches.py").write_text("open('hatched', 'w')")
    monkeypatch.syspath_prepend(str(Path().absolute()))
    features = {"featuresDict": {"features": {"x": {key: "hatches.Feature", "content": {}}}}}
    (folder / "features.json").write_text(
        json.dumps({"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict", **features})
    )
    (folder / "dataset_info.json").write_text(
        json.dumps({"name": "evil", "version": "1.0.0", "fileFormat": "tfrecord"})
    )
    with pytest.raises(ValueError, match=r"asks for hatches\.Feature, which isn't of tfds") as error:
        open_builder("evil", "data")
    sentence(error)


# Programs and secrets -----------------------------------------------------------------------------------------------

SECRETS = {
    name: f"s3cr3t-{name.lower()}"
    for name in (
        "TOKEN",
        "KEY",
        "SECRET",
        "PASSWORD",
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "GITHUB_TOKEN",
    )
}
TINY = [
    "--config=configs/digits.py",
    *(
        f"--config.{assignment}"
        for assignment in (
            "model.width=8", "model.depth=1", "model.moe_every=1", "model.patch_size=4", "model.heads=1",
            "moe.expert_width=8", "moe.num_experts=2", "router.k=1", "batch_size=72", "moe.group_size=9", "steps=2",
            "optimizer.warmup_steps=1",
        )
    ),
]  # fmt: skip


def ended(main: Callable[[Any], None], *argv: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        cli.run(main, argv)
    return int(exit_info.value.code or 0)


@pytest.mark.parametrize(
    ("config", "words"), [(DEEP, "nested too deeply"), ("[]", "must hold a table"), ('{"__init__": 1}', "overridden")]
)
def test_programs_end_with_a_sentence(
    config: str, words: str, guard: Guard, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path("run")
    run.mkdir()
    (run / "config.json").write_text(config)
    (run / "model.safetensors").write_bytes(guard.payload)
    for main, argv, code, wanted in (
        (evaluate.main, ["--workdir=run"], cli.FAILURE, words),
        (train.main, ["--config=run/config.json", "--workdir=other"], cli.USAGE, words),
        (convert.main, ["to-hf", "run", "out"], cli.FAILURE, words),
        (convert.main, ["from-hf", "run", "out"], cli.USAGE, ""),
    ):
        assert ended(main, *argv) == code
        err = capsys.readouterr().err
        assert wanted in err
        assert err.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["run"]


def test_secrets_are_neither_written_nor_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    assert ended(train.main, *TINY, f"--workdir={run}") == 0
    assert ended(evaluate.main, f"--workdir={run}") == 0
    assert ended(train.main, *TINY, f"--workdir={run}", "--config.seed=5") == cli.USAGE
    assert ended(train.main, "--help") == 0
    (run / "config.json").write_text("{")
    assert ended(evaluate.main, f"--workdir={run}") == cli.FAILURE
    said = capfd.readouterr()
    assert "s3cr3t" not in said.out + said.err
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"config.json", "metrics.jsonl", "result.json", "evaluation.json"} <= {path.name for path in files}
    assert [path for path in files if b"s3cr3t" in path.read_bytes()] == []


# Versions -----------------------------------------------------------------------------------------------------------


def test_every_version_is_pinned() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pin = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?==\d[\w.+!]*( ; [^#@]+)?")
    assert [line for line in lines if not pin.fullmatch(line)] == []
    assert len(lines) == len(set(lines)) > 100
    # A package has several pins only where they are for different Pythons.
    names = [line.partition("==")[0] for line in lines]
    assert all(";" in line for line, name in zip(lines, names, strict=True) if names.count(name) > 1)


def test_every_package_that_is_asked_for_has_a_pin() -> None:
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name != "clusters"}
    wanted = [line for lines in (project["dependencies"], *extras.values()) for line in lines]
    names = {re.split(r"[\[<>=~! ]", line)[0].lower().replace("_", "-") for line in wanted} - {"moe-jax"}
    pinned = {line.partition("==")[0] for line in (REPOSITORY / "constraints.txt").read_text().splitlines()}
    assert names - pinned == set()


def test_every_installation_is_pinned() -> None:
    files = [
        REPOSITORY / "Makefile",
        REPOSITORY / ".ci" / "run",
        *(path for path in (REPOSITORY / "tpu_setup").rglob("*") if path.suffix in (".sh", ".yaml", "")),
        *(REPOSITORY / ".github").rglob("*.y*ml"),
    ]
    found = 0
    for path in files:
        if not path.is_file():
            continue
        text = path.read_text().replace("\\\n", " ")
        for command in re.findall(r"^[^#\n]*\bpip3? install (.*)$", text, flags=re.MULTILINE):
            found += 1
            words = command.partition(";")[0].split()
            pins = [word for word in words if re.fullmatch(r"[\w-]+==[\d.]+", word)]
            # SkyPilot doesn't go with the versions that are pinned.
            assert "constraints.txt" in words or pins, f"{path}: {command}"
    assert found >= 8
