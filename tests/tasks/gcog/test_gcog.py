from __future__ import annotations

import numpy as np
import pytest
import torch

from attnlab.tasks import create_task
from attnlab.tasks.gcog.rules import OPERATORS, Rule, Selector, encode_grid, encode_rule, evaluate, holds, num_classes, places
from attnlab.tasks.gcog.sampling import ENDINGS, Family, draw_example

SQUARE, STAR = Selector(1, 2), Selector(3, 4)


@pytest.fixture
def grid():
    """Shape 1 of colour 2 in row 1, column 2; shape 3 of colour 4 in row 3, column 0."""
    cells = np.zeros((5, 5, 2), dtype=np.int64)
    cells[1, 2], cells[3, 0] = (2, 1), (4, 3)
    return cells


def test_each_operator(grid):
    answers = {
        "exist": 0,
        "go": 2 + 5 * 2 + 1,
        "sumeven": 1,
        "sumodd": 0,
        "producteven": 0,
        "productodd": 1,
    }
    for operator, answer in answers.items():
        assert evaluate(Rule(operator, (SQUARE,)), grid) == answer
    assert evaluate(Rule("exist", (Selector(1, 3),)), grid) == 1
    assert evaluate(Rule("getcolor", (Selector(shape=3),)), grid) == 2 + 25 + 26 + 3
    assert evaluate(Rule("getshape", (Selector(colour=4),)), grid) == 2 + 25 + 2
    assert evaluate(Rule("sumeven", (SQUARE, STAR)), grid) == 0 and evaluate(Rule("producteven", (SQUARE, STAR)), grid) == 0
    assert num_classes(10) == 138


def test_a_statement_chooses_the_branch(grid):
    then, otherwise = Rule("go", (STAR,)), Rule("getcolor", (Selector(shape=1),))
    assert evaluate(Rule("exist", (SQUARE,), then, otherwise), grid) == evaluate(then, grid)
    assert evaluate(Rule("sumeven", (SQUARE,), then, otherwise), grid) == evaluate(otherwise, grid)


def test_tokens_of_a_rule_go_level_by_level():
    leaf = Rule("exist", (SQUARE,))
    middle = Rule("sumodd", (SQUARE, STAR), Rule("getshape", (Selector(colour=4),)), leaf)
    rows = encode_rule(Rule("exist", (STAR,), leaf, middle))
    assert [OPERATORS[int(row[0]) - 1] for row in rows[:-1]] == [
        "exist", "switch", "exist", "sumodd", "switch", "getshape", "exist",
    ]  # fmt: skip
    assert rows[3].tolist() == [8, 1, 2, 1, 3, 4, 1, 0] and rows[5].tolist() == [4, 1, 4, 1, 0, 0, 0, 0]
    assert rows[-1].tolist() == [0] * 7 + [1] and not rows[1, 1:].any()


def test_tokens_of_a_grid_go_row_by_row(grid):
    tokens = encode_grid(grid)
    assert tokens.shape == (26, 3) and tokens[-1].tolist() == [0, 0, 1]
    assert tokens[1 * 5 + 2].tolist() == [2, 1, 0] and (tokens != 0).sum() == 5


def test_what_cannot_be_answered_is_said(grid):
    with pytest.raises(ValueError, match="grid: expected one object for 'go'"):
        evaluate(Rule("go", (Selector(5, 5),)), grid)
    with pytest.raises(ValueError, match="operator: expected one of"):
        Rule("switch", ())
    with pytest.raises(ValueError, match="then, otherwise: expected both or none"):
        Rule("go", (SQUARE,), Rule("exist", (SQUARE,)), Rule("exist", (SQUARE,)))


@pytest.mark.parametrize(("depth", "side", "features"), [(1, 3, 3), (3, 5, 6), (5, 10, 10)])
def test_drawn_rules_have_one_answer(depth, side, features):
    rng, seen, truths = np.random.default_rng(0), set(), []
    for _ in range(150):
        rule, grid = draw_example(Family((depth,)), 4, side, features, rng)
        assert rule.depth == depth and 0 <= evaluate(rule, grid) < num_classes(side)
        seen |= {node.operator for node in rule.levels() if node is not None}
        nodes = [node for node in rule.levels() if node is not None]
        for node in nodes:
            for selector in node.selectors:
                assert len(places(grid, selector)) == 1 or (node.operator == "exist" and not len(places(grid, selector)))
        truths += [holds(node, grid) for node in nodes if node.operator == "exist"]
    assert seen == set(ENDINGS) and 0.35 < np.mean(truths) < 0.65


def test_distractors_are_as_many_as_asked():
    rng = np.random.default_rng(0)
    for count in (0, 3, 20):
        _, grid = draw_example(Family(endings=("go",)), count, 6, 10, rng)
        assert grid.any(-1).sum() == count + 1


def rules_of(task, held_out):
    return [rule for rule, _ in task._examples(300, torch.Generator().manual_seed(0), held_out)]


def test_the_systematic_split_withholds_pairs():
    task = create_task("gcog", generalization="systematic", side=6, features=10, eval_examples=20)
    (family,) = task.families(True)
    assert len(family.held_out) == 20
    for held_out in (False, True):
        for rule in rules_of(task, held_out):
            if rule.operator in ("exist", "sumeven", "producteven"):
                pair = (rule.selectors[0].shape, rule.selectors[0].colour)
                assert (pair in family.held_out) == held_out
    assert {rule.operator for rule in rules_of(task, True)} == {"exist", "sumeven", "producteven", "getshape"}
    assert {rule.operator for rule in rules_of(task, False)} == set(ENDINGS)


def test_the_tree_split_crosses_operators_and_the_productive_one_is_deeper():
    task = create_task("gcog", generalization="systematic_trees", side=5, features=6, eval_examples=20)

    def follows(rules):
        return {(rule.operator, part.operator) for rule in rules for part in (rule.then, rule.otherwise) if part is not None}

    trained, tested = rules_of(task, False), rules_of(task, True)
    assert follows(tested) and not follows(trained) & follows(tested)
    assert {rule.depth for rule in trained} == {1, 3} and {rule.depth for rule in tested} == {3}
    deep = create_task("gcog", generalization="productive", side=6, features=8, eval_examples=20)
    assert {rule.depth for rule in rules_of(deep, False)} == {1, 3} and {rule.depth for rule in rules_of(deep, True)} == {5}


@pytest.mark.parametrize("binary", [False, True])
def test_the_sequence_is_rule_and_grid(binary):
    task = create_task("gcog", generalization="systematic_trees", side=5, features=6, binary=binary, eval_examples=30)
    batch = task.examples("valid")
    assert batch.inputs.shape == (30, 5 + 26, task.model_options["patch_dim"]) and batch.mask.all()
    width = task._width(True)
    assert not batch.inputs[:, :5, width:].any() and not batch.inputs[:, 5:, :width].any()
    trained = task.draw(30, torch.Generator().manual_seed(0))
    assert not trained.mask.all() and not trained.inputs[~trained.mask].any()
    assert 0 < task.baselines()["majority"] < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 2}, "depth: expected a positive odd integer, got 2"),
        ({"generalization": "all"}, "generalization: expected one of"),
        ({"features": 11}, "features, distractors: expected 2 to 10"),
        ({"depth": 5}, "side, features: expected room for rules of depth 5, got 3 and 3"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_task("gcog", **options)
