"""The forms whose outcome is not yet what their data states, and why. Strict: a cure shows."""

from __future__ import annotations

BROKEN: dict[str, str] = {
    "CohereForAI/c4ai-command-r-plus": "a small parameter of two dimensions is taken for a matrix",
    "jhu-clsp/ettin-decoder-17m": "`get_decoder` gives its head, and no blocks are found there",
    "tencent/Hunyuan-A13B-Instruct": "its router is pruned",
    "baidu/ERNIE-4.5-21B-A3B-PT": "a small parameter of two dimensions is taken for a matrix",
    "Qwen/Qwen3-Next-80B-A3B-Instruct": "a depthwise convolution in its blocks",
    "Qwen/Qwen3.5 text (Qwen3_5ForCausalLM)": "a depthwise convolution in its blocks",
    "ibm-granite/granite-4.0-h-tiny": "a depthwise convolution in its blocks",
    "ibm-granite/granite-4.0-h-1b": "a depthwise convolution in its blocks",
    "nvidia/NVIDIA-Nemotron-Nano-9B-v2": "a depthwise convolution in its blocks",
    "LiquidAI/LFM2-350M": "a depthwise convolution in its blocks",
    "LiquidAI/LFM2-8B-A1B": "a depthwise convolution in its blocks",
    "tiiuae/Falcon-H1-0.5B-Base": "a depthwise convolution in its blocks",
    "ibm-ai-platform/Bamba-9B-v2": "a depthwise convolution in its blocks",
    "ai21labs/AI21-Jamba-1.5-Mini": "a depthwise convolution in its blocks",
    "allenai/Olmo-Hybrid-7B": "tensors that transformers puts together are not found",
    "google/recurrentgemma-2b": "`plan` accepts it",
    "mistralai/Mamba-Codestral-7B-v0.1 (mamba2)": "a depthwise convolution in its blocks",
    "state-spaces/mamba-130m-hf": "a depthwise convolution in its blocks",
    "tiiuae/falcon-mamba-7b": "a depthwise convolution in its blocks",
    "HuggingFaceTB/SmolVLM-256M-Instruct": "its forward needs the towers",
}
"""Name of a form → reason."""
