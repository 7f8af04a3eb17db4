"""How a linear map ends."""

from tinydrug.kernels.jit import inline
from tinydrug.kernels.tiles import tile_add, tile_add_vec, tile_load, tile_store
from tinydrug.kernels.vectors import load


@inline
def finish(acc, bias, onto, y, stride):
    """Add the bias (if any), then what is there already (if asked), then store: one order for every tile."""
    if bias != 0:
        acc = tile_add_vec(acc, load(bias))
    if onto:
        acc = tile_add(tile_load(acc, y, stride), acc)
    tile_store(acc, y, stride)
