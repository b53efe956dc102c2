"""Suites: those of the package are sound, and mistakes in others are told with what was meant."""

from __future__ import annotations

import pytest

from attnlab.compare.suites import MixerChoice, Suite, TaskChoice, Timing, list_suites, load_suite, select
from attnlab.core.errors import UnknownNameError

GOOD = """
mixers = ["softmax", { name = "softmax", label = "multi_query", options = { num_kv_heads = 1 } }]
learning_rates = [1e-3, 1]
[[tasks]]
name = "recall"
options = { seq_len = 32 }
budget = { steps = 5 }
mixer_options = { softmax = { num_kv_heads = 2 } }
[timing]
lengths = [64, 128]
dim = 32
"""


def test_the_packages_suites_load():
    assert {"quick", "smoke"} <= set(list_suites())
    quick = load_suite("quick")
    assert len(quick.mixers) >= 8 and len(quick.tasks) == 3 and quick.seeds >= 2 and quick.timing is not None
    assert quick.mixers[0].name == "softmax", "the control and every comparison need it"


def test_a_file_is_read(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    suite = load_suite(path)
    assert suite.name == "mine"
    assert [mixer.label for mixer in suite.mixers] == ["softmax", "multi_query"]
    assert suite.learning_rates == (0.001, 1.0)
    assert suite.timing == Timing((64, 128), (128,), 32)
    assert suite.tasks[0].mixer_options == {"softmax": {"num_kv_heads": 2}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('softmax", {', 'sofmax", {'), r"unknown mixer 'sofmax'; did you mean 'softmax'"),
        (("num_kv_heads = 1", "kv_heads = 1"), r"mixer 'softmax' has no option 'kv_heads'; did you mean 'num_kv_heads'"),
        (('name = "recall"', 'name = "recal"'), r"unknown task 'recal'; did you mean 'recall'"),
        (("seq_len = 32", "seqlen = 32"), r"task 'recall' has no option 'seqlen'; did you mean 'seq_len'"),
        (("steps = 5", "step = 5"), r"budget of task 'recall': unknown key 'step'; did you mean 'steps'"),
        (("learning_rates", "learning_rate"), r"suite: unknown key 'learning_rate'; did you mean 'learning_rates'"),
        (("[1e-3, 1]", "[0.0]"), r"learning_rates: expected positive numbers"),
        (("[1e-3, 1]", "0.1"), r"learning_rates: expected a list of numbers, got 0.1"),
        (('label = "multi_query"', 'label = "softmax"'), r"softmax more than once; give each entry a label"),
        (("[64, 128]", "[128, 64]"), r"timing lengths: expected positive integers in rising order"),
        (("dim = 32", "dim = 33"), r"timing dim: expected a multiple of num_heads=4"),
        (("dim = 32", 'dim = "32"'), r"timing dim: expected an integer"),
        (("{ softmax = {", "{ softmx = {"), r"mixer_options of task 'recall': unknown key 'softmx'"),
        (("mixers = [", "mixers = [1, "), r"mixers: expected a name or a table with a name, got 1"),
        (("mixers = [", "mixers = ["[:-1] + '"x" #'), r"mixers: expected a list"),
        (("[timing]", "seeds = 0\n[timing]"), r"unknown key 'seeds'"),
        (("mixers =", "seeds = 0\nmixers ="), r"seeds: expected at least 1, got 0"),
        (("mixers =", "seeds = true\nmixers ="), r"seeds: expected int, got True"),
        (("mixers =", "mixers"), r"mine.toml"),
    ],
)
def test_mistakes_are_told(tmp_path, change, message):
    path = tmp_path / "mine.toml"
    assert change[0] in GOOD
    path.write_text(GOOD.replace(*change, 1))
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        load_suite(path)
    assert "mine.toml" in str(caught.value)


def test_an_unknown_suite_names_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown suite 'quik'; did you mean 'quick'"):
        load_suite("quik")


def test_parts_are_selected():
    suite = load_suite("smoke")
    chosen = select(suite, mixers=["sigmoid", "linear"], tasks=["digits", "recall"], seeds=3, learning_rates=[0.1], timing=False)
    assert [mixer.label for mixer in chosen.mixers] == ["sigmoid", "linear"]
    assert chosen.tasks == (suite.tasks[2], suite.tasks[0]), "tasks of the suite keep their options"
    assert (chosen.seeds, chosen.learning_rates, chosen.timing) == (3, (0.1,), None)
    with pytest.raises(UnknownNameError, match="unknown mixer"):
        select(suite, mixers=["sigmoyd"])


def test_options_of_a_dropped_mixer_go_with_it():
    task = TaskChoice("recall", mixer_options={"sliding_window": {"window": 8}})
    suite = Suite("s", (task,), (MixerChoice("softmax"), MixerChoice("sliding_window")))
    assert select(suite, mixers=["softmax"]).tasks[0].mixer_options == {}
