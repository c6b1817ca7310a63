"""What every `steersman train` has in common: YAML and flags into dataclasses, loading, errors of one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import get_available_reporting_integrations
from trl.scripts.utils import TrlParser

from steersman.training.data.preferences import DataError, load_tokenizer
from steersman.training.errors import ConfigError
from steersman.training.options import check_options
from steersman.training.output import claim

Arguments = TypeVar("Arguments", bound="RunArguments")
Config = TypeVar("Config")
Peeked = TypeVar("Peeked")


_REFUSED = (ValueError, TypeError, OSError, yaml.YAMLError, IndexError)  # what the parser raises


@dataclass(kw_only=True)
class RunArguments:
    """What every kind of training is given beyond TRL's own settings."""

    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Replace a model that output_dir holds, and remove its checkpoints; else that is refused."},
    )
    figure: bool = field(
        default=True, metadata={"help": "Draw the accuracy by prefix length beside the model, as accuracy.png."}
    )


def run(
    kind: str,
    arguments_type: type[Arguments],
    config_type: Callable[[Sequence[str]], type[Config]],
    train: Callable[[Arguments, Config], Any],
    argv: Sequence[str],
) -> int:
    """Runs `steersman train KIND` with these command-line arguments; 2 for an error in what the user gave.

    config_type: from the arguments, what the rest of them is read into.
    """
    try:
        arguments, config = parse(kind, arguments_type, config_type(argv), argv)
        check_options(config)
        _check_reports(config)
        claim(config, arguments.overwrite_output_dir)
        train(arguments, config)
    except (ConfigError, DataError) as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes with the same error, one says it
            print(f"steersman train {kind}: error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(
    kind: str, arguments_type: type[Arguments], config_type: type[Config], argv: Sequence[str]
) -> tuple[Arguments, Config]:
    """The two dataclasses, from `--config FILE.yaml` and flags over it; raises ConfigError."""
    parser = _Parser((arguments_type, config_type), prog=f"steersman train {kind}")
    # A progress bar in a terminal, lines in a log.
    parser.set_defaults(disable_tqdm=not sys.stderr.isatty())
    try:
        arguments, config = parser.parse_args_and_config(argv)
    except _REFUSED as error:
        raise one_line(error) from None
    _check_choices(arguments)
    _follow_train_file(arguments, argv)
    return arguments, config


def _follow_train_file(arguments: Any, argv: Sequence[str]) -> None:
    """Leaves out the validation_file of a configuration file whose train_file is replaced by a flag: it holds rows of
    other data, and may not be there at all."""
    flags = {part.split("=")[0].lstrip("-").replace("-", "_") for part in argv if part.startswith("--")}
    other = getattr(arguments, "validation_file", None)
    if other and "train_file" in flags and "validation_file" not in flags:
        arguments.validation_file = None
        log(
            f"validation_file {other} is left out, since --train_file replaces the data that it belongs to: name your "
            "own with --validation_file"
        )


def log(message: str) -> None:
    """Writes a line to standard error, once for all processes of a training."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def log_data(arguments: Any, rows: int, held_out: int) -> None:
    """Writes what is trained on, and what is measured on if anything."""
    measured = f"measured on {held_out} rows of {arguments.validation_file}"
    if not held_out:
        measured = "not measured: there is no validation_file"
    log(f"training on {rows} rows of {arguments.train_file}; the model is {measured}")


def peek(kind: str, arguments_type: type[Peeked], argv: Sequence[str]) -> Peeked:
    """A few of the arguments, the others left alone; raises ConfigError."""
    parser = _Parser((arguments_type,), prog=f"steersman train {kind}", add_help=False, allow_abbrev=False)
    try:
        arguments: Peeked = parser.parse_args_and_config(argv, return_remaining_strings=True)[0]
    except _REFUSED as error:
        raise one_line(error) from None
    _check_choices(arguments)
    return arguments


def _check_reports(config: Any) -> None:
    missing = set(config.report_to) - set(get_available_reporting_integrations())
    if missing:
        raise ConfigError(f"report_to: {', '.join(sorted(missing))} can't be used: the package is not installed")


def one_line(error: Exception) -> ConfigError:
    """Another library's complaint about what the user gave."""
    return ConfigError(" ".join(str(error).split()))


def load(path: str, auto_model: Any, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of an Auto class, in float32 unless `dtype` says otherwise, and its tokenizer; raises ConfigError or
    DataError."""
    tokenizer = load_tokenizer(path)
    try:
        model = auto_model.from_pretrained(path, **{"dtype": "float32", **options})
    # What a quantised checkpoint needs may not be installed.
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{path} can't be loaded: {str(error).splitlines()[0]}") from None
    return model, tokenizer


def prepare_tokenizer(path: str, config: Any) -> PreTrainedTokenizerBase:
    """A checkpoint's tokenizer with the `eos_token`, `pad_token` and `chat_template_path` of TRL's configuration, if it
    has them; without a padding token anywhere the end token is one. Raises ConfigError or DataError.

    What is padding is known by its place, so that a padding token may be the end token too.
    """
    tokenizer = load_tokenizer(path)
    for name in ("eos_token", "pad_token"):
        token = getattr(config, name, None)
        if token is not None and token not in tokenizer.get_vocab():
            raise ConfigError(f"{name}: {token!r} is no token of {path}: name one of its vocabulary, or leave it out")
        if token is not None:
            setattr(tokenizer, name, token)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    template = getattr(config, "chat_template_path", None)
    if template is not None:
        tokenizer.chat_template = _read_template(template)
    return tokenizer


def _read_template(path: str) -> str:
    if not path.endswith((".jinja", ".j2")):
        raise ConfigError(f"chat_template_path: a file of Jinja (.jinja or .j2), not {path}: no tokens can be added")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template_path: {path} can't be read: {error}") from None


def _check_choices(arguments: Any) -> None:
    """argparse checks the choices of flags only, not those of a file."""
    for name, hint in get_type_hints(type(arguments)).items():
        if get_origin(hint) is Literal and getattr(arguments, name) not in get_args(hint):
            raise ConfigError(f"{name} is one of {', '.join(get_args(hint))}, not {getattr(arguments, name)!r}")


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print the usage of all of TRL's flags before it."""
        raise ConfigError(message)
