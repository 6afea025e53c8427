"""vLLM's plugin: MX experts, and on CPU MX linear layers, run packed; see docs/vllm.md.

``plugin`` is what vLLM imports; it imports the rest only where it puts it to use.
"""
