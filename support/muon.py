"""The optimizer of matrices in blocks that start untrained."""

import math

import torch


# The "Polar Express" (Amsel et al. 2025): each is the best for the interval in which the one before leaves singular
# values that were between 0.001 and 1. Three of them train as well as five steps of Jordan's one polynomial.
POLYNOMIALS = ((8.2872, -23.5959, 17.3004), (4.1071, -2.9478, 0.5448), (3.9487, -2.9089, 0.5518))


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024): before momentum moves a matrix, all its singular values are brought near 1 (0.2 to 1.9).

    So every direction of a matrix learns at one pace, where the gradient would favour a few, and a short training gets
    further. torch.optim.Muon always multiplies in bf16, which takes seconds a step where processors cannot; this one
    does it in `dtype`, and with all matrices of one shape at a time.
    """

    def __init__(self, groups, dtype, momentum=0.95):
        super().__init__(groups, {})
        self.dtype, self.momentum = dtype, momentum

    def orthogonalise(self, x):
        """Matrices x (n, rows, columns) with their singular values near 1, by products alone."""
        flip = x.shape[1] > x.shape[2]
        x = (x.mT if flip else x).to(self.dtype)
        x = x / (1.01 * x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for a, b, c in POLYNOMIALS:  # a x + b x^3 + c x^5 of each singular value
            square = x @ x.mT
            polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
            x = torch.baddbmm(x, polynomial, x, beta=a)
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
