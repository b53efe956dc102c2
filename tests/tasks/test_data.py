"""The two tasks on real data: text and digits."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import pytest
import torch

from attnlab.tasks import create_task
from attnlab.tasks.corpus import load_corpus, source_files, split_of


@pytest.fixture
def library(tmp_path):
    """A small tree of sources, with what must be left out."""
    for index in range(60):
        (tmp_path / f"m{index:02}.py").write_text(f"x = {index}\n" * 5)
    for folder in ("site-packages", "test", "pkg/__pycache__", "pkg/tests"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "left_out.py").write_text("y")
    (tmp_path / "pkg" / "inside.py").write_text("z = 1\n")
    (tmp_path / "notes.txt").write_text("no")
    return tmp_path


def test_the_corpus_is_the_sorted_sources_split_by_path(library):
    corpus = load_corpus(10**6, str(library))
    names = [path.relative_to(library).as_posix() for path in source_files(library)]
    assert names == [*(f"m{index:02}.py" for index in range(60)), "pkg/inside.py"]
    assert corpus.num_files == 61
    for split, text in corpus.splits.items():
        expected = b"".join((library / name).read_bytes() for name in names if split_of(name) == split)
        assert text.numpy().tobytes() == expected


def test_the_corpus_is_capped_and_identified(library):
    capped = load_corpus(1_800, str(library))
    assert sum(map(len, capped.splits.values())) <= 1_800 and 0 < capped.num_files < 61
    before = load_corpus(10**6, str(library)).sha256
    (library / "m00.py").write_text("x = -1\n")
    load_corpus.cache_clear()
    assert load_corpus(10**6, str(library)).sha256 != before
    with pytest.raises(ValueError, match=r"max_bytes: 10 bytes of .* leave valid, test empty"):
        load_corpus(10, str(library))


def test_splits_have_about_their_shares():
    splits = [split_of(f"package/module{index}.py") for index in range(4000)]
    for split, share in (("train", 0.8), ("valid", 0.1), ("test", 0.1)):
        assert abs(splits.count(split) / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5


def test_windows_are_the_text_and_its_continuation():
    task = create_task("stdlib_text", seq_len=50, max_bytes=1_500_000, eval_windows=10)
    text = task.corpus.splits["valid"].numpy().tobytes()
    for batch in task.eval_batches(4):
        for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
            window = bytes(inputs.tolist())
            assert window in text and window[1:] == bytes(targets.tolist()[:-1])
    assert (Path(sysconfig.get_path("stdlib")) / "abc.py").read_bytes()[:200] in b"".join(
        part.numpy().tobytes() for part in task.corpus.splits.values()
    )


def test_ngram_baselines_are_in_order_and_count_pairs():
    task = create_task("stdlib_text", max_bytes=1_500_000, eval_windows=20)
    values = task.baselines()
    assert 8.0 == values["uniform"] > values["unigram"] > values["bigram"] > 1.0
    (batch,) = task.eval_batches(20)
    train = task.corpus.splits["train"].long()
    counts = torch.bincount(train, minlength=256).double() + 1
    unigram = counts / counts.sum()
    bits = []
    for before, after in list(zip(batch.inputs.flatten().tolist(), batch.targets.flatten().tolist(), strict=True))[:40]:
        follows = train[1:][train[:-1] == before]
        bits.append(-torch.log2(((follows == after).sum() + unigram[after]) / (len(follows) + 1)))
    from attnlab.tasks.stdlib_text import _ngrams

    table = _ngrams(task.corpus.splits["train"])[1]
    found = -table[batch.inputs.flatten()[:40], batch.targets.flatten()[:40]].log2()
    torch.testing.assert_close(found, torch.stack(bits), rtol=1e-9, atol=1e-9)


def test_digits_are_cut_into_patches_row_by_row():
    one, two = create_task("digits"), create_task("digits", patch=2)
    assert one.model_options["grid"] == (8, 8) and two.model_options["grid"] == (4, 4)
    image = next(one.eval_batches(1)).inputs.view(8, 8)
    patches = next(two.eval_batches(1)).inputs.view(4, 4, 2, 2)
    for row in range(8):
        for column in range(8):
            assert patches[row // 2, column // 2, row % 2, column % 2] == image[row, column]


def test_digit_splits_do_not_overlap():
    task = create_task("digits")
    seen = {name: {hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in task._split(name)[0]} for name in task._ranges}
    assert [len(task._split(name)[1]) for name in ("train", "valid", "test")] == [1077, 360, 360]
    assert not (seen["train"] & seen["valid"] or seen["train"] & seen["test"] or seen["valid"] & seen["test"])
    with pytest.raises(ValueError, match="patch: expected 1, 2 or 4, got 3"):
        create_task("digits", patch=3)
