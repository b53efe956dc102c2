"""The tasks of Long Range Arena: their data, their baselines, and what is said when data are not there."""

from __future__ import annotations

import csv
import json
import random
from functools import partial

import numpy as np
import pytest
import torch

from attnlab.tasks import create_task, reference_model
from attnlab.tasks.files import MissingDataError
from attnlab.tasks.lra import listops
from attnlab.tasks.lra.fixed import pad_right
from attnlab.tasks.lra.listops_trees import FIRST_OPERATOR, ListOpsSettings, accepted_trees, read_source, source_text
from attnlab.tasks.lra.shards import build_shards, piece_sizes

TREES = {"train_examples": 40, "eval_examples": 20}
IMAGES = {"train_examples": 2, "eval_examples": 6, "contour_length": 2}


def everything(task, split="valid"):
    (batch,) = task.eval_batches(10**6, split)
    return batch


def make_piece(number, size):
    return {"x": np.arange(size) + 1000 * number}


def test_pieces_are_made_once_and_kept(tmp_path):
    made = []

    def make(number, size):
        made.append(number)
        if len(made) == 2 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return make_piece(number, size)

    stopped: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        build_shards(make, [3, 3, 2], folder=tmp_path, facts={"seed": 1})
    pieces = build_shards(make, [3, 3, 2], folder=tmp_path, facts={"seed": 1})
    assert made == [0, 1, 1, 2] and [piece["x"].tolist() for piece in pieces] == [[0, 1, 2], [1000, 1001, 1002], [2000, 2001]]
    with pytest.raises(ValueError, match="holds a data set of other settings"):
        build_shards(make, [3], folder=tmp_path, facts={"seed": 2})
    with pytest.raises(ValueError, match="processes: expected a positive integer, got 0"):
        build_shards(make, [3], processes=0)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.slow
def test_several_processes_make_the_same_pieces():
    make = partial(listops.listops_shard, settings=ListOpsSettings(4, 5, 5, 60), seed=0)
    one, two = (build_shards(make, [20, 20, 20], processes=count) for count in (1, 2))
    assert all(np.array_equal(a["ids"], b["ids"]) for a, b in zip(one, two, strict=True))


def test_sizes_of_pieces():
    assert piece_sizes(7, 3, kept=False) == [3, 3, 1] and piece_sizes(7, 3, kept=True) == [3, 3, 3]
    assert piece_sizes(6, 3, kept=False) == [3, 3]


def test_listops_splits_do_not_share_trees():
    task = create_task("listops", **TREES)
    trees = {part: [ids for ids, _ in found] for part, found in task._examples.items()}
    assert [len(found) for found in trees.values()] == [40, 20, 20]
    assert len(set().union(*trees.values())) == 80
    batch = everything(task)
    assert batch.inputs.shape == (20, 60) and torch.equal(batch.inputs != 0, batch.mask)
    assert [bytes(row[mask].tolist()) for row, mask in zip(batch.inputs, batch.mask, strict=True)] == trees["valid"]


def test_listops_baselines_are_counted_in_training():
    task = create_task("listops", train_examples=300, eval_examples=50)
    train = task._examples["train"]
    for split in ("valid", "test"):
        batch, right, surest = everything(task, split), 0, 0
        for ids, target in zip(batch.inputs, batch.targets.tolist(), strict=True):
            values = [value for tree, value in train if tree[0] == int(ids[0])]
            counts = [values.count(value) for value in range(10)]
            best = [value for value in range(10) if counts[value] == max(counts)]
            right += target in best
            surest += best == [target]
            assert int(ids[0]) >= FIRST_OPERATOR
        assert surest / 50 - 1e-9 <= task.baselines(split)["root_operator"] <= right / 50 + 1e-9
    assert task.baselines("test")["root_operator"] > task.baselines("test")["majority"]


