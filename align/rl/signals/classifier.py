"""Signal "classifier": a stock sequence-classification model, read through its own tokenizer and chat template.

Its base, tokenizer and template may be others than the policy's: a conversation's texts are rendered anew, as
`apply_chat_template` does. Scores are those of its own forward pass, checked against it in the tests. Costs a second
model in memory, frozen, and one forward pass, in batches of replies of like length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from align.checkpoints.resolve import is_classifier
from align.models.fingerprint import base_fingerprint, context_length, read_model_config
from align.models.location import model_folder
from align.models.tokenizer import open_tokenizer
from align.rl.signals.base import Normalise, Said, Scorer, Site, Source, Verdict, failed, kinds
from data_prep.core.errors import UserError, unknown
from data_prep.core.hashing import sha256_json
from data_prep.core.options import option
from data_prep.rendering.digests import tokenizer_digest

if TYPE_CHECKING:
    from data_prep.options import DataOptions


class Precision(Enum):
    """Precision at which its weights are kept."""

    fp32 = "fp32"
    bf16 = "bf16"


@kinds.register("classifier")
@dataclass
class Classifier(Source):
    """Scores replies by the logit of a stock classifier."""

    usual: ClassVar[Normalise] = Normalise.start

    classifier: str = option("", "stock sequence-classification model: a folder, or a hub id org/name")
    label: str | None = option(None, "label whose logit is the score, by name or number, where it has several")
    template: str | None = option(None, "file with its chat template, where its tokenizer has none")
    load: Precision = option(Precision.fp32, "fp32|bf16: precision of its weights")
    batch_size: int = option(32, "conversations read at a time", low=1)

    def check(self, where: str, data: DataOptions) -> None:
        """The folder is a classifier with a tokenizer, a template, and one label that counts; no weight is read."""
        from align.models.loading import inspect_weights

        folder = self._folder(where)
        self._label(folder, where)
        try:
            _ids(self._tokenizer(folder, where), [{"role": "user", "content": "?"}], "!")
        except _WritingError as problem:
            raise UserError(
                f"the chat template of the classifier cannot write out a conversation ({problem})",
                code="no_template",
                file=str(folder),
                field=where,
                hint=f"name the template that it was trained with: {where}.template=FILE",
            ) from problem
        inspect_weights(folder, _auto())

    def contents(self, data: DataOptions) -> list[str]:
        """Its weights, tokenizer and template."""
        folder = self._folder("")
        template = self._tokenizer(folder, "").chat_template
        return [base_fingerprint(folder), tokenizer_digest(folder), sha256_json(template)]

    def judges(self) -> list[dict[str, str]]:
        """Itself."""
        folder = self._folder("")
        return [{"name": folder.name, "path": str(folder), "fingerprint": base_fingerprint(folder)}]

    def open(self, where: str, site: Site) -> Scorer:
        """The classifier in memory, frozen."""
        import torch

        from align.models.loading import load_weights

        folder = self._folder(where)
        place, tokenizer = self._label(folder, where), self._tokenizer(folder, where)
        dtype = torch.float32 if self.load is Precision.fp32 else torch.bfloat16
        model: Any = load_weights(folder, _auto(), dtype=dtype)[0].to(site.device).eval().requires_grad_(False)
        longest = min(context_length(read_model_config(folder)) or 1 << 30, tokenizer.model_max_length)

        def score(said: Said) -> list[Verdict]:
            rows, who = [], f"the classifier {folder.name}"
            for row, text in zip(said.prompts, said.texts, strict=True):
                try:
                    rows.append(ids := _ids(tokenizer, row.messages, text))
                except _WritingError as problem:
                    raise failed(who, f"cannot write out the reply to {row.id} ({problem})") from problem
                if len(ids) > longest:
                    what = f"reads at most {longest} tokens, prompt and reply of {row.id} are {len(ids)}"
                    raise failed(who, what)
            return [{"score": logits[place]} for logits in logits_of(model, rows, self.batch_size)]

        return score

    def _folder(self, where: str) -> Path:
        try:
            folder = model_folder(self.classifier)
        except UserError as problem:
            hint = problem.hint if problem.code == "missing_model" else "give the path of a downloaded folder"
            raise UserError(problem.message, code=problem.code, field=f"{where}.classifier", hint=hint) from None
        if not is_classifier(folder):
            raise UserError(
                "no sequence-classification model: it has no head for scores",
                code="no_classifier",
                file=str(folder),
                field=where,
                hint="a reward model of a run is named as checkpoint=RUN/reward_model",
            )
        return folder

    def _tokenizer(self, folder: Path, where: str) -> Any:
        """Its tokenizer, with a chat template."""
        tokenizer = open_tokenizer(folder)
        if self.template is not None:
            file = Path(self.template).expanduser()
            if not file.is_file():
                raise UserError(f"no such file: {file}", code="no_template", field=f"{where}.template")
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        if tokenizer.chat_template is None:
            raise UserError(
                "the classifier's tokenizer has no chat template, so conversations cannot be written as it reads them",
                code="no_template",
                file=str(folder),
                field=where,
                hint=f"name the template that it was trained with: {where}.template=FILE",
            )
        return tokenizer

    def _label(self, folder: Path, where: str) -> int:
        """The place of the logit that counts."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        names = {str(config.id2label.get(i, i)): i for i in range(config.num_labels)}
        if self.label is None and config.num_labels == 1:
            return 0
        if self.label is None:
            raise UserError(
                f"the classifier has {config.num_labels} labels, and one number a reply is needed",
                code="several_labels",
                file=str(folder),
                field=where,
                hint=f"name the one that is wanted: {where}.label=NAME (one of {', '.join(names)})",
            )
        numbers = {str(i): i for i in names.values()}
        if self.label not in names and self.label not in numbers:
            problem = unknown("label", self.label, names)
            raise UserError(problem.message, code=problem.code, field=f"{where}.label")
        return names.get(self.label, numbers.get(self.label, 0))


