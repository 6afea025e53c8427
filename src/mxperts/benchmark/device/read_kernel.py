# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def, misc"
"""The Triton kernel that reads. Triton's types are not Python's."""

import triton
import triton.language as tl


@triton.jit
def read_kernel(words_ptr, out_ptr, WORDS: tl.constexpr, STEPS: tl.constexpr):
    """Xor of int32 words, so that no load can be left out."""
    block = tl.program_id(0).to(tl.int64)
    total = tl.zeros((WORDS,), tl.int32)
    for step in range(STEPS):
        total ^= tl.load(words_ptr + (block * STEPS + step) * WORDS + tl.arange(0, WORDS))
    tl.store(out_ptr + block, tl.xor_sum(total))
