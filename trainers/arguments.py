"""TRL's parser of command lines and YAML files, with an adapter of any method of PEFT's or ours beside the rest.

Notable: TRL's ModelConfig has LoRA's settings under names of its own, and four of them under the adapters' names
(`lora_alpha`, `lora_dropout`, `use_dora`, `use_rslora`). With `adapter` these four are the adapter's.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from peft_dynamic._extras import how_to_install

try:
    from trl import ModelConfig, ScriptArguments, TrlParser
except ImportError as error:
    raise ImportError(f"AdapterParser needs TRL. {how_to_install('trl', 'trl>=1.16', 'datasets')}") from error

# What PEFT or the script fills in, and no user
_FILLED_IN = {
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("task_type", "runtime_config"),
}
# ModelConfig's settings of its LoRA: "lora_r" and the like, which mean nothing beside another adapter
_TRL_LORA = {
    each.name
    for each in dataclasses.fields(ModelConfig)
    if each.name.startswith(("lora_", "use_dora", "use_rslora", "use_peft"))
}
_UNSET: Any = type("Unset", (), {"__repr__": lambda self: "the adapter's own default"})()
_PATTERN = re.compile(r"[*+?()\[\]{}|^$\\]")  # a regular expression, in which a comma separates nothing


def adapter_names() -> list[str]:
    """What `adapter` may be: the methods that PEFT knows now, in lower case."""
    return sorted(str(getattr(kind, "value", kind)).lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING)


def adapter_fields(adapter: str) -> dict[str, dataclasses.Field]:
    """The fields of an adapter's configuration that a user sets, by name.

    Args:
        adapter: as in `adapter_names`; upper case and hyphens do too.

    Raises:
        ValueError: there is no such method.
    """
    fields = dataclasses.fields(_config_class(adapter))
    return {each.name: each for each in fields if each.init and each.name not in _FILLED_IN}


@dataclasses.dataclass
class RunArguments(ScriptArguments):
    """TRL's arguments of a script, and ours."""

    dataset_name: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Rows: a file of JSON lines, CSV or Parquet, a folder, or one of the Hub."},
    )
    eval_data: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Rows to evaluate on, as dataset_name; None for the split dataset_test_split."},
    )
    curve_ranks: str | None = dataclasses.field(
        default=None, metadata={"help": "Ranks to measure at each evaluation, as 2,8: eval_rank_8_loss and so on."}
    )
    curve_exits: str | None = dataclasses.field(
        default=None, metadata={"help": "Depths to measure at each evaluation, as 12,30: eval_exit_12_loss and so on."}
    )
    curve_every: int = dataclasses.field(default=1, metadata={"help": "Measure them at every so many evaluations."})
    early_stopping_patience: int | None = dataclasses.field(
        default=None,
        metadata={"help": "Stop after so many evaluations without a better metric_for_best_model."},
    )
    overwrite: bool = dataclasses.field(
        default=False, metadata={"help": "Replace the run in output_dir, with its checkpoints."}
    )


