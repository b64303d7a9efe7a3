"""`params.yaml`: the real one is the specification's, a bad one is refused in one line that says what is right."""

import os
import random
import re
import runpy
import signal
from collections.abc import Callable
from functools import partial, reduce
from operator import attrgetter, getitem
from pathlib import Path

import pytest
import yaml
from dvc.utils.serialize import load_yaml as load_as_dvc
from pydantic import ValidationError
from support import ROOT

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import Params, load_params
from mnist_pipeline.common.yaml_file import read_sections

REAL = (ROOT / "params.yaml").read_bytes()
LINE_OF_EPOCHS = 1 + REAL[: REAL.index(b"  epochs")].count(b"\n")

LAST_LINE = REAL.count(b"\n")


def written(content: bytes) -> Callable[[Path], object]:
    return partial(Path.write_bytes, data=content)


def changed(key: str, value: str) -> Callable[[Path], object]:
    content = yaml.safe_load(REAL)
    *sections, name = key.split(".")
    reduce(getitem, sections, content)[name] = "VALUE"  # until it is written as a user would: YAML might quote it
    return written(yaml.safe_dump(content).replace("VALUE", value).encode())


def without(key: str) -> Callable[[Path], object]:
    content = yaml.safe_load(REAL)
    *sections, name = key.split(".")
    del reduce(getitem, sections, content)[name]
    return written(yaml.safe_dump(content).encode())


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        load_params(path)
    return str(refused.value)


def bomb(line: str) -> bytes:
    """Return params with a list of ten levels; each names the one before ten times."""
    levels = ["  - &a0 {k: 1}", *(f"  - &a{n} {line.format(', '.join(10 * [f'*a{n - 1}']))}" for n in range(1, 10))]
    return REAL + "\n".join(["bomb:", *levels, ""]).encode()


