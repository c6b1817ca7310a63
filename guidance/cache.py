"""Paged key-value cache of one auxiliary model: blocks, tables, reuse of prefixes across requests, a hard bound."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

BLOCK_SIZE = 16
"""Tokens a block holds: the unit in which memory is handed out."""

_SIBLINGS_TRIED = 8


class CacheFull(RuntimeError):
    """Every block is in use by a running request."""


@dataclass(frozen=True)
class LayerShape:
    """Key-value shape of one attention layer."""

    heads: int
    key_width: int
    value_width: int


@dataclass
class Block:
    """One block's place in the tree of known prefixes; `tokens` are those whose keys and values it holds."""

    index: int
    users: int = 0
    uid: int = -1
    parent: int = -1
    tokens: tuple[int, ...] = ()


@dataclass
class CachedSequence:
    """The cached prefix of one request: its table of block indices and how many tokens of it are valid."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0


class PagedCache:
    """Blocks for `num_blocks` x BLOCK_SIZE tokens; layout per layer [heads, block, BLOCK_SIZE, width].

    A block that no request uses keeps its contents until it is needed, so that a later request with the same
    prefix finds it. Blocks are shared between requests only when full; a partly matching one is copied.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        num_blocks: int,
        num_scratch: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.layers = tuple(layers)
        """Shapes of the layers, in order."""
        self.num_blocks = num_blocks
        self.padding = num_blocks
        """Index of one block more that no sequence ever gets: tables are padded with it."""
        self.scratch = range(num_blocks + 1, num_blocks + 1 + num_scratch)
        """Indices of the blocks that candidates are written to, a step at a time."""
        total = num_blocks + 1 + num_scratch
        # Masked columns are read and weighted with 0, and 0 · NaN is NaN: blocks begin as zeros, a block that is
        # handed out holds finite numbers only (see scrub), and padding is never written.
        self.keys = [_zeros(shape.heads, total, shape.key_width, dtype, device) for shape in layers]
        self.values = [_zeros(shape.heads, total, shape.value_width, dtype, device) for shape in layers]
        self._blocks = [Block(index) for index in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._children: dict[int, OrderedDict[tuple[int, ...], int]] = {}
        self._next_uid = 1

    @staticmethod
    def bytes_per_token(layers: Sequence[LayerShape], dtype: torch.dtype) -> int:
        """Memory that one cached token takes over all layers."""
        return sum(shape.heads * (shape.key_width + shape.value_width) for shape in layers) * dtype.itemsize

    @property
    def memory(self) -> int:
        """Bytes that all blocks take, padding and scratch included."""
        return sum(layer.numel() * layer.element_size() for layer in (*self.keys, *self.values))

    @property
    def blocks_in_use(self) -> int:
        """Blocks held by running requests."""
        return self.num_blocks - len(self._free)

    def admit(self, tokens: Sequence[int]) -> CachedSequence:
        """Starts a sequence with the longest prefix of `tokens` that is already cached, at no cost in compute."""
        sequence = CachedSequence()
        parent = 0
        while (known := self._find_full(parent, tokens, sequence.length)) is not None:
            self._acquire(known)
            sequence.blocks.append(known.index)
            sequence.length += BLOCK_SIZE
            parent = known.uid
        self._copy_partial(parent, tokens, sequence)
        return sequence

    def extend(self, sequence: CachedSequence, length: int) -> None:
        """Makes room for `length` tokens in all; raises CacheFull, leaving the sequence as it was."""
        missing = -(-length // BLOCK_SIZE) - len(sequence.blocks)
        if missing <= 0:
            return
        if missing > len(self._free):
            raise CacheFull(f"{missing} more cache blocks needed, {len(self._free)} of {self.num_blocks} are free")
        for _ in range(missing):
            sequence.blocks.append(self._take().index)

    def register(self, sequence: CachedSequence, tokens: Sequence[int]) -> None:
        """Makes the blocks that hold `tokens` (their keys and values are written) findable by later requests."""
        parent = 0
        for number, index in enumerate(sequence.blocks):
            held = tuple(tokens[number * BLOCK_SIZE : min((number + 1) * BLOCK_SIZE, sequence.length)])
            if not held:
                return
            block = self._blocks[index]
            known = self._find(parent, held)
            if known is not None:
                block = self._blocks[known]
            else:
                self._enter(block, parent, held)
            parent = block.uid

    def release(self, sequence: CachedSequence) -> None:
        """Gives the sequence's blocks back; what is registered stays findable until it is overwritten."""
        for index in reversed(sequence.blocks):
            block = self._blocks[index]
            block.users -= 1
            if block.users == 0:
                self._free[index] = None
                if not block.tokens:
                    self._free.move_to_end(index, last=False)
        sequence.blocks.clear()
        sequence.length = 0

    def scrub(self, sequence: CachedSequence) -> None:
        """Zeroes and forgets those of the sequence's blocks that hold a number that is not finite, and scratch: a step
        with fewer candidates leaves what it does not overwrite, and 0 times NaN is NaN behind any mask."""
        for index in (*sequence.blocks, *self.scratch):
            layers = [layer[:, index] for layer in (*self.keys, *self.values)]
            if not all(bool(layer.isfinite().all()) for layer in layers):
                if index not in self.scratch:
                    self._forget(self._blocks[index])
                for layer in layers:
                    layer.zero_()

    def _find_full(self, parent: int, tokens: Sequence[int], start: int) -> Block | None:
        chunk = tuple(tokens[start : start + BLOCK_SIZE])
        if len(chunk) < BLOCK_SIZE:
            return None
        index = self._find(parent, chunk)
        return None if index is None else self._blocks[index]

    def _find(self, parent: int, tokens: tuple[int, ...]) -> int | None:
        siblings = self._children.get(parent)
        return None if siblings is None else siblings.get(tokens)

    def _copy_partial(self, parent: int, tokens: Sequence[int], sequence: CachedSequence) -> None:
        wanted = tuple(tokens[sequence.length : sequence.length + BLOCK_SIZE])
        best, best_length = None, 0
        for held, index in list(reversed(self._children.get(parent, {}).items()))[:_SIBLINGS_TRIED]:
            length = _common_prefix(held, wanted)
            if length > best_length:
                best, best_length = index, length
        if best is None or not self._free:
            return
        source = self._blocks[best]
        self._acquire(source)
        try:
            if not self._free:
                return
            target = self._take().index
        finally:
            self._drop(source)
        for layer in (*self.keys, *self.values):
            layer[:, target, :best_length] = layer[:, best, :best_length]
        sequence.blocks.append(target)
        sequence.length += best_length

    def _acquire(self, block: Block) -> None:
        block.users += 1
        self._free.pop(block.index, None)

    def _drop(self, block: Block) -> None:
        block.users -= 1
        if block.users == 0:
            self._free[block.index] = None

    def _take(self) -> Block:
        index, _ = self._free.popitem(last=False)
        block = self._blocks[index]
        self._forget(block)
        block.users = 1
        return block

    def _enter(self, block: Block, parent: int, tokens: tuple[int, ...]) -> None:
        self._forget(block)
        block.uid, block.parent, block.tokens = self._next_uid, parent, tokens
        self._next_uid += 1
        self._children.setdefault(parent, OrderedDict())[tokens] = block.index

    def _forget(self, block: Block) -> None:
        siblings = self._children.get(block.parent)
        if siblings is not None and siblings.get(block.tokens) == block.index:
            del siblings[block.tokens]
            if not siblings:
                del self._children[block.parent]
        block.uid, block.parent, block.tokens = -1, -1, ()


def _zeros(heads: int, blocks: int, width: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    return torch.zeros(heads, blocks, BLOCK_SIZE, width, dtype=dtype, device=device)


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length
