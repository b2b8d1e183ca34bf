"""How a stage's rows become token ids: the one road for `align run` and `align check`. No weights, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.checkpoints.compatibility import ParentInfo, StagePlan, adapter_of
from align.config.schema import StageSpec
from align.models.fingerprint import context_length
from data_prep.core.errors import UserError, at_row
from data_prep.options import LengthOptions
from data_prep.prepare.arrow_rows import Rows
from data_prep.prepare.prepare import prepare
from data_prep.records.tally import LongRows
from data_prep.types import LabelledTokens, PairTokens, RowKind

if TYPE_CHECKING:
    from align.adapters.base import Adapter
    from data_prep.prepare.prepare import Prepared, Renderer


@dataclass(frozen=True)
class Reading:
    """What turns one stage's data into rows of token ids."""

    spec: StageSpec
    renderer: Renderer
    model_config: dict[str, Any]
    """The content of the base's config.json."""
    context: int | None
    """Longest row in tokens that the stage's roles take, if the model has a limit."""
    seed: int
    standings: Sequence[ParentInfo | None] = ()
    """What the stage's roles stand on."""

    def lengths(self, kind: str) -> LengthOptions:
        """The stage's row-length rules, within the model's context; a prompt leaves room for the reply.

        Raises:
            UserError: there is no room for a prompt.
        """
        stage = self.spec.stage
        longest = min(stage.max_length, self.context or stage.max_length)
        reply = stage.reply_tokens if kind == "prompts" else 0
        if longest <= reply:
            raise UserError(
                f"no room for a prompt: {reply} reply tokens in a context of {longest}",
                code="no_room",
                field=f"stages.{self.spec.name}.max_new_tokens",
                hint=f"lower stages.{self.spec.name}.max_new_tokens",
            )
        return LengthOptions(
            max_length=longest - reply,
            on_long=stage.on_long,
            on_long_answer=stage.on_long_answer,
            keep_prompt=stage.keep_prompt,
            max_lost=stage.max_lost,
        )

    def rows(self, kind: str, on_disk: bool = False) -> Prepared[Any]:
        """The rows of one kind of data (conversations, preferences, unpaired, prompts, text) as the stage reads them.

        Args:
            on_disk: few rows lie in a file as many do.

        Raises:
            UserError: bad rows, too many over-long rows, nothing left, or token ids that the model does not have.
        """
        lengths = self.lengths(kind)
        try:
            prepared = prepare(RowKind[kind], self.spec.data, self.renderer, lengths, self.seed, on_disk)
        except LongRows as problem:
            problem.hint = self.room(problem)
            raise
        self._check_vocabulary(prepared)
        return prepared

    def folder(self, kind: str) -> Path:
        """The same rows in a file, for processes that map it: the folder that `load` opens."""
        rows = self.rows(kind, on_disk=True).train
        assert isinstance(rows, Rows)
        return rows.path.parent

    def room(self, problem: LongRows) -> str:
        """What can be done about rows over a length: raise max_length, unless the model's context is the limit."""
        where = f"stages.{self.spec.name}."
        if self.context is not None and self.spec.stage.max_length >= self.context:
            return f"the model's context of {self.context} is the limit: {problem.ways(where)}"
        limit = f", at most {self.context} (the model's context)" if self.context else ""
        return f"raise {where}max_length (now {self.spec.stage.max_length}{limit}), {problem.ways(where)}"

    def require_fit(self, kind: str, prepared: Prepared[Any]) -> None:
        """The stage can take these rows of a kind: enough of them, with what its options and adapters read of a row.

        Raises:
            UserError: it cannot.
        """
        stage = self.spec.stage
        stage.check_rows(f"stages.{self.spec.name}", kind, len(prepared.train))
        stage.check_contents(kind, chain(prepared.train, prepared.eval), self.spec.data)
        self._check_features(prepared)

    def _check_vocabulary(self, prepared: Prepared[Any]) -> None:
        """Every token id has a row in the model's embedding."""
        size = (self.model_config.get("text_config") or self.model_config).get("vocab_size")
        if size is not None and prepared.highest >= int(size):
            raise UserError(
                f"the tokenizer gives token id {prepared.highest}, the model has {size} tokens",
                code="vocabulary",
                hint="use the tokenizer that belongs to this model",
            )

    def _check_features(self, prepared: Prepared[Any]) -> None:
        """Every row has the features that the adapters of the stage's roles read.

        Raises:
            UserError: the first row that has not.
        """
        readers = [adapter_of(one) for one in self.standings if one is not None]
        readers += [self.spec.adapter] if self.spec.stage.trains else []
        readers = [one for one in readers if one.traits.reads_features]
        for row in chain(prepared.train, prepared.eval) if readers else ():
            for reader in readers:
                if problem := reader.against_features(row.features):
                    hint = "a column of another name: data.conversations.columns={features: COLUMN}"
                    raise at_row(row.id, UserError(problem, field="features", code="bad_features", hint=hint))


def reading_of(plan: StagePlan[Any], model_config: dict[str, Any], renderer: Renderer, seed: int) -> Reading:
    """How a planned stage reads its rows."""
    below = (plan.init, *plan.judges)
    return Reading(plan.spec, renderer, model_config, context_of(model_config, plan.spec.adapter, below), seed, below)


def context_of(
    model_config: dict[str, Any], adapter: Adapter, standings: Sequence[ParentInfo | None] = ()
) -> int | None:
    """Longest row in tokens behind the virtual tokens of a stage's roles, if the model has a limit."""
    limit = context_length(model_config)
    roles = [adapter, *(adapter_of(standing) for standing in standings if standing is not None)]
    return None if limit is None else limit - max(each.virtual_tokens for each in roles)


def ids_of(row: Any) -> list[list[int]]:
    """The sequences of token ids in a prepared row."""
    if isinstance(row, PairTokens):
        return [row.prompt, row.chosen, row.rejected]
    if isinstance(row, LabelledTokens):
        return [row.prompt, row.reply]
    return [row.ids]


def remarks_of(card: dict[str, Any]) -> list[UserError]:
    """What a data card says of columns that are not used, although they grade rows or hold thoughts."""
    cards = [card, *card.get("sources", {}).values()]
    keys = ("code", "hint", "file", "field")
    said = [one for each in cards for one in each.get("left_out", ()) if one["code"] != "left_out"]
    return [UserError(one["message"], **{key: one[key] for key in keys}) for one in said]