def _auto() -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification


class _WritingError(Exception):
    """Why a chat template does not write out a conversation."""


def _ids(tokenizer: Any, messages: Sequence[dict[str, Any]], reply: str) -> list[int]:
    """A conversation as the classifier reads it.

    Raises:
        _WritingError: its template refuses the conversation, or is none.
    """
    whole = [*messages, {"role": "assistant", "content": reply}]
    try:
        ids: list[int] = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=True)["input_ids"]
    except Exception as problem:  # templates are programs
        raise _WritingError(" ".join(str(problem).split())) from problem
    return ids


def logits_of(model: Any, rows: Sequence[Sequence[int]], batch_size: int) -> list[list[float]]:
    """A stock classifier's logits of each row, [labels] in float32, as it gives them to the row alone.

    Rows of like length are read together, padded behind. A model that reads its score at the last token that is no
    padding is told which that is: where it knows of none, an id that no row of the batch has.
    """
    import torch

    found: dict[int, list[float]] = {}
    own, order = model.config.pad_token_id, sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        used = {token for i in places for token in rows[i]}
        pad = own if own is not None else next(i for i in count() if i not in used)
        model.config.pad_token_id = pad
        width = max(len(rows[i]) for i in places)
        ids_BT = torch.tensor([[*rows[i], *[pad] * (width - len(rows[i]))] for i in places])
        mask_BT = torch.arange(width)[None] < torch.tensor([len(rows[i]) for i in places])[:, None]
        with torch.inference_mode():
            out = model(input_ids=ids_BT.to(model.device), attention_mask=mask_BT.long().to(model.device))
        found |= dict(zip(places, out.logits.float().cpu().tolist(), strict=True))
    model.config.pad_token_id = own
    return [found[i] for i in range(len(rows))]
