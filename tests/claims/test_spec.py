"""Claims as data: complete, about papers that there are, with thresholds that decide."""

from __future__ import annotations

import inspect

import pytest

from attnlab.claims import Claim, Condition, Quantity, claim, claims, judge
from attnlab.claims.run import runnable
from attnlab.claims.spec import parse
from attnlab.core.errors import UnknownNameError
from attnlab.papers.catalog import paper

ROW = {
    "id": "a",
    "paper": "deltanet",
    "statement": "It works.",
    "published": "0.99",
    "how": "so",
    "budget": "seconds",
    "run": "weights:collinear",
    "number": "accuracy",
    "reproduced": [{"number": "accuracy", "at_least": 0.99}],
    "partly": [{"number": "accuracy", "at_least": 0.9, "of": "low"}],
}


def made(**changes: object) -> Claim:
    return parse({"claim": [{**ROW, **changes}]})["a"]


@pytest.mark.parametrize("name", list(claims()))
def test_a_claim_names_a_paper_and_a_function_that_takes_its_settings(name):
    subject = claim(name)
    assert paper(subject.paper).slug == subject.paper
    if subject.run:
        inspect.signature(runnable(subject.run)).bind(None, **subject.settings)


def test_settings_are_laid_over_the_shared_ones():
    shared = {"common": {"seeds": 3, "mixer": "linear"}}
    row = {**ROW, "shared": "common", "settings": {"mixer": "softmax"}}
    assert parse({"shared": shared, "claim": [row]})["a"].settings == {"seeds": 3, "mixer": "softmax"}


@pytest.mark.parametrize(
    ("mean", "low", "verdict"), [(0.99, 0.98, "reproduced"), (0.9899, 0.9, "partly"), (0.95, 0.89, "not"), (0.2, 0.1, "not")]
)
def test_the_thresholds_decide(mean, low, verdict):
    assert judge(made(), {"accuracy": Quantity(mean, low, 1.0, 3)}) == verdict


def test_bounds_from_above_and_at_the_ends_of_the_interval():
    subject = made(reproduced=[{"number": "error", "at_most": 0.1, "of": "high"}], partly=[], number="error")
    assert judge(subject, {"error": Quantity(0.05, 0.0, 0.1, 3)}) == "reproduced"
    assert judge(subject, {"error": Quantity(0.05, 0.0, 0.11, 3)}) == "not"


def test_a_verdict_needs_every_number_that_a_condition_reads():
    both = made(reproduced=[{"number": "accuracy", "at_least": 2.0}, {"number": "gap", "at_least": 0.0}])
    with pytest.raises(ValueError, match=r"gap: expected a measured number, got only \['accuracy'\]"):
        judge(both, {"accuracy": Quantity(0.5, None, None, 1)})
    with pytest.raises(ValueError, match="expected an interval, but 1 value gives none"):
        judge(made(), {"accuracy": Quantity(0.5, None, None, 1)})


def test_what_cannot_be_tested_here_says_why_and_runs_nothing():
    subject = made(run="", number="", reproduced=[], partly=[], not_testable="A thousand GPUs.")
    assert judge(subject, {}) == "not testable here"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": ""}, "expected either run or not_testable"),
        ({"not_testable": "x"}, "expected either run or not_testable"),
        ({"reproduced": []}, "expected how, budget, number and reproduced beside run"),
        ({"reproduced": [{"number": "x"}]}, "expected at_least or at_most, got neither"),
        ({"reproduced": [{"number": "x", "at_least": 1.0, "of": "middle"}]}, "of: expected one of"),
        ({"paper": "deltanett"}, "did you mean 'deltanet'"),
        ({"budgets": "x"}, "unknown key 'budgets'; did you mean 'budget'"),
        ({"shared": "x"}, "unknown shared settings 'x'"),
    ],
)
def test_what_is_incomplete_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        made(**changes)


def test_an_id_is_taken_once():
    with pytest.raises(ValueError, match="claim 'a' is there twice"):
        parse({"claim": [ROW, ROW]})


def test_an_unknown_claim_names_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'recall-mamba'"):
        claim("recall-mambo")


def test_conditions_read_as_they_decide():
    assert Condition("gap", at_least=0.05, of="low").text == "lower end of gap >= 0.05"
    assert Condition("x", at_least=1, at_most=1.000001).text == "x >= 1 and x <= 1.000001"
