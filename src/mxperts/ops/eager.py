"""Whether an operation may go to its backend straight away, without PyTorch's dispatcher in between."""

from __future__ import annotations

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether nothing watches or traces these tensors: no compiler, mode, transform, subclass or gradient.

    PyTorch takes 50 microseconds and more to call an operator written in Python; a layer that decodes one token may
    take less than 200.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.jit._trace.is_tracing():
        return False
    grad = torch.is_grad_enabled()
    return all(t is None or (type(t) in _PLAIN and not (grad and t.requires_grad)) for t in tensors)
