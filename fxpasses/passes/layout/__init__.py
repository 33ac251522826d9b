"""Memory-layout assignment: contiguous or channels_last, chosen per tensor by an exact minimum cut.

labels       the taxonomy: what each operator does with layouts
costs        seconds under each label: a device profile, else a roofline
network      reading a graph as a problem
problem      the problem itself: two labels, shared copies
solve        its exact optimum
opinions     which operators want what, at each copy
plan         what was decided, as data
stock        what inductor would have done by itself
materialise  copies in the graph, and metadata that follows
"""
