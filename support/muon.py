"""The optimizer of matrices in blocks that start untrained."""

import math

import torch


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024): before momentum moves a matrix, all its singular values are brought to about 1.

    So every direction of a matrix learns at one pace, where the gradient would favour a few, and a short training gets
    further. torch.optim.Muon always multiplies in bf16, which takes seconds a step where processors cannot; this one
    does it in `dtype`, and with all matrices of one shape at a time.
    """

    def __init__(self, groups, dtype, momentum=0.95):
        super().__init__(groups, {})
        self.dtype, self.momentum = dtype, momentum

    def orthogonalise(self, x, steps=5):
        """Matrices x (n, rows, columns) with their singular values near 1, by Newton and Schulz' iteration."""
        flip = x.shape[1] > x.shape[2]
        x = (x.mT if flip else x).to(self.dtype)
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(steps):  # a quintic polynomial of each singular value; its coefficients are Jordan's
            square = x @ x.mT
            polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
            x = torch.baddbmm(x, polynomial, x, beta=3.4445)
        return (x.mT if flip else x).float()

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, parameters in shapes.items():
                gradients = [p.grad for p in parameters]
                for p in parameters:
                    if p not in self.state:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                momenta = [self.state[p]["momentum"] for p in parameters]
                torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
                ahead = torch.stack(torch._foreach_lerp(gradients, momenta, self.momentum))  # (n, rows, columns)
                size = group["lr"] * 0.2 * math.sqrt(max(shape))  # an entry moves about as far as by AdamW
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(self.orthogonalise(ahead)), alpha=-size)
