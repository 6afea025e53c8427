"""From what every module has to the rules of a config: few, exact, and in the words that all layouts share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from mxperts.checkpoint.config import layout_of
from mxperts.checkpoint.layout import Rule
from mxperts.checkpoint.names import split_expert
from mxperts.errors import ArgumentError
from mxperts.formats import Scheme

_NONE = Scheme("none")
_OUTPUT = "lm_head"
"""The output layer, which has no tensor where it shares the embedding's; unless told, other software would quantise it.
"""


def rules_of(schemes: Mapping[str, Scheme], default: Scheme | None = None) -> list[Rule]:
    """The rules that give every module its scheme.

    Args:
        schemes: by module; at least one is quantised.
        default: what ``"*"`` is to have, if any module has it; otherwise it is what most of them have.

    Returns:
        Unquantised modules by name, the output layer too if it is not among ``schemes``; then those that have another
        scheme than the default, all experts of a layer at once where they have the same; then ``"*"``. No two of the
        others speak of the same module, so that their order is of no account, which layouts do not agree on.
    """
    counts = Counter(scheme for scheme in schemes.values() if scheme != _NONE)
    if not any(module.rpartition(".")[2] == _OUTPUT for module in schemes):
        schemes = {**schemes, _OUTPUT: _NONE}
    if default is None or default not in counts:
        default = counts.most_common(1)[0][0]
    experts: dict[str, set[Scheme]] = {}
    for module, scheme in schemes.items():
        if scheme != _NONE and (expert := split_expert(module)) is not None:
            experts.setdefault(expert[0], set()).add(scheme)
    others: dict[str, Scheme] = {}
    for module, scheme in schemes.items():
        if scheme in (_NONE, default):
            continue
        expert = split_expert(module)
        # the pattern must match the experts' own name too, which is what vLLM asks for
        others[module if expert is None or len(experts[expert[0]]) > 1 else f"{expert[0]}*"] = scheme
    return [
        *(Rule(pattern=module, scheme=_NONE) for module, scheme in schemes.items() if scheme == _NONE),
        *(Rule(pattern=pattern, scheme=scheme) for pattern, scheme in others.items()),
        Rule(pattern="*", scheme=default),
    ]


def check_expressible(layout: str, modules: Iterable[Rule], model_type: str | None) -> None:
    """Check that a layout can hold a checkpoint.

    Args:
        layout: its name.
        modules: what every module has; the patterns are their names.
        model_type: of the model's config.

    Raises:
        ArgumentError: it cannot; the message names the first module that it cannot hold and says why.
    """
    for rule in modules:
        why = layout_of(layout).refuses(rule, model_type)
        if why is not None:
            raise ArgumentError(f"{rule.pattern} cannot be written in the {layout} layout: {why}")
