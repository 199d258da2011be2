"""The sentence encoder against a float64 derivation on a tiny random BERT, and the real one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from delible.errors import ModelError
from delible.lm.encoder import POOLING_FILE, Encoder, SentenceEncoder, sentence_encoder

WORDS = ["the", "keeper", "of", "lighthouse", "boils", "an", "egg", "every", "morning", "?"]
TEXTS = ["the keeper of the lighthouse", "egg", "every morning the keeper boils an egg ?", "", "an"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(path)
    return path


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_vectors_are_the_normalised_mean_of_the_hidden_states(folder: Path) -> None:
    encoder = SentenceEncoder(folder, batch_size=2)
    assert isinstance(encoder, Encoder)
    vectors = encoder.encode(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), 32)

    tokenizer = BertTokenizerFast.from_pretrained(folder)
    model = BertModel.from_pretrained(folder).double().eval()
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.no_grad():  # alone, so that nothing is padded
            hidden = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        mean = hidden.numpy().mean(axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


def test_order_and_batches_do_not_matter(folder: Path) -> None:
    whole = SentenceEncoder(folder, batch_size=32).encode(TEXTS)
    parts = SentenceEncoder(folder, batch_size=1).encode(TEXTS[::-1])[::-1]
    np.testing.assert_allclose(whole, parts, atol=1e-6)
    np.testing.assert_array_equal(whole, SentenceEncoder(folder).encode(TEXTS))
    assert np.abs(whole[0] - whole[2]).max() > 0.01


def test_no_texts_give_no_rows(folder: Path) -> None:
    assert SentenceEncoder(folder).encode([]).shape == (0, 32)


def test_long_texts_are_cut_where_the_encoder_ends(folder: Path, tmp_path: Path) -> None:
    long, longer = " ".join(["egg"] * 14), " ".join(["egg"] * 400)
    np.testing.assert_allclose(*SentenceEncoder(folder).encode([long, longer]), atol=1e-6)
    short = copy_of(folder, tmp_path)
    (short / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 4}))
    same = SentenceEncoder(short).encode(["an egg every morning", "an egg"])
    np.testing.assert_allclose(same[0], same[1], atol=1e-6)


def test_identity_follows_the_weights_and_settings(folder: Path, tmp_path: Path) -> None:
    original = SentenceEncoder(folder).identity
    copy = copy_of(folder, tmp_path)
    assert SentenceEncoder(copy).identity == original
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    changed = SentenceEncoder(copy).identity
    (copy / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 4}))
    assert len({original, changed, SentenceEncoder(copy).identity}) == 3


def test_one_instance_per_folder(folder: Path) -> None:
    assert sentence_encoder(folder) is sentence_encoder(str(folder))


def test_nothing_is_read_before_it_is_needed(tmp_path: Path) -> None:
    encoder = SentenceEncoder(tmp_path / "nowhere")
    for use in (lambda: encoder.encode(["egg"]), lambda: encoder.identity):
        with pytest.raises(ModelError, match="holds no sentence encoder"):
            use()


def test_a_folder_that_cannot_be_read_is_an_error(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path)
    (copy / "config.json").write_text(json.dumps({"model_type": "no such type"}))
    with pytest.raises(ModelError, match="could be read"):
        SentenceEncoder(copy).encode(["egg"])


def test_other_pooling_is_an_error(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path)
    (copy / POOLING_FILE).parent.mkdir()
    (copy / POOLING_FILE).write_text(json.dumps({"pooling_mode_mean_tokens": False}))
    with pytest.raises(ModelError, match="does not pool by the mean"):
        SentenceEncoder(copy).encode(["egg"])


@pytest.mark.slow
def test_the_built_in_encoder_knows_a_paraphrase() -> None:
    vectors = sentence_encoder().encode(
        [
            "What is the capital of France?",
            "Which city is France's capital?",
            "How do I bake sourdough bread?",
        ]
    )
    assert vectors.shape == (3, 384)
    assert vectors[0] @ vectors[1] > 0.9
    assert vectors[0] @ vectors[2] < 0.3
