"""The form of messages that a chat template takes: content as a list of parts, or as one text.

Most templates take the content of a message as a list of parts. Some take a text only: they fail on a list, print it as
Python does, or write no placeholder for its images. They get one text, with a placeholder for every image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal

from promprune.errors import PromptError, UnsupportedModelError
from promprune.runtime.engine.template import OverBudgetError, compile_template, rendering

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["FALLBACK_TEMPLATE", "ChatTemplate", "Message"]

Message = Mapping[str, Any]

# For models without a chat template: the format that LLaVA-1.5 was trained with.
FALLBACK_TEMPLATE: Final = """\
{% for message in messages %}
{{- message.role.upper() + ': ' }}
{%- for part in message.content if part.type == 'image' %}{{ image_token + '\n' }}{% endfor %}
{%- for part in message.content if part.type == 'text' %}{{ part.text + ' ' }}{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

_PROBE: Final = "promprune probe"  # a text that no template contains
_MAX_RENDERED_CHARACTERS: Final = 8_000_000


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, compiled.

    Attributes:
        source: in jinja.
        image_token: text of the image placeholder.
        special_tokens: name -> text, such as ``bos_token``.

    Raises:
        Exception: of jinja, or of Python when it compiles jinja's output; on use.
    """

    source: str
    image_token: str
    special_tokens: Mapping[str, str]

    @cached_property
    def compiled(self) -> Template:
        """The template."""
        return compile_template(self.source)

    @cached_property
    def _content(self) -> Literal["parts", "text"]:
        """The form in which it takes the content of a message; found within the budget of the first rendering."""
        return "text" if self._failure("parts") and not self._failure("text") else "parts"

    def refuse_unusable(self) -> None:
        """Refuse a template that cannot render a question about one image.

        Raises:
            UnsupportedModelError: it fails, or does not write the text and one placeholder.
        """
        try:
            with rendering():
                failure = self._failure(self._content)
        except (OverBudgetError, PromptError) as error:
            failure = str(error)
        if failure:
            raise UnsupportedModelError(
                f"the chat template of this model cannot render a question about one image ({failure})",
                expected=f"the question and one {self.image_token!r}, from a list of parts or from a text",
                fix="correct chat_template.jinja, chat_template.json or tokenizer_config.json",
            )

    def arrange(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Return messages whose content is a list of parts, with their content in the form that the template takes."""
        with rendering():
            return self._arrange(messages)

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text of messages, whose content is a list of parts, up to the assistant's next answer.

        Raises:
            PromptError: it is too long.
            Exception: of jinja, or any error of the Python code that jinja compiled from the template.
        """
        with rendering():
            return self._render(self._arrange(messages))

    def _arrange(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        if self._content == "parts":
            return [dict(message) for message in messages]
        return [{**message, "content": self._as_text(message["content"])} for message in messages]

    def _render(self, messages: Sequence[Message]) -> str:
        values = {
            "messages": messages,
            "add_generation_prompt": True,
            "image_token": self.image_token,
            "tools": None,
            "documents": None,
            **self.special_tokens,
        }
        return _concatenate(self.compiled.generate(values))

    def _failure(self, content: Literal["parts", "text"]) -> str:
        """Say why a question about one image cannot be rendered with its content in this form; empty if it can.

        Raises:
            OverBudgetError, PromptError: it takes too long, or makes too much text.
        """
        parts = [{"type": "image"}, {"type": "text", "text": _PROBE}]
        try:
            text = self._render([{"role": "user", "content": parts if content == "parts" else self._as_text(parts)}])
        except (OverBudgetError, PromptError):
            raise
        except Exception as error:  # any error of the Python code that jinja compiled from the template
            return f"{type(error).__name__}: {error}"
        if _PROBE not in text or repr(_PROBE) in text:
            return "it does not write the text"
        count = text.count(self.image_token)
        return "" if count == 1 else f"it writes {count} image placeholders for 1 image"

    def _as_text(self, parts: Sequence[Mapping[str, str]]) -> str:
        return "\n".join(self.image_token if part["type"] == "image" else part["text"] for part in parts)


def _concatenate(parts: Iterator[str]) -> str:
    """Concatenate the output of a template, and refuse a text that is too long."""
    taken: list[str] = []
    length = 0
    for part in parts:
        taken.append(part)
        length += len(part)
        if length > _MAX_RENDERED_CHARACTERS:
            raise PromptError(f"the prompt is longer than {_MAX_RENDERED_CHARACTERS} characters", fix="shorten it")
    return "".join(taken)
