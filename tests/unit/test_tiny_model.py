"""The tiny checkpoint of examples/models: it loads and speaks, and its training can be repeated."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

MODELS = Path(__file__).parents[2] / "examples" / "models"
TINY = MODELS / "tiny"
sys.path.insert(0, str(MODELS))
corpus: Any = import_module("corpus")
train_tiny: Any = import_module("train_tiny")

MAX_LOSS = 0.35
"""Nats per token; the shipped weights reach 0.29 on the text of the test."""

STORY_PROMPTS = ("Once upon a time", "The old lighthouse keeper", "Long ago,")
ANSWERS = {
    "What is a compiler?": "program",
    "What is prefill?": "prompt",
    "What is a KV cache?": "keys",
    "What does a scheduler do?": "requests",
    "What is the opposite of hot?": "cold",
}
"""A word that the answer to each question must contain."""

TOKENIZER = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
any_text = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(TINY)


@pytest.fixture(scope="module")
def fast_tokenizer() -> Any:
    return transformers.PreTrainedTokenizerFast.from_pretrained(TINY)


def greedy(model: Any, prompt: str, max_new_tokens: int = 250) -> list[int]:
    """The tokens that greedy decoding writes after `prompt`, with the stop token if it comes."""
    tokens = torch.tensor([TOKENIZER.encode(prompt).ids])
    written = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return [int(token) for token in written[0, tokens.shape[1] :]]


def as_question(text: str) -> str:
    return f"Question: {text}\nAnswer:"


def test_the_checkpoint_is_between_one_and_four_megabytes() -> None:
    assert 1e6 < sum(file.stat().st_size for file in TINY.iterdir()) < 4e6


def test_every_weight_is_found_and_none_is_left_over() -> None:
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        TINY, output_loading_info=True
    )
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert not any(loading.values())
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_the_model_groups_its_queries_and_ties_its_embeddings(model: Any) -> None:
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_generation_stops_at_the_token_that_ends_a_text(model: Any, fast_tokenizer: Any) -> None:
    end = TOKENIZER.token_to_id(corpus.END)
    assert model.generation_config.eos_token_id == fast_tokenizer.eos_token_id == end


@given(any_text)
@settings(deadline=None)
def test_the_tokenizer_gives_back_every_text(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


@given(any_text)
@settings(deadline=None)
def test_both_loaders_of_the_tokenizer_agree(fast_tokenizer: Any, text: str) -> None:
    assert fast_tokenizer(text).input_ids == TOKENIZER.encode(text).ids


def test_the_chat_template_writes_what_the_model_was_trained_on(fast_tokenizer: Any) -> None:
    turns = [("Why?", "So that."), ("Thanks!", "You are welcome.")]
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    chat = fast_tokenizer.apply_chat_template(messages, tokenize=False)
    assert chat == corpus.BEGIN + corpus.render(turns) + corpus.END


@pytest.mark.parametrize("prompt", STORY_PROMPTS)
def test_a_greedy_story_is_made_of_known_words_and_ends_on_its_own(model: Any, prompt: str) -> None:
    tokens = greedy(model, prompt)
    assert tokens[-1] == model.generation_config.eos_token_id
    words = corpus.words(TOKENIZER.decode(tokens))
    known = corpus.vocabulary()
    assert len(words) >= 30
    assert sum(word in known for word in words) > 0.9 * len(words)


@pytest.mark.parametrize("question", ANSWERS)
def test_an_answer_is_about_the_question(model: Any, question: str) -> None:
    tokens = greedy(model, as_question(question))
    assert tokens[-1] == model.generation_config.eos_token_id
    assert ANSWERS[question] in TOKENIZER.decode(tokens)


def test_the_loss_on_unseen_text_is_low(model: Any) -> None:
    assert train_tiny.held_out_loss(model, TOKENIZER, seed=12345) < MAX_LOSS


def test_the_same_seed_composes_the_same_text() -> None:
    first, second = (list(islice(corpus.documents(seed=7), 50)) for _ in range(2))
    assert first == second != list(islice(corpus.documents(seed=8), 50))


def test_every_slot_is_filled_and_every_article_fits() -> None:
    text = "\n".join(islice(corpus.documents(seed=7), 5000))
    assert not set("{}") & set(text)
    assert set(re.findall(r"\b[Aa] [aeiou]\w*|\b[Aa]n [^aeiou\W]\w*", text)) <= {"a user"}


def test_the_shipped_tokenizer_is_the_one_that_the_text_gives() -> None:
    assert train_tiny.train_tokenizer(seed=0).get_vocab() == TOKENIZER.get_vocab()


def test_training_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    outs = (tmp_path / "first", tmp_path / "second")
    script = str(MODELS / "train_tiny.py")
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    runs = [
        subprocess.Popen(
            [sys.executable, script, "--steps", "3", "--out", str(out)], env=environment
        )
        for out in outs
    ]
    assert [run.wait() for run in runs] == [0, 0]
    first, second = ({file.name: file.read_bytes() for file in out.iterdir()} for out in outs)
    assert first == second
    assert first.keys() == {file.name for file in TINY.iterdir()}
