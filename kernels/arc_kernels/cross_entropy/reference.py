"""Linear cross-entropy in plain torch: loss and gradient of h for one chunk of rows at a time.

With logits a = h W', the loss of a row is logsumexp(a) - a[label] and its gradient with respect to h is
(softmax(a) - onehot(label)) W. Backward scales the gradient of each row by one number, so forward can compute it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 28  # logits per chunk: 256 MiB


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_LD: Tensor, weight_VD: Tensor, labels_L: Tensor) -> Tensor:
        wide = torch.float64 if h_LD.dtype == torch.float64 else torch.float32
        needs_grad = ctx.needs_input_grad[0]
        num_rows, vocab_size = h_LD.shape[0], weight_VD.shape[0]
        chunk = max(1, CHUNK_BYTES // (vocab_size * wide.itemsize))
        nll_L = torch.empty(num_rows, dtype=wide, device=h_LD.device)
        grad_LD = torch.empty_like(h_LD) if needs_grad else None
        for start in range(0, num_rows, chunk):
            rows = slice(start, start + chunk)
            logits = (h_LD[rows] @ weight_VD.T).to(wide)
            label = labels_L[rows, None]
            logsumexp = torch.logsumexp(logits, dim=-1, keepdim=True)
            nll_L[rows] = (logsumexp - logits.gather(1, label)).squeeze(1)
            if grad_LD is not None:
                probs = logits.sub_(logsumexp).exp_()
                probs.scatter_add_(1, label, probs.new_full(label.shape, -1.0))
                grad_LD[rows] = probs.to(weight_VD.dtype) @ weight_VD
        if grad_LD is not None:
            ctx.save_for_backward(grad_LD)
        return nll_L

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (grad_LD,) = ctx.saved_tensors
        return (grad_LD * grads[0][:, None]).to(grad_LD.dtype), None, None


def linear_cross_entropy_reference(h_LD: Tensor, weight_VD: Tensor, labels_L: Tensor) -> Tensor:
    """See `linear_cross_entropy`."""
    return _LinearCrossEntropy.apply(h_LD, weight_VD, labels_L)