BAD_FILES = {
    # keys
    "unknown section": (changed("tune", "{}"), ["tune is unknown", "seed, threads, data, model, train"]),
    "unknown key": (
        changed("train.nesterov", "true"),
        ["train.nesterov is unknown", "epochs, batch_size, optimizer"],
    ),
    "unknown nested key": (changed("train.scheduler.power", "2"), ["scheduler.power is unknown", "step_size, gamma"]),
    "key that is no text": (written(REAL + b"no: 2\n"), ["seed, threads, data, model, train"]),
    "key over two lines": (written(REAL + b'"two\\nlines": 2\n'), ["lines", "is unknown", "seed, threads"]),
    "missing seed": (without("seed"), ["seed is missing"]),
    "missing section": (without("report"), ["report is missing"]),
    "missing key": (without("data.mean"), ["data.mean is missing"]),
    "missing nested key": (without("train.scheduler.gamma"), ["train.scheduler.gamma is missing"]),
    "two mistakes": (
        written(REAL.replace(b"\n  epochs:", b"\n  epoch:")),
        ["train.epochs is missing", "train.epoch is unknown", "choose from processes, epochs, "],
    ),
    # types
    "quoted exponent": (changed("train.weight_decay", "'1e-5'"), ["train.weight_decay", "(write 1e-05)"]),
    "exponent for an integer": (changed("report.gallery_size", "1e2"), ["report.gallery_size", "integer", "100.0"]),
    "quoted integer": (changed("train.epochs", "'14'"), ["train.epochs", "valid integer", "'14'", "(write 14)"]),
    "quoted float": (changed("data.std", '"0.3081"'), ["data.std", "valid number", "(write 0.3081)"]),
    "word for a number": (changed("model.dropout", "none"), ["model.dropout", "valid number", "the text 'none'"]),
    "true for an integer": (changed("train.epochs", "true"), ["train.epochs", "valid integer", "is true"]),
    "yes for a number": (changed("train.weight_decay", "yes"), ["train.weight_decay", "valid number", "text 'yes'"]),
    "yes for a truth": (changed("model.bias", "yes"), ["model.bias must be true or false, and is the text 'yes'"]),
    "minutes for an integer": (changed("train.epochs", "1:30"), ["train.epochs", "valid integer", "the text '1:30'"]),
    "float for an integer": (changed("train.batch_size", "129.0"), ["train.batch_size", "valid integer", "129.0"]),
    "fraction for an integer": (changed("seed", "0.5"), ["seed", "valid integer", "0.5"]),
    "nothing for an integer": (changed("threads", ""), ["threads", "valid integer", "is empty"]),
    "null for a word": (
        changed("train.optimizer", "null"),
        ["train.optimizer", "'adam', 'adamw', 'muon' or 'sgd'", "empty"],
    ),
    "list for a number": (changed("train.learning_rate", "[0.1]"), ["train.learning_rate", "valid number", "a list"]),
    "section for a number": (changed("data.mean", "{r: 0.1}"), ["data.mean", "valid number", "a section"]),
    "date for an integer": (changed("seed", "2026-01-01"), ["seed", "valid integer", "2026"]),
    "list for a section": (changed("model", "[0.25]"), ["model must be a section", "is a list"]),
    "number for a section": (changed("evaluate", "1000"), ["evaluate must be a section", "is 1000"]),
    "nothing for a section": (changed("train.scheduler", ""), ["train.scheduler must be a section", "is empty"]),
    # values
    "negative seed": (changed("seed", "-1"), ["seed", "greater than or equal to 0", "-1"]),
    "seed of 33 bits": (changed("seed", str(2**32)), ["seed", "less than 4294967296", "is 4294967296"]),
    "no threads": (changed("threads", "0"), ["threads", "greater than or equal to 1", "is 0"]),
    "too many threads": (changed("threads", "257"), ["threads", "less than or equal to 256", "257"]),
    "no epochs": (changed("train.epochs", "0"), ["train.epochs", "greater than or equal to 1", "is 0"]),
    "empty batches": (changed("evaluate.batch_size", "0"), ["evaluate.batch_size", "greater than or equal to 1"]),
    "negative batches": (changed("train.batch_size", "-129"), ["train.batch_size", "greater than or equal to 1"]),
    "huge batches": (changed("train.batch_size", "1000001"), ["train.batch_size", "less than or equal to 1000000"]),
    "negative split": (changed("data.validation_size", "-1"), ["data.validation_size", "greater than or equal to 0"]),
    "mean of unscaled pixels": (changed("data.mean", "33.3"), ["data.mean", "less than 1", "33.3"]),
    "zero deviation": (changed("data.std", "0.0"), ["data.std", "greater than or equal to 0.001", "0.0"]),
    "deviation of unscaled pixels": (changed("data.std", "78.6"), ["data.std", "less than or equal to 1", "78.6"]),
    "deviation of nothing": (changed("data.std", "1e-300"), ["data.std", "greater than or equal to 0.001", "1e-300"]),
    "dropout of everything": (changed("model.dropout", "1.0"), ["model.dropout", "less than 1", "1.0"]),
    "negative dropout": (changed("model.dropout", "-0.1"), ["model.dropout", "greater than or equal to 0", "-0.1"]),
    "no learning": (changed("train.learning_rate", "0"), ["train.learning_rate", "greater than 0", "is 0"]),
    "negative decay": (changed("train.weight_decay", "-0.1"), ["train.weight_decay", "greater than or equal to 0"]),
    "decay beyond floats": (changed("train.weight_decay", "1e308"), ["train.weight_decay", "equal to 100", "1e+308"]),
    "rate beyond floats": (changed("train.learning_rate", "1e300"), ["train.learning_rate", "equal to 100", "1e+300"]),
    "too few channels": (changed("model.channels", "[6, 10]"), ["model.channels must be a list of 6, and has 2"]),
    "too many channels": (changed("model.channels", "[1,1,1,1,1,1,1]"), ["channels must be a list of 6, and has 7"]),
    "one class": (changed("data.classes", "[Coat]"), ["data.classes must be 2 to 256 different names", "a list"]),
    "two classes of one name": (changed("data.classes", "[Coat, Coat]"), ["data.classes must be", "different names"]),
    "a class with a bar": (changed("data.classes", "[Coat, 'a|b']"), ["data.classes must be", "of letters and digits"]),
    "a class that leads out": (changed("data.classes", "[Coat, ../x]"), ["data.classes must be", "letters and digits"]),
    "a class without a name": (changed("data.classes", "[Coat, '']"), ["data.classes must be", "letters and digits"]),
    "a class that is a truth": (changed("data.classes", "[Coat, true]"), ["data.classes.1 must be a valid string"]),
    "a class of a long name": (changed("data.classes", f"[Coat, {60 * 'a'}]"), ["data.classes.1", "50 characters"]),
    "a number of classes": (changed("data.classes", "10"), ["data.classes must be a valid list, and is 10"]),
    "growing rate": (changed("train.scheduler.gamma", "1.5"), ["train.scheduler.gamma", "less than or equal to 1"]),
    "steps of nothing": (changed("train.scheduler.step_size", "0"), ["train.scheduler.step_size", "equal to 1"]),
    "not a number": (changed("train.learning_rate", ".nan"), ["train.learning_rate", "finite number", "nan"]),
    "infinity": (changed("data.std", ".inf"), ["data.std", "finite number", "inf"]),
    "number beyond floats": (changed("train.learning_rate", "1.0e+999"), ["train.learning_rate", "finite number"]),
    "unknown optimizer": (
        changed("train.optimizer", "lion"),
        ["train.optimizer", "'adam', 'adamw', 'muon' or 'sgd'", "lion"],
    ),
    "optimizer in capitals": (changed("train.optimizer", "Adam"), ["train.optimizer", "'muon' or 'sgd'", "'Adam'"]),
    "unknown dropout kind": (changed("model.dropout_kind", "2d"), ["model.dropout_kind", "'element' or 'channel'"]),
    # long ones
    "long text": (changed("train.optimizer", 40_000 * "a"), ["train.optimizer", "'adam'", "aaa…"]),
    "long key": (written(REAL + 1000 * b"k" + b": 1\n"), ["kkk… is unknown", "seed, threads"]),
    "many keys": (written(REAL + b"".join(b"k%d: 1\n" % each for each in range(1000))), ["k0 is unknown", "seed, th"]),
    "long list": (changed("model.channels", f"[{1000 * '1,'}]"), ["model.channels must be a list of 6"]),
    "number of 5000 hexadecimal digits": (
        changed("seed", "0x" + 5000 * "f"),
        ["line", "cannot be read", "of the type int"],
    ),
    "number of 4000 digits": (changed("seed", 4000 * "1"), ["seed", "less than 4294967296", "111…"]),
    "long file": (written(REAL + 50_000 * b"#"), ["at most 50,000 bytes long"]),
    # files
    "tab": (written(REAL.replace(b"  epochs", b"\tepochs")), [f"line {LINE_OF_EPOCHS} cannot be read", r"'\t'"]),
    "unclosed bracket": (changed("seed", "[0"), ["line", "cannot be read", "']'"]),
    "wrong indentation": (written(REAL.replace(b"  epochs", b" epochs")), ["line", "indented with spaces"]),
    "lost colon": (written(REAL.replace(b"epochs:", b"epochs")), [f"line {LINE_OF_EPOCHS + 1} ", "`key: value`"]),
    "key that stands twice": (written(REAL + b"seed: 1\n"), [f"line {LAST_LINE + 1} ", 'key "seed"', "each key once"]),
    "nested key that stands twice": (
        written(REAL.replace(b"  epochs: 14", b"  epochs: 14\n  epochs: 9")),
        [f"line {LINE_OF_EPOCHS + 1} ", 'duplicate key "epochs"'],
    ),
    "unknown alias": (changed("seed", "*other"), ["line", "alias", "not allowed"]),
    "alias": (written(REAL.replace(b"seed: 0", b"seed: &n 0\nthreads: *n")), ["line 3 ", "anchor", "not allowed"]),
    "bomb of aliases": (written(bomb("[{}]")), ["line", "anchor", "not allowed"]),
    "bomb of merges": (written(bomb("{{<<: [{}]}}")), ["line", "anchor", "not allowed"]),
    "code": (changed("seed", "!!python/object/apply:os.getpid []"), ["line", "cannot be read", "os.getpid"]),
    "word tagged as a truth": (changed("model.bias", "!!bool perhaps"), ["line", "'perhaps' is not of the type bool"]),
    "date that is none": (changed("seed", "2026-13-45"), ["line", "'2026-13-45' is not of the type timestamp"]),
    "number of 5000 digits": (changed("seed", 5000 * "1"), ["line", "111… is not of the type int"]),
    "letter beyond Unicode": (written(REAL + rb'note: "\U00110000"'), [f"line {LAST_LINE + 1} ", "cannot be read"]),
    "other version of YAML": (written(b"%YAML 1.3\n---\n" + REAL), ["line 1 ", "not YAML 1.2"]),
    "deep nesting": (changed("seed", 600 * "[" + 600 * "]"), ["line", "depth"]),
    "two documents": (written(REAL + b"---\nseed: 1\n"), ["line", "another document"]),
    "merge conflict": (written(b"<<<<<<< HEAD\n" + REAL), ["line", "cannot be read"]),
    "empty file": (written(b""), ["must hold sections", "holds empty"]),
    "only a comment": (written(b"# later\n"), ["must hold sections", "holds empty"]),
    "list of sections": (written(b"- train\n- model\n"), ["must hold sections", "holds a list"]),
    "single word": (written(b"train\n"), ["must hold sections", "the text 'train'"]),
    "NUL byte": (written(REAL + b"\0"), [f"line {LAST_LINE + 1} ", "#x0000"]),
    "not UTF-8": (written(REAL + b"# caf\xe9\n"), [f"line {LAST_LINE + 1} ", "save the file as UTF-8"]),
    "UTF-16": (written(REAL.decode().encode("utf-16")), ["line 1 ", "save the file as UTF-8"]),
    "absent file": (lambda path: None, ["is absent", "git checkout"]),
    "directory": (Path.mkdir, ["must be a file"]),
    "pipe": (os.mkfifo, ["must be a file"]),
    "device": (lambda path: path.symlink_to("/dev/zero"), ["must be a file"]),
}


