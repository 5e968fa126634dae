"""Weights of Hugging Face models in and out, and the logits of what came in.

    python -m moe.convert from-hf DIR WORKDIR         # config.json and safetensors to a workdir
    python -m moe.convert to-hf WORKDIR DIR           # and back, in the types that they came in
    python -m moe.convert logits WORKDIR tokens.npy logits.npy    # ids [B, L] to float32 logits [B, L, V]

Mixtral, OLMoE and Qwen3-MoE, and dense Llama, Qwen2 and Qwen3 (the config of a dense one has the experts that its
copies would be, see `config.init_from`). No code of the model is run and nothing is unpickled.
`--config.model.dtype=float32` has logits computed in float32 where the model asks for bfloat16.
"""

from collections.abc import Sequence
from pathlib import Path

from moe import cli
from moe.convert.convert import from_hf, to_hf
from moe.convert.logits import write_logits
from moe.files import is_remote, open_path


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = cli.make_parser(__doc__ or "", "configs/digits.py")
    parser.add_argument("command", choices=("from-hf", "to-hf", "logits"))
    parser.add_argument("paths", nargs="+", help="what to read, then what to write")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="of a safetensors file (default: %(default)s)")
    arguments, overrides = cli.parse(parser, argv)
    wanted = 3 if arguments.command == "logits" else 2
    if len(arguments.paths) != wanted:
        raise cli.UsageError(f"{arguments.command} takes {wanted} paths, not {len(arguments.paths)}; see --help.")
    if overrides and arguments.command != "logits":
        raise cli.UsageError(f"{arguments.command} takes no config field: {overrides[0]}.")
    if not arguments.shard_gb > 0:
        raise cli.UsageError(f"--shard-gb = {arguments.shard_gb} must be positive.")
    with cli.usage_errors():
        source, *others = map(open_path, arguments.paths)
        if remote := [
            path for path in ([source] if arguments.command == "from-hf" else []) + others if is_remote(path)
        ]:
            raise ValueError(f"{remote[0]} must be on this machine: only the workdir of a run is read from a bucket.")
        local = [Path(path) for path in others]
        match arguments.command:
            case "from-hf":
                from_hf(Path(source), local[0])
            case "to-hf":
                to_hf(source, local[0], arguments.step, int(arguments.shard_gb * 1e9))
            case "logits":
                write_logits(source, local[0], local[1], arguments.step, overrides)


if __name__ == "__main__":
    cli.run(main)
