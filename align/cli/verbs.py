"""The table of verbs: what each takes and which function does its work."""

from __future__ import annotations

from align.cli.verb import Verb

FORCE = ("--force",)
STRICT = ("--strict",)
"""Any warning ends in exit code 2; what was made stays."""
_DATA = "align.cli.data_options"
VERBS = [
    Verb("run", "[OVERRIDES]", "run a pipeline; the same command again goes on", "align.cli.run:run", True, STRICT),
    Verb("check", "[OVERRIDES]", "say what a run would do and what is wrong", "align.cli.check:check", flags=STRICT),
    Verb("plan", "[OVERRIDES]", "say what memory and time every stage takes", "align.cli.plan:plan"),
    Verb("recommend", "[OVERRIDES]", "say which method to take, and why", "align.cli.recommend:recommend"),
    Verb("eval", "TARGET [OVERRIDES]", "evaluate a checkpoint or a run again", "align.cli.run:evaluate", flags=STRICT),
    Verb("ls", "[KIND]", "list adapters, stages, data, models, recipes, runs and other kinds", "align.cli.show:ls"),
    Verb("show", "[RECIPE] [OVERRIDES]", "print a resolved recipe and where each value is from", "align.cli.show:show"),
    Verb("options", "WORD", "find options by their name or by what they do", "align.cli.options:options"),
    Verb("schema", "", "print the JSON schema of recipes, for editors", "align.cli.options:schema"),
    Verb(
        "completion",
        "SHELL",
        "print a script that completes commands on Tab: bash, zsh or fish",
        "align.cli.completion:completion",
    ),
    Verb("cp", "RECIPE DIR", "copy a recipe to start one's own", "align.cli.copy:cp", flags=("--as=NAME",)),
    Verb("lineage", "TARGET", "print what a checkpoint stands on", "align.cli.show:lineage"),
    Verb(
        "ship",
        "TARGET [OPTIONS]",
        "bring a checkpoint to the tool that shall load it: stock libraries, vLLM, llama.cpp, Ollama, the hub",
        "align.cli.weights:ship",
        flags=FORCE,
        options="align.weights.options:ShipOptions",
    ),
    Verb(
        "merge",
        "TARGET [OPTIONS]",
        "fold a checkpoint into one set of weights",
        "align.cli.weights:merge",
        flags=FORCE,
        options="align.weights.options:MergeOptions",
    ),
    Verb(
        "export",
        "TARGET [OPTIONS]",
        "write a checkpoint as other tools load it",
        "align.cli.weights:export",
        flags=FORCE,
        options="align.weights.options:ExportOptions",
    ),
    Verb(
        "extract",
        "TARGET [OPTIONS]",
        "a full fine-tune, DoRA or IA3 minus its base, as a LoRA",
        "align.cli.weights:extract",
        options="align.weights.options:ExtractOptions",
    ),
    Verb(
        "compress",
        "TARGET [OPTIONS]",
        "lower the rank of an adapter",
        "align.cli.weights:compress",
        flags=FORCE,
        options="align.weights.options:CompressOptions",
    ),
    Verb(
        "chat",
        "TARGET [OPTIONS]",
        "talk to a checkpoint, in the terminal or on a local page",
        "align.cli.chat:chat",
        flags=("--compare", "--web", "--port=PORT"),
        options="align.serving.options:ChatOptions",
    ),
    Verb(
        "label",
        "TARGET [OPTIONS]",
        "compare replies of a run's stages on a local page, and keep the choices",
        "align.cli.label:label",
        flags=("--summary", "--port=PORT"),
        options="align.serving.options:LabelOptions",
    ),
    Verb(
        "serve",
        "TARGET [OPTIONS]",
        "answer programs by OpenAI's protocol: every policy of the runs on one base",
        "align.cli.serve:serve",
        flags=("--token=TOKEN", "--port=PORT"),
        options="align.serving.options:ServeOptions",
    ),
    Verb(
        "combine",
        "TARGET TARGET [OPTIONS]",
        "adapters of several tasks as one",
        "align.cli.weights:combine",
        options="align.weights.options:CombineOptions",
    ),
    Verb("count", "[OVERRIDES]", "count an adapter's parameters on any config.json", "align.cli.weights:count"),
    Verb(
        "data",
        "ACTION FILE [OPTIONS]",
        "look at data, and make files of it: stats, show, dedup, split, convert",
        "",
        actions=(
            Verb("stats", "FILE", "count what is in a file", "align.cli.data:stats", options=f"{_DATA}:StatsOptions"),
            Verb(
                "show",
                "FILE",
                "print rows as the model sees them",
                "align.cli.data:show",
                options=f"{_DATA}:ShowOptions",
            ),
            Verb(
                "dedup",
                "FILE",
                "write the rows without repetitions",
                "align.cli.data:dedup",
                options=f"{_DATA}:DedupOptions",
            ),
            Verb(
                "split",
                "FILE",
                "write rows to train on and to evaluate on",
                "align.cli.data:split",
                options=f"{_DATA}:SplitOptions",
            ),
            Verb(
                "convert",
                "FILE",
                "write the rows in another format",
                "align.cli.data:convert",
                options=f"{_DATA}:ConvertOptions",
            ),
        ),
    ),
    Verb("verify", "TARGET", "check files, hashes and parents of a checkpoint or a run", "align.cli.show:verify"),
]
