"""Memory-layout assignment: contiguous or channels_last, chosen per tensor by an exact minimum cut.

labels       the taxonomy: what each operator does with layouts
costs        seconds under each label: a device profile, else a roofline
network      reading a graph as a problem
problem      the problem itself: two labels, shared copies
solve        its exact optimum
plan         what was decided, as data
materialise  copies in the graph, and metadata that follows
"""
