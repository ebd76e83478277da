"""The flags of `inpaint-server models …`."""

import argparse
from collections.abc import Callable
from typing import TypeAlias

from server.cli.options import Parser

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
Run: TypeAlias = Callable[[argparse.Namespace], int]

KEYS = {
    "revision": "commit of a hub id",
    "variant": "file variant, such as fp16",
    "config": "for a single file: folder or hub id of configuration and tokenizer",
    "prediction_type": "epsilon or v_prediction",
    "scheduler": "default scheduler, by its class in diffusers",
    "vae": "file, folder or hub id of a VAE",
    "safety_checker": "folder or hub id of a safety checker",
}
"""Keys of an entry that `models add` writes besides the source, and what they hold."""

FLAGS = {"config": "--config-from"}
"""Where the flag is not the key's own name: `--config` names the settings file."""


def add_models_commands(commands: Commands, shared: Parser, run: Run) -> None:
    """The commands below `models`. run: their function."""
    each = commands.add_parser("list", parents=[shared], help="list models and LoRAs (default)")
    each.add_argument("--json", action="store_true", help="print JSON")
    each.set_defaults(run=run, verb="list")
    for verb, text in (
        ("pull", "download a model as the hub has it now, and trust it"),
        ("verify", "compare the files of a model or LoRA with those it was first used with"),
        ("trust", "accept a model's present files as the right ones"),
    ):
        each = commands.add_parser(verb, parents=[shared], help=text)
        each.add_argument("model_id", metavar="ID", help="id of models.toml, folder or hub id")
        each.set_defaults(run=run, verb=verb)
    add_adding(commands, shared, run)
    add_removing(commands, shared, run)


def add_adding(commands: Commands, shared: Parser, run: Run) -> None:
    each = commands.add_parser("add", parents=[shared], help="add an entry to models.toml")
    each.add_argument("model_id", metavar="ID", help="name of the model or LoRA")
    each.add_argument("source", metavar="SOURCE", help="hub id, folder or .safetensors file")
    each.add_argument("--lora", action="store_true", help="the file is a LoRA, not a model")
    for key, text in KEYS.items():
        flag = FLAGS.get(key, f"--{key.replace('_', '-')}")
        each.add_argument(flag, dest=f"key_{key}", metavar="TEXT", help=text)
    each.set_defaults(run=run, verb="add")


def add_removing(commands: Commands, shared: Parser, run: Run) -> None:
    each = commands.add_parser(
        "remove",
        parents=[shared],
        help="remove an entry of models.toml, and what was downloaded for it alone",
    )
    each.add_argument("model_id", metavar="ID", help="id of models.toml, or a hub id")
    each.add_argument("--yes", action="store_true", help="do not ask")
    each.set_defaults(run=run, verb="remove")
