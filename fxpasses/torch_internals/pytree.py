"""Nested containers, model outputs of transformers among them: their leaves, and the same nest of others.

Known for torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only
