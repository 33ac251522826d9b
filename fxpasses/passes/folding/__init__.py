"""Norms and affine arithmetic folded into the weights of the convolution or linear layer beside them."""