class AdapterParser(TrlParser):
    """`TrlParser` with an adapter: `adapter` names its method, and the fields of its configuration are options.

    On a command line that is `--adapter dylora --r 8 --ranks 1,2,4,8`, and in a YAML file the same names as keys. A
    list on a command line has commas or blanks between its items, and a mapping is written as in YAML.

    A TRL script needs no other change:

        parser = AdapterParser((ScriptArguments, SFTConfig, ModelConfig))
        script, training, model, peft_config = parser.parse_args_and_config()

    Args:
        dataclass_types: as in `TrlParser`.
        task_type: the adapter's, "CAUSAL_LM" or "SEQ_CLS" and so on.
        default_adapter: the method where neither `adapter` nor `use_peft` is given; None for no adapter.
        kwargs: as in `argparse.ArgumentParser`.
    """

    def __init__(
        self,
        dataclass_types: Any = None,
        task_type: str = "CAUSAL_LM",
        default_adapter: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataclass_types, **{"allow_abbrev": False, **kwargs})
        self.task_type, self.default_adapter = task_type, default_adapter
        self._used = False
        self.add_argument("--adapter", help="The adapter's method, of PEFT's or ours, such as dylora or lora.")
        self._defaults = {action.dest: _default(action) for action in reversed(self._actions)}  # of --x, not of --no_x
        self.given: dict[str, Any] = {}  # what is no default, as a YAML file would have it; from the last call

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """As TrlParser's, with the adapter's `PeftConfig` after the data classes; None for no adapter.

        Raises:
            ValueError: an option is not known, or a value is not right; the text names it.
        """
        import sys

        words = [part for word in (sys.argv[1:] if args is None else args) for part in _apart(word)]
        given = _read_config(words)
        adapter = self._adapter(words, given)
        fields = {} if adapter is None else adapter_fields(adapter)
        if self._used:
            raise ValueError(
                "this parser has the options of an adapter from the call before, and would take them for another's. "
                "Make an AdapterParser for each command line."
            )
        self._used = bool(fields)
        self._add(fields)
        self._check_known(words, given, adapter)
        *found, namespace = super().parse_args_and_config(args=words)
        values = {name: value for name in fields if (value := getattr(namespace, name, _UNSET)) is not _UNSET}
        for each in found:
            if isinstance(each, ModelConfig):
                if adapter is not None:
                    values |= self._taken_back(each, fields)
                elif each.use_peft:
                    from trl import get_peft_config

                    each.lora_task_type = self.task_type
                    return (*found, get_peft_config(each))
        if adapter is None:
            return (*found, None)
        values = {name: _value(value, fields[name]) for name, value in values.items()}
        self.given |= values
        return (*found, _config_class(adapter)(task_type=self.task_type, **values))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, with a note of what was given."""
        found, rest = super().parse_known_args(args, namespace)
        known = {name: value for name, value in vars(found).items() if value is not _UNSET}
        self.given = {
            name: value for name, value in known.items() if name not in self._defaults or value != self._defaults[name]
        }
        return found, rest

    def page(self, words: Iterable[str]) -> str:
        """The help of all options, those of the adapter that the words name among them."""
        adapter = self._adapter([part for word in words for part in _apart(word)], {})
        self._add({} if adapter is None else adapter_fields(adapter))
        return self.format_help()

    def error(self, message: str) -> NoReturn:
        """Raise instead of argparse's page of usage and exit.

        Raises:
            ValueError: always.
        """
        raise ValueError(message)

    def _adapter(self, words: list[str], given: dict[str, Any]) -> str | None:
        """The method's name, before the options that depend on it can be read."""
        if "--adapter" in words:
            at = len(words) - 1 - words[::-1].index("--adapter")
            if at + 1 == len(words) or words[at + 1].startswith("--"):
                raise ValueError(f"--adapter: name a method, one of {', '.join(adapter_names())}.")
            name: Any = words[at + 1]
        else:
            name = given.get("adapter")
        wants_peft = "--use_peft" in words or "--use-peft" in words or given.get("use_peft")
        if name is None:
            return None if wants_peft else self.default_adapter
        if wants_peft:
            raise ValueError(f"use_peft asks for TRL's LoRA, and adapter={name!r} for another: leave one of them out.")
        _config_class(name)
        return str(name)

    def _add(self, fields: dict[str, dataclasses.Field]) -> None:
        """Options for an adapter's fields; where ModelConfig has the name, its option is the adapter's from now on."""
        there = {action.dest: action for action in self._actions}
        group = self.add_argument_group("adapter")
        for name, each in fields.items():
            if name in _TRL_LORA and name in there:
                action = there[name]
                action.default, action.type, action.nargs, action.choices = _UNSET, _Word, "*", None
                continue
            if name in there:
                raise ValueError(f"{name} is a field of the adapter and of {self.dataclass_types}: which one is meant?")
            names = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
            help = str(each.metadata.get("help", "")).replace("%", "%%")
            group.add_argument(*names, dest=name, nargs="*", type=_Word, default=_UNSET, help=help)

    def _taken_back(self, model: Any, fields: dict[str, dataclasses.Field]) -> dict[str, Any]:
        """The adapter's values that ModelConfig has got, and ModelConfig's defaults in their place.

        Raises:
            ValueError: another setting of ModelConfig's LoRA was given.
        """
        values = {}
        for each in dataclasses.fields(ModelConfig):
            value = getattr(model, each.name)
            if each.name in _TRL_LORA and each.name in fields:
                setattr(model, each.name, each.default)
                if value is not _UNSET:
                    values[each.name] = value
            elif each.name in _TRL_LORA - {"lora_task_type"} and value != each.default:
                own = each.name.removeprefix("lora_")
                fix = f"the adapter's own name of it is {own}" if own in fields else "the adapter has no such setting"
                raise ValueError(f"{each.name}={value!r} is a setting of TRL's LoRA, without adapter: {fix}.")
        return values

    def _check_known(self, words: list[str], given: dict[str, Any], adapter: str | None) -> None:
        """Raise for an option or a key that nothing knows, with the one that may have been meant."""
        known = {option for action in self._actions for option in action.option_strings}
        keys = {action.dest for action in self._actions} | {"env"}
        for word in words:
            if re.match(r"--[A-Za-z]", word) and word not in known | {"--config"}:
                raise ValueError(self._unknown(word, sorted(known), adapter))
        for key in given:
            if key not in keys:
                raise ValueError(f"in the file: {self._unknown(str(key), sorted(keys), adapter)}")

    def _unknown(self, name: str, known: list[str], adapter: str | None) -> str:
        near = difflib.get_close_matches(name, known, n=1)
        meant = f" Was {near[0]} meant?" if near else ""
        others = [each for each in adapter_names() if each != adapter and name.lstrip("-") in adapter_fields(each)]
        ours = [each for each in ("dylora", "moslora", "loretta_rep", "lora") if each in others]
        of = f" It is one of --adapter {(ours or others)[0]}." if others else ""
        with_adapter = f" with the adapter {adapter}" if adapter else ""
        return f"{name} is not known{with_adapter}.{of or meant}"


