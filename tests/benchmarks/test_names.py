"""Names on the command lines of benchmarks: a wrong one is a line with the nearest, and exit code 2."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import defaults, methods

HOME = Path(defaults.__file__).parent


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        ("objectives", ["no-run", "--only", "gae,rlo"], "unknown objective 'rlo' (did you mean 'rloo'? choices: best,"),
        ("objectives", ["no-run"], "runs/no-run is no finished run of the whole chain"),
        ("functions", ["--size", "t"], "unknown size 't' (did you mean 'T'?"),
        ("memory", ["lorra", "8", "1", "1", "8"], "unknown method 'lorra' (did you mean 'lora'?"),
        ("benchmarks.defaults", ["sft", "rm", "warmr"], "unknown setting 'warmr' (did you mean 'warmer'?"),
        ("benchmarks.methods", ["nanno"], "unknown measured part 'nanno' (did you mean 'nano'?"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(module, words, said, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(HOME))
    monkeypatch.setattr(sys, "argv", [module, *words])
    monkeypatch.setattr(methods.cli, "main", lambda words: pytest.fail("nothing is to be run"))
    with pytest.raises(SystemExit) as ended:
        import_module(module).main()
    assert ended.value.code == 2 and said in " ".join(capsys.readouterr().err.split())
