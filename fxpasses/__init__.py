"""Graph passes for torch.compile, make_fx and torch.export that can be seen, counted and trusted."""
