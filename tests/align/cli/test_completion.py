"""`align completion SHELL`, in real shells: what Tab offers, with no program of Python in reach."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from contextlib import redirect_stdout

import pytest

from align.cli.dispatch import main
from tests.tiny_chain import refused

BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="no bash")
TAB = """
PATH=/usr/bin:/bin
python() { exit 9; }
source ./align.bash
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_align
((${#COMPREPLY[@]})) && printf '%s\\n' "${COMPREPLY[@]}"
exit 0
"""


OTHERS = {
    "zsh": """
autoload -Uz compinit && compinit -u -D
source ./align.zsh
PATH=/usr/bin:/bin
python() { exit 9 }
COMP_WORDS=(${(s: :)1}) COMP_CWORD=$((${#COMP_WORDS} - 1))
compgen -o nospace -F _align -- "${COMP_WORDS[-1]}"
""",
    "fish": "source ./align.fish; complete -C $argv[1]",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with some runs and files."""
    folder = tmp_path_factory.mktemp("completion")
    for name in ("quick/sft", "quick/ppo", "other/sft"):
        stage = folder / "runs" / name
        stage.mkdir(parents=True)
        (stage / "checkpoint.json").write_text("{}")
        (stage.parent / "run.json").write_text("{}")
    (folder / "rows.jsonl").write_text("")
    (folder / "deep").mkdir()
    (folder / "deep" / "rows.csv").write_text("")
    return folder


@pytest.fixture(scope="module")
def tab(place):
    """What bash offers for the words of a command, the last of which is being typed, cut as bash cuts them."""
    made = subprocess.run([sys.executable, "-m", "align.cli", "completion", "bash"], capture_output=True, text=True)
    (place / "align.bash").write_text(made.stdout)

    def offered(*words: str) -> list[str]:
        command = [BASH, "--noprofile", "--norc", "-c", TAB, "bash", "align", *words]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout.splitlines()

    return offered


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["sh"], ["ship ", "show "]),
        (["ship", "q"], ["quick "]),
        (["ship", "quick/"], ["quick/ppo ", "quick/sft "]),
        (["ship", "last", "t"], ["to="]),
        (["ship", "last", "to", "=", "o"], ["ollama "]),
        (["ship", "last", "to", "="], ["folder ", "gguf ", "hub ", "ollama ", "vllm "]),
        (["ship", "last", "to=f"], ["folder "]),
        (["ship", "last", "push", "=", ""], ["false ", "true "]),
        (["chat", "last", "--"], ["--compare ", "--config-dir ", "--help ", "--json ", "--port ", "--web "]),
        (["run", "pipeline", "=", "rl"], ["rlhf "]),
        (["run", "adapter", "=", "ver"], ["vera "]),
        (["run", "stages.reward_model.adapter", "=", "ver"], ["vera "]),
        (["run", "stages.pp"], ["stages.ppo."]),
        (["run", "stages.ppo.advantag"], ["stages.ppo.advantage="]),
        (["run", "model.load", "=", "nf4_b"], ["nf4_bf16 "]),
        (["run", "data.preferences.pa"], ["data.preferences.path="]),
        (["run", "data.preferences.path", "=", "ro"], ["rows.jsonl "]),
        (["run", "data.preferences.path", "=", "de"], ["deep/"]),
        (["run", "data.preferences.path", "=", "deep/"], ["deep/rows.csv "]),
        (["run", "row"], ["rows.jsonl "]),
        (["run", "adapter", "=", "vera", "seed", "=", "1", "--st"], ["--strict "]),
        (["data", "sp"], ["split "]),
        (["data", "split", "rows.jsonl", "sha"], ["share="]),
        (["nonsense", "row"], ["rows.jsonl "]),
        (["run", "no_such_thing"], []),
    ],
    ids=" ".join,
)
def test_tab_offers(tab, words, wanted):
    assert tab(*words) == wanted


def test_an_empty_word_is_offered_what_can_stand_there(tab):
    assert {"run ", "chat ", "completion "} <= set(tab(""))
    assert {"adapter=", "adapter.", "stages.", "data=", "seed=", "--json ", "rows.jsonl "} <= set(tab("run", ""))
    assert {"last ", "quick ", "other ", "to="} <= set(tab("ship", ""))
    assert "quick " not in tab("run", "")


@pytest.mark.parametrize("shell", OTHERS)
def test_other_shells_offer_the_same(shell, place):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    with redirect_stdout(io.StringIO()) as script:
        assert main(["completion", shell]) == 0
    (place / f"align.{shell}").write_text(script.getvalue())
    bare = {"zsh": "-f", "fish": "--no-config"}[shell]
    for words, wanted in {
        "align sh": ["ship", "show"],
        "align ship quick/": ["quick/ppo", "quick/sft"],
        "align ship last to=": ["to=folder", "to=gguf", "to=hub", "to=ollama", "to=vllm"],
        "align run adapter=ver": ["adapter=vera"],
        "align run stages.pp": ["stages.ppo."],
        "align run data.preferences.path=deep/": ["data.preferences.path=deep/rows.csv"],
        "align run no_such_thing": [],
    }.items():
        command = [shell, bare, "-c", OTHERS[shell], *([shell] if shell == "zsh" else []), words]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
        offered = [line.strip() for line in done.stdout.splitlines() if line]
        assert (offered, done.stderr) == (wanted, ""), words


def test_another_shell_is_one_line(capfd):
    assert 'completion is for bash, zsh, fish; eval "$(align completion bash)"' in refused(
        main(["completion", "tcsh"]), capfd.readouterr().err
    )
