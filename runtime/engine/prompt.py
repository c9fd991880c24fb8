"""From messages to token ids: chat template, tokenizer, and one placeholder per visual token.

A message is ``{"role": "user", "content": TEXT}`` or ``{"role": ..., "content": [PART, ...]}`` with parts
``{"type": "text", "text": TEXT}`` and ``{"type": "image"}``, as in Hugging Face chats.

Only the chat template can produce special tokens, so no text can end its own turn and begin another one. The image
placeholder in a text of the caller is refused. Other special tokens in a text (``</s>``, ``<|im_end|>``), and all of
them in the assistant's texts, are escaped: they are tokenized as ordinary characters, even if they begin in one text
and end in the next, or in the template. Special tokens that a package's tokenizer finds only in normalized text
(``"normalized": true``) are an exception.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

from promprune.errors import PackageError, PrompruneError, PromptError, first_line
from promprune.inputs import read_file
from promprune.package.contents import MAX_CONFIG_BYTES
from promprune.package.manifest import CHAT_TEMPLATE_FILE, Manifest
from promprune.runtime.engine.chat_template import FALLBACK_TEMPLATE, ChatTemplate, Message
from promprune.runtime.engine.template import MAX_TEMPLATE_BYTES
from promprune.runtime.engine.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "PromptBuilder",
    "TokenIds",
    "as_messages",
    "read_json",
    "tokenizer_errors",
]

TokenIds = npt.NDArray[np.int64]

# Marks that are inserted in the texts while the template renders them: code points that Unicode never assigns. The two
# marks enclose a special token. The second mark is also inserted after a text that ends with the beginning of a special
# token, and before one that starts with the end of one, because the template may put any text next to it.
_LITERAL: Final = "\ufdd0"
_EDGE: Final = "\ufdd1"
_MARKS: Final = re.compile(f"([{_LITERAL}{_EDGE}])")
_ROLE: Final = re.compile("[A-Za-z_]+")
_SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXPORT_AGAIN: Final = "copy the package again, or export it again"


@dataclass(frozen=True)
class PromptBuilder:
    """Turns messages into token ids. Safe to use from several threads at once.

    Attributes:
        image_token: the placeholder's text.
        image_token_id: its id.
        context_length: positions the language model was made for.
    """

    folder: Path
    image_token: str
    image_token_id: int
    context_length: int

    @classmethod
    def from_package(cls, folder: Path, manifest: Manifest) -> PromptBuilder:
        """Read the tokenizer and the chat template of a package.

        Raises:
            PackageError: one of them cannot be read, or the tokenizer does not have the image placeholder.
        """
        prompts = cls(
            folder=folder,
            image_token=manifest.image.token,
            image_token_id=manifest.image.token_id,
            context_length=manifest.context_length,
        )
        _ = prompts._special_pattern, prompts._special_tokens, prompts._template
        return prompts

    def build(self, messages: Sequence[Message], image_tokens: Sequence[int]) -> TokenIds:
        """Return the token ids of a conversation up to the assistant's next answer, int64 [length].

        Args:
            messages: the conversation.
            image_tokens: number of placeholders of each image part, in order.

        Raises:
            PromptError: a message is malformed, its text contains the placeholder, the template refuses it, or
                images and placeholders do not match.
            PackageError: the tokenizer fails.
        """
        text = self.render(messages)
        ids = self._tokenize(text)
        if not len(ids):
            raise PromptError("the prompt has no tokens", expected="at least one", fix="write a prompt")
        is_image = ids == self.image_token_id
        if int(is_image.sum()) != len(image_tokens):
            raise PromptError(
                f"the prompt has {int(is_image.sum())} image placeholders for {len(image_tokens)} images",
                expected="one per image",
                fix="give one {'type': 'image'} part per image, before or between the texts",
            )
        repeats = np.ones(len(ids), np.int64)
        repeats[is_image] = image_tokens
        return np.repeat(ids, repeats)

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text of a conversation, with one placeholder per image and marks at special tokens in the texts.

        Raises:
            PromptError: a message is malformed, its text contains the placeholder, or the template refuses it.
        """
        from jinja2 import TemplateError

        try:
            return self._template.render([self._check_message(message) for message in messages])
        except PrompruneError:
            raise
        except TemplateError as error:
            raise PromptError(f"the chat template refuses the messages ({error})", fix="change the messages") from error
        except Exception as error:  # any error of the Python code that jinja compiled from the template
            raise PromptError(
                f"the chat template fails on these messages ({type(error).__name__}: {error})",
                fix="change the messages, or the package's chat template",
            ) from error

    def check_fits(self, prompt_tokens: int, new_tokens: int | None, *, at_most: int) -> int:
        """Return how many tokens may be generated after a prompt.

        Args:
            prompt_tokens: length of the prompt, including images.
            new_tokens: requested number; None for as many as fit into the context, at most ``at_most``.
            at_most: see ``new_tokens``.

        Raises:
            PromptError: the prompt, or the prompt and the answer, do not fit the context.
        """
        left = self.context_length - prompt_tokens
        if left < 1 or (new_tokens is not None and new_tokens > left):
            asked = f" and max_new_tokens is {new_tokens}" if new_tokens is not None and left >= 1 else ""
            raise PromptError(
                f"the prompt is {prompt_tokens} tokens long{asked}",
                expected=f"at most {self.context_length} tokens in all ({max(left, 0)} are left for the answer)",
                fix="shorten the prompt, use fewer images, or ask for fewer new tokens",
            )
        return min(left, at_most) if new_tokens is None else new_tokens

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The package's tokenizer.

        Raises:
            PackageError: it cannot be read, or does not have the image placeholder.
        """
        path = self.folder / "tokenizer.json"
        with tokenizer_errors(f"{path} is not a usable tokenizer"):
            tokenizer = read_tokenizer(path)
            tokenizer.no_truncation()
            tokenizer.no_padding()
        if tokenizer.token_to_id(self.image_token) != self.image_token_id:
            raise PackageError(
                f"{path} gives {self.image_token!r} the id {tokenizer.token_to_id(self.image_token)}",
                expected=f"{self.image_token_id}, the id in the manifest",
                fix=_EXPORT_AGAIN,
            )
        return tokenizer

    @cached_property
    def _template(self) -> ChatTemplate:
        template = ChatTemplate(self._template_source(), self.image_token, self._special_tokens)
        try:
            _ = template.compiled
        except Exception as error:  # errors of jinja, and of Python when it compiles jinja's output
            reason = f"{type(error).__name__}: {error}"
            raise PackageError(f"{self.folder} has a broken chat template ({reason})", fix=_EXPORT_AGAIN) from error
        return template

    def _template_source(self) -> str:
        path = self.folder / CHAT_TEMPLATE_FILE
        if path.exists():
            try:
                return read_file(path, most_bytes=MAX_TEMPLATE_BYTES).decode()
            except (OSError, UnicodeDecodeError) as error:
                raise PackageError(f"{path} cannot be read ({error})", fix=_EXPORT_AGAIN) from error
        template = self._tokenizer_config.get("chat_template")
        if isinstance(template, list):  # several named templates
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if isinstance(template, str) and len(template) > MAX_TEMPLATE_BYTES:
            raise PackageError(
                f"the chat template of {self.folder} has {len(template)} characters",
                expected=f"at most {MAX_TEMPLATE_BYTES}",
                fix=_EXPORT_AGAIN,
            )
        return template if isinstance(template, str) else FALLBACK_TEMPLATE

    @cached_property
    def _tokenizer_config(self) -> dict[str, Any]:
        return read_json(self.folder / "tokenizer_config.json")

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in _SPECIAL_TOKENS:
            token = self._tokenizer_config.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[name] = token
        return found

    def _tokenize(self, text: str) -> TokenIds:
        """Tokenize a rendered prompt; if the template wrote the beginning-of-sequence token, no second one is added."""
        bos = self._special_tokens.get("bos_token")
        add_special_tokens = not (bos and text.startswith(bos))
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"the prompt cannot be tokenized ({error})", expected="valid Unicode text") from error
        ids: list[int] = []
        with tokenizer_errors("the package's tokenizer fails on the prompt"):
            for number, (piece, is_literal) in enumerate(self._split_at_special_tokens(text)):
                if is_literal:
                    ids += self._encode_literally(piece)
                elif piece or number == 0:
                    with_special_tokens = add_special_tokens and number == 0
                    ids += self.tokenizer.encode(piece, add_special_tokens=with_special_tokens).ids
        return np.array(ids, np.int64)

    def _split_at_special_tokens(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yield the pieces of a rendered prompt, without marks, and whether a piece is a special token to escape.

        The first piece is never one. Special tokens of the template have no mark before or inside them.
        """
        *texts_and_marks, last = _MARKS.split(text)
        texts, marks = texts_and_marks[::2], texts_and_marks[1::2]
        plain = "".join([*texts, last])
        places = list(accumulate(map(len, texts)))  # positions of the marks in the plain text
        literal = {place for place, mark in zip(places, marks, strict=True) if mark == _LITERAL}
        edges = {place for place, mark in zip(places, marks, strict=True) if mark == _EDGE}
        done = 0
        for match in self._special_pattern.finditer(plain):
            begin, end = match.span()
            between = begin in literal and end in edges  # both marks are needed: the template may have removed one
            if between or bisect_right(places, begin) < bisect_left(places, end):
                yield plain[done:begin], False
                yield match[0], True
                done = end
        yield plain[done:], False

    def _encode_literally(self, text: str) -> list[int]:
        """Return ordinary tokens for a special token; for its parts, if it is also an ordinary token."""
        ids: list[int] = self._literal_tokenizer.encode(text, add_special_tokens=False).ids
        if len(text) > 1 and not self._special_ids.isdisjoint(ids):
            return self._encode_literally(text[:1]) + self._encode_literally(text[1:])
        return ids

    @cached_property
    def _literal_tokenizer(self) -> Tokenizer:
        """A copy of the tokenizer that encodes special tokens and the image placeholder as ordinary characters."""
        from tokenizers import AddedToken

        tokenizer = type(self.tokenizer).from_str(self.tokenizer.to_str())
        # In some packages the placeholder is an ordinary token.
        tokenizer.add_special_tokens([AddedToken(self.image_token, special=True)])
        tokenizer.encode_special_tokens = True
        return tokenizer

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        ids = map(self.tokenizer.token_to_id, self._special_texts)
        return frozenset(token for token in ids if token is not None)

    @cached_property
    def _special_texts(self) -> list[str]:
        """The special tokens and the image placeholder, sorted."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        return sorted({self.image_token, *(token.content for token in added if token.special and token.content)})

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        """Matches special tokens, the longest first."""
        return re.compile("|".join(map(re.escape, sorted(self._special_texts, key=len, reverse=True))))

    @cached_property
    def _special_heads_and_tails(self) -> tuple[frozenset[str], frozenset[str]]:
        """Proper prefixes of special tokens, and their proper suffixes."""
        cuts = [(text[:place], text[place:]) for text in self._special_texts for place in range(1, len(text))]
        return frozenset(head for head, _ in cuts), frozenset(tail for _, tail in cuts)

    def _check_message(self, message: Message) -> dict[str, Any]:
        """Return a checked copy of a message, with its content as a list of parts."""
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            _refuse_message(message, "a mapping with 'role' and 'content'")
        role, content = str(message["role"]), message.get("content")
        if not _ROLE.fullmatch(role):
            raise PromptError(
                f"received a message with the role {role[:100]!r}",
                expected="letters and underscores, as in 'user', 'assistant' or 'system'",
            )
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, Sequence) or isinstance(content, (str, bytes)):
            _refuse_message(message, "content that is a text, or a list of parts")
        return {"role": role, "content": [self._check_part(part, role) for part in content]}

    def _check_part(self, part: object, role: str) -> dict[str, str]:
        if isinstance(part, Mapping) and part.get("type") == "image":
            return {"type": "image"}
        if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            _refuse_message(part, "{'type': 'image'}, or {'type': 'text', 'text': ...}")
        text = _MARKS.sub("", str(part["text"]))
        if self.image_token in text and role != "assistant":  # the user cannot change what the model said
            raise PromptError(
                f"the text contains {self.image_token!r}, which stands for an image",
                expected="text without it",
                fix="remove it (images come before the text), or use {'type': 'image'} parts for other positions",
            )
        return {"type": "text", "text": self._mark_special_tokens(text)}

    def _mark_special_tokens(self, text: str) -> str:
        """Mark text that is, or may become, a special token. Marks go inside outer spaces: templates may trim those."""
        content = text.strip()
        if not content:
            return text
        heads, tails = self._special_heads_and_tails
        lengths = range(1, min(len(content), max(map(len, self._special_texts))) + 1)
        before = _EDGE if any(content[:length] in tails for length in lengths) else ""
        after = _EDGE if any(content[-length:] in heads for length in lengths) else ""
        marked = self._special_pattern.sub(rf"{_LITERAL}\g<0>{_EDGE}", content)
        return text.replace(content, f"{before}{marked}{after}", 1)


def as_messages(prompt: str | Sequence[Message], num_images: int) -> list[Message]:
    """Return the messages of a prompt; a text becomes one user message, after the images.

    Raises:
        PromptError: it is neither a text nor a non-empty list of messages.
    """
    if isinstance(prompt, str):
        images: list[dict[str, str]] = [{"type": "image"}] * num_images
        return [{"role": "user", "content": [*images, {"type": "text", "text": prompt}]}]
    if not isinstance(prompt, (list, tuple)) or not prompt:
        raise PromptError(
            f"received a prompt of type {type(prompt).__name__}", expected="a text, or a list of one message or more"
        )
    return list(prompt)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a package; empty if the file does not exist.

    Raises:
        PackageError: it is not a JSON object.
    """
    if not os.path.lexists(path):
        return {}
    try:
        content = json.loads(read_file(path, most_bytes=MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise PackageError(f"{path} cannot be read ({error})", fix=_EXPORT_AGAIN) from error
    if not isinstance(content, dict):
        raise PackageError(f"{path} contains a {type(content).__name__}", expected="a JSON object", fix=_EXPORT_AGAIN)
    return content


@contextmanager
def tokenizer_errors(received: str) -> Iterator[None]:
    """Turn every error of a tokenizer into a PackageError.

    The library raises bare Exceptions, and its panics are BaseExceptions.
    """
    try:
        yield
    except (PrompruneError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise PackageError(f"{received} ({first_line(error)})", fix=_EXPORT_AGAIN) from error


def _refuse_message(received: object, expected: str) -> NoReturn:
    raise PromptError(f"received the message {str(received)[:100]!r}", expected=expected)
