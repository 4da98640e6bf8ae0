"""A checkpoint's chat template: messages with roles to the text that the model was fine-tuned to answer.

Decisions: the template is the one that the checkpoint's record or its tokenizer's settings hold, as Jinja in the form of
the transformers library, so that those of other programs work; it is run in a sandbox, since checkpoints are downloaded.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lit_gpt.checkpoints.loaded import LoadedModel
from lit_gpt.data.sft_formats import CHAT_TEMPLATES
from lit_gpt.files import parse_json

if TYPE_CHECKING:
    from jinja2.sandbox import SandboxedEnvironment

RECORD_KEY = "chat_template"
"""Where a run's record says it."""


def find_chat_template(loaded: LoadedModel, name: str | None = None) -> str:
    """The template of a checkpoint, as Jinja.

    Args:
        loaded: the checkpoint.
        name: one of `CHAT_TEMPLATES`; None takes what the checkpoint holds.

    Raises:
        ValueError: it holds none; no such name.
    """
    known = ", ".join(CHAT_TEMPLATES)
    if name is not None:
        if name not in CHAT_TEMPLATES:
            raise ValueError(
                f"--apply_chat_template {name}: choose from {known}, or give no name for the checkpoint's own"
            )
        return CHAT_TEMPLATES[name]
    try:
        settings = parse_json(loaded.tokenizer.contents.get("tokenizer_config.json", b"{}"))
        held = loaded.run_record.get(RECORD_KEY) or settings.get(RECORD_KEY)
    except (ValueError, AttributeError):
        held = None
    if isinstance(held, list):
        # Several, each with a name.
        named = [one for one in held if isinstance(one, dict)]
        held = next((one.get("template") for one in named if one.get("name") == "default"), None)
    if not isinstance(held, str):
        raise ValueError(
            "--apply_chat_template: this checkpoint has no chat template; if it was fine-tuned with one, name that: "
            f"--apply_chat_template {known}"
        )
    return held


def render_chat(
    template: str, messages: Sequence[dict[str, str]], eos_text: str, add_generation_prompt: bool = True
) -> str:
    """The text of some messages.

    Args:
        template: Jinja.
        messages: each with a `role` and a `content`.
        eos_text: how the end token is written; the token that begins a text is not written.
        add_generation_prompt: end where the model's answer begins; else within the last message, to be continued.

    Raises:
        ValueError: the template refuses the messages, or is none.
    """
    values = {"add_generation_prompt": add_generation_prompt, "bos_token": "", "eos_token": eos_text}
    # A downloaded template is a program: what it raises can be anything.
    try:
        text = _environment().from_string(template).render(messages=messages, **values)
        text.encode()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the checkpoint's chat template cannot take these messages: {reason}") from error
    last = messages[-1]["content"].strip() if messages else ""
    if not add_generation_prompt and last in text:
        text = text[: text.rindex(last) + len(last)]
    return text


def _environment() -> SandboxedEnvironment:
    """What the transformers library gives templates: its functions, `break`, `continue` and `generation`."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, around the text that a model is trained on: that text, with a scope of its own."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(reason: str) -> str:
        raise TemplateError(reason)

    def as_json(value: Any, indent: int | None = None) -> str:
        # Jinja's own is for HTML: it writes < as an escape.
        return json.dumps(value, ensure_ascii=False, indent=indent)

    extensions = ["jinja2.ext.loopcontrols", Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = as_json
    return environment
