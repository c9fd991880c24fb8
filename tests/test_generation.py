"""Choosing tokens, compared with Hugging Face's logits processors; streaming text, compared with decoding all of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from promprune.errors import BackendError, PackageError
from promprune.runtime.engine.config import GenerationConfig
from promprune.runtime.engine.request import Request
from promprune.runtime.engine.sampling import TextStream, TokenChooser, eos_token_ids_of, probabilities_of
from tests.support.fake_package import make_tokenizer


def reference_probabilities(logits: np.ndarray, config: GenerationConfig) -> np.ndarray:
    """Temperature, top-k and top-p as Hugging Face applies them."""
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = torch.tensor(logits, dtype=torch.float64)[None]
    scores = TemperatureLogitsWarper(float(config.temperature))(None, scores)
    if config.top_k:
        scores = TopKLogitsWarper(config.top_k)(None, scores)
    if config.top_p < 1:
        scores = TopPLogitsWarper(config.top_p)(None, scores)
    return torch.softmax(scores, dim=-1)[0].numpy()


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.01, 1),
)
@settings(max_examples=150, deadline=None)
def test_distribution_is_hugging_faces(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(seed).normal(size=50).astype(np.float32) * 4
    logits[::7] = logits[1::7].max()  # ties, at the boundary of top-k too
    config = GenerationConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    found, expected = probabilities_of(logits, config), reference_probabilities(logits, config)
    np.testing.assert_allclose(np.sort(found), np.sort(expected), atol=1e-9)
    tied = np.isin(logits, logits[::7])  # which of equals top-p keeps is left open
    np.testing.assert_allclose(found[~tied], expected[~tied], atol=1e-9)


def nucleus_of_full_sort(probabilities: np.ndarray, top_p: float) -> list[int]:
    """The ids that top-p keeps, from all tokens sorted one by one: most likely first, ties by id."""
    kept, total = [], 0.0
    for token in sorted(range(probabilities.size), key=lambda token: (-probabilities[token], token)):
        if total >= top_p:
            break
        kept.append(token)
        total += probabilities[token]
    return sorted(kept)


@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.sampled_from([1, 255, 256, 257, 2048, 2049, 5000]),
    levels=st.sampled_from([1, 2, 3, 300, 10**9]),  # distinct logits: few levels make many ties
    spread=st.floats(0.01, 20),
    top_p=st.floats(0.01, 0.999),
)
@settings(max_examples=100, deadline=None)
def test_nucleus_is_that_of_a_full_sort(seed: int, vocabulary: int, levels: int, spread: float, top_p: float) -> None:
    random = np.random.default_rng(seed)
    logits = (random.integers(levels, size=vocabulary) * (spread / levels)).astype(np.float32)
    probabilities = probabilities_of(logits, GenerationConfig(temperature=1.0))
    found = probabilities_of(logits, GenerationConfig(temperature=1.0, top_p=top_p))
    kept = nucleus_of_full_sort(probabilities, top_p)
    assert np.flatnonzero(found).tolist() == kept
    np.testing.assert_allclose(found[kept], probabilities[kept] / probabilities[kept].sum(), rtol=1e-12)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_penalty_is_hugging_faces(penalty: float) -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    random = np.random.default_rng(0)
    seen = [3, 7, 7, 20]
    chooser = TokenChooser(GenerationConfig(repetition_penalty=penalty), seen)
    for _ in range(30):
        logits = random.normal(size=40).astype(np.float32)
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), torch.tensor(logits)[None])
        token = chooser.choose(logits)
        assert token == int(expected.argmax())
        seen.append(token)


def test_draws_follow_the_distribution() -> None:
    config = GenerationConfig(temperature=1.0, seed=0)
    chooser = TokenChooser(config)
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    counts = np.bincount([chooser.choose(logits) for _ in range(20_000)], minlength=4)
    np.testing.assert_allclose(counts / 20_000, [0.5, 0.3, 0.15, 0.05], atol=0.015)  # 4 standard errors


def test_seeds_repeat_and_no_seed_does_not() -> None:
    logits = np.zeros(1000, np.float32)

    def draws(seed: int | None) -> list[int]:
        chooser = TokenChooser(GenerationConfig(temperature=1.0, seed=seed))
        return [chooser.choose(logits) for _ in range(8)]

    assert draws(5) == draws(5)
    assert draws(5) != draws(6)
    assert draws(None) != draws(None)


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert TokenChooser(GenerationConfig()).choose(np.array([1, 5, 5, 2], np.float32)) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_numbers_are_refused(bad: float) -> None:
    with pytest.raises(BackendError, match="not finite"):
        TokenChooser(GenerationConfig()).choose(np.array([1, bad], np.float32))


def test_excluded_tokens_are_never_drawn() -> None:
    logits = np.array([0, -np.inf, 1, -np.inf], np.float32)
    chooser = TokenChooser(GenerationConfig(temperature=3.0, seed=1))
    assert {chooser.choose(logits) for _ in range(200)} == {0, 2}


def llama_like_tokenizer() -> Tokenizer:
    """Pieces with the sentencepiece underline, byte fallback, and a stripped leading space."""
    pieces = [*"▁abcdefghijklmnopqrstuvwxyz.,!?é", "▁the", "th", "he", "the", "▁t"]
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    vocabulary |= {piece: 257 + number for number, piece in enumerate(pieces)}
    merges = [("t", "h"), ("h", "e"), ("th", "e"), ("▁", "the"), ("▁", "t")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def wordpiece_tokenizer() -> Tokenizer:
    words = ["[UNK]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


TOKENIZERS = {"bytes": make_tokenizer(), "llama": llama_like_tokenizer(), "wordpiece": wordpiece_tokenizer()}


def streamed(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_streamed_text_is_the_decoded_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text).ids
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\N{REPLACEMENT CHARACTER}" not in text and name != "wordpiece":
        assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, 259), max_size=30))
@settings(max_examples=150, deadline=None)
def test_any_bytes_stream_as_they_decode(ids: list[int]) -> None:
    tokenizer = TOKENIZERS["bytes"]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_of_four_bytes_comes_whole() -> None:
    tokenizer = TOKENIZERS["bytes"]
    assert streamed(tokenizer, tokenizer.encode("a😀b").ids) == ["a", "", "", "", "😀", "b", ""]


def test_an_unfinished_character_is_given_out_at_the_end() -> None:
    tokenizer = TOKENIZERS["bytes"]
    assert streamed(tokenizer, tokenizer.encode("é").ids[:1]) == ["", "\N{REPLACEMENT CHARACTER}"]


@given(text=st.text(alphabet="ab é", max_size=30), stop=st.lists(st.text(alphabet="ab é", min_size=1, max_size=4)))
@settings(max_examples=200, deadline=None)
def test_text_ends_before_the_first_stop_text(text: str, stop: list[str]) -> None:
    tokenizer = TOKENIZERS["bytes"]
    places = [text.find(end) + len(end) for end in stop if end in text]
    found = "".join(streamed(tokenizer, tokenizer.encode(text).ids, tuple(stop)))
    if not places:
        assert found == text
    else:  # the stop text that is complete first decides
        first = min(places)
        assert found == text[: min(first - len(end) for end in stop if text[:first].endswith(end))]


def test_what_could_begin_a_stop_text_is_held_back() -> None:
    tokenizer = TOKENIZERS["bytes"]
    assert streamed(tokenizer, tokenizer.encode("x##y###z").ids, ("###",)) == ["x", "", "", "##y", "", "", "", ""]


def test_a_tokenizer_that_fails_on_the_answer_is_refused() -> None:
    """It panics, which raises a BaseException."""
    tokenizer = make_tokenizer()
    tokenizer.decoder = decoders.Strip("a", 0, 1000)
    with pytest.raises(PackageError, match="tokenizer fails on the answer") as caught:
        streamed(tokenizer, tokenizer.encode("ba").ids)
    assert "\n" not in str(caught.value)


def choose(request: Request, tokens: list[int], vocabulary: int) -> None:
    for token in tokens:
        request.choose_token(np.eye(vocabulary, dtype=np.float32)[token])


@pytest.mark.parametrize(
    ("tokens", "stop", "limit", "reason", "text"),
    [
        ("abc", (), 3, "length", "abc"),
        (["a", 2], (), 9, "stop", "a"),
        ("abc", ("c",), 3, "stop", "ab"),
        (["a", 2], (), 2, "stop", "a"),
    ],
)
def test_requests_say_why_they_ended(tokens: list, stop: tuple, limit: int, reason: str, text: str) -> None:
    tokenizer = TOKENIZERS["bytes"]
    request = Request(
        prompt_ids=np.zeros(0, np.int64),
        is_image=np.zeros(0, np.bool_),
        images=[],
        config=GenerationConfig(stop=stop),
        tokenizer=tokenizer,
        eos_token_ids={2},
        max_new_tokens=limit,
    )
    ids = [tokenizer.encode(token).ids[0] if isinstance(token, str) else token for token in tokens]
    assert request.finish_reason is None
    choose(request, ids, tokenizer.get_vocab_size())
    assert (request.finish_reason, request.text, request.token_ids) == (reason, text, ids)


@pytest.mark.parametrize(
    ("config", "expected"),
    [({}, set()), ({"eos_token_id": 5}, {5}), ({"eos_token_id": [5, 7]}, {5, 7}), ({"eos_token_id": None}, set())],
)
def test_end_of_sequence_ids(config: dict, expected: set) -> None:
    assert eos_token_ids_of(config) == expected
