"""LaTeX formulas as lines of Unicode that can be read in a terminal."""

from __future__ import annotations

import re

_TABLE = """
alpha α  beta β  gamma γ  delta δ  epsilon ε  zeta ζ  eta η  theta θ  iota ι  kappa κ  lambda λ  mu μ  nu ν  xi ξ
pi π  rho ρ  sigma σ  tau τ  upsilon υ  phi φ  varphi φ  chi χ  psi ψ  omega ω  ell ℓ  Gamma Γ  Delta Δ  Theta Θ
Lambda Λ  Xi Ξ  Pi Π  Sigma Σ  Phi Φ  Psi Ψ  Omega Ω  sum ∑  prod ∏  int ∫  infty ∞  partial ∂  nabla ∇  top ᵀ
cdot ·  odot ⊙  otimes ⊗  oplus ⊕  times ×  le ≤  leq ≤  ge ≥  geq ≥  ne ≠  neq ≠  approx ≈  equiv ≡  sim ∼
propto ∝  in ∈  notin ∉  subset ⊂  cup ∪  cap ∩  setminus ∖  forall ∀  exists ∃  mid |  to →  rightarrow →
leftarrow ←  mapsto ↦  Rightarrow ⇒  langle ⟨  rangle ⟩  lfloor ⌊  rfloor ⌋  lceil ⌈  rceil ⌉  lVert ⟪  rVert ⟫
lvert |  rvert |  dots …  ldots …  cdots …
"""
_WORDS = _TABLE.split()
_SYMBOLS = {
    **dict(zip(_WORDS[::2], _WORDS[1::2], strict=True)),
    **dict.fromkeys(("left", "right", "big", "Big", "bigl", "bigr", "textstyle", "displaystyle", "limits", "!"), ""),
    **dict.fromkeys((",", ";", ":", " "), " "),
    "quad": "  ",
    "qquad": "    ",
    "|": "‖",
    "\\": "; ",
}
_RELATIONS = set("=≤≥≠≈≡∼∝∈∉⊂∪∩×·⊙⊗⊕→←↦⇒")
_LIMITS = set("∑∏∫")
_ACCENTS = {"hat": "\u0302", "bar": "\u0304", "tilde": "\u0303", "dot": "\u0307", "vec": "\u20d7", "overline": "\u0304"}
_WRAPPERS = ("mathrm", "mathbf", "mathcal", "boldsymbol", "text", "texttt", "operatorname", "mathit", "mathsf")
_BOARD = {"R": "ℝ", "N": "ℕ", "Z": "ℤ", "C": "ℂ", "E": "𝔼", "1": "𝟙"}
_SUB = str.maketrans("0123456789+-=()aehijklmnoprstuvx", "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₐₑₕᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓ")
_SUP = str.maketrans("0123456789+-=()inT", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁱⁿᵀ")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[{}^_&~]|[A-Za-z]+|\d+|\s+|.", re.DOTALL)
_MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$]+?)\$", re.DOTALL)


def readable(formula: str) -> str:
    r"""A formula on one line: ``o_i = \sum_j a_{ij} v_j`` becomes ``oᵢ = ∑ⱼ aᵢⱼ vⱼ``. Unknown commands keep their name."""
    text = _Reader(_TOKEN.findall(formula)).read()
    text = re.sub(r" *([=≤≥≠≈∈→←↦]) *", r" \1 ", text)
    text = re.sub("⟪ *| *⟫", "‖", text)
    text = re.sub(r"([([⟨]) +", r"\1", re.sub(r" +([)\]⟩,.])", r"\1", text))
    return re.sub(r"(?<=\S) {1,3}(?=\S)", " ", text).strip()


def readable_text(text: str) -> list[tuple[str, bool]]:
    """Prose with ``$...$`` in it as pieces of text; True marks a displayed equation, which stands on a line of its own."""
    pieces: list[tuple[str, bool]] = []
    line, end = "", 0
    for match in _MATH.finditer(text):
        line += text[end : match.start()]
        end = match.end()
        if match[1] is None:
            line += readable(match[2])
        else:
            pieces += [(line, False), (readable(match[1]), True)]
            line = ""
    pieces.append((line + text[end:], False))
    return [(" ".join(part.split()) if not display else part, display) for part, display in pieces if part.strip()]


class _Reader:
    """A recursive reader of LaTeX tokens."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.at = tokens, 0

    def read(self, until: str = "") -> str:
        """Everything up to the token ``until``, or to the end."""
        out = ""
        while self.at < len(self.tokens) and self.tokens[self.at] != until:
            out = out.rstrip() + self.script() if self.tokens[self.at] in ("_", "^") else out + self.item()
        self.at += 1
        return out

    def argument(self) -> str:
        """What a command or a script applies to: a group, or the next single token."""
        while self.at < len(self.tokens) and self.tokens[self.at].isspace():
            self.at += 1
        if self.at >= len(self.tokens):
            return ""
        token = self.tokens[self.at]
        if token == "{":
            self.at += 1
            return self.read("}").strip()
        if len(token) > 1 and token[0] != "\\":  # x_12 is x_1 2
            self.tokens[self.at] = token[1:]
            return token[0]
        return self.item().strip()

    def script(self) -> str:
        """A subscript or a superscript."""
        mark = self.tokens[self.at]
        self.at += 1
        inside = self.argument()
        table = _SUB if mark == "_" else _SUP
        compact = inside.replace(" ", "")
        if inside == "ᵀ":
            return inside
        if compact and all(ord(char) in table for char in compact):
            return compact.translate(table)
        plain = inside if inside.isalnum() else f"({inside})"
        follows = self.tokens[self.at] if self.at < len(self.tokens) else ""
        return mark + plain + (" " if follows[:1].isalnum() else "")  # x_a b is not x_ab

    def item(self) -> str:
        """One token and what it takes."""
        token = self.tokens[self.at]
        self.at += 1
        if token == "{":
            return self.read("}")
        if token[0] == "\\":
            return self.command(token[1:])
        if token.isspace() or token in "&~":
            return " " if token != "&" else ""
        return token

    def command(self, name: str) -> str:
        """A command with its arguments."""
        if name == "frac":
            return f"{_bracketed(self.argument())} / {_bracketed(self.argument())}"
        if name == "sqrt":
            return "√" + _bracketed(self.argument())
        if name == "mathbb":
            inside = self.argument()
            return _BOARD.get(inside, inside)
        if name in _WRAPPERS:
            return self.argument()
        if name in _ACCENTS:
            return self.argument() + _ACCENTS[name]
        symbol = _SYMBOLS.get(name, name)
        if symbol in _RELATIONS:
            return f" {symbol} "
        return symbol


def _bracketed(text: str) -> str:
    return text if re.fullmatch(r"[\w\u0300-\u036f|‖]+|[^()]*\([^()]*\)", text) and " " not in text else f"({text})"
