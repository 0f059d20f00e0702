"""The hash that HDF5 takes of its own structures: lookup3 by Bob Jenkins, "hashlittle"."""

import struct

_ALL = 0xFFFFFFFF
_BLOCK = struct.Struct("<3I")

_MIX = ((2, 4), (0, 6), (1, 8), (2, 16), (0, 19), (1, 4))
"""Of each step the word that is turned, and by how many bits."""

_FINISH = ((1, 14), (2, 11), (0, 25), (1, 16), (2, 4), (0, 14), (1, 24))


def lookup3(data: bytes) -> int:
    """The hash of some bytes, a number of 32 bits (http://burtleburtle.net/bob/c/lookup3.c).

    >>> hex(lookup3(b"Four score and seven years ago"))
    '0x17770551'
    """
    words = [(0xDEADBEEF + len(data)) & _ALL] * 3
    if not data:
        return words[2]
    last = (len(data) - 1) // _BLOCK.size * _BLOCK.size
    for block in _BLOCK.iter_unpack(data[:last]):
        words = [(word + more) & _ALL for word, more in zip(words, block, strict=True)]
        for turned, bits in _MIX:
            # Of the three words in a circle, the one before takes another from itself.
            target, other = (turned + 1) % 3, (turned + 2) % 3
            words[target] = ((words[target] - words[turned]) & _ALL) ^ _turned(words[turned], bits)
            words[turned] = (words[turned] + words[other]) & _ALL
    block = _BLOCK.unpack(data[last:].ljust(_BLOCK.size, b"\0"))
    words = [(word + more) & _ALL for word, more in zip(words, block, strict=True)]
    for turned, bits in _FINISH:
        target = (turned + 1) % 3
        words[target] = ((words[target] ^ words[turned]) - _turned(words[turned], bits)) & _ALL
    return words[2]


def _turned(word: int, bits: int) -> int:
    return ((word << bits) | (word >> (32 - bits))) & _ALL
