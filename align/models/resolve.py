"""The base model of a configuration: its folder, made or found, and the renderer of its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from align.config.schema import RunConfig
from align.models.chat_template import asked_template, bare, dressed
from align.models.fingerprint import base_fingerprint
from align.models.from_scratch import make_blank
from align.models.location import model_folder
from align.models.tokenizer import open_tokenizer
from data_prep.core.errors import UserError

if TYPE_CHECKING:
    from align.models.shared_base import BaseIdentity
    from data_prep.rendering.renderer import Renderer


def find_base(config: RunConfig, folder: Path, weights: bool = True) -> Path:
    """The folder of a run's base: the one it names, or a fresh one made in `folder`/blank.

    Args:
        weights: False makes a fresh base without them, only to be looked at.

    Raises:
        UserError: no model is given, or there is none where it is said to be.
    """
    model = config.model
    if model.init == "random":
        if model.template:
            raise UserError("a fresh model has model.tokenizer.template", field="model.template", code="not_used")
        return make_blank(model, config.stages[0].data, config.seed, folder / "blank", weights)
    if model.init is not None:
        raise UserError(f"unknown init '{model.init}' (choices: random)", field="model.init")
    if not model.path:
        raise UserError("no model is given", field="model.path", hint="set model=hf model.path=FOLDER")
    found = model_folder(model.path, model.revision)
    return dressed(found, asked_template(model.template, found)) if model.template else found


def base_identity(config: RunConfig, folder: Path) -> BaseIdentity:
    """What records call a run's base, the folder of which is `folder`."""
    from align.models.shared_base import BaseIdentity

    path = config.model.path
    if config.model.init == "random":
        name = f"random:{config.seed}"
    else:
        assert path is not None
        name = str(bare(folder)) if Path(path).expanduser().exists() else path
    return BaseIdentity(name, config.model.revision, base_fingerprint(folder))


def open_renderer(folder: Path) -> Renderer:
    """What renders rows with the tokenizer and chat template of a model folder."""
    from data_prep.rendering.renderer import Renderer

    return Renderer(open_tokenizer(folder))