def test_the_real_params_are_the_specifications(params: Params) -> None:
    assert (params.data.mean, params.data.std) == (0.1307, 0.3081)
    assert (params.model.dropout, params.model.parameter_budget) == (0.25, 20_000)
    assert (params.train.epochs, params.train.batch_size) == (14, 129)
    assert (params.train.optimizer, params.train.learning_rate, params.train.weight_decay) == ("adam", 0.001, 1e-4)
    assert (params.train.scheduler.step_size, params.train.scheduler.gamma) == (5, 0.5)
    assert params.data.validation_size == 0  # the specification trains on all 60,000 images


@pytest.mark.parametrize("section", ["data", "model", "train", "train.scheduler", "evaluate", "report", ""])
def test_params_do_not_change_once_loaded(params: Params, section: str) -> None:
    part = attrgetter(section)(params) if section else params
    for key, value in part:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, key, value)


@pytest.mark.parametrize("key", ["train.learning_rate", "train.weight_decay", "data.std"])
def test_a_whole_number_is_a_number(tmp_path: Path, key: str) -> None:
    changed(key, "1")(tmp_path / "params.yaml")
    assert attrgetter(key)(load_params(tmp_path / "params.yaml")) == 1.0


@pytest.mark.parametrize(("spoil", "fragments"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_refused_in_one_line(
    tmp_path: Path, spoil: Callable[[Path], object], fragments: list[str]
) -> None:
    path = tmp_path / "params.yaml"
    spoil(path)
    message = refusal(path)
    assert len(message.splitlines()) == 1
    assert message.startswith(str(path))
    assert len(message) - len(str(path)) < 250
    assert message.isprintable()
    assert [fragment for fragment in fragments if fragment not in message] == []


@pytest.mark.parametrize("word", ["nan", "inf", "-infinity"])
def test_what_would_be_refused_again_is_not_advised(tmp_path: Path, word: str) -> None:
    changed("train.learning_rate", word)(tmp_path / "params.yaml")
    assert "(write" not in refusal(tmp_path / "params.yaml")


def test_a_stage_with_bad_params_ends_with_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changed("train.learning_rate", "low")(tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "stages/train.py"), run_name="__main__")
    message = str(ended.value.code)  # text for a code is printed and becomes 1
    assert message.startswith("error: params.yaml: train.learning_rate")
    assert len(message.splitlines()) == 1
    assert capsys.readouterr() == ("", "")
    assert [path.name for path in tmp_path.rglob("*")] == ["params.yaml"]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in range(1, 10))])
