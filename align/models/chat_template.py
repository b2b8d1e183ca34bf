"""A chat template for a base that has none: `model.template=chatml|plain|PATH`.

The base is dressed: a folder of links to its files, with the template as `chat_template.jinja`. It is what every stage
opens, so the template's digest is in every record as ever. Checkpoints keep the template's text and dress the base
again by themselves. No token is added: a turn ends with the tokenizer's eos (`plain`), or with `<|im_end|>` where the
tokenizer has it (`chatml`).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from align.models.tokenizer import open_tokenizer
from data_prep.core.cache_folder import cache_folder
from data_prep.core.errors import UserError, nearest
from data_prep.core.hashing import sha256_json
from data_prep.rendering.digests import digest_of_template, template_text

TEMPLATE = "chat_template.jinja"
_NEEDS = {"chatml": ("<|im_start|>", "<|im_end|>"), "plain": ()}
"""The templates that come with the package, and the tokens they are written with."""
_FIELD = "model.template"


def asked_template(wanted: str, folder: Path) -> str:
    """The text of the template that `model.template` asks for, fit for the tokenizer in `folder`.

    Raises:
        UserError: no such template or file, or the tokenizer lacks a token that it needs.
    """
    if wanted not in _NEEDS:
        path = Path(wanted).expanduser()
        if not path.is_file():
            near = nearest(wanted, [*_NEEDS])
            hint = f"did you mean {near}?" if near else f"there are {', '.join(_NEEDS)}, or give a file"
            raise UserError(f"no such template: {wanted}", field=_FIELD, code="no_template", hint=hint)
        return path.read_text(encoding="utf-8")
    tokenizer: Any = open_tokenizer(folder)
    lacking = [token for token in _NEEDS[wanted] if token not in tokenizer.get_vocab()]
    if lacking or tokenizer.eos_token is None:
        raise UserError(
            f"'{wanted}' needs {' and '.join(lacking) or 'an end-of-text token'}, which this tokenizer does not have",
            field=_FIELD,
            code="no_template",
            hint="use plain, which needs an end-of-text token alone, or the path of a template of your own",
        )
    text = (Path(__file__).parent / f"{wanted}.jinja").read_text(encoding="utf-8")
    begins = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return "{{- bos_token -}}\n" + text if begins else text


def dressed(folder: Path, text: str) -> Path:
    """`folder` if its chat template is `text`, else a folder of links to its files with that template.

    Raises:
        UserError: the cache cannot be written.
    """
    own = template_text(folder)
    if own is not None and digest_of_template(own) == digest_of_template(text):
        return folder
    files = sorted(path for path in folder.absolute().iterdir() if path.is_file() and path.name != TEMPLATE)
    key = sha256_json([[str(path) for path in files], text])
    place = cache_folder() / "dressed" / key[:32]
    if place.is_dir():
        return place
    staging = place.with_name(f".{place.name}-{os.getpid()}")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        for path in files:
            (staging / path.name).symlink_to(path)
        (staging / TEMPLATE).write_text(text, encoding="utf-8")
        if not place.is_dir():
            staging.rename(place)
    except OSError as error:
        raise UserError(f"cannot keep the model with its template ({error})", field=_FIELD, file=str(place)) from error
    return place


def bare(folder: Path) -> Path:
    """The folder that a dressed one stands for; any other folder as it is."""
    config = folder / "config.json"
    return Path(os.readlink(config)).parent if folder.parent == cache_folder() / "dressed" else folder
