"""`params.yaml`: the real one is the specification's, a bad one is refused in one line that says what is right."""

import runpy
import signal
from collections.abc import Callable
from functools import partial, reduce
from operator import attrgetter, getitem
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from support import ROOT

from mnist_pipeline.common.errors import UserError
from mnist_pipeline.common.params import Params, load_params

REAL = (ROOT / "params.yaml").read_bytes()
LINE_OF_EPOCHS = 1 + REAL[: REAL.index(b"  epochs")].count(b"\n")


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


BAD_FILES = {
    # keys
    "unknown section": (changed("tune", "{}"), ["tune is unknown", "seed, threads, data, model, train"]),
    "unknown key": (
        changed("train.momentum", "0.9"),
        ["train.momentum is unknown", "epochs, batch_size, precision, optimizer"],
    ),
    "unknown nested key": (changed("train.scheduler.power", "2"), ["scheduler.power is unknown", "step_size, gamma"]),
    "key that is no text": (written(REAL + b"no: 2\n"), ["seed, threads, data, model, train"]),
    "key over two lines": (written(REAL + b'"two\\nlines": 2\n'), ["lines", "is unknown", "seed, threads"]),
    "missing seed": (without("seed"), ["seed is missing"]),
    "missing section": (without("report"), ["report is missing"]),
    "missing key": (without("data.mean"), ["data.mean is missing"]),
    "missing nested key": (without("train.scheduler.gamma"), ["train.scheduler.gamma is missing"]),
    "two mistakes": (
        written(REAL.replace(b"epochs:", b"epoch:")),
        ["train.epochs is missing", "train.epoch is unknown", "choose from processes, epochs, "],
    ),
    # types
    "quoted exponent": (changed("train.weight_decay", "'1e-5'"), ["train.weight_decay", "(write 0.00001)"]),
    "exponent for an integer": (changed("report.gallery_size", "1e2"), ["report.gallery_size", "integer", "100.0"]),
    "quoted integer": (changed("train.epochs", "'14'"), ["train.epochs", "valid integer", "'14'", "(write 14)"]),
    "quoted float": (changed("data.std", '"0.3081"'), ["data.std", "valid number", "(write 0.3081)"]),
    "word for a number": (changed("model.dropout", "none"), ["model.dropout", "valid number", "the text 'none'"]),
    "true for an integer": (changed("train.epochs", "true"), ["train.epochs", "valid integer", "is true"]),
    "yes for a number": (changed("train.weight_decay", "yes"), ["train.weight_decay", "valid number", "is true"]),
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
    "zero deviation": (changed("data.std", "0.0"), ["data.std", "greater than 0", "0.0"]),
    "dropout of everything": (changed("model.dropout", "1.0"), ["model.dropout", "less than 1", "1.0"]),
    "negative dropout": (changed("model.dropout", "-0.1"), ["model.dropout", "greater than or equal to 0", "-0.1"]),
    "no learning": (changed("train.learning_rate", "0"), ["train.learning_rate", "greater than 0", "is 0"]),
    "negative decay": (changed("train.weight_decay", "-0.1"), ["train.weight_decay", "greater than or equal to 0"]),
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
    # files
    "tab": (written(REAL.replace(b"  epochs", b"\tepochs")), [f"line {LINE_OF_EPOCHS}", "not YAML", r"'\t'"]),
    "unclosed bracket": (changed("seed", "[0"), ["line", "not YAML", "']'"]),
    "wrong indentation": (written(REAL.replace(b"  epochs", b" epochs")), ["line", "not YAML"]),
    "lost colon": (written(REAL.replace(b"epochs:", b"epochs")), ["line", "not YAML"]),
    "unknown alias": (changed("seed", "*other"), ["line", "not YAML", "'other'"]),
    "code": (changed("seed", "!!python/object/apply:os.getpid []"), ["line", "not YAML", "os.getpid"]),
    "word tagged as a truth": (changed("seed", "!!bool perhaps"), ["not YAML"]),
    "date that is none": (changed("seed", "2026-13-45"), ["not YAML"]),
    "number of 5000 digits": (changed("seed", 5000 * "1"), ["not YAML"]),
    "deep nesting": (changed("seed", 600 * "[" + 600 * "]"), ["not YAML"]),
    "two documents": (written(REAL + b"---\nseed: 1\n"), ["line", "not YAML", "another document"]),
    "merge conflict": (written(b"<<<<<<< HEAD\n" + REAL), ["line", "not YAML"]),
    "empty file": (written(b""), ["must hold sections", "holds empty"]),
    "only a comment": (written(b"# later\n"), ["must hold sections", "holds empty"]),
    "list of sections": (written(b"- train\n- model\n"), ["must hold sections", "holds a list"]),
    "single word": (written(b"train\n"), ["must hold sections", "the text 'train'"]),
    "NUL byte": (written(REAL + b"\0"), ["not YAML", "#x0000"]),
    "not UTF-8": (written(REAL + b"# caf\xe9\n"), ["cannot be read", "utf-8", "0xe9"]),
    "UTF-16": (written(REAL.decode().encode("utf-16")), ["cannot be read", "utf-8"]),
    "absent file": (lambda path: None, ["is absent", "git checkout"]),
    "directory": (Path.mkdir, ["cannot be read", "directory"]),
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


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001", "+1e-03", ".1e-2"])
def test_a_number_is_what_dvc_takes_it_for(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(
        REAL.decode().replace("learning_rate: 0.001", f"learning_rate: {text}"),
        encoding="utf-8",
    )
    assert load_params(path).train.learning_rate == 0.001
