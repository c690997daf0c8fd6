"""Signs of Unicode and what they are in LaTeX."""

from __future__ import annotations

import re

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙ", "0123456789+-=()n")
RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ]+")
LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙ]+")
VULGAR = {
    "½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5),
    "⅗": (3, 5), "⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅐": (1, 7), "⅛": (1, 8), "⅜": (3, 8),
    "⅝": (5, 8), "⅞": (7, 8), "⅑": (1, 9), "⅒": (1, 10),
}  # fmt: skip
SIGNS = {
    "×": r" \times ", "⋅": r" \cdot ", "·": r" \cdot ", "∙": r" \cdot ", "÷": " / ", "∕": "/",
    "⁄": "/", "≤": r" \le ", "≥": r" \ge ", "⩽": r" \le ", "⩾": r" \ge ", "≠": r" \ne ",
    "≈": r" \approx ", "±": r" \pm ", "∓": r" \mp ", "∞": r" \infty ", "π": r" \pi ",
    "√": r" \sqrt ", "∛": r" \sqrt[3] ", "∪": r" \cup ", "∩": r" \cap ", "∈": r" \in ",
    "∉": r" \notin ", "∅": r" \emptyset ", "ℝ": r" \mathbb{R} ", "ℤ": r" \mathbb{Z} ",
    "ℕ": r" \mathbb{N} ", "ℚ": r" \mathbb{Q} ", "ℂ": r" \mathbb{C} ", "°": r"^\circ ",
    "º": r"^\circ ", "′": "'", "⟨": r" \langle ", "⟩": r" \rangle ", "〈": r" \langle ",
    "〉": r" \rangle ", "⌊": r" \lfloor ", "⌋": r" \rfloor ", "⌈": r" \lceil ", "⌉": r" \rceil ",
    "…": r" \ldots ", "⋯": r" \ldots ", "∖": r" \setminus ", "α": r" \alpha ", "β": r" \beta ",
    "γ": r" \gamma ", "δ": r" \delta ", "ε": r" \epsilon ", "θ": r" \theta ", "λ": r" \lambda ",
    "μ": r" \mu ", "φ": r" \phi ", "ϕ": r" \phi ", "ω": r" \omega ", "σ": r" \sigma ",
    "τ": r" \tau ", "ρ": r" \rho ", "Δ": r" \Delta ", "Σ": r" \Sigma ", "Ω": r" \Omega ",
    "“": '"', "”": '"', "‘": "'", "’": "'", "、": ", ", "，": ", ", "；": "; ", "。": ". ",
}  # fmt: skip
UNICODE = str.maketrans(SIGNS)
