"""Generates text with a pruned model whose 2:4 linears run as sparse tensors on an NVIDIA GPU.

python examples/sparse_inference.py PRUNED "The tide comes in"
"""

import sys

import torch
from torch.sparse import to_sparse_semi_structured
from transformers import AutoModelForCausalLM, AutoTokenizer


def sparsify(model: torch.nn.Module) -> list[str]:
    """Makes each linear that is 2:4 sparse, in place, and returns their names."""
    made = []
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and not layer.in_features % 4:
            weight = layer.weight.detach()
            if (weight.view(-1, 4) != 0).sum(dim=1).max() <= 2:
                layer.weight = torch.nn.Parameter(to_sparse_semi_structured(weight), False)
                made.append(name)
    return made


if __name__ == "__main__":  # sparse kernels take fp16 and bf16, and shapes in multiples of 32 x 64
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).to("cuda")
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    print(f"{len(sparsify(model))} layers made sparse", file=sys.stderr)
    prompt = tokenizer(sys.argv[2], return_tensors="pt", return_token_type_ids=False).to("cuda")
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))