def test_whatever_is_in_the_file_a_refusal_is_one_line_that_names_a_key_or_a_line(tmp_path: Path, seed: int) -> None:
    chance, path = random.Random(seed), tmp_path / "params.yaml"
    keys = "|".join(re.findall(r"^ *(\w+):", REAL.decode(), re.MULTILINE))
    odd = [
        *"\t\n :-[]{}&*!|>'\"%@`#,?~\\\0\r\u2028\ufeffé0123456789eE._x",
        "\n\n",
        "---\n",
        "<<: ",
        "!!int ",
        "&a ",
        "*a",
    ]
    for _ in range(50):
        text = REAL.decode()
        for _ in range(chance.choice([1, 2, 10])):
            start = chance.randrange(len(text))
            text = text[:start] + chance.choice(odd) + text[start + chance.choice([0, 0, 1, 20]) :]
        path.write_text(text, encoding="utf-8", newline="")
        try:
            load_params(path)
        except UserError as refused:
            message = str(refused).removeprefix(str(path))
            assert message.isprintable()
            assert len(message) < 250
            assert re.search(rf", line \d+ |\b({keys})\b", message), message


FORMS = (
    *(
        "010",
        "08",
        "0o10",
        "0o8",
        "0x10",
        "0b11",
        "-010",
        "1_000",
        "1:30",
        "1:30.5",
        "12e03",
        "5.",
        "._",
        "1.2.3",
        "1e",
    ),
    *(
        "1e-3",
        "1E-3",
        "1.0e-3",
        "+1e-03",
        ".1e-2",
        "1e3",
        ".5e3",
        "0.1_1",
        ".inf",
        "-.INF",
        ".nan",
        "2026-01-01",
        "=",
        "<<",
    ),
    *("yes", "no", "on", "off", "y", "n", "True", "TRUE", "tRUE", "false", "~", "null", "NULL", "'1'", '"010"', ""),
)


def test_a_value_is_what_dvc_takes_it_for(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    for form in FORMS:
        path.write_text(f"key: {form}\n", encoding="utf-8")
        try:
            expected = repr(load_as_dvc(path))
        except Exception:
            with pytest.raises(UserError, match="line 1 cannot be read"):
                read_sections(path)
        else:
            assert repr(read_sections(path)) == expected


def test_a_leading_zero_is_decimal(tmp_path: Path) -> None:
    changed("train.epochs", "010")(tmp_path / "params.yaml")
    assert load_params(tmp_path / "params.yaml").train.epochs == 10


def test_numbers_are_names_of_classes_too(tmp_path: Path) -> None:
    changed("data.classes", "[0, 1.5, T-shirt/top, 'Größe 7', St. Bernard]")(tmp_path / "params.yaml")
    assert load_params(tmp_path / "params.yaml").data.classes == ["0", "1.5", "T-shirt/top", "Größe 7", "St. Bernard"]
