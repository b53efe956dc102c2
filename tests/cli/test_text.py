"""Docstrings in parts, and formulas in Unicode."""

from __future__ import annotations

import pytest

from attnlab.cli.docstrings import describe_arguments, parse
from attnlab.cli.latex import readable, readable_text

DOCSTRING = r"""A mechanism
    over two lines.

    It computes $y$:

        code()

    Args:
        dim: width, a long
            explanation.
        low, high: two at once.
        **options: those of the base.

    Raises:
        ValueError: for nonsense.
        UnsupportedError: with ``causal=True``: it cannot.

    Differs from the paper: in
    one point.
    """


def test_a_docstring_in_parts():
    doc = parse(DOCSTRING)
    assert doc.summary == "A mechanism over two lines."
    assert doc.body == ("It computes $y$:", "    code()")
    assert doc.arguments == {
        "dim": "width, a long explanation.",
        "low": "two at once.",
        "high": "two at once.",
        "**options": "those of the base.",
    }
    assert doc.errors == {"ValueError": "for nonsense.", "UnsupportedError": "with ``causal=True``: it cannot."}
    assert doc.differences == "in one point."


def test_arguments_that_are_said_elsewhere_are_a_note():
    doc = parse("A thing.\n\nArgs: those of `Base`; more.")
    assert doc.arguments == {} and doc.notes == {"Args": "those of `Base`; more."}


def test_no_docstring_has_no_parts():
    assert parse(None) == parse("") and parse(None).summary == ""


def test_the_nearest_class_says_what_an_argument_is():
    class Base:
        """Base.

        Args:
            a: old.
            b: kept.
        """

    class Derived(Base):
        """Derived.

        Args:
            a: new.
            **options: those of Base.
        """

    assert describe_arguments(Derived) == {"a": "new.", "b": "kept."}


@pytest.mark.parametrize(
    ("latex", "text"),
    [
        (r"o_i = \sum_j a_{ij} v_j", "oᵢ = ∑ⱼ aᵢⱼ vⱼ"),
        (r"q_i^\top k_j", "qᵢᵀ kⱼ"),
        (r"\frac{1}{n} x", "1 / n x"),
        (r"\frac{a + b}{c_i}", "(a + b) / cᵢ"),
        (r"e^{-s_h}", "e^(-sₕ)"),
        (r"10^{-5}", "10⁻⁵"),
        (r"\mathrm{softmax}_b(x)", "softmax_b(x)"),
        (r"x \in \mathbb{R}^{n \times d}", "x ∈ ℝ^(n × d)"),
        (r"\hat q, \bar K", "q̂, K̄"),
        (r"\sqrt{\sigma^2 + \epsilon}", "√(σ² + ε)"),
        (r"\lVert q_i \rVert_2", "‖qᵢ‖₂"),
        (r"a,\qquad b", "a,    b"),
        (r"\left(x\right) \odot \unheard", "(x) ⊙ unheard"),
        (r"x_12", "x₁2"),
    ],
)
def test_formulas_can_be_read(latex, text):
    assert " ".join(readable(latex).split()) == " ".join(text.split())


def test_displayed_equations_stand_alone():
    assert readable_text("For $x_i$,\n\n$$y = x^2$$\n\nand so on.") == [
        ("For xᵢ,", False),
        ("y = x²", True),
        ("and so on.", False),
    ]
