"""The prompt for one question about one image, rendered by the checkpoint's chat template."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from promprune.runtime.engine.chat_template import FALLBACK_TEMPLATE, ChatTemplate

__all__ = ["chat_template", "prompt_text", "refuse_unusable_template"]


def chat_template(processor: Any) -> Any:
    """Return the chat template of a processor, or else of its tokenizer; None if neither has one.

    If there are several named templates, return the one for plain conversations.
    """
    for owner in (processor, processor.tokenizer):
        template = getattr(owner, "chat_template", None)
        template = template.get("default") if isinstance(template, dict) else template
        if template:
            return template
    return None


def prompt_text(processor: Any, image_token_id: int, question: str) -> str:
    """Render one question about one image, with one placeholder.

    A model without a chat template gets the prompt of LLaVA-1.5.
    """
    tokenizer, template = processor.tokenizer, chat_template(processor)
    if not template:
        return f"USER: {tokenizer.convert_ids_to_tokens(image_token_id)}\n{question} ASSISTANT:"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = _template(processor, image_token_id).arrange([{"role": "user", "content": content}])
    return str(
        tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, tokenize=False)
    )


def refuse_unusable_template(processor: Any, image_token_id: int) -> None:
    """Refuse a chat template that cannot render a question about one image.

    Raises:
        UnsupportedModelError: it cannot.
    """
    _template(processor, image_token_id).refuse_unusable()


def _template(processor: Any, image_token_id: int) -> ChatTemplate:
    """Return the runtime's view of a chat template: both decide alike which form of messages it takes."""
    tokenizer = processor.tokenizer
    special_tokens = tuple((name, text) for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str))
    source = chat_template(processor) or FALLBACK_TEMPLATE
    return _cached(source, str(tokenizer.convert_ids_to_tokens(image_token_id)), special_tokens)


@lru_cache(maxsize=8)
def _cached(source: str, image_token: str, special_tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
    return ChatTemplate(source, image_token, dict(special_tokens))
