"""What a server answers for: every policy of its targets by name, on one base in memory, and their reward models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from align.checkpoints.checkpoint import RECORD, Checkpoint
from align.checkpoints.compatibility import adapter_of
from align.checkpoints.resolve import resolve_target
from align.config.schema import Load
from align.inference.mixed_batch import Mixed
from align.models.low_rank import LowRankTerms
from align.roles import Role
from align.run_record import RunRecord, is_run
from align.serving.conversation import Panel, context_of
from align.serving.options import ChatOptions, ServeOptions, find_policy, label_of
from data_prep.core.errors import UserError, unknown


@dataclass(frozen=True)
class Model:
    """A policy, or the base."""

    name: str
    """What it is called first: its stage, or `base`."""
    label: str
    """RUN/STAGE, a folder, or the base's folder."""
    adapter: str | None
    """Its name in the mixed batch; None is the base."""
    context: int
    judge: str | None
    """The digest of its chain's reward model."""
    roles: tuple[Checkpoint, ...] = ()
    """The policy and the reward model, whose adapters say which features a request needs."""


def speakers_of(target: str, out: str) -> tuple[list[Checkpoint | Path], list[str]]:
    """The policies that TARGET names, a run's last one first, and what must be said about the choice."""
    found, notes = find_policy(target, out)
    if isinstance(found, Path) or found.foreign or not is_run(folder := resolve_target(target, out)):
        return [found], notes
    run = RunRecord.open(folder)
    made = [Checkpoint.open(run.at(entry)) for entry in reversed(run.finished(RECORD))]
    return [one for one in made if one.role == "policy"], notes


class Served:
    """The models of a server.

    Args:
        speakers: policies, or folders of plain models, the main one first.
        options: `reward` and `base` are read.

    Raises:
        UserError: files, parents, base, tokenizer or template do not fit, or they stand on several bases.
    """

    def __init__(self, speakers: Sequence[Checkpoint | Path], options: ServeOptions) -> None:
        panels = _panels(speakers, ChatOptions(reward=options.reward, base=options.base))
        self.renderer, self.bases = panels[0].renderer, panels[0].bases
        self.models: dict[str, Model] = {}
        """Every name that requests may use: stages of the first TARGET that has one, and RUN/STAGE."""
        self.judges: dict[str, tuple[Checkpoint, Role]] = {}
        """Digest -> reward model."""
        self.mixed = self._mixed(panels)
        for panel in panels:
            self._name(panel)

    def find(self, name: str) -> Model:
        """The model of a name.

        Raises:
            UserError: there is none; the nearest is named.
        """
        if name not in self.models:
            raise unknown("model", name, self.models)
        return self.models[name]

    @property
    def vocabulary(self) -> int:
        """How many ids the models know."""
        return int(self.mixed.role.tree.config.get_text_config().vocab_size)

    def _mixed(self, panels: Sequence[Panel]) -> Mixed:
        """All policies over one base: those with low-rank terms in one tree, the others in trees of their own."""
        main = panels[0].load_of(None)
        terms: dict[str, Sequence[LowRankTerms]] = {}
        apart: dict[str, Role] = {}
        for panel in panels:
            for stage, one in panel.chain:
                if one is None or one.digest in terms or one.digest in apart:
                    continue
                load = panel.load_of(one)
                low_rank = adapter_of(one).traits.low_rank and not one.record.get("derived_base")
                if low_rank and load is main:
                    terms[one.digest] = self.bases.terms(one, load)
                else:
                    apart[one.digest] = self.bases.realise(one, stage, load)
        return Mixed.over(self.bases.root(main), terms, apart)

    def _name(self, panel: Panel) -> None:
        """Give every policy of a lineage its names."""
        judge = panel.judge_checkpoint
        if judge is not None and judge.digest not in self.judges:
            self.judges[judge.digest] = judge, self.bases.realise(judge, "reward", Load(judge.load))
        for stage, one in panel.chain:
            adapter, label = (None, str(panel.bases.folder)) if one is None else (one.digest, label_of(one))
            context = context_of(self.mixed.role_of(adapter).tree)
            roles = tuple(each for each in (one, judge) if each is not None)
            model = Model(stage, label, adapter, context, judge.digest if judge else None, roles)
            for name in (stage, label) if one else (stage,):
                self.models.setdefault(name, model)


def _panels(speakers: Sequence[Checkpoint | Path], options: ChatOptions) -> list[Panel]:
    """The lineages of policies, each policy in one of them, over one base in memory."""
    panels: list[Panel] = []
    for speaker in speakers:
        seen = {one.digest for panel in panels for _, one in panel.chain if one is not None}
        if isinstance(speaker, Checkpoint) and speaker.digest in seen:
            continue
        panel = Panel(speaker, options)
        if panels:
            _put_on_one_base(panels[0], panel)
        panels.append(panel)
    return panels


def _put_on_one_base(first: Panel, other: Panel) -> None:
    """Let a lineage stand on the weights in memory that the first one stands on.

    Raises:
        UserError: it stands on other weights, or has another tokenizer or chat template.
    """
    own: Mapping[str, tuple[str, str]] = {
        "base": (first.bases.identity.fingerprint, other.bases.identity.fingerprint),
        "tokenizer": (first.renderer.tokenizer_digest, other.renderer.tokenizer_digest),
        "chat template": (first.renderer.template_digest, other.renderer.template_digest),
    }
    for what, (ours, theirs) in own.items():
        if ours != theirs:
            raise UserError(
                f"{other.label} has another {what} than {first.label}",
                code="wrong_base",
                hint="serve each from a server of its own: port=0 takes any free one",
            )
    other.bases = first.bases
