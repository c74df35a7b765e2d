"""Encoders and language models against references that share nothing with the crate."""

import json
import os
import pickle
import shutil
import subprocess

import numpy as np
import pytest
import sparse24
from conftest import two_of_four

TEXTS = ["the cat sat on the mat .", "dog", "the dog ran .", "cat cat cat cat cat cat"]


def test_embeddings_are_those_of_the_reference(tiny_bert):
    encoder = sparse24.Encoder(tiny_bert.folder, device="cpu")
    embeddings = encoder.encode(TEXTS)
    assert embeddings.shape == (4, 40) and embeddings.dtype == np.float32
    assert (encoder.dimension, encoder.get_sentence_embedding_dimension(), encoder.max_tokens) == (40, 40, 24)
    expected = np.stack([tiny_bert.embedding(text) for text in TEXTS])
    np.testing.assert_allclose(embeddings, expected, atol=2e-6)
    # Of one text, of any iterable, and in batches of any size.
    np.testing.assert_array_equal(encoder.encode(TEXTS[0]), encoder.encode([TEXTS[0]])[0])
    np.testing.assert_allclose(encoder.encode(t for t in TEXTS), embeddings, atol=1e-6)
    np.testing.assert_allclose(encoder.encode(np.array(TEXTS, object), batch_size=1), embeddings, atol=1e-6)
    assert encoder.encode([]).shape == (0, 40)


@pytest.mark.parametrize("vector", [1, 8])
def test_a_pruned_encoder_is_the_reference_with_pruned_weights(tiny_bert, vector):
    encoder = sparse24.Encoder(tiny_bert.folder, f"{vector}:2:4", device=sparse24.Device("cpu", threads=1))
    pruned = lambda name, w: np.where(two_of_four(w, vector), w, 0)
    expected = np.stack([tiny_bert.embedding(text, pruned) for text in TEXTS])
    dense = np.stack([tiny_bert.embedding(text) for text in TEXTS])
    assert np.abs(expected - dense).max() > 1e-2
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=2e-6)


def test_more_texts_than_a_window_keep_their_order(tiny_bert):
    encoder = sparse24.Encoder(tiny_bert.folder, device="cpu")
    words = ["the", "cat", "sat", "on", "mat", "dog", "ran"]
    rng = np.random.default_rng(24)
    texts = [" ".join(rng.choice(words, rng.integers(1, 6))) for _ in range(4500)]
    embeddings = encoder.encode(texts)
    for i in [0, 1, 4095, 4096, 4097, 4499]:
        np.testing.assert_allclose(embeddings[i], tiny_bert.embedding(texts[i]), atol=2e-6)


def test_what_is_no_text_is_named(tiny_bert):
    encoder = sparse24.Encoder(tiny_bert.folder, device="cpu")
    with pytest.raises(TypeError, match="text 1 is no str, but int"):
        encoder.encode(["cat", 1])
    with pytest.raises(TypeError, match="text 4200 is no str, but NoneType"):
        encoder.encode(["cat"] * 4200 + [None])
    with pytest.raises(TypeError, match="bytes"):
        encoder.encode(b"cat")
    with pytest.raises(TypeError):
        encoder.encode(5)
    with pytest.raises(ValueError, match="batch_size is 0"):
        encoder.encode(["cat"], batch_size=0)
    with pytest.raises(ValueError, match="surrogates"):
        encoder.encode(["\ud800"])


