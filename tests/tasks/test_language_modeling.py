import multiprocessing

import pytest
import torch

from tasks import cache
from tasks.code import code
from tasks.fetch import fetch
from tasks.language_modeling import LanguageModeling
from tasks.text import text
from training.errors import UsageError

WORDS = "".join(f"line {i} of a small corpus\n" for i in range(400))
KEYS = {"source": "words", "context_length": 16, "vocab_size": 300}


def task(train=WORDS, validation=WORDS[:2000], **keys):
    keys = KEYS | {"tokenizer": "bytes", "objective": "causal"} | keys
    return LanguageModeling(lambda: [train], validation and (lambda: [validation]), **keys)


def batch(task, count=8, seed=0, split="train"):
    rows = fetch(getattr(task, split), range(count))
    return task.prepare(rows, torch.Generator().manual_seed(seed), True)


def test_windows_lie_end_to_end_and_labels_are_the_next_bytes():
    found = batch(task(), 3)
    data = WORDS.encode()
    for row in range(3):
        start = 16 * row
        assert bytes(found["input_ids"][row].tolist()) == data[start : start + 16]
        assert bytes(found["labels"][row].tolist()) == data[start + 1 : start + 17]
    assert len(task().train) == (len(data) - 1) // 16


def test_hold_out_leaves_no_window_in_both():
    found = task(validation=None)
    windows = (len(WORDS) - 1) // 16
    assert len(found.validation) == windows // 10
    assert len(found.train) + len(found.validation) == windows - 1
    last = fetch(found.train, [len(found.train) - 1])["tokens"][0]
    first = fetch(found.validation, [0])["tokens"][0]
    text_ = WORDS.encode()
    assert bytes(last.tolist()) == text_[(len(found.train) - 1) * 16 :][:17]
    assert bytes(first.tolist()) == text_[(windows - windows // 10) * 16 :][:17]


def test_masking_is_15_percent_of_which_80_10_10():
    long = WORDS * 20
    found = batch(task(long, objective="masked"), 4000)
    clean = fetch(task(long).train, range(4000))["tokens"][:, :-1].long()
    chosen = found["labels"] != -100
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.005)
    assert found["labels"][chosen].equal(clean[chosen])
    inputs = found["input_ids"]
    assert inputs[~chosen].equal(clean[~chosen])
    assert (inputs[chosen] == 256).float().mean().item() == pytest.approx(0.8, abs=0.01)
    # A random byte is the right one in 1 of 256 cases.
    kept = (inputs[chosen] == clean[chosen]).float().mean().item()
    assert kept == pytest.approx(0.1 + 0.1 / 256, abs=0.01)


def test_masking_is_a_function_of_the_generator():
    found = task(objective="masked")
    assert batch(found, seed=1)["input_ids"].equal(batch(found, seed=1)["input_ids"])
    assert not batch(found, seed=1)["input_ids"].equal(batch(found, seed=2)["input_ids"])


def test_bpe_decodes_to_the_text():
    found = task(tokenizer="bpe")
    ids = fetch(found.train, range(5))["tokens"][:, :-1].flatten().tolist()
    decoded = found.tokenizer._tokenizer.decode(ids)
    assert WORDS.startswith(decoded)
    assert found.bytes_per_token > 1.5
    assert found.dims["vocab_size"] <= 300


def test_derived_metrics():
    found = task().derived({"loss": 2.0})
    assert found["perplexity"] == pytest.approx(7.389056)
    assert found["bits_per_byte"] == pytest.approx(2.885390)


def test_cache_is_used_again_and_follows_the_content():
    task()
    built = {p: p.stat().st_mtime_ns for p in (cache.root() / "windows").iterdir()}
    task()
    assert {p: p.stat().st_mtime_ns for p in (cache.root() / "windows").iterdir()} == built
    task(WORDS.replace("small", "SMALL"))
    assert len(list((cache.root() / "windows").iterdir())) == len(built) + 1


def _length(queue):
    queue.put(len(task().train))


def test_processes_may_fill_the_cache_at_once():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_length, args=(queue,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    assert {queue.get(timeout=60) for _ in workers} == {(len(WORDS) - 1) // 16}
    for worker in workers:
        worker.join()
    assert not list((cache.root() / "windows").glob(".building-*"))


@pytest.mark.parametrize("corpus", ["", "x", "one line\n"])
def test_too_little_text_is_refused(corpus):
    with pytest.raises(UsageError, match="too little text in words"):
        task(corpus, validation=None)


def test_code_holds_out_whole_files(tmp_path):
    for i in range(200):
        (tmp_path / f"file{i}.py").write_text(f"# {i:03} " + "x = 1\n" * 10)
    found = code(path=str(tmp_path), context_length=8)
    size = 6 + 60
    files = (len(found.train) * 8 + len(found.validation) * 8) / size
    assert files == pytest.approx(200, abs=1)
    assert 0 < len(found.validation) * 8 / size < 25


def test_code_of_few_files_or_one(tmp_path):
    (tmp_path / "one.py").write_text("x = 1\n" * 100)
    for path in (tmp_path, tmp_path / "one.py"):
        found = code(path=str(path), context_length=8)
        assert (len(found.train), len(found.validation)) == (74 - 7 - 1, 7)
    with pytest.raises(UsageError, match=r"too little text in .*: 600 tokens found, 1537 needed"):
        code(path=str(tmp_path), context_length=512)
    with pytest.raises(UsageError, match="no file or folder"):
        code(path=str(tmp_path / "two"))


def test_a_saved_tokenizer_is_used_without_its_cuts(tmp_path):
    from tokenizers import Tokenizer

    trained = task(tokenizer="bpe").tokenizer._tokenizer
    trained.enable_truncation(4)
    trained.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).truncation
    found = task(tokenizer=str(tmp_path))
    ids = fetch(found.train, range(5))["tokens"][:, :-1].flatten().tolist()
    assert WORDS.startswith(found.tokenizer._tokenizer.decode(ids))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="is no tokenizer"):
        task(tokenizer=str(tmp_path))


def test_a_misspelt_tokenizer_gets_a_hint(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://localhost:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("tasks.sources.getproxies", dict)
    with pytest.raises(UsageError, match=r"cannot be reached .*did you mean 'bytes'"):
        task(tokenizer="byts")


def test_text_file(tmp_path):
    (tmp_path / "corpus.txt").write_text(WORDS)
    found = text(path=str(tmp_path / "corpus.txt"), context_length=16)
    assert bytes(batch(found, 2)["input_ids"].flatten().tolist()) == WORDS.encode()[:32]
    with pytest.raises(UsageError, match="did you mean 'text'"):
        text(path=str(tmp_path / "corpus.txt"), column="txt")
    with pytest.raises(UsageError, match=r"task\.path"):
        text(path=None)


def test_tiny_shakespeare(data):
    found = text(path=str(data / "tiny_shakespeare"), context_length=64)
    whole = (data / "tiny_shakespeare" / "train.txt").read_bytes()
    assert bytes(batch(found, 1)["input_ids"][0].tolist()) == whole[:64]
    assert len(found.train) == pytest.approx(len(whole) / 64, abs=2)