def _config_class(adapter: Any) -> Any:
    name = str(adapter).lower().replace("-", "_")
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if str(getattr(kind, "value", kind)).lower() == name:
            return config
    raise ValueError(f"adapter={adapter!r}: there is no such method; there are {', '.join(adapter_names())}.")


def _apart(word: str) -> list[str]:
    """`--name=value` as two words, which TrlParser needs of --config."""
    found = re.fullmatch(r"(--config)=(.*)", word, re.DOTALL) or re.fullmatch(r"(--adapter)=(.*)", word, re.DOTALL)
    if found:
        return list(found.groups())
    named = re.fullmatch(r"(--[A-Za-z][\w-]*)=(.*)", word, re.DOTALL)
    return list(named.groups()) if named and not named[2].startswith("-") else [word]


def _read_config(words: list[str]) -> dict[str, Any]:
    """The YAML file that `--config` names, for a look at what it says before TrlParser reads it.

    Raises:
        ValueError: it cannot be read, or is no mapping.
    """
    if "--config" not in words:
        return {}
    at = words.index("--config")
    if at + 1 == len(words):
        raise ValueError("--config: name a YAML file.")
    path = Path(words[at + 1])
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"--config {path} must have keys and values, as `learning_rate: 2.0e-4`; it is {content!r:.60}."
        )
    return content


class _Word(str):
    """A word of the command line, which no value of a YAML file is."""


def _default(action: Any) -> Any:
    """As argparse gives it, which reads a default that is text as if it had been typed."""
    return action.type(action.default) if isinstance(action.default, str) and callable(action.type) else action.default


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, _Word) for word in value)


def _value(value: Any, field: dataclasses.Field) -> Any:
    """A value as the configuration takes it: from a YAML file as it is, from a command line out of its words."""
    kind = str(field.type)
    if not _is_words(value):
        if not isinstance(value, str):
            return value
        # argparse has made a word of a file's text; PEFT would read a text in place of a list letter by letter
        return [str(value)] if _lists_alone(kind) else str(value)
    words = [str(word) for word in value]
    if not words:
        if "bool" in kind:
            return True
        raise ValueError(f"{field.name}: a value is missing.")
    lists = "list" in kind.lower()
    if lists and len(words) == 1 and "," in words[0] and not _PATTERN.search(words[0]):
        words = [word.strip() for word in words[0].split(",")]
    read = [_from_text(word) if _more_than_text(kind) else word for word in words]
    if len(read) > 1 and not lists:
        raise ValueError(f"{field.name}={' '.join(words)!r}: one value is wanted.")
    if words in (["none"], ["null"]) and ("Optional" in kind or "None" in kind):
        return None
    return read if len(read) > 1 or (lists and _is_item(read[0], kind)) else read[0]


def _lists_alone(kind: str) -> bool:
    """Whether a type has lists of texts and no text: a text would be read letter by letter."""
    rest = re.sub(r"(?i)list\[str\]", "", kind)
    return rest != kind and not re.search(r"\bstr\b", rest)


def _is_item(value: Any, kind: str) -> bool:
    """Whether a single value is a list of one: a number, or a name where PEFT would take a text for a pattern."""
    if isinstance(value, str):
        plain = not (_PATTERN.search(value) or "-" in value)  # all-linear is a word of PEFT's
        return _lists_alone(kind) or (plain and "list[str]" in kind.lower())
    return isinstance(value, int | float) and not isinstance(value, bool)


def _more_than_text(kind: str) -> bool:
    return any(word in kind for word in ("int", "float", "bool", "dict", "Dict", "Config"))


def _from_text(text: str) -> Any:
    """As YAML reads it; a number in the form 1e-4, which YAML takes for text, as a number."""
    if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text):
        return float(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
