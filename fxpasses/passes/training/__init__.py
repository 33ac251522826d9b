"""What the backward pass keeps: masks read off other tensors, inputs in their own strides."""
