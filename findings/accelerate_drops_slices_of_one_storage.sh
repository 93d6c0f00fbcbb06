#!/usr/bin/env bash
# accelerate 1.15.0 with safetensors 0.8.0 and torch 2.13.0: parameters that are disjoint slices of one
# buffer are taken for copies of each other, and all but one are left out of the saved model.
#
# Expected: `Accelerator.save_model` writes every parameter of the model, or raises.
# Happens:  two linear layers, whose four parameters lie side by side in one flat buffer without any
#           overlap, are saved as one tensor; the only trace is a log line. The file loads without
#           complaint about what it holds. The same model with a storage for each parameter is saved
#           whole. (Flat buffers are what fused optimizers and FSDP's first version make of a model.)
#           Tensors are grouped by the identity of their storage, not by the bytes that they cover.
# Seen:     slices of one storage: 1 of 4 tensors; storages of their own: 4 of 4 tensors
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check \
  torch==2.13.0 accelerate==1.15.0 safetensors==0.8.0 2>/dev/null

cat > try.py <<'PY'
import logging
import sys

import accelerate
import safetensors
import torch
from safetensors.torch import load_file

logging.disable(logging.CRITICAL)
print(f"accelerate {accelerate.__version__}, safetensors {safetensors.__version__}, torch {torch.__version__}")
accelerator = accelerate.Accelerator(cpu=True)


def saved(name: str, own_storages: bool) -> str:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    buffer = torch.zeros(sum(p.numel() for p in model.parameters()))
    start = 0
    for p in model.parameters():
        piece = buffer[start : start + p.numel()].view(p.shape)
        start += p.numel()
        piece.copy_(p.detach())
        # The second is the same memory through DLPack, which makes a storage of just this piece.
        p.data = torch.from_dlpack(piece) if own_storages else piece
    accelerator.save_model(model, name)
    written = load_file(f"{name}/model.safetensors")
    return f"{len(written)} of {len(list(model.parameters()))} tensors"


slices, own = saved("slices", False), saved("own", True)
print(f"slices of one storage: {slices}; storages of their own: {own}")
sys.exit(slices != "1 of 4 tensors" or own != "4 of 4 tensors")
PY
venv/bin/python try.py
