"""The prompt for one question about one image, rendered by the checkpoint's chat template."""

from __future__ import annotations

from typing import Any

__all__ = ["chat_template", "prompt_text"]


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
    messages = [{"role": "user", "content": content}]
    return str(
        tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, tokenize=False)
    )
