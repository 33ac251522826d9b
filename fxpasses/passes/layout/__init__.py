"""Memory-layout assignment: contiguous or channels_last, chosen per tensor by an exact minimum cut.

labels        the taxonomy: what each operator does with layouts
costs         seconds under each label: a device profile, else a roofline
convolutions  sizes and directions of a convolution, and the matrix product that one may be
prices        what reading and copying a tensor in another layout costs
network       the graph as a problem, in expressions of its sizes: roles, variables, tensors
reading       from a graph to its network
problem       the problem in numbers: two labels, shared copies
solve         its exact optimum
preferences   which operators want what, at each copy
assign        from a graph to a plan
stock         what inductor would have done by itself
edits         changes of a graph that can be taken back
copies        the operators that move a tensor to another layout
settling      what inductor is told to put into memory as planned
materialise   a plan carried out: copies in the graph, and metadata that follows
passes        the pass over graphs that are run as they are
joint         the pass inside inductor, on the joint graph
unsafe        kernels that are wrong in channels_last
eager_strides, raw_memory   whoever can see strides sees eager's
"""
