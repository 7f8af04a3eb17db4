"""A SentencePiece model written in its file format, ModelProto of sentencepiece_model.proto."""

import struct

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # types of pieces; GGUF has the same for tokens


def sentencepiece_model(pieces, scores, types, remove_extra_whitespaces: bool = False) -> bytes:
    """A BPE model that normalizes nothing and has no BOS or EOS. OverflowError for a score beyond float32."""
    model = bytearray()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        model += _bytes(1, _bytes(1, piece.encode()) + _float(2, score) + _number(3, kind))
    byte_fallback = list(types).count(BYTE) == 256  # the library wants all or none
    trainer = _number(3, 2) + _number(35, byte_fallback)  # model_type BPE
    normalizer = _bytes(1, b"identity") + _number(3, True) + _number(4, remove_extra_whitespaces)
    return bytes(model + _bytes(2, trainer) + _bytes(3, normalizer))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