def test_listops_are_kept_and_published_files_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(listops, "SHARD", 30)  # kept pieces are whole
    made = create_task("listops", path=tmp_path / "kept", **TREES)
    again = create_task("listops", path=tmp_path / "kept", **TREES)
    assert made.fingerprint() == again.fingerprint() == create_task("listops", **TREES).fingerprint()
    assert json.loads((tmp_path / "kept" / "settings.json").read_text())["max_depth"] == 4
    for part, name in (("train", "train"), ("valid", "val"), ("test", "test")):
        with (tmp_path / f"basic_{name}.tsv").open("w", newline="") as stream:
            rows = csv.writer(stream, delimiter="\t")
            rows.writerow(["Source", "Target"])
            rows.writerows([source_text(ids), value] for ids, value in made._examples[part])
    read = create_task("listops", path=tmp_path)
    assert read.fingerprint() == made.fingerprint()
    (tmp_path / "basic_val.tsv").write_text("a\tb\n")
    with pytest.raises(ValueError, match="expected the columns Source and Target"):
        create_task("listops", path=tmp_path)
    assert read_source("( ( [MIN 1 ) ] )") == [11, 2, 15]


def test_more_trees_than_there_are_is_told():
    tiny = {"max_depth": 2, "max_args": 2, "min_length": 3, "max_length": 5}  # 400 trees
    assert len(create_task("listops", train_examples=200, eval_examples=20, **tiny).labels("train")) == 200
    with pytest.raises(ValueError, match="train_examples, eval_examples: expected fewer, there are about 400 such trees"):
        create_task("listops", train_examples=1000, **tiny)
    with pytest.raises(ValueError, match="min_length, max_length: expected lengths that trees have, got 4 and 7"):
        next(accepted_trees(random.Random(0), ListOpsSettings(3, 2, 4, 7), patience=100))


def test_pathfinder_is_read_as_pixels_or_patches():
    pixels, patches = (create_task("pathfinder", patch=patch, **IMAGES) for patch in (0, 2))
    ids, cut = everything(pixels), everything(patches)
    assert ids.inputs.shape == (6, 256) and cut.inputs.shape == (6, 64, 4)
    assert torch.equal(ids.targets, cut.targets) and set(ids.targets.tolist()) <= {0, 1}
    image = ids.inputs.view(6, 8, 2, 8, 2)
    assert torch.equal(cut.inputs.view(6, 8, 8, 2, 2) * 64, image.permute(0, 1, 3, 2, 4).float())
    for task in (pixels, patches):
        logits = everything(task).through(reference_model(task, "softmax", dim=8, depth=1).model)
        assert logits.shape == (6, 2)
    with pytest.raises(ValueError, match="size: expected one of"):
        create_task("pathfinder", size=20)
    with pytest.raises(ValueError, match="patch: expected 0 or a divisor of size=16, got 3"):
        create_task("pathfinder", patch=3)


def test_pathfinder_without_pillow_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r'pip install "attnlab\[images\]"'):
        create_task("pathfinder", **IMAGES).fingerprint()


def test_bytes_are_cut_and_padded():
    ids, mask = pad_right([b"ab", b"", bytes([255]) * 5], 3, shift=1)
    assert ids.tolist() == [[98, 99, 0], [0, 0, 0], [256, 256, 256]] and mask.sum(1).tolist() == [2, 0, 3]


@pytest.fixture
def reviews(tmp_path):
    for folder, texts in {"train/pos": 6, "train/neg": 5, "test/pos": 2, "test/neg": 3}.items():
        (tmp_path / folder).mkdir(parents=True)
        for number in range(texts):
            (tmp_path / folder / f"{number}_7.txt").write_bytes(f"{folder} {number} é".encode())
    return tmp_path