def test_models_that_are_none_are_named(tiny_bert, tiny_llama, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        sparse24.Encoder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json"):
        sparse24.Encoder(tmp_path)
    with pytest.raises(ValueError, match="is of a language model, which makes no embeddings"):
        sparse24.Encoder(tiny_llama[0], device="cpu")
    with pytest.raises(ValueError, match="is of an encoder, not of a language model"):
        sparse24.Generator(tiny_bert.folder, device="cpu")
    with pytest.raises(ValueError, match='sparsity "3:4" is not none, 2:4 or V:2:4'):
        sparse24.Encoder(tiny_bert.folder, "3:4", device="cpu")
    with pytest.raises(ValueError, match="give them to sparse24.Device"):
        sparse24.Encoder(tiny_bert.folder, device=sparse24.Device("cpu"), threads=1)
    with pytest.raises(TypeError, match="dtype int8"):
        sparse24.Encoder(tiny_bert.folder, device="cpu", dtype=np.int8)


def test_activations_that_overflow_are_named_by_their_text(tiny_bert, tmp_path):
    shutil.copytree(tiny_bert.folder, tmp_path / "spoiled")
    tensors = sparse24.load_file(tiny_bert.folder / "model.safetensors")
    # The row of one word.
    tensors["embeddings.word_embeddings.weight"][6] = 3e38
    sparse24.save_file(tensors, tmp_path / "spoiled" / "model.safetensors")
    encoder = sparse24.Encoder(tmp_path / "spoiled", device="cpu")
    with pytest.raises(ValueError, match="text 2: activations are not finite in f32"):
        encoder.encode(["dog", "the dog", "the cat", "mat"])


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_an_encoder_is_pickled_as_its_folder_and_options(tiny_bert, protocol, monkeypatch):
    monkeypatch.chdir(tiny_bert.folder.parent)
    encoder = sparse24.Encoder(tiny_bert.folder.name, "8:2:4", device="cpu", threads=1)
    data = pickle.dumps(encoder, protocol)
    assert len(data) < 1000
    # Another process may be in another folder.
    monkeypatch.chdir("/")
    again = pickle.loads(data)
    np.testing.assert_array_equal(again.encode(TEXTS), encoder.encode(TEXTS))
    assert again.device.threads == 1 and "8:2:4" in repr(again)


def test_similarities_are_cosines(tiny_bert):
    encoder = sparse24.Encoder(tiny_bert.folder, device="cpu")
    a, b = RNG.standard_normal((3, 40)), RNG.standard_normal((2, 40))
    a[1] = 0
    expected = [[0 if not x.any() else x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in b] for x in a]
    np.testing.assert_allclose(encoder.similarity(a, b), expected, atol=1e-6)
    with pytest.raises(ValueError, match="have no similarity"):
        encoder.similarity(a, b[:, :3])


RNG = np.random.default_rng(24)


def greedy(model, prompt, steps):
    """Letters by torch's logits of a text, as far as it goes on so."""
    for item in model["items"]:
        ids = [int(i) for i in item["ids"]]
        logits = np.reshape(item["logits"], (len(ids), -1))
        yield ids, logits.argmax(1)


def test_generated_tokens_are_the_most_likely_ones(tiny_llama):
    folder, model = tiny_llama
    generator = sparse24.Generator(folder, device="cpu")
    assert not generator.has_chat_template and generator.max_tokens == 48
    checked = 0
    for ids, most_likely in greedy(model, None, 1):
        for length in range(1, len(ids) + 1):
            prompt = "".join(chr(97 + i) for i in ids[:length])
            generated = generator.generate(prompt, max_tokens=1)
            assert generated.tokens == [most_likely[length - 1]], prompt
            checked += 1
    assert checked > 10


def test_text_comes_in_pieces_and_may_be_ended(tiny_llama):
    generator = sparse24.Generator(tiny_llama[0], "2:4", device="cpu", threads=1)
    pieces = []
    whole = generator.generate("hello", max_tokens=9, on_text=pieces.append)
    assert (len(whole.tokens), whole.finish, whole.prompt_tokens) == (9, "max_tokens", 5)
    assert "".join(pieces) == whole.text == str(whole) and len(pieces) == 9
    assert whole.decoded == 8 and whole.decode_seconds > 0 and whole.prompt_seconds > 0
    ended = generator.generate("hello", max_tokens=9, on_text=lambda text: False)
    assert (ended.tokens, ended.finish) == (whole.tokens[:1], "stopped")
    assert generator.generate("hello", max_tokens=99).finish == "context"
    assert generator.generate("hello", max_tokens=0).text == ""

    def fails(text):
        raise KeyError(text)

    with pytest.raises(KeyError, match=whole.text[0]):
        generator.generate("hello", on_text=fails)
    again = pickle.loads(pickle.dumps(generator))
    assert again.generate("hello", max_tokens=9) == whole


def test_draws_are_a_function_of_their_seed(tiny_llama):
    generator = sparse24.Generator(tiny_llama[0], device="cpu")
    draw = lambda seed: generator.generate("a", max_tokens=20, temperature=2.0, seed=seed).tokens
    assert draw(1) == draw(1) != draw(2)
    for arguments in [{"temperature": -1.0}, {"top_p": 0.0}, {"system": "be brief"}]:
        with pytest.raises(ValueError):
            generator.generate("a", **arguments)
    with pytest.raises(ValueError, match="no tokens"):
        generator.generate("")
    with pytest.raises(OverflowError):
        generator.generate("a", max_tokens=-1)


@pytest.mark.skipif("SPARSE24_BIN" not in os.environ, reason="SPARSE24_BIN does not name the command sparse24")
def test_the_command_line_makes_the_same_embeddings(tiny_bert):
    command = [os.environ["SPARSE24_BIN"], "embed", str(tiny_bert.folder), "--sparsity", "8:2:4", "--device", "cpu"]
    lines = subprocess.run([*command, "--text", *TEXTS], check=True, capture_output=True, text=True).stdout.splitlines()
    expected = np.array([json.loads(line)["embedding"] for line in lines], np.float32)
    encoder = sparse24.Encoder(tiny_bert.folder, "8:2:4", device="cpu")
    np.testing.assert_array_equal(encoder.encode(TEXTS), expected)
