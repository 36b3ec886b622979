"""What goes wrong in a command ends it with one line; a bug of ours says that it is."""

import errno
import os
import signal
import sys

import jax
import numpy as np
import pandas as pd
import pytest
from absl import flags
from absl.testing import flagsaver

from configs import base
from tests.train.common import tiny_config
from tests.train.engine.toy import TASKS
from train import cli
from train.analysis import confusion
from train.data.text import pictured, printable
from train.engine import loop
from train.studies import report


def ended(main, monkeypatch, *arguments):
    """The status of the command."""
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    monkeypatch.setattr(cli, "keep_compiled", lambda: None)
    monkeypatch.setattr(cli, "_PATIENCE", 0.0)
    # Other tests may have left threads, and imported commands that require flags.
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(flags.FlagValues, "validate_all_flags", lambda _: None)
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    return end.value.code


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("width is 0"), "width is 0"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "the disk is full: "),
        (OSError("No space left on device"), "the disk is full: "),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "denied: 'a/b'"),
        (ChildProcessError("a worker was killed"), "a worker was killed"),
        (MemoryError(), "out of memory; a smaller batch_size"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB\nlong\nlist"),
            "RESOURCE_EXHAUSTED: 9 GB\n",
        ),
        (ModuleNotFoundError("No module named 'grain'"), "kalman_flax[train]"),
    ],
)
def test_expected_errors_are_one_line(error, line, monkeypatch, capsys):
    assert ended(raising(error), monkeypatch) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and line in said and said.count("\n") == 1


@pytest.mark.parametrize("error", [TypeError("x"), KeyError("y"), AssertionError()])
def test_a_bug_of_ours_says_so(error, monkeypatch, capsys):
    assert ended(raising(error), monkeypatch) == os.EX_SOFTWARE
    said = capsys.readouterr().err
    assert "Traceback" in said and repr(error)[:8] in said
    assert said.splitlines()[-1].startswith("This is a bug in kalman_flax.")


def test_what_a_library_refuses_may_be_a_bug_of_ours(monkeypatch, capsys):
    assert ended(lambda: pd.Series([1]).sum(axis=9), monkeypatch) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "(raised in pandas; --verbosity=1 shows where. If what you gave is" in said


@pytest.mark.parametrize("given, what", [("gs://bucket/a", "a URL"), ("", "is empty")])
@flagsaver.flagsaver
def test_a_data_directory_is_on_this_machine(given, what, monkeypatch, capsys):
    assert ended(print, monkeypatch, f"--data_dir={given}") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: --data_dir is ") and what in said


def test_ctrl_c_is_no_bug(monkeypatch, capsys):
    assert ended(raising(KeyboardInterrupt()), monkeypatch) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("text", ["", ","])
def test_an_empty_list_is_refused(text):
    values = flags.FlagValues()
    flags.DEFINE_list("sizes", ["1"], "", flag_values=values)
    values(["command"])
    cli.check_lists(values)
    values.unparse_flags()
    values(["command", f"--sizes={text}"])
    with pytest.raises(ValueError, match=r"^--sizes is empty; leave it out"):
        cli.check_lists(values)


@pytest.mark.parametrize(
    "url", ["gs://bucket/run", "s3://b", "file:///tmp/x", "hdfs:/a", "gs:/x"]
)
def test_a_url_is_no_directory(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = flags.FlagValues()
    flag = flags.DEFINE_string("output", None, "", flag_values=values)
    values(["command", f"--output={url}"])
    with pytest.raises(ValueError, match=f"^--output is {url}, a URL"):
        cli.path(flag)
    with pytest.raises(ValueError, match=r"^workdir is .*, a URL"):
        loop.train(tiny_config(), url)
    assert not list(tmp_path.iterdir())


CONFIGS = {
    "return foo": "name 'foo' is not defined",
    "return get_config(3)": "takes 0 positional arguments",
    "return {}[7]": "no key 7",
    "return (": "was never closed",
}


@pytest.mark.parametrize("body", CONFIGS)
def test_a_config_that_fails(body, tmp_path, monkeypatch, capsys):
    path = tmp_path / "config.py"
    path.write_text(f"def get_config():\n    {body}\n")
    given = said_of_config(f"{path}", monkeypatch)
    assert CONFIGS[body] in given and "config.py" in given
    assert "Traceback" not in given and given.count("\n") <= 1


@pytest.mark.parametrize(
    "name, key, message",
    [
        ("configs/experiments/digits.py:foo", "", "takes 0 positional arguments but 1"),
        ("configs/experiments", "", "Is a directory"),
        ("", "", "empty string"),
        ("configs/experiments/digits.py", "norm.x=3", "--config.norm.x=3"),
        ("configs/experiments/digits.py", "norm_options=3", "is not a dict"),
    ],
)
def test_a_bad_config_flag(name, key, message, monkeypatch):
    said = said_of_config(name, monkeypatch, *([f"--config.{key}"] if key else []))
    assert message in said and "Traceback" not in said


def said_of_config(name, monkeypatch, *more):
    values, arguments = flags.FlagValues(), ["command", f"--config={name}", *more]
    cli.define_config(flag_values=values, sys_argv=arguments)
    monkeypatch.setattr(flags, "FLAGS", values)
    with pytest.raises(SystemExit) as end:
        cli._parse(arguments)
    return str(end.value.code)


def test_help_lists_the_keys():
    text = base.listing()
    assert all(f"--config.{key}=" in text for key in base.get_config())
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", ["$", "a\nb", "x\0y", "\udcff", "$x_{", "n" * 300])
def test_names_of_classes_that_files_cannot_take(name, tmp_path):
    names, counts = [name, "other"], np.array([[2, 0], [1, 1]])
    confusion.write_csv(tmp_path / "c.csv", counts, names)
    lines = (tmp_path / "c.csv").read_text(encoding="utf-8").splitlines()
    assert lines[1:] == [f"{printable(name)},2,0", "other,1,1"]
    confusion.plot(tmp_path / "c.png", counts, names, "title")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert len(pictured(name)) <= 31


def test_a_task_without_accuracy_is_described():
    (name, task), *_ = TASKS.items()
    summary = {
        "norm": name,
        "headline": f"test_{task.headline}",
        "test_error": 0.01234567,
        **dict.fromkeys(("batch_size", "micro_batch_size", "devices", "steps"), 8),
        "seconds": 0.0,
        "test_images": 5,
    }
    assert report.describe(summary).endswith("test error on 5 examples  0.01235")
    table = report.table([report.Run(summary | {"variant": "a", "seed": 0}, [])])
    assert "| test error " in table and "0.01235" in table and "%" not in table
