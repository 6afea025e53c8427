"""How checkpoints spell the names of experts and their projections."""

from __future__ import annotations

import re

SPELLINGS = {
    "gate_proj": ("gate_proj", "w1"),
    "up_proj": ("up_proj", "w3"),
    "down_proj": ("down_proj", "w2"),
    "gate_up_proj": ("gate_up_proj",),
}
"""Every spelling of a projection, by its name in transformers; ``w1``, ``w2``, ``w3`` are Mixtral's."""

BLOCKS = ("mlp", "block_sparse_moe", "feed_forward")
"""What the module that holds router and experts is called."""

ALTERNATING = ("gpt_oss",)
"""Model types in whose experts the rows of gate and up alternate."""

ALTERNATING_ROWS = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
"""Which rows of such a ``gate_up_proj`` are whose."""

_SPELLED = {
    ("mixtral", "quark"): ("mlp", 0),
    ("mixtral", "compressed-tensors"): ("block_sparse_moe", 1),
}
"""By model type and layout, where its software opens one spelling only: that of ``BLOCKS``, and which of ``SPELLINGS``.

AMD Quark has the names of Transformers' modules, the others those of the published model.
"""

_PROJECTION = "|".join(sorted({s for spellings in SPELLINGS.values() for s in spellings}, key=len, reverse=True))
_EXPERT = re.compile(rf"(?P<experts>(?:.*\.)?experts)\.(?P<index>\d+)\.(?P<projection>{_PROJECTION})$")
_FUSED = re.compile(r"(?P<experts>(?:.*\.)?experts)\.(?P<projection>gate_up_proj|down_proj)$")


def split_expert(module: str) -> tuple[str, int, str] | None:
    """``model.layers.0.mlp.experts.3.w1`` -> (``model.layers.0.mlp.experts``, 3, ``w1``); None for another module."""
    found = _EXPERT.match(module)
    return None if found is None else (found["experts"], int(found["index"]), found["projection"])


def split_fused(name: str) -> tuple[str, str] | None:
    """``model.layers.0.mlp.experts.down_proj`` -> (``model.layers.0.mlp.experts``, ``down_proj``), else None."""
    found = _FUSED.match(name)
    return None if found is None else (found["experts"], found["projection"])


def spellings(module: str) -> list[str]:
    """Every name that a module may have in a config, its own first.

    An expert's projection may be ``w1`` or ``gate_proj``, and whatever is in a block of ``BLOCKS`` may be said to be in
    another.
    """
    found = [module]
    if (expert := split_expert(module)) is not None:
        experts, index, projection = expert
        found += [f"{experts}.{index}.{s}" for group in SPELLINGS.values() if projection in group for s in group]
    for name in list(found):
        parts = name.split(".")
        for place in (i for i, part in enumerate(parts) if part in BLOCKS):
            found += [".".join((*parts[:place], block, *parts[place + 1 :])) for block in BLOCKS]
    return list(dict.fromkeys(found))


def respell(module: str, model_type: str | None, layout: str) -> str:
    """A module's name as a layout's own software wants it; most models have but one spelling."""
    if model_type is None or (model_type, layout) not in _SPELLED:
        return module
    block, choice = _SPELLED[model_type, layout]
    if (expert := split_expert(module)) is not None:
        experts, index, projection = expert
        spelled = next(group for group in SPELLINGS.values() if projection in group)
        module = f"{experts}.{index}.{spelled[min(choice, len(spelled) - 1)]}"
    return ".".join(block if part in BLOCKS else part for part in module.split("."))