def test_texts_of_a_folder(reviews, monkeypatch):
    task = create_task("lra_text", path=reviews, max_length=14)
    batch = everything(task, "test")
    assert batch.targets.tolist() == [0, 0, 0, 1, 1] and torch.equal(everything(task).inputs, batch.inputs)
    first = "test/neg 0 é".encode()
    assert batch.inputs[0].tolist() == [*(byte + 1 for byte in first), 0] and int(batch.mask[0].sum()) == 13
    assert task.baselines("test") == {"chance": 0.5, "majority": 0.4}
    split = create_task("lra_text", path=reviews, held_out=0.5)
    sizes = [len(split.labels(part)) for part in ("train", "valid", "test")]
    assert sum(sizes[:2]) == 11 and sizes[1] > 0 and sizes[2] == 5
    assert split.fingerprint() != task.fingerprint()
    logits = batch.through(reference_model(task, "softmax", dim=8, depth=1).model)
    assert logits.shape == (5, 2)
    monkeypatch.setenv("ATTNLAB_DATA", str(reviews.parent))
    with pytest.raises(MissingDataError, match="'lra_text' reads data that attnlab does not fetch"):
        create_task("lra_text")


def test_pairs_of_a_file(tmp_path):
    lines = [b"1.0\tp1\tp2\tfirst text\tsecond\ttab", "0\tp3\tp4\té\tx".encode()]
    for name in ("train", "eval", "test"):
        (tmp_path / f"new_aan_pairs.{name}.tsv").write_bytes(b"\n".join(lines) + b"\n")
    task = create_task("lra_retrieval", path=tmp_path, max_length=12)
    batch = everything(task)
    assert batch.targets.tolist() == [1, 0] and batch.context is not None
    assert bytes(int(token) - 1 for token in batch.inputs[0][batch.mask[0]]) == b"first text"
    assert bytes(int(token) - 1 for token in batch.context[0][batch.context_mask[0]]) == b"second\ttab"
    logits = batch.through(reference_model(task, "softmax", dim=8, depth=1).model)
    assert logits.shape == (2, 2)
    task.loss(logits, batch).backward()
    (tmp_path / "new_aan_pairs.test.tsv").write_bytes(b"1\tonly two\n")
    with pytest.raises(ValueError, match="expected label, two identifiers and two texts"):
        create_task("lra_retrieval", path=tmp_path)
    with pytest.raises(MissingDataError, match="lra_release"):
        create_task("lra_retrieval", path=tmp_path / "nothing")


def test_pixels_of_binary_files(tmp_path):
    rng, images = np.random.default_rng(0), {}
    for name in (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"):
        images[name] = rng.integers(0, 256, (4, 3073), dtype=np.uint8)
        images[name][:, 0] %= 10
        images[name].tofile(tmp_path / name)
    task = create_task("cifar_pixels", path=tmp_path)
    assert [len(task.labels(part)) for part in ("train", "valid", "test")] == [18, 2, 4]
    batch, record = everything(task, "test"), images["test_batch.bin"][1]
    red, green, blue = (float(record[1 + channel * 1024 + 40]) for channel in range(3))
    assert int(batch.inputs[1, 40]) == int(0.2989 * red + 0.5870 * green + 0.1140 * blue)
    assert batch.targets.tolist() == images["test_batch.bin"][:, 0].tolist() and batch.inputs.shape == (4, 1024)
    assert set(task.baselines()) == {"chance", "majority"} and len(task.fingerprint()) == 64
    images["test_batch.bin"][:, :3000].copy().tofile(tmp_path / "test_batch.bin")
    with pytest.raises(ValueError, match="expected records of 3073 bytes"):
        create_task("cifar_pixels", path=tmp_path)


def test_pixels_of_png_files(tmp_path):
    image_of = pytest.importorskip("PIL.Image").fromarray
    for part in ("train", "test"):
        for label in range(10):
            (tmp_path / part / f"class{label}").mkdir(parents=True)
            image_of(np.full((32, 32, 3), label, dtype=np.uint8)).save(tmp_path / part / f"class{label}" / f"{label}.png")
    task = create_task("cifar_pixels", path=tmp_path)
    assert everything(task, "test").targets.tolist() == list(range(10))
    assert int(everything(task, "test").inputs[9].max()) in (8, 9)  # the weights add up to 0.9999


def test_pickles_are_not_read(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(b"a pickle")
    with pytest.raises(MissingDataError, match=r"data_batch_1.bin.*the pickles of the Python version are not"):
        create_task("cifar_pixels", path=tmp_path)
